"""What the GPU kernels of an equivariant layer read: where every operand lies, and who does which tile.

A layer is four launches, whatever the number of tensors: two that sum (out of the features, then out
of sums), one that mixes into the parts which are broadcast, one that mixes into whole tensors and
adds to each everything that is broadcast to it. ``triton.py`` has the kernels; a *row* is one position's
channels, and all offsets and strides are in rows of one sample.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import combinations
from math import prod
from typing import NamedTuple

import numpy as np
import torch

from weightops.ops.equivariant.decode import Decoded, Operand, Side, decode

MOST_DIMENSIONS = 6
HEAD = 10  # entries in front of the sizes of a step of `mix`
OUTER_HEAD = 4
ROWS = 64  # rows of a tile of whole tensors, and of a step of `outer`
PART_ROWS = 32
_PROGRAMS = 512  # that share a type's parameter gradient at least, where its rows allow
_CHUNK = 1 << 20  # rows of one of them at most, which keeps its counter within 32 bits


class Facts(NamedTuple):
    """What is to be known of a plan before its tables are made."""

    numel_in: int
    numel_out: int
    num_biases: int
    rank: int
    rows: int  # of one sample's features, sums or parts, at most


class Room(NamedTuple):
    """Where a node's rows lie: in the features themselves, or among what was summed or mixed."""

    whole: bool
    offset: int
    strides: tuple[int, ...]


class Launch(NamedTuple):
    table: torch.Tensor  # int32
    items: torch.Tensor  # int32, one row a program
    rank: int
    extra: int = 0


class Sums(NamedTuple):
    launches: tuple[Launch, Launch]  # out of features, out of sums
    rows: int


class Layer(NamedTuple):
    sums: Sums
    parts: Launch
    wholes: Launch
    columns: tuple[int, int]  # of a tile, of either
    mixed_rows: int


class Gradient(NamedTuple):
    reads: Sums
    writes: Sums
    outer: Launch
    columns: int
    blocks: int  # of partial sums
    terms: torch.Tensor  # int32 [T, 3]: first block, distance to the next, their number


def lanes(channels: int) -> int:
    """Channels of one operand, padded to a power of two."""
    return 1 << (channels - 1).bit_length()


def _dense(sizes: Sequence[int]) -> tuple[int, ...]:
    return tuple(prod(sizes[d + 1 :]) for d in range(len(sizes)))


def _chain(side: Side, number: int) -> tuple[int, list[int]]:
    """The diagonal that a node comes from, and which of its dimensions the node keeps."""
    node = side.nodes[number]
    if node.parent < 0:
        return number, list(range(len(node.sizes)))
    root, kept = _chain(side, node.parent)
    return root, kept[: node.dropped] + kept[node.dropped + 1 :]


def _root_room(side: Side, number: int) -> Room:
    node = side.nodes[number]
    part = side.parts[node.part]
    strides = [0] * len(node.sizes)
    for axis, dim in enumerate(node.which):
        strides[dim] += part.strides[axis]
    return Room(True, part.offset, tuple(strides))


def _count(sizes: Iterable[int]) -> int:
    return prod(max(1, size) for size in sizes)


def _front(values: Sequence[int], rank: int, fill: int) -> list[int]:
    return [fill] * (rank - len(values)) + list(values)


def _device(values: object, device: torch.device) -> torch.Tensor:
    found = np.asarray(values, dtype=np.int64)
    if found.size and (found.max() >= 2**31 or found.min() < -(2**31)):
        raise OverflowError("equivariant: a table's entry does not fit 32 bits")
    return torch.from_numpy(found.astype(np.int32)).to(device)


def _tiles(lengths: Sequence[int], samples: int, block: int) -> np.ndarray:
    """``[n, 3]``: record, sample and position at which each tile of ``block`` rows begins."""
    found = [np.zeros((0, 3), np.int64)]
    for number, length in enumerate(lengths):
        starts = np.arange(0, samples * length, block, dtype=np.int64)
        found.append(np.stack([np.full_like(starts, number), *divmod(starts, max(1, length))], 1))
    return np.concatenate(found)


