"""The basis of the equivariant maps between two weight spaces (arXiv 2402.05232, section 3.2).

Every set partition of the axes of an output and an input tensor whose blocks hold one label each is
one map, a *term*: a block of several input axes reads that diagonal; a block of input axes only is
averaged; a block with both is an index that is kept; a block of output axes only is broadcast, on the
diagonal where it has several. Terms are numbered as in the paper's code: by output tensor, then by
input tensor, then by partition.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import lru_cache
from itertools import product
from math import prod
from string import ascii_letters
from typing import NamedTuple

from weightops.spec import WeightSpec

Label = Hashable
Block = tuple[int, ...]  # axes of one tensor that share an index


class Axis(NamedTuple):
    label: Label
    size: int
    stride: int  # in positions of the flat layout


class Part(NamedTuple):
    """A tensor, or the slice of one at one position of its fixed axes."""

    name: str
    fixed: tuple[int, ...]
    offset: int
    axes: tuple[Axis, ...]

    @property
    def labels(self) -> tuple[Label, ...]:
        return tuple(axis.label for axis in self.axes)

    def __str__(self) -> str:
        return self.name + "".join(f"({i})" for i in self.fixed)


class Term(NamedTuple):
    """One basis map; ``str(term)`` reads like an einsum.

    An index on both sides is kept, one of the input only is averaged, one of the output only is
    broadcast; an index that stands twice on a side is a diagonal.
    """

    input: str
    output: str
    input_axes: tuple[Label, ...]
    output_axes: tuple[Label, ...]
    input_indices: str
    output_indices: str

    @property
    def kept(self) -> tuple[Label, ...]:
        """Labels of the indices that are kept."""
        found = dict(zip(self.input_indices, self.input_axes, strict=True))
        return tuple(label for index, label in found.items() if index in self.output_indices)

    def __str__(self) -> str:
        return f"{self.input}[{self.input_indices}] -> {self.output}[{self.output_indices}]"


FIXED = ("permute", "channel", "index")


def parts(spec: WeightSpec, fixed: str, side: str = "") -> list[Part]:
    """The tensors of ``spec`` as labelled axes; ``side`` keeps fixed axes of two specs apart."""
    found = []
    for name, shape in spec.shapes.items():
        atoms: list[Axis] = []
        stride = prod(shape)
        for axis in range(len(shape)):
            for factor, (label, size) in enumerate(spec.factors(name, axis)):
                stride = stride // size if size else 0
                key = (side, name, axis, factor) if label is None else label
                atoms.append(Axis(key, size, stride))
        offset = spec.offsets[name]
        if fixed == "permute":
            found.append(Part(name, (), offset, tuple(atoms)))
            continue
        held = [a for a in atoms if isinstance(a.label, tuple)]
        free = tuple(a for a in atoms if not isinstance(a.label, tuple))
        for at in product(*(range(a.size) for a in held)):
            shift = sum(i * a.stride for i, a in zip(at, held, strict=True))
            found.append(Part(name, at, offset + shift, free))
    return found


def _partitions(items: tuple[int, ...]) -> Iterator[list[Block]]:
    if len(items) <= 1:
        yield [items] if items else []
        return
    first, rest = items[:1], items[1:]
    for smaller in _partitions(rest):
        for n, block in enumerate(smaller):
            yield [*smaller[:n], first + block, *smaller[n + 1 :]]
        yield [first, *smaller]


@lru_cache(maxsize=4096)
def partitions(pattern: tuple[int, ...]) -> tuple[tuple[Block, ...], ...]:
    """Set partitions of ``range(len(pattern))`` whose blocks hold equal entries of ``pattern`` only."""
    groups: dict[int, tuple[int, ...]] = {}
    for position, label in enumerate(pattern):
        groups[label] = (*groups.get(label, ()), position)
    return tuple(
        tuple(block for blocks in choice for block in blocks)
        for choice in product(*(tuple(_partitions(group)) for group in groups.values()))
    )


def pattern_of(labels: Sequence[Label]) -> tuple[int, ...]:
    """Labels numbered by first appearance."""
    number: dict[Label, int] = {}
    return tuple(number.setdefault(label, len(number)) for label in labels)


class Match(NamedTuple):
    """One partition, as the blocks of each side: kept pairs, averaged and broadcast blocks."""

    kept: tuple[tuple[Block, Block], ...]  # (output axes, input axes), by first output axis
    averaged: tuple[Block, ...]
    broadcast: tuple[Block, ...]


@lru_cache(maxsize=4096)
def matches(pattern: tuple[int, ...], rank_out: int) -> tuple[Match, ...]:
    """The partitions of output axes followed by input axes, in the paper's order."""
    found = []
    for partition in partitions(pattern):
        kept, averaged, broadcast = [], [], []
        for block in partition:
            out = tuple(a for a in block if a < rank_out)
            into = tuple(a - rank_out for a in block if a >= rank_out)
            if out and into:
                kept.append((out, into))
            elif into:
                averaged.append(into)
            else:
                broadcast.append(out)
        found.append(Match(tuple(sorted(kept)), tuple(sorted(averaged)), tuple(sorted(broadcast))))
    return tuple(found)


def pair(output: Part, input: Part) -> tuple[Match, ...]:
    """All terms from ``input`` to ``output``, in the paper's order."""
    return matches(pattern_of(output.labels + input.labels), len(output.axes))


def term(output: Part, input: Part, match: Match) -> Term:
    """The readable form of one term."""
    letter = iter(ascii_letters)
    into, out = [""] * len(input.axes), [""] * len(output.axes)
    for blocks in (
        *match.kept,
        *(((), b) for b in match.averaged),
        *((b, ()) for b in match.broadcast),
    ):
        index = next(letter)
        for axis in blocks[0]:
            out[axis] = index
        for axis in blocks[1]:
            into[axis] = index
    return Term(str(input), str(output), input.labels, output.labels, "".join(into), "".join(out))


def _within_a_tensor(term: Term) -> bool:
    return term.input == term.output


def _message_passing(term: Term) -> bool:
    return bool(term.kept) or term.input == term.output


#: names of common choices of terms
SELECTIONS: dict[str, Callable[[Term], bool] | None] = {
    "full": None,
    "local": _within_a_tensor,
    "mpnn": _message_passing,
}
