"""Which label, tensor and axis of a spec is wrong, found by trying what would mend it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, combinations, islice, permutations, product

from torch import Tensor

from weightops.spec import Axis, WeightSpec
from weightops.tracing._probe import Probe

#: changes of each kind that are tried at most
ATTEMPTS = 200

Place = tuple[str, int]


@dataclass(frozen=True)
class Fault:
    """What is wrong, in words, and the label, tensor and axis where these are known."""

    text: str
    label: str | None = None
    tensor: str | None = None
    axis: int | None = None


@dataclass(frozen=True)
class _Change:
    """Entries that axes get instead of theirs, the labels that this concerns, and what it means."""

    labels: tuple[str, ...]
    axes: dict[Place, Axis]
    text: str


def find_fault(
    probe: Probe, spec: WeightSpec, perms: Mapping[str, Tensor], rtol: float, error: float
) -> Fault:
    """Why permuting all labels by ``perms`` changes the function, by ``error``."""
    for gradients in (False, True):
        errors = {
            label: probe.error(spec, {label: index}, gradients=gradients)
            for label, index in perms.items()
        }
        failing = [label for label in perms if errors[label] > rtol]
        if failing:
            break
    else:
        return Fault(
            f"labels {list(perms)} change nothing alone, but together change outputs or "
            f"gradients by {error:.1e} of the largest"
        )
    pairs = [
        pair for pair in combinations(failing, 2) if len({spec.labels[each] for each in pair}) == 1
    ]
    kinds: list[Iterator[_Change]] = [
        chain.from_iterable(_single(spec, label) for label in failing),
        chain.from_iterable(_exchanges(spec, *pair) for pair in pairs),
        _unions(spec, failing, pairs),
        chain.from_iterable(_moves(spec, label) for label in failing),
    ]
    for change in chain.from_iterable(islice(kind, ATTEMPTS) for kind in kinds):
        other = _changed(spec, change.axes)
        moved = {label: perms[label] for label in change.labels if label in other.labels}
        if probe.error(other, moved, gradients=gradients) <= rtol:
            tensor, axis = next(iter(change.axes))
            return Fault(
                f"label {change.labels[0]!r} changes {_what(gradients)}: {change.text}",
                change.labels[0],
                tensor,
                axis,
            )
    worst = max(failing, key=errors.__getitem__)
    where = ", ".join(f"{tensor} axis {axis}" for tensor, axis in spec.occurrences(worst))
    return Fault(
        f"label {worst!r} changes {_what(gradients)} by {errors[worst]:.1e} of the largest, and no "
        f"single change mends it; it stands on {where}",
        worst,
    )


def _what(gradients: bool) -> str:
    return "gradients, but not outputs" if gradients else "outputs"


def _changed(spec: WeightSpec, changes: Mapping[Place, Axis]) -> WeightSpec:
    axes = {
        name: tuple(changes.get((name, axis), entry) for axis, entry in enumerate(entries))
        for name, entries in spec.axes.items()
    }
    used = {label for entries in axes.values() for entry in entries for label in _factors(entry)}
    sizes = {label: size for label, size in spec.labels.items() if label in used}
    return WeightSpec(axes, spec.shapes, sizes=sizes)


def _single(spec: WeightSpec, label: str) -> Iterator[_Change]:
    """Changes of one axis, or of all that have the same product."""
    for place, entry in _without(spec, label):
        yield _Change((label,), {place: entry}, f"it does not belong on {_axis(spec, place)}")
    for place, entry in _with(spec, label):
        yield _Change((label,), {place: entry}, f"it is missing on {_axis(spec, place)}")
    alike: dict[tuple, list[Place]] = {}
    for name, axis in spec.occurrences(label):
        entry = spec.axes[name][axis]
        if isinstance(entry, tuple):
            alike.setdefault(entry, []).append((name, axis))
    for factors, places in alike.items():
        groups = [*([place] for place in places), places]
        for group, order in product(groups, permutations(factors)):
            if order != factors:
                text = f"{factors} must be {order}, on {_listed(group)}"
                yield _Change((label,), dict.fromkeys(group, order), text)


def _exchanges(spec: WeightSpec, a: str, b: str) -> Iterator[_Change]:
    """Two labels that stand in each other's place, on axes of one tensor first."""
    both = product(spec.occurrences(a), spec.occurrences(b))
    for one, other in sorted(both, key=lambda pair: pair[0][0] != pair[1][0]):
        if one != other:
            axes = {one: _renamed(spec, one, {a: b}), other: _renamed(spec, other, {b: a})}
            text = f"it stands on {_axis(spec, one)} in the place of {b!r}, on {_axis(spec, other)}"
            yield _Change((a, b), axes, text)


