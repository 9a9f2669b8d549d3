"""A spec's tensors as the integers that the permute kernels read.

A plan lists the labels' sizes, then the maps (every distinct way an axis is permuted: a label, or a
product of labels and fixed factors), then per tensor the size and map of each axis. Each list stands
behind its length; -1 is "fixed". Plain integers are constants to ``torch.compile`` and
``torch.export``, so the same plan serves the kernels and the traced reference.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from weightops.spec import WeightSpec

FIXED = -1


class Map(NamedTuple):
    """One way of permuting an axis: ``(label, size)`` factors, slowest first."""

    factors: tuple[tuple[int, int], ...]


class Decoded(NamedTuple):
    """A plan's integers, read back."""

    label_sizes: list[int]
    maps: list[Map]
    tensors: list[list[tuple[int, int]]]  # per tensor, per axis: size and map


def plan(spec: WeightSpec) -> list[int]:
    """The plan of ``spec``, built once and cached on it."""
    return _cached(spec, spec.digest)


def _cached(spec: WeightSpec, digest: str) -> list[int]:
    cached = spec._cache.get("permute")
    if cached is None:
        cached = spec._cache["permute"] = _build(spec)
    return cached


# To Dynamo the plan is a constant, and what guards it is the digest, which is read outside. This is what
# torch.compiler.assume_constant_result does, after importing the whole compiler (a second).
_cached._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _build(spec: WeightSpec) -> list[int]:
    number = {label: i for i, label in enumerate(spec.labels)}
    maps: dict[Map, int] = {}
    tensors: list[int] = []
    for name, shape in spec.shapes.items():
        tensors.append(len(shape))
        for axis, size in enumerate(shape):
            factors = spec.factors(name, axis)
            which = FIXED
            if any(label is not None for label, _ in factors):
                key = Map(
                    tuple((FIXED if label is None else number[label], n) for label, n in factors)
                )
                which = maps.setdefault(key, len(maps))
            tensors += [size, which]
    code = [len(number), *spec.labels.values(), len(maps)]
    for each in maps:
        code.append(len(each.factors))
        code += [value for factor in each.factors for value in factor]
    return [*code, len(spec.shapes), *tensors]


def decode(code: Sequence[int]) -> Decoded:
    """Read a plan's integers back, as the compiled kernels do."""
    values = iter(code)

    def pairs() -> Iterator[tuple[int, int]]:
        for _ in range(next(values)):
            yield next(values), next(values)

    label_sizes = [next(values) for _ in range(next(values))]
    maps = [Map(tuple(pairs())) for _ in range(next(values))]
    tensors = [list(pairs()) for _ in range(next(values))]
    return Decoded(label_sizes, maps, tensors)
