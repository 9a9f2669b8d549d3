"""A plan's integers read back, with the parts of each side renumbered to lie one after another."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import prod
from typing import NamedTuple

import torch

Operand = tuple[int, tuple[int, ...]]  # node, and its dimension for each dimension of the type


class Part(NamedTuple):
    """A labelled tensor of one side, and where it starts when parts lie one after another."""

    offset: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    start: int


class Node(NamedTuple):
    """A diagonal (``parent`` -1), its axis a lying along dimension ``which[a]``; or a mean of one."""

    part: int
    parent: int
    dropped: int
    which: tuple[int, ...]
    sizes: tuple[int, ...]


class Side(NamedTuple):
    parts: tuple[Part, ...]
    nodes: tuple[Node, ...]
    wholes: tuple[int, ...]  # per part the node that is all of it
    scalars: tuple[int, ...]  # per part the node that is its mean, -1 where there is none
    diagonals: tuple[int, ...]  # nodes without parent that are not all of their part
    mean: bool
    ordered: bool  # whether parts lie one after another in the flat layout too


class Type(NamedTuple):
    sizes: tuple[int, ...]
    readers: tuple[Operand, ...]
    writers: tuple[Operand, ...]
    start: int  # of its terms in ``Decoded.order``


class Decoded(NamedTuple):
    inputs: Side
    outputs: Side
    types: tuple[Type, ...]  # those with both readers and writers
    order: tuple[int, ...]  # terms by type, reader and writer; num_terms where there is none
    inverse: tuple[int, ...]  # where each term stands in ``order``
    numel_in: int
    numel_out: int
    num_terms: int


class _Cursor:
    def __init__(self, code: Sequence[int]) -> None:
        self.code, self.at = code, 0

    def one(self) -> int:
        self.at += 1
        return self.code[self.at - 1]

    def many(self, n: int) -> tuple[int, ...]:
        self.at += n
        return tuple(self.code[self.at - n : self.at])


def _side(cursor: _Cursor, mean: bool) -> Side:
    parts: list[Part] = []
    start, ordered = 0, True
    for _ in range(cursor.one()):
        offset, rank = cursor.many(2)
        pairs = cursor.many(2 * rank)
        sizes, strides = pairs[::2], pairs[1::2]
        dense = all(strides[a] == prod(sizes[a + 1 :]) for a in range(rank) if sizes[a] > 1)
        ordered = ordered and offset == start and (dense or 0 in sizes)
        parts.append(Part(offset, sizes, strides, start))
        start += prod(sizes)
    nodes: list[Node] = []
    whole_of: list[bool] = []
    wholes, scalars = [-1] * len(parts), [-1] * len(parts)
    diagonals: list[int] = []
    for number in range(cursor.one()):
        part, parent, dropped = cursor.many(3)
        sizes = parts[part].sizes
        which: tuple[int, ...] = ()
        if parent >= 0:
            above = nodes[parent].sizes
            sizes = (*above[:dropped], *above[dropped + 1 :])
            whole_of.append(whole_of[parent])
        else:
            which = cursor.many(len(sizes))
            whole_of.append(which == tuple(range(len(sizes))))
            if whole_of[-1]:
                wholes[part] = number
            else:
                sizes = tuple(sizes[which.index(d)] for d in range(max(which) + 1))
                diagonals.append(number)
        if not sizes and whole_of[-1]:
            scalars[part] = number
        nodes.append(Node(part, parent, dropped, which, sizes))
    return Side(
        tuple(parts),
        tuple(nodes),
        tuple(wholes),
        tuple(scalars),
        tuple(diagonals),
        mean,
        ordered,
    )


def _decode(code: Sequence[int]) -> Decoded:
    cursor = _Cursor(code)
    numel_in, numel_out, num_terms, mean = cursor.many(4)
    inputs, outputs = _side(cursor, bool(mean)), _side(cursor, False)
    types: list[Type] = []
    order: list[int] = []
    for _ in range(cursor.one()):
        rank = cursor.one()
        sizes = cursor.many(rank)
        r, w = cursor.many(2)
        operands = [(cursor.one(), cursor.many(rank)) for _ in range(r + w)]
        table = cursor.many(r * w)
        if table:
            types.append(Type(sizes, tuple(operands[:r]), tuple(operands[r:]), len(order)))
            order += [num_terms if t < 0 else t for t in table]
    inverse = [-1] * num_terms
    for place, number in enumerate(order):
        if number < num_terms:
            inverse[number] = place
    return Decoded(
        inputs, outputs, tuple(types), tuple(order), tuple(inverse), numel_in, numel_out, num_terms
    )


_remembered = lru_cache(maxsize=256)(_decode)


def decode(code: Sequence[int]) -> Decoded:
    """Read a plan's integers back, as the compiled kernels do."""
    return _remembered(tuple(code))


# What a list of integers says is a constant, which Dynamo need not trace.
decode._dynamo_marked_constant = True  # type: ignore[attr-defined]


def layout(side: Side, device: torch.device) -> torch.Tensor:
    """``[P]``: where each weight, parts laid one after another, lies in the flat layout."""
    grids = [_grid(part.offset, part.sizes, part.strides, device) for part in side.parts]
    return torch.cat(grids)


def _grid(
    start: int, sizes: Sequence[int], steps: Sequence[int], device: torch.device
) -> torch.Tensor:
    grid = torch.full((1,), start, dtype=torch.int64, device=device)
    for size, step in zip(sizes, steps, strict=True):
        grid = (grid[:, None] + step * torch.arange(size, device=device)).flatten()
    return grid