def _unions(
    spec: WeightSpec, failing: list[str], pairs: list[tuple[str, str]]
) -> Iterator[_Change]:
    """Labels that are one: two of them, or all of one size."""
    by_size: dict[int, list[str]] = {}
    for label in failing:
        by_size.setdefault(spec.labels[label], []).append(label)
    for kept, *others in (*pairs, *(tuple(each) for each in by_size.values() if len(each) > 2)):
        names = dict.fromkeys(others, kept)
        places = [place for other in others for place in spec.occurrences(other)]
        text = f"{' and '.join(map(repr, others))} must be the same label, on {_listed(places)}"
        yield _Change((kept,), {place: _renamed(spec, place, names) for place in places}, text)


def _moves(spec: WeightSpec, label: str) -> Iterator[_Change]:
    """The label stands on one axis instead of another one, of the same tensor first."""
    both = product(_without(spec, label), _with(spec, label))
    for (old, left), (new, entry) in sorted(both, key=lambda pair: pair[0][0][0] != pair[1][0][0]):
        if old != new:
            text = f"it belongs on {_axis(spec, new)}, not on {_axis(spec, old)}"
            yield _Change((label,), {old: left, new: entry}, text)


def _without(spec: WeightSpec, label: str) -> Iterator[tuple[Place, Axis]]:
    for place in spec.occurrences(label):
        factors = [each for each, _ in spec.factors(*place)]
        for i, each in enumerate(factors):
            if each == label:
                yield from _entries(place, [*factors[:i], None, *factors[i + 1 :]])


def _with(spec: WeightSpec, label: str) -> Iterator[tuple[Place, Axis]]:
    """Axes with a factor as long as the label or a multiple: fixed ones, other labels', multiples."""
    size = spec.labels[label]

    def places(fits: Callable[[str | None, int], bool], *new: str | None) -> Iterator:
        for name, entries in spec.axes.items():
            for axis in range(len(entries)):
                of = spec.factors(name, axis)
                factors = [each for each, _ in of]
                for i, factor in enumerate(of):
                    if fits(*factor):
                        yield from _entries((name, axis), [*factors[:i], *new, *factors[i + 1 :]])

    yield from places(lambda each, length: each is None and length == size, label)
    yield from places(lambda each, length: each not in (None, label) and length == size, label)
    for new in ((label, None), (None, label)):
        yield from places(
            lambda each, length: each is None and length > size and length % size == 0, *new
        )


def _entries(place: Place, factors: list[str | None]) -> Iterator[tuple[Place, Axis]]:
    """The axis with these factors, fixed neighbours as one; none where fixed ones stay apart."""
    kept = [
        each
        for i, each in enumerate(factors)
        if each is not None or i == 0 or factors[i - 1] is not None
    ]
    if kept.count(None) <= 1:
        yield place, kept[0] if len(kept) == 1 else tuple(kept)


def _factors(entry: Axis) -> tuple[str | None, ...]:
    return entry if isinstance(entry, tuple) else (entry,)


def _renamed(spec: WeightSpec, place: Place, names: Mapping[str, str]) -> Axis:
    entry = spec.axes[place[0]][place[1]]
    if isinstance(entry, tuple):
        return tuple(factor and names.get(factor, factor) for factor in entry)
    return entry and names.get(entry, entry)


def _axis(spec: WeightSpec, place: Place) -> str:
    name, axis = place
    entry = spec.axes[name][axis]
    return f"{name} axis {axis} ({'fixed' if entry is None else repr(entry)})"


def _listed(places: list[Place]) -> str:
    return ", ".join(f"{name} axis {axis}" for name, axis in places)
