"""The walk's labels as a WeightSpec: parts of tensors, products with one fixed factor, names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise, product
from math import prod
from typing import Any, TypeAlias

from torch import nn

from weightops import _check
from weightops.population._compile import PROGRAM, compile_or_reason
from weightops.spec import Axis as Entry
from weightops.spec import WeightSpec
from weightops.tracing import (  # noqa: F401  (they register their rules)
    rules_joins,
    rules_layers,
    rules_lookups,
    rules_sequences,
    rules_slices,
    rules_views,
)
from weightops.tracing.export import decompose, export, read_weights
from weightops.tracing.labels import Axis, Labels
from weightops.tracing.names import name_labels
from weightops.tracing.rules import Axes, Stack, replace
from weightops.tracing.walk import Decisions, Walk

#: an axis as the spec writes it: (label's atom, or ``None`` if fixed; size), slowest first
Factors: TypeAlias = tuple[tuple[int | None, int], ...]
#: the bounds of a part of a tensor, and its axes
Block: TypeAlias = tuple[tuple[tuple[int, int], ...], Axes]


@dataclass(frozen=True)
class Part:
    """A tensor, or a rectangular part of one, whose axes are products.

    Attributes:
        tensor: the name in the state dict.
        shape: of all the tensor.
        bounds: per axis where the part starts and stops.
        factors: per axis its factors.
        reasons: per axis why (one of) its fixed factors is fixed; ``None`` without one.
    """

    tensor: str
    shape: tuple[int, ...]
    bounds: tuple[tuple[int, int], ...]
    factors: tuple[Factors, ...]
    reasons: tuple[str | None, ...]

    @property
    def name(self) -> str:
        """As the spec writes it: ``"w"``, ``"w[0:64]"``, ``"w[:, 64:96]"``."""
        return self.tensor + self.slices(len(self.shape))

    def slices(self, axes: int) -> str:
        """Where the part lies on the first ``axes`` axes, empty if it is all of them."""
        listed = [
            ":" if bound == (0, length) else f"{bound[0]}:{bound[1]}"
            for bound, length in zip(self.bounds[:axes], self.shape, strict=False)
        ]
        while listed and listed[-1] == ":":
            listed.pop()
        return f"[{', '.join(listed)}]" if listed else ""


@dataclass(frozen=True)
class Derivation:
    """A spec with what it was made of.

    Attributes:
        spec: the spec.
        parts: its tensors, in order.
        origins: label -> the part and axis that it is named after.
        unknown: op without a rule -> how many nodes it has.
    """

    spec: WeightSpec
    parts: tuple[Part, ...]
    origins: Mapping[str, tuple[Part, int]]
    unknown: Mapping[str, int]


def trace(model: nn.Module, *example_inputs: Any, **kwargs: Any) -> WeightSpec:
    """Derive which axes of a model's weights permute together.

    The model is exported in eval mode (``torch.export``), every axis of every tensor in the graph
    gets a label, and each op ties labels together, refines them or fixes them. Inputs, outputs,
    constants, kernels and what an op that is not known reads are fixed. Axes that are concatenated
    or split become parts of tensors (:class:`weightops.WeightSpec`), views that split an axis make
    products of labels. Labels are named after the first module whose output axis carries them.

    The spec is a claim from the ops' rules, marked ``unverified`` until :func:`weightops.verify` has
    proven it on the model.

    Args:
        model: the architecture, on any device (meta too); neither its weights nor its mode change.
        example_inputs: what its ``forward`` takes. Sizes matter, values do not.
        kwargs: further inputs of ``forward`` by name.

    Returns:
        A spec of all floating tensors of the state dict in its order, tied ones once.

    Raises:
        ValueError: ``torch.export`` fails; names the module and line that it failed at.
        TypeError: ``model`` is no module.

    Source: weight-space symmetries as in Ainsworth et al., "Git Re-Basin", arXiv 2209.04836, derived
    instead of written by hand.
    """
    return derive("trace", model, example_inputs, kwargs).spec


def derive(
    where: str, model: nn.Module, inputs: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Derivation:
    """Walk the exported graph until every axis that is a stack was seen as one."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{where}: model must be a module, not {_check.describe(model)}")
    weights = read_weights(model)
    exported = export(where, model, inputs, kwargs)
    program = decompose(exported)
    decisions: Decisions = {}
    while True:
        known = {key: set(bounds) for key, bounds in decisions.items()}
        walk = Walk(program, weights, decisions)
        if decisions == known:
            break
    _settle(walk.labels, walk.weights)
    parts = tuple(
        part
        for name, shape in weights.shapes.items()
        for part in _parts(walk.labels, name, shape, walk.weights[name])
    )
    names, origins = name_labels(model, parts)
    factors = [factor for part in parts for axis in part.factors for factor in axis]
    spec = WeightSpec(
        {part.name: [_entry(axis, names) for axis in part.factors] for part in parts},
        {part.name: [stop - start for start, stop in part.bounds] for part in parts},
        sizes={names[atom]: size for atom, size in factors if atom is not None},
        unverified=True,
    )
    spec._cache[PROGRAM] = compile_or_reason(exported, model, weights.names)
    return Derivation(spec, parts, origins, walk.unknown)


def _entry(factors: Factors, names: Mapping[int, str]) -> Entry:
    entry = tuple(None if atom is None else names[atom] for atom, _ in factors)
    return entry if len(entry) > 1 else entry[0] if entry else None


