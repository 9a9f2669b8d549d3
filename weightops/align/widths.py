"""Networks of one architecture and different widths: padding, and matching of the units they share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

from torch import Tensor

from weightops import _check
from weightops.align._arguments import check_spec
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
        The wider spec, with the same tensors and labels, and the networks ``[N, P']`` in its layout;
        differentiable.

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
    wider = _resized(spec, sizes)
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
        other_spec: axes and layout of ``flat``'s networks: the same tensors and labels.
        flat: networks ``[N, P']``, of the same floating dtype.
        seed: of the order in which labels are visited.
        tensors: names that count in the objective, as for :func:`match`.
        max_sweeps: give up after so many sweeps over the labels.

    Raises:
        ValueError: the specs differ in more than the sizes of labels; shapes, devices or names do not
            fit, or a weight is not finite.
        TypeError: an argument has the wrong type or dtype.
    """
    where = "match_partial"
    check_spec(where, spec)
    check_spec(where, other_spec)
    _check_correspondence(where, spec, other_spec)
    spec.check_flat(where, reference, "reference", dims=1)
    other_spec.check_flat(where, flat, dims=2)
    _check.floating(where, "reference", reference)
    if flat.dtype != reference.dtype:
        raise TypeError(f"{where}: flat is {flat.dtype}, but reference is {reference.dtype}")
    _check.same_device(where, "flat", flat, "reference", reference)
    _check.finite(where, "reference", reference)
    _check.finite(where, "flat", flat)

    ours, theirs = spec.labels, other_spec.labels
    wider = _resized(spec, {label: max(ours[label], theirs[label]) for label in ours})
    found = match(
        wider,
        _padded(spec, reference[None], wider)[0],
        _padded(other_spec, flat, wider),
        seed=seed,
        tensors=tensors,
        max_sweeps=max_sweeps,
    )
    units = {}
    for label, index in found.perms.items():
        # Place i takes unit index[i] of the wider network, so unit j goes to place argsort(index)[j].
        larger = ours[label] > theirs[label]
        units[label] = index.argsort(-1)[:, : theirs[label]] if larger else index[:, : ours[label]]
    return PartialMatch(units, found.objective, wider, found.perms)


def _resized(spec: WeightSpec, sizes: Mapping[str, int]) -> WeightSpec:
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
    return WeightSpec(spec.axes, shapes, sizes=labels)


def _padded(spec: WeightSpec, flat: Tensor, wider: WeightSpec, *, variance: float = 0.0) -> Tensor:
    """The networks in ``wider``'s layout; new entries are zero, those of running variances ``variance``."""
    padded = flat.new_zeros(len(flat), wider.numel)
    narrow = spec.unflatten(flat)
    for name, wide in wider.unflatten(padded).items():
        if name.split("[", 1)[0].endswith("running_var"):
            wide.fill_(variance)
        factors = [
            each for axis in range(len(wider.axes[name])) for each in wider.factors(name, axis)
        ]
        old = [each for axis in range(len(spec.axes[name])) for each in spec.factors(name, axis)]
        corner = wide.view(len(flat), *(size for _, size in factors))
        for dim, (_, size) in enumerate(old, 1):
            corner = corner.narrow(dim, 0, size)
        corner.copy_(narrow[name].reshape(corner.shape))
    return padded


def _check_correspondence(where: str, spec: WeightSpec, other: WeightSpec) -> None:
    for name in (*spec.shapes, *other.shapes):
        for side, each in (("spec", spec), ("other_spec", other)):
            if name not in each.shapes:
                raise ValueError(f"{where}: {side} has no tensor {name!r}, which the other one has")
    for name, axes in spec.axes.items():
        if axes != other.axes[name]:
            raise ValueError(
                f"{where}: {name} has axes {axes} in spec, but {other.axes[name]} in other_spec"
            )
        for axis in range(len(axes)):
            pairs = zip(spec.factors(name, axis), other.factors(name, axis), strict=True)
            for (label, size), (_, theirs) in pairs:
                if label is None and size != theirs:
                    raise ValueError(
                        f"{where}: {name} axis {axis} has {size} fixed entries in spec, "
                        f"but {theirs} in other_spec"
                    )
