"""A layer's plan: readers and writers grouped by type, and the integers that the kernels read.

A *reader* takes a diagonal of an input tensor and averages some of the remaining indices; a *writer*
broadcasts over some indices of a diagonal of an output tensor. What a reader keeps and a writer takes
is a multiset of labels, its *type*; every reader composes with every writer of its type, once for
each way of matching equal labels. So the terms of a type are one matrix product.

Each side of the plan is a list of tensors, of *nodes* (a tensor's diagonals, then what is left of
them after averaging one index at a time) and of types. Transposing a layer swaps the sides.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from math import prod
from typing import NamedTuple

import torch

from weightops import _check
from weightops.ops.equivariant.basis import (
    FIXED,
    SELECTIONS,
    Block,
    Label,
    Match,
    Part,
    Term,
    pair,
    parts,
    term,
)
from weightops.ops.equivariant.size import check_count, check_memory, count_terms
from weightops.spec import WeightSpec

NodeKey = tuple[int, tuple[Block, ...], tuple[Block, ...]]  # part, kept blocks, dropped blocks
Selection = str | Callable[[Term], bool]


class Node(NamedTuple):
    """A diagonal of a tensor (``parent`` None), or its parent averaged over dimension ``dropped``."""

    part: int
    blocks: tuple[Block, ...]
    parent: int | None
    dropped: int


class Type(NamedTuple):
    """Readers and writers that keep the same labels: ``(node, node dimension of each type dimension)``."""

    sizes: tuple[int, ...]
    readers: list[tuple[int, tuple[int, ...]]]
    writers: list[tuple[int, tuple[int, ...]]]
    table: list[list[int]]  # [reader][writer]: number of the term, or -1


class Side:
    """The nodes of one side, numbered as they are asked for: a node stands behind its parent."""

    def __init__(self, found: Sequence[Part]) -> None:
        self.parts = found
        self.nodes: list[Node] = []
        self._number: dict[NodeKey, int] = {}

    def size(self, part: int, block: Block) -> int:
        return self.parts[part].axes[block[0]].size

    def number(self, part: int, kept: tuple[Block, ...], dropped: tuple[Block, ...]) -> int:
        key = (part, kept, dropped)
        if key not in self._number:
            parent, position = None, -1
            if dropped:
                back = min(dropped, key=lambda block: self.size(part, block))
                blocks = tuple(sorted((*kept, back)))
                parent = self.number(part, blocks, tuple(b for b in dropped if b != back))
                position = blocks.index(back)
            self._number[key] = len(self.nodes)
            self.nodes.append(Node(part, kept, parent, position))
        return self._number[key]

    def sizes(self, node: Node) -> list[int]:
        return [self.size(node.part, block) for block in node.blocks]

    def integers(self) -> Iterator[int]:
        yield len(self.parts)
        for part in self.parts:
            yield from (part.offset, len(part.axes))
            for axis in part.axes:
                yield from (axis.size, axis.stride)
        yield len(self.nodes)
        for node in self.nodes:
            yield from (node.part, -1 if node.parent is None else node.parent, node.dropped)
            if node.parent is None:
                which = {axis: d for d, block in enumerate(node.blocks) for axis in block}
                yield from (which[axis] for axis in range(len(which)))


class EquivariantPlan:
    """All linear maps from one weight space to another that commute with the permutations of neurons.

    Args:
        spec: the input's weight space.
        spec_out: the output's, ``spec`` by default; labels of one name permute together.
        fixed: what axes without a label are. ``"permute"``: permutable, each with a label of its own,
            as in the paper. ``"index"``: not permutable; every position has parameters of its own (NFN's
            hidden-only setting). ``"channel"``: the same maps, their positions taken as channels.
        terms: which basis maps: ``"full"``; ``"local"`` (from a tensor to itself); ``"mpnn"`` (those that
            keep an index, and those from a tensor to itself); or ``predicate(term) -> bool``.
        normalize: what becomes of an index that is not kept: its ``"mean"`` or its ``"sum"``.

    Attributes:
        num_terms: number of basis maps T; ``theta`` is ``[T, C_in, C_out]``.
        num_biases: one per output tensor, or per position of its fixed axes where those are not
            permuted; ``bias`` is ``[num_biases, C_out]``.

    Raises:
        ValueError: one label has two sizes, an option is unknown, or there are too many terms.
        TypeError: an argument has the wrong type.
    """

    def __init__(
        self,
        spec: WeightSpec,
        spec_out: WeightSpec | None = None,
        *,
        fixed: str = "permute",
        terms: Selection = "full",
        normalize: str = "mean",
    ) -> None:
        where = "EquivariantPlan"
        spec_out = spec if spec_out is None else spec_out
        for name, value in (("spec", spec), ("spec_out", spec_out)):
            if not isinstance(value, WeightSpec):
                raise TypeError(
                    f"{where}: {name} must be a WeightSpec, not {_check.describe(value)}"
                )
        _check.choice(where, "fixed", fixed, FIXED)
        _check.choice(where, "normalize", normalize, ("mean", "sum"))
        if not callable(terms):
            _check.choice(where, "terms", terms, tuple(SELECTIONS), or_else="a predicate")
        self.spec, self.spec_out = spec, spec_out
        self.fixed, self.selection, self.normalize = fixed, terms, normalize
        check_count(where, count_terms(spec, spec_out, fixed, terms == "local"), fixed)
        into = parts(spec, fixed)
        out = into if spec == spec_out else parts(spec_out, fixed, "out")
        self.inputs, self.outputs = Side(into), Side(out)
        self._select = terms if callable(terms) else SELECTIONS[terms]
        self.num_biases = len(out)
        self.types: list[Type] = []
        self.num_terms = 0
        self._build()
        self._code = list(self._integers())
        self._digest = hashlib.sha256(array("q", self._code).tobytes()).hexdigest()

    def check_size(
        self, in_channels: int, out_channels: int, dtype: torch.dtype = torch.float32
    ) -> None:
        """Raise ``ValueError`` where ``theta`` would be larger than this machine's memory."""
        check_memory("EquivariantPlan", self.num_terms, in_channels, out_channels, dtype)

    @property
    def terms(self) -> list[Term]:
        """The basis maps, numbered as in the paper's code; ``theta[t]`` is the matrix of ``terms[t]``."""
        return [term(o, i, match) for o, i, match in self._matches()]

    @property
    def terms_per_output(self) -> list[int]:
        """Number of terms that write each output tensor; terms are numbered by it first."""
        counts = [0] * len(self.outputs.parts)
        for each in self.types:
            for w, (number, _) in enumerate(each.writers):
                counts[self.outputs.nodes[number].part] += sum(row[w] >= 0 for row in each.table)
        return counts

    @property
    def products(self) -> int:
        """Multiplications of a network's channels: terms, each at all positions of its type."""
        return sum(
            prod(each.sizes) * sum(t >= 0 for row in each.table for t in row) for each in self.types
        )

    def _matches(self) -> Iterator[tuple[Part, Part, Match]]:
        for i, j in self._pairs():
            output, input = self.outputs.parts[i], self.inputs.parts[j]
            for match in pair(output, input):
                if self._select is None or self._select(term(output, input, match)):
                    yield output, input, match

    def _pairs(self) -> Iterator[tuple[int, int]]:
        """Output and input parts between which there are terms."""
        if self.selection == "local" and self.spec == self.spec_out:
            yield from ((i, i) for i in range(len(self.outputs.parts)))
        else:
            yield from product(range(len(self.outputs.parts)), range(len(self.inputs.parts)))

    def _build(self) -> None:
        """Group the terms by type."""
        groups: dict[tuple, tuple[dict, dict, dict]] = {}
        labels: dict[Label, int] = {}
        for part in (*self.inputs.parts, *self.outputs.parts):
            for label in part.labels:
                labels.setdefault(label, len(labels))
        sizes = self._check_sizes()
        numbered = [tuple(labels[label] for label in part.labels) for part in self.outputs.parts]
        for i, j in self._pairs():
            output, input, numbers = self.outputs.parts[i], self.inputs.parts[j], numbered[i]
            for match in pair(output, input):
                if self._select and not self._select(term(output, input, match)):
                    continue
                kept = sorted(match.kept, key=lambda blocks: numbers[blocks[0][0]])
                kind = tuple([numbers[out[0]] for out, _ in kept])
                readers, writers, table = groups.setdefault(kind, ({}, {}, {}))
                reader = (j, tuple([into for _, into in kept]), match.averaged)
                writer = (i, tuple([out for out, _ in kept]), match.broadcast)
                r = readers.setdefault(reader, len(readers))
                w = writers.setdefault(writer, len(writers))
                table[r, w] = self.num_terms
                self.num_terms += 1
        by_number = list(labels)
        for kind, (readers, writers, table) in sorted(groups.items(), key=lambda g: len(g[0])):
            rows = [[-1] * len(writers) for _ in readers]
            for (r, w), number in table.items():
                rows[r][w] = number
            listed = [
                [self._operand(side, *key) for key in keys]
                for side, keys in ((self.inputs, readers), (self.outputs, writers))
            ]
            order = self._loop_order(len(kind), listed)
            reading, writing = (
                [(n, tuple(dims[d] for d in order)) for n, dims in side] for side in listed
            )
            lengths = tuple(sizes[by_number[kind[d]]] for d in order)
            self.types.append(Type(lengths, reading, writing, rows))

        self._add_passages()

    def _add_passages(self) -> None:
        """Types of one operand for nodes that terms only pass through, on their way up or down."""
        for part in range(len(self.outputs.parts)):
            axes = range(len(self.outputs.parts[part].axes))
            self.outputs.number(part, tuple((axis,) for axis in axes), ())
            self.outputs.number(part, (), tuple((axis,) for axis in axes))
        for part in range(len(self.inputs.parts)):
            axes = range(len(self.inputs.parts[part].axes))
            self.inputs.number(part, tuple((axis,) for axis in axes), ())
        for which, side in enumerate((self.inputs, self.outputs)):
            served = {
                number
                for each in self.types
                for number, _ in (each.writers if which else each.readers)
            }
            for number, node in enumerate(side.nodes):
                if number not in served:
                    operand = [(number, tuple(range(len(node.blocks))))]
                    lengths = tuple(side.sizes(node))
                    self.types.append(
                        Type(lengths, [], operand, [])
                        if which
                        else Type(lengths, operand, [], [[]])
                    )
        self.types.sort(key=lambda each: len(each.sizes))

    def _check_sizes(self) -> dict[Label, int]:
        sizes: dict[Label, int] = {}
        for part in (*self.inputs.parts, *self.outputs.parts):
            for label, size, _ in part.axes:
                if sizes.setdefault(label, size) != size:
                    raise ValueError(
                        f"EquivariantPlan: label {label!r} has size {sizes[label]} in spec, "
                        f"but {size} in spec_out"
                    )
        return sizes

    @staticmethod
    def _operand(
        side: Side, part: int, kept: tuple[Block, ...], dropped: tuple[Block, ...]
    ) -> tuple[int, tuple[int, ...]]:
        blocks = tuple(sorted(kept))
        return side.number(part, blocks, dropped), tuple(blocks.index(block) for block in kept)

    def _loop_order(self, rank: int, listed: Sequence) -> list[int]:
        """Type dimensions, slowest first, as most whole tensors of the type lie in memory, else most nodes."""
        votes = [(0, 0)] * rank
        for side, operands in zip((self.inputs, self.outputs), listed, strict=True):
            for number, dims in operands:
                whole = side.nodes[number].parent is None
                for d, position in enumerate(dims):
                    votes[d] = (votes[d][0] + position * whole, votes[d][1] + position)
        return sorted(range(rank), key=lambda d: votes[d])

    def _integers(self) -> Iterator[int]:
        mean = int(self.normalize == "mean")
        yield from (self.spec.numel, self.spec_out.numel, self.num_terms, mean)
        yield from self.inputs.integers()
        yield from self.outputs.integers()
        yield len(self.types)
        for each in self.types:
            yield from (len(each.sizes), *each.sizes, len(each.readers), len(each.writers))
            for number, dims in (*each.readers, *each.writers):
                yield from (number, *dims)
            for row in each.table:
                yield from row


def code_of(plan: EquivariantPlan) -> list[int]:
    """The integers of ``plan``."""
    return _code(plan, plan._digest)


def _code(plan: EquivariantPlan, digest: str) -> list[int]:
    return plan._code


# As for permute's plan: a constant to Dynamo, guarded by the digest, which is read outside.
_code._dynamo_marked_constant = True  # type: ignore[attr-defined]
