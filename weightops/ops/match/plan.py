"""Where a spec's labels stand in a network, as the integers that the matching kernels read.

A plan lists the labels' sizes, then the ranges of numbers in tensors without labels, then per label its
places (:class:`Place`). Each list stands behind its length; -1 is "fixed".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from math import prod
from typing import NamedTuple

from weightops.spec import WeightSpec

FIXED = -1


class Factor(NamedTuple):
    label: int
    size: int
    stride: int


class Place(NamedTuple):
    """A label's units in one tensor: unit ``u`` begins ``u * stride`` numbers behind ``offset``.

    It holds ``run`` numbers that follow each other at every combination of the other factors.
    """

    offset: int
    stride: int
    run: int
    counts: int  # the objective takes one place of each tensor
    tensor: int
    others: tuple[Factor, ...]


class Decoded(NamedTuple):
    """A plan's integers, read back."""

    sizes: list[int]
    fixed: list[tuple[int, int]]
    places: list[list[Place]]  # per label


def plan(spec: WeightSpec, counted: Sequence[str], copies: int) -> list[int]:
    """The plan of ``copies`` networks side by side, ``[copies * P]``, which are permuted alike.

    ``counted`` are the tensors that the objective sums over. Cached on the spec.
    """
    key = ("match", tuple(counted), copies)
    if key not in spec._cache:
        spec._cache[key] = _build(spec, counted, copies)  # type: ignore[index]
    return spec._cache[key]  # type: ignore[index]


def _build(spec: WeightSpec, counted: Sequence[str], copies: int) -> list[int]:
    number = {label: i for i, label in enumerate(spec.labels)}
    fixed: list[tuple[int, int]] = []
    places: list[list[Place]] = [[] for _ in number]
    for t, name in enumerate(spec.shapes):
        offset, numel = spec.offsets[name], prod(spec.shapes[name])
        if name not in counted or numel == 0:
            continue
        factors = _factors(spec, name, number, copies)
        labelled = [i for i, factor in enumerate(factors) if factor.label != FIXED]
        if not labelled:
            starts = [offset + copy * spec.numel for copy in range(copies)]
            fixed += [(start, start + numel) for start in starts]
        for i in labelled:
            others = factors[:i] + factors[i + 1 :]
            run = 1
            if others and others[-1].label == FIXED and others[-1].stride == 1:
                run = others.pop().size
            own = factors[i]
            places[own.label].append(
                Place(offset, own.stride, run, int(i == labelled[0]), t, tuple(others))
            )
    code = [len(number), *spec.labels.values(), len(fixed)]
    code += [value for pair in fixed for value in pair]
    for each in places:
        code.append(len(each))
        for place in each:
            code += [*place[:-1], len(place.others)]
            code += [value for factor in place.others for value in factor]
    return code


def _factors(spec: WeightSpec, name: str, number: dict[str, int], copies: int) -> list[Factor]:
    """A tensor's factors, slowest first; fixed ones that follow each other are one."""
    pairs = [
        (FIXED if label is None else number[label], size)
        for axis in range(len(spec.shapes[name]))
        for label, size in spec.factors(name, axis)
    ]
    merged: list[tuple[int, int]] = []
    for label, size in pairs:
        if label == FIXED and merged and merged[-1][0] == FIXED:
            merged[-1] = (FIXED, merged[-1][1] * size)
        elif label != FIXED or size != 1:
            merged.append((label, size))
    *strides, _ = [*accumulate((size for _, size in reversed(merged)), int.__mul__, initial=1)]
    factors = [
        Factor(label, size, stride)
        for (label, size), stride in zip(merged, reversed(strides), strict=True)
    ]
    return factors if copies == 1 else [Factor(FIXED, copies, spec.numel), *factors]


def decode(code: Sequence[int]) -> Decoded:
    """Read a plan's integers back, as the compiled kernel does."""
    values = iter(code)

    def many(count: int) -> list[int]:
        return [next(values) for _ in range(count)]

    def read_places() -> Iterator[Place]:
        for _ in range(next(values)):
            offset, stride, run, counts, tensor, others = many(6)
            factors = tuple(Factor(*many(3)) for _ in range(others))
            yield Place(offset, stride, run, counts, tensor, factors)

    sizes = many(next(values))
    fixed = [(next(values), next(values)) for _ in range(next(values))]
    return Decoded(sizes, fixed, [list(read_places()) for _ in sizes])