def _factors(labels: Labels, axis: Axis) -> Factors | None:
    """A product as the spec has it, neighbouring fixed factors as one; ``None`` if it is none."""
    found: list[tuple[int | None, int]] = []
    for atom in labels.atoms(axis):
        if labels.is_fixed((atom,)):
            found.append((None, labels.size(atom)))
        elif labels.is_sum(atom):
            parts = [_factors(labels, segment) for segment in labels.segments((atom,))]
            if parts[0] is None or any(part != parts[0] for part in parts):
                return None
            found += [(None, len(parts)), *parts[0]]
        else:
            found.append((atom, labels.size(atom)))
    merged: list[tuple[int | None, int]] = []
    for fixed, group in groupby(found, lambda factor: factor[0] is None):
        listed = list(group)
        merged += [(None, prod(size for _, size in listed))] if fixed else listed
    return tuple(merged)


def _segments(labels: Labels, axis: Axis) -> list[Axis]:
    """The consecutive parts of an axis; one if all carry the same labels."""
    if _factors(labels, axis) is not None:
        return [labels.atoms(axis)]
    segments = labels.segments(axis)
    merged: list[Axis] = []
    for fixed, group in groupby(segments, labels.is_fixed):
        listed = list(group)
        merged += [labels.join(listed)] if fixed and len(listed) > 1 else listed
    return merged


def _all_axes(weights: Iterable[Axes | Stack]) -> Iterator[Axis]:
    for value in weights:
        for part in value.parts if isinstance(value, Stack) else (value,):
            yield from part


def _settle(labels: Labels, weights: Mapping[str, Axes | Stack]) -> None:
    """Fix or tie what a spec can't express, until it can express all."""
    _fix_unread(labels, weights)
    changed = True
    while changed:
        changed = False
        for axis in _all_axes(weights.values()):
            for segment in _segments(labels, axis):
                factors = _factors(labels, segment)
                if factors is None:
                    _tie_inner_sums(labels, segment)
                    changed = True
                elif sum(atom is None for atom, _ in factors) > 1:
                    _close_gap(labels, factors)
                    changed = True


def _fix_unread(labels: Labels, weights: Mapping[str, Axes | Stack]) -> None:
    """A part of a tensor that carries no label of another tensor is one that nothing reads."""
    segments = [labels.segments(axis) for axis in _all_axes(weights.values())]
    count = Counter(atom for each in segments for segment in each for atom in segment)
    for each in segments:
        for segment in each if len(each) > 1 else ():
            if all(count[atom] == 1 for atom in segment):
                labels.fix(segment, "a part that nothing reads")


def _tie_inner_sums(labels: Labels, segment: Axis) -> None:
    """Parts inside a product can't be tensors of their own: they share labels, or are fixed."""
    for atom in labels.atoms(segment):
        if labels.is_sum(atom) and _factors(labels, (atom,)) is None:
            first, *others = labels.segments((atom,))
            for each in (first, *others):
                _tie_inner_sums(labels, each)
            if all(labels.length(first) == labels.length(other) for other in others):
                for other in others:
                    labels.unite(first, other)
            if _factors(labels, (atom,)) is None:
                labels.fix((atom,), "unequal parts inside a product")


def _close_gap(labels: Labels, factors: Factors) -> None:
    """Fix the smallest run of labels that stands between two fixed factors."""
    fixed = [position for position, (atom, _) in enumerate(factors) if atom is None]
    gaps = [factors[start + 1 : stop] for start, stop in pairwise(fixed)]
    gap = min(gaps, key=lambda each: prod(size for _, size in each))
    for atom, _ in gap:
        assert atom is not None
        labels.fix((atom,), "between two fixed factors of one axis")


def _parts(labels: Labels, name: str, shape: Sequence[int], value: Axes | Stack) -> Iterator[Part]:
    for bounds, axes in (
        _stack_blocks(labels, value) if isinstance(value, Stack) else _blocks(labels, value)
    ):
        factors = [_factors(labels, axis) or () for axis in axes]
        yield Part(
            name,
            tuple(shape),
            bounds,
            tuple(factors),
            tuple(
                None
                if all(atom is not None for atom, _ in each)
                else str(labels.reason(axis) or "parts with the same labels")
                for axis, each in zip(axes, factors, strict=True)
            ),
        )


def _stack_blocks(labels: Labels, stack: Stack) -> Iterator[Block]:
    """As :func:`_blocks`, segment by segment, unless all of them carry the same labels."""
    first, dim = stack.parts[0], stack.dim
    columns = zip(*(replace(axes, dim) for axes in stack.parts), strict=True)
    if all(
        (known := _factors(labels, column[0])) is not None
        and all(_factors(labels, axis) == known for axis in column)
        for column in columns
    ):
        joined = labels.join([axes[dim] for axes in stack.parts])
        yield from _blocks(labels, replace(first, dim, joined))
        return
    offset = 0
    for axes in stack.parts:
        yield from _blocks(labels, axes, dim, offset)
        offset += labels.length(labels.atoms(axes[dim]))


def _blocks(labels: Labels, axes: Axes, dim: int = 0, offset: int = 0) -> Iterator[Block]:
    """Every combination of the segments of the axes, with its bounds; ``dim`` begins at ``offset``."""
    choices = []
    for position, axis in enumerate(axes):
        segments = _segments(labels, axis)
        lengths = [labels.length(labels.atoms(segment)) for segment in segments]
        bounds = pairwise(accumulate(lengths, initial=offset if position == dim else 0))
        choices.append(list(zip(bounds, segments, strict=True)))
    for chosen in product(*choices):
        yield tuple(bound for bound, _ in chosen), tuple(segment for _, segment in chosen)
