"""Networks of one architecture and different widths: padding, and matching of the units they share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

from torch import Tensor

from weightops import _check
from weightops._parts import parse
from weightops.align._arguments import check_names, check_spec
from weightops.align.matching import match
from weightops.spec import WeightSpec


@dataclass(frozen=True)
class PartialMatch:
    """What :func:`match_partial` found; N networks against one reference.

    Attributes:
        units: label -> int64 ``[N, n]``, n the smaller of the two sizes: for each unit of the network
            with fewer, the unit of the one with more that it corresponds to, each at most once. Where
            the sizes are equal, for each unit of the reference that of ``flat``.
        objective: ``[N]`` float64, the inner product with the reference over corresponding weights.
        spec: the layout that has the larger size of each label.
        perms: label -> int64 ``[N, size]``; they bring ``flat``, widened to ``spec``, to the reference,
            widened alike.
    """

    units: dict[str, Tensor]
    objective: Tensor
    spec: WeightSpec
    perms: dict[str, Tensor]


def widen(spec: WeightSpec, flat: Tensor, *, sizes: Mapping[str, int]) -> tuple[WeightSpec, Tensor]:
    """Append units whose weights are zero.

    No unit reads from the new ones, so the function stays as it was, except where a layer normalises
    over a widened axis or divides by its length (layer norm, the scale of attention). New entries of
    ``running_var`` are one, which batch norm can divide by.

    Args:
        spec: axes and layout of one network.
        flat: networks ``[N, P]``.
        sizes: label -> its new size, at least the old one; other labels stay as they are.

    Returns:
        The wider spec, with the same tensors (parts are renamed as they move) and labels, and the
        networks ``[N, P']`` in its layout; differentiable.

    Raises:
        ValueError: a label is not the spec's or would shrink; shapes do not fit.
        TypeError: an argument has the wrong type or dtype.
    """
    check_spec("widen", spec)
    spec.check_flat("widen", flat, dims=2)
    if not isinstance(sizes, Mapping):
        raise TypeError(f"widen: sizes must map labels, not {_check.describe(sizes)}")
    for label, size in sizes.items():
        if label not in spec.labels:
            raise ValueError(f"widen: sizes has label {label!r}, the spec has {list(spec.labels)}")
        _check.count("widen", f"sizes[{label!r}]", size, spec.labels[label])
    wider = _resized(spec, sizes, unverified=spec.unverified)
    return wider, _padded(spec, flat, wider, variance=1.0)


def match_partial(
    spec: WeightSpec,
    reference: Tensor,
    other_spec: WeightSpec,
    flat: Tensor,
    *,
    seed: int = 0,
    tensors: Sequence[str] | None = None,
    max_sweeps: int = 100,
) -> PartialMatch:
    """Match networks to a reference of other widths, by :func:`match` on networks padded with zeros.

    Padded units score nothing, so the units left without a counterpart are those of least gain. Either
    side may have more units, label by label.

    Args:
        spec: axes and layout of the reference.
        reference: the network ``[P]``.
        other_spec: axes and layout of ``flat``'s networks: the same tensors, save for the bounds of
            parts, and the same labels.
        flat: networks ``[N, P']``, of the same floating dtype.
        seed: of the order in which labels are visited.
        tensors: names in ``spec`` that count in the objective, as for :func:`match`.
        max_sweeps: give up after so many sweeps over the labels.

    Raises:
        ValueError: the specs differ in more than the sizes of labels; shapes, devices or names do not
            fit, or a weight is not finite.
        TypeError: an argument has the wrong type or dtype.
    """
    where = "match_partial"
    check_spec(where, spec)
    check_spec(where, other_spec, "other_spec")
    ours, theirs = spec.labels, other_spec.labels
    sizes = {label: max(size, theirs[label]) for label, size in ours.items() if label in theirs}
    wider = _resized(spec, sizes)
    _check_correspondence(where, wider, _resized(other_spec, sizes))
    spec.check_flat(where, reference, "reference", dims=1)
    other_spec.check_flat(where, flat, dims=2)
    _check.floating(where, "reference", reference)
    if flat.dtype != reference.dtype:
        raise TypeError(f"{where}: flat is {flat.dtype}, but reference is {reference.dtype}")
    _check.same_device(where, "flat", flat, "reference", reference)
    _check.finite(where, "reference", reference)
    _check.finite(where, "flat", flat)
    names = dict(zip(spec.shapes, wider.shapes, strict=True))
    if tensors is not None:
        check_names(where, tensors, spec)
    _check.seed(where, seed)
    _check.count(where, "max_sweeps", max_sweeps)

    found = match(
        wider,
        _padded(spec, reference[None], wider)[0],
        _padded(other_spec, flat, wider),
        seed=seed,
        tensors=None if tensors is None else [names[name] for name in tensors],
        max_sweeps=max_sweeps,
    )
    units = {}
    for label, index in found.perms.items():
        # Place i takes unit index[i] of the wider network, so unit j goes to place argsort(index)[j].
        larger = ours[label] > theirs[label]
        units[label] = index.argsort(-1)[:, : theirs[label]] if larger else index[:, : ours[label]]
    return PartialMatch(units, found.objective, wider, found.perms)


def _resized(spec: WeightSpec, sizes: Mapping[str, int], *, unverified: bool = False) -> WeightSpec:
    """The spec with other sizes of labels: the same tensors in the same order."""
    labels = {**spec.labels, **sizes}
    shapes = {
        name: [
            prod(
                size if label is None else labels[label] for label, size in spec.factors(name, axis)
            )
            for axis in range(len(shape))
        ]
        for name, shape in spec.shapes.items()
    }
    names = _renamed_parts(shapes)
    return WeightSpec(
        {names[name]: axes for name, axes in spec.axes.items()},
        {names[name]: shape for name, shape in shapes.items()},
        sizes=labels,
        unverified=unverified,
    )


def _renamed_parts(shapes: Mapping[str, Sequence[int]]) -> dict[str, str]:
    """Name -> the name whose slices fit the new shape, behind parts that changed in length."""
    slices = {name: parse(name)[1] or () for name in shapes}
    cuts: dict[tuple[str, int], dict[int, int]] = {}
    bounds = [
        (each.start, each.stop, parse(name)[0], axis, shapes[name][axis])
        for name, index in slices.items()
        for axis, each in enumerate(index)
        if each.stop is not None
    ]
    for start, stop, tensor, axis, length in sorted(bounds):
        moved = cuts.setdefault((tensor, axis), {0: 0})
        moved[stop] = moved[start] + length
    renamed = {}
    for name, index in slices.items():
        tensor = parse(name)[0]
        texts = [
            ":"
            if each.stop is None
            else "{}:{}".format(*(cuts[tensor, axis][at] for at in (each.start, each.stop)))
            for axis, each in enumerate(index)
        ]
        renamed[name] = f"{tensor}[{', '.join(texts)}]" if texts else name
    return renamed


def _padded(spec: WeightSpec, flat: Tensor, wider: WeightSpec, *, variance: float = 0.0) -> Tensor:
    """The networks in ``wider``'s layout; new entries are zero, those of running variances ``variance``."""
    padded = flat.new_zeros(len(flat), wider.numel)
    target = wider.unflatten(padded)
    renamed = zip(spec.shapes, _resized(spec, wider.labels).shapes, strict=True)
    narrow = spec.unflatten(flat)
    for name, new in renamed:
        wide = target[new]
        if parse(name)[0].endswith("running_var"):
            wide.fill_(variance)
        corner = wide.view(len(flat), *(size for _, size in _factors(wider, new)))
        for dim, (_, size) in enumerate(_factors(spec, name), 1):
            corner = corner.narrow(dim, 0, size)
        corner.copy_(narrow[name].reshape(corner.shape))
    return padded


def _factors(spec: WeightSpec, name: str) -> list[tuple[str | None, int]]:
    return [each for axis in range(len(spec.shapes[name])) for each in spec.factors(name, axis)]


def _check_correspondence(where: str, spec: WeightSpec, other: WeightSpec) -> None:
    """Raise unless the specs, brought to equal sizes, are the same but for the tensors' order."""
    for name in (*spec.shapes, *other.shapes):
        for side, each in (("spec", spec), ("other_spec", other)):
            if name not in each.shapes:
                raise ValueError(f"{where}: {side} has no tensor {name!r}, which the other one has")
    for name, axes in spec.axes.items():
        if axes != other.axes[name]:
            raise ValueError(
                f"{where}: {name} has axes {axes} in spec, but {other.axes[name]} in other_spec"
            )
        for axis, (ours, theirs) in enumerate(
            zip(spec.shapes[name], other.shapes[name], strict=True)
        ):
            if ours != theirs:
                raise ValueError(
                    f"{where}: {name} axis {axis} has length {ours} in spec, but {theirs} in "
                    "other_spec, with labels of equal sizes"
                )