class _Reading:
    """One side's rows as they are read, and the two launches that make the sums among them.

    A node that lacks several dimensions is summed out of the one that lacks its first, which is its
    longest: so what the second launch reads is small.
    """

    def __init__(self, side: Side, needed: Iterable[int], means: bool) -> None:
        self.side = side
        self.rooms: dict[int, Room] = {}
        self.records: tuple[list, list] = ([], [])
        # What the gradients of biases need lies first, one after another.
        self._first = {n: row for row, n in enumerate(side.scalars)} if means else {}
        self.rows = len(self._first)
        for number in self._first:
            self._sum(number, copy=True)
        for number in sorted(set(needed)):
            self._sum(number)

    def _sum(self, number: int, copy: bool = False) -> None:
        """Make a room for a node; ``copy`` a tensor that has no dimensions among the sums, too."""
        side, node = self.side, self.side.nodes[number]
        if number in self.rooms:
            return
        if node.parent < 0:
            self.rooms[number] = _root_room(side, number)
            if not copy:
                return
        room = Room(False, self._first.get(number, self.rows), _dense(node.sizes))
        if node.parent >= 0:
            self.rooms[number] = room
        if number not in self._first:
            self.rows += prod(node.sizes)
        first, above = number, node.parent
        while above >= 0 and side.nodes[above].parent >= 0:
            first, above = above, side.nodes[above].parent
        root, kept = _chain(side, number)
        if first == number:
            source, held = _root_room(side, root), list(range(len(side.nodes[root].sizes)))
        else:
            self._sum(first)
            source, held = self.rooms[first], _chain(side, first)[1]
        sizes = side.nodes[root].sizes
        over = [dim for dim in held if dim not in kept]
        strides = dict(zip(held, source.strides, strict=True))
        count = _count(sizes[dim] for dim in over) if side.mean else 1
        self.records[first != number].append(
            (
                (prod(node.sizes), room.offset, prod(sizes[d] for d in over), count, source.offset),
                ([sizes[d] for d in kept], [strides[d] for d in kept]),
                ([sizes[d] for d in over], [strides[d] for d in over]),
            )
        )

    def sums(self, samples: int, channels: int, device: torch.device) -> Sums:
        return Sums(
            (
                self._launch(self.records[0], samples, channels, device),
                self._launch(self.records[1], samples, channels, device),
            ),
            self.rows,
        )

    @staticmethod
    def _launch(records: list, samples: int, channels: int, device: torch.device) -> Launch:
        rank = max((len(kept[0]) for _, kept, _ in records), default=0)
        dropped = max((len(over[0]) for _, _, over in records), default=0)
        table = [
            [value for group in groups for value in group]
            for groups in (
                (
                    head,
                    *(_front(kept[i], rank, 1 - i) for i in (0, 1)),
                    *(_front(over[i], dropped, 1 - i) for i in (0, 1)),
                )
                for head, kept, over in records
            )
        ]
        items = _tiles([head[0] for head, _, _ in records], samples, pool_block(channels)[0])
        return Launch(_device(table, device), _device(items, device), rank, dropped)


def pool_block(channels: int) -> tuple[int, int, int]:
    """Sums, rows added to each at a time, and channels of a tile of ``pool``."""
    width = min(64, lanes(channels))
    sums = max(2, 64 // width)
    # Few channels have an address each, where more share one: half the elements take its registers.
    return sums, (4096 if width >= 16 else 2048) // (sums * width), width


class _Step(NamedTuple):
    sizes: tuple[int, ...]
    readers: tuple[Operand, ...]
    writers: tuple[Operand, ...]
    table: tuple[tuple[int, ...], ...]


def _steps(plan: Decoded, transpose: bool) -> list[_Step]:
    """The types. Of a transposed layer readers of one node become one writer, so that nothing is
    written twice; how they differed becomes a difference of what is read."""
    found = []
    for each in plan.types:
        width = len(each.writers)
        terms = plan.order[each.start : each.start + len(each.readers) * width]
        numbers = [-1 if t == plan.num_terms else t for t in terms]
        table = [numbers[i : i + width] for i in range(0, len(numbers), width)]
        readers, writers = list(each.readers), list(each.writers)
        if transpose:
            own = dict(reversed(readers))  # of each node the first
            places = {operand: w for w, operand in enumerate(own.items())}
            entries: dict[tuple[Operand, int], int] = {}
            for (node, dims), row in zip(each.readers, table, strict=True):
                back = [dims.index(d) for d in own[node]]
                for (above, places_of), number in zip(each.writers, row, strict=True):
                    reader = (above, tuple(places_of[d] for d in back))
                    entries[reader, places[node, own[node]]] = number
            readers, writers = list(dict.fromkeys(r for r, _ in entries)), list(places)
            table = [[entries.get((r, w), -1) for w in range(len(writers))] for r in readers]
        found.append(_Step(each.sizes, tuple(readers), tuple(writers), tuple(map(tuple, table))))
    return found


class _Writing:
    """One side's rows as they are mixed, and what each whole tensor adds up."""

    def __init__(self, side: Side, steps: Sequence[_Step]) -> None:
        self.side, self.rows = side, 0
        self.rooms: dict[int, Room] = {}
        self.below: dict[int, list[int]] = {part: [] for part in range(len(side.parts))}
        self.biases = {number: part for part, number in enumerate(side.wholes)}
        for step in steps:
            for number, _ in step.writers:
                node = side.nodes[number]
                if number in self.biases:
                    continue
                self.rooms[number] = Room(False, self.rows, _dense(node.sizes))
                self.below[node.part].append(number)
                self.rows += prod(node.sizes)

    def addends(self, number: int, dims: Sequence[int], rank: int) -> tuple[list, list]:
        """What is added to the whole tensor ``number``: to all of it, and to its diagonals only.

        Each is ``[offset, count, pairs, *strides]``; bit p of ``pairs`` says that the p-th pair of
        dimensions must agree.
        """
        side, found = self.side, ([], [])  # type: ignore[var-annotated]
        shift = rank - len(dims)
        for child in self.below[side.nodes[number].part]:
            root, kept = _chain(side, child)
            which, sizes = side.nodes[root].which, side.nodes[root].sizes
            room = self.rooms[child]
            steps = dict(zip(kept, room.strides, strict=True))
            along = [steps.get(d, 0) if which.index(d) == a else 0 for a, d in enumerate(which)]
            count = _count(s for d, s in enumerate(sizes) if d not in kept) if side.mean else 1
            pairs = sum(
                1 << p
                for p, (d, e) in enumerate(combinations(range(rank), 2))
                if d >= shift and which[dims[d - shift]] == which[dims[e - shift]]
            )
            found[pairs != 0].append(
                [room.offset, count, pairs, *_front([along[a] for a in dims], rank, 0)]
            )
        return found


def _write_step(step: _Step, reading: _Reading, writing: _Writing, rank: int, at: int) -> list[int]:
    """A step of ``mix``, which begins at ``at`` of the table."""
    order = sorted(
        range(len(step.readers)), key=lambda r: not reading.rooms[step.readers[r][0]].whole
    )
    rooms = [reading.rooms[step.readers[r][0]] for r in order]
    readers = [
        [room.offset, *_front([room.strides[d] for d in step.readers[r][1]], rank, 0)]
        for r, room in zip(order, rooms, strict=True)
    ]
    writers, plain, diagonal = [], [], []
    for number, dims in step.writers:
        whole = number in writing.biases
        room = _root_room(writing.side, number) if whole else writing.rooms[number]
        along = _front([room.strides[d] for d in dims], rank, 0)
        writers.append([room.offset, writing.biases.get(number, 0), *along])
        found = writing.addends(number, dims, rank) if whole else ([], [])
        plain.append(found[0])
        diagonal.append(found[1])
    counts = [max(map(len, lists), default=0) for lists in (plain, diagonal)]
    nothing = [-1, 1, 0] + [0] * rank
    added = [
        [each[a] if a < len(each) else nothing for each in lists]
        for lists, count in zip((plain, diagonal), counts, strict=True)
        for a in range(count)
    ]
    body = [
        np.array(readers, np.int64).reshape(len(readers), 1 + rank),
        np.array([step.table[r] for r in order], np.int64),
        np.array(writers, np.int64).T,
        np.array(added, np.int64).reshape(len(added), len(writers), 3 + rank).transpose(0, 2, 1),
    ]
    begins = np.cumsum([at + HEAD + rank, *(piece.size for piece in body)]).tolist()
    head = [prod(step.sizes), begins[0], sum(r.whole for r in rooms), len(rooms), begins[1]]
    head += [len(writers), begins[2], begins[3], counts[0], sum(counts)]
    return [*head, *_front(step.sizes, rank, 1), *(int(v) for p in body for v in p.flatten())]


def _columns(steps: Sequence[_Step], channels: int, most: int) -> int:
    """Columns of a tile, of 16 to ``most``: as many operands side by side as most positions have."""
    width = min(most, lanes(channels))
    rows = sum(prod(step.sizes) for step in steps)
    mean = sum(prod(step.sizes) * len(step.writers) for step in steps) / max(1, rows)
    operands = 1 << max(0, int(mean).bit_length() - 1)
    return max(16, min(most, width * operands))


def _mix(
    steps: Sequence[_Step],
    reading: _Reading,
    writing: _Writing,
    samples: int,
    block: int,
    columns: int,
    channels: int,
    device: torch.device,
) -> Launch:
    rank = max((len(step.sizes) for step in steps), default=0)
    table: list[int] = []
    heads = []
    for step in steps:
        heads.append(len(table))
        table += _write_step(step, reading, writing, rank, len(table))
    tiles = _tiles([prod(step.sizes) for step in steps], samples, block)
    at_once = max(1, columns // lanes(channels))
    chunks = np.array([-(-len(step.writers) // at_once) for step in steps], np.int64)
    items = np.repeat(tiles, chunks[tiles[:, 0]], 0)
    begins = np.cumsum(chunks[tiles[:, 0]]) - chunks[tiles[:, 0]]
    chunk = np.arange(len(items)) - np.repeat(begins, chunks[tiles[:, 0]])
    items = np.concatenate([items, at_once * chunk[:, None]], 1)
    items[:, 0] = np.array(heads, np.int64)[items[:, 0]]
    diagonals = any(table[head + 8] < table[head + 9] for head in heads)
    return Launch(_device(table, device), _device(items, device), rank, int(diagonals))


def _narrow(step: _Step, keep: Sequence[bool]) -> _Step:
    """The step with some of its writers only."""
    return step._replace(
        writers=tuple(w for w, held in zip(step.writers, keep, strict=True) if held),
        table=tuple(
            tuple(t for t, held in zip(row, keep, strict=True) if held) for row in step.table
        ),
    )


def _nodes(plan: Decoded, which: int) -> list[int]:
    """The nodes of one side that terms read or write: the same for a layer and its gradients."""
    return [n for each in plan.types for n, _ in (each.writers if which else each.readers)]


@lru_cache(maxsize=256)
def facts(code: tuple[int, ...]) -> Facts:
    """Sizes of the plan ``code``."""
    plan = decode(code)
    sides = (plan.inputs, plan.outputs)
    summed = max(sum(prod(node.sizes) for node in side.nodes) for side in sides)
    return Facts(
        plan.numel_in,
        plan.numel_out,
        len(plan.outputs.parts),
        max((len(part.sizes) for side in sides for part in side.parts), default=0),
        max(plan.numel_in, plan.numel_out, summed),
    )


@lru_cache(maxsize=64)
def layer(
    code: tuple[int, ...],
    transpose: bool,
    reads: int,
    writes: int,
    batch: int,
    groups: int,
    device: torch.device,
) -> Layer:
    """The launches of a layer, or of its transpose, from ``reads`` to ``writes`` channels."""
    plan = decode(code)
    source, target = (plan.outputs, plan.inputs) if transpose else (plan.inputs, plan.outputs)
    steps = [step for step in _steps(plan, transpose) if 0 not in step.sizes]
    reading = _Reading(source, _nodes(plan, transpose), transpose)
    writing = _Writing(target, steps)
    parts = [_narrow(step, [n not in writing.biases for n, _ in step.writers]) for step in steps]
    wholes = [_narrow(step, [n in writing.biases for n, _ in step.writers]) for step in steps]
    mixed = {number for step in steps for number, _ in step.writers}
    for number in target.wholes:
        sizes = target.nodes[number].sizes
        if number not in mixed and 0 not in sizes:
            wholes.append(_Step(sizes, (), ((number, tuple(range(len(sizes)))),), ()))
    launches, columns = [], []
    for which, block in ((parts, PART_ROWS), (wholes, ROWS)):
        held = [step for step in which if step.writers]
        columns.append(_columns(held, writes, 64 if reads <= 32 else 32))
        launches.append(
            _mix(held, reading, writing, batch // groups, block, columns[-1], writes, device)
        )
    sums = reading.sums(batch, reads, device)
    return Layer(sums, launches[0], launches[1], (columns[0], columns[1]), writing.rows)


@lru_cache(maxsize=64)
def gradient(
    code: tuple[int, ...],
    reads: int,
    writes: int,
    batch: int,
    groups: int,
    device: torch.device,
) -> Gradient:
    """The launches of the gradients by parameters and biases."""
    plan = decode(code)
    read = _Reading(plan.inputs, _nodes(plan, 0), False)
    written = _Reading(plan.outputs, _nodes(plan, 1), True)
    samples = batch // groups
    steps = _steps(plan, False)
    rank = max((len(step.sizes) for step in steps), default=0)
    columns = _columns(steps, writes, 64)
    at_once = max(1, columns // lanes(writes))
    table: list[int] = []
    items: list[tuple[int, ...]] = []
    terms = np.zeros((plan.num_terms, 3), np.int64)
    blocks = 0
    for step in steps:
        length, r, w = prod(step.sizes), len(step.readers), len(step.writers)
        head, rows = len(table), samples * length
        operands = []
        for reading, listed in ((read, step.readers), (written, step.writers)):
            rooms = [(reading.rooms[number], dims) for number, dims in listed]
            operands.append(
                [
                    [
                        int(room.whole),
                        room.offset,
                        *_front([room.strides[d] for d in dims], rank, 0),
                    ]
                    for room, dims in rooms
                ]
            )
        begin = head + OUTER_HEAD + rank
        table += [length, begin, w, begin + r * (2 + rank), *_front(step.sizes, rank, 1)]
        table += [value for one in operands[0] for value in one]
        table += [value for each in zip(*operands[1], strict=True) for value in each]
        if not rows:
            continue
        chunks = range(0, w, at_once)
        wanted = max(1, _PROGRAMS // (r * len(chunks) * groups), -(-rows // _CHUNK))
        share = max(4, -(-rows // (wanted * ROWS))) * ROWS
        begins = range(0, rows, share)
        for i, row in enumerate(step.table):
            for j, number in enumerate(row):
                if number >= 0:
                    terms[number] = blocks + i * w + j, r * w, len(begins)
        for s, start in enumerate(begins):
            items += [
                (
                    head,
                    i,
                    j,
                    *divmod(start, length),
                    min(share, rows - start),
                    blocks + (s * r + i) * w,
                )
                for i in range(r)
                for j in chunks
            ]
        blocks += len(begins) * r * w
    outer = Launch(
        _device(table, device), _device(items or np.zeros((0, 7)), device), rank, len(items)
    )
    return Gradient(
        read.sums(batch, reads, device),
        written.sums(batch, writes, device),
        outer,
        columns,
        blocks,
        _device(terms, device),
    )
