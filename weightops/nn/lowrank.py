"""Wide types of a plan as two plans, through a weight space that has one tensor per type.

What the readers of a type keep is a tensor with the type's axes. Mixing them into ``rank`` channels of
such a tensor, then that tensor into what the writers take, is the type's matrix as a product of two.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count
from typing import NamedTuple

import torch
from torch import Tensor

from weightops.ops.equivariant import EquivariantPlan
from weightops.ops.equivariant.basis import Axis, Block, Label, Term
from weightops.ops.equivariant.plan import Side, Type
from weightops.spec import WeightSpec


class Operand(NamedTuple):
    """A reader or a writer: a tensor's blocks that are kept, by dimension of the type, and the others."""

    part: str
    kept: tuple[Block, ...]
    others: frozenset[Block]


class Group(NamedTuple):
    """Readers and writers that all compose: ``table[r][w]`` is the number of the term in the full plan.

    ``readers`` and ``writers`` are the numbers of their terms in the plans up and down.
    """

    readers: list[int]
    writers: list[int]
    table: list[list[int]]


class Through:
    """Selects terms between a tensor in the middle, all of which is kept, and given operands."""

    def __init__(self, wanted: frozenset[tuple[str, Operand]], upward: bool) -> None:
        self.wanted, self.upward = wanted, upward

    def __call__(self, term: Term) -> bool:
        return self.key(term) in self.wanted

    def key(self, term: Term) -> tuple[str, Operand] | None:
        ends = (term.input, term.input_indices), (term.output, term.output_indices)
        (part, indices), (middle, kept) = ends if self.upward else ends[::-1]
        blocks: dict[str, Block] = {}
        for axis, index in enumerate(indices):
            blocks[index] = (*blocks.get(index, ()), axis)
        if len(set(kept)) < len(kept) or not blocks.keys() >= set(kept):
            return None
        at = tuple(blocks[index] for index in kept)
        return middle, Operand(part, at, frozenset(blocks.values()).difference(at))


class Only:
    """Selects given terms."""

    def __init__(self, terms: frozenset[Term]) -> None:
        self.terms = terms

    def __call__(self, term: Term) -> bool:
        return term in self.terms


class Factors(NamedTuple):
    """A plan as ``down(up(x)) + rest(x)``; ``rest`` is ``None`` where no term remains."""

    up: EquivariantPlan
    down: EquivariantPlan
    rest: EquivariantPlan | None
    groups: list[Group]
    remaining: list[int]  # numbers in the full plan of the terms of ``rest``

    def compose(self, up: Tensor, down: Tensor, rest: Tensor | None) -> Tensor:
        """The parameters of the full plan, ``[T, C_in, C_out]``."""
        terms = len(self.remaining) + sum(len(g.readers) * len(g.writers) for g in self.groups)
        theta = up.new_zeros(terms, up.shape[1], down.shape[2])
        if rest is not None:
            theta[self.remaining] = rest
        for group in self.groups:
            product = torch.einsum("rik,wko->rwio", up[group.readers], down[group.writers])
            theta[torch.tensor(group.table)] = product
        return theta

    def decompose_(self, theta: Tensor, up: Tensor, down: Tensor, rest: Tensor | None) -> None:
        """Fill the factors so that they compose to the nearest to ``theta`` (least squares)."""
        if rest is not None:
            rest.copy_(theta[self.remaining])
        rank = up.shape[2]
        for group in self.groups:
            product = theta[torch.tensor(group.table)]  # [R, W, C_in, C_out]
            matrix = product.transpose(1, 2).flatten(0, 1).flatten(1)
            u, s, v = torch.linalg.svd(matrix, full_matrices=False)
            # Both factors get the same share of every singular value.
            root = s[:rank].sqrt()
            left, right = u[:, :rank] * root, root[:, None] * v[:rank]
            up[group.readers] = left.unflatten(0, (len(group.readers), -1))
            right = right.unflatten(1, (len(group.writers), -1))
            down[group.writers] = right.transpose(0, 1)


def factorize(
    plan: EquivariantPlan, in_channels: int, out_channels: int, rank: int
) -> Factors | None:
    """``plan`` with its wide types factored, or ``None`` where it has none.

    A type of R readers and W writers is wide where ``rank * (R C_in + W C_out) < R C_in W C_out``. Where
    a choice of terms left holes in a type, its readers are grouped by the writers that they share.
    """
    names = _Names(plan)
    axes: dict[str, tuple[str, ...]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    wide: list[tuple[list[tuple[str, Operand]], list[tuple[str, Operand]], list[list[int]]]] = []
    for each in plan.types:
        for rows, columns in _full_blocks(each):
            into, out = len(rows) * in_channels, len(columns) * out_channels
            if rank * (into + out) >= into * out:
                continue
            middle = f"type{len(axes)}"
            axes[middle], shapes[middle] = names.of(each), each.sizes
            readers = [(middle, _operand(plan.inputs, *each.readers[r])) for r in rows]
            writers = [(middle, _operand(plan.outputs, *each.writers[w])) for w in columns]
            wide.append((readers, writers, [[each.table[r][w] for w in columns] for r in rows]))
    if not wide:
        return None
    # Fixed axes get labels, as a tensor in the middle keeps what is permuted like them.
    middle_spec = WeightSpec(axes, shapes)
    up, ups = _plan(plan, names.spec_in, middle_spec, [key for w in wide for key in w[0]], True)
    down, downs = _plan(
        plan, middle_spec, names.spec_out, [key for w in wide for key in w[1]], False
    )
    groups = [
        Group([ups[key] for key in readers], [downs[key] for key in writers], table)
        for readers, writers, table in wide
    ]
    factored = {t for group in groups for row in group.table for t in row}
    remaining = [t for t in range(plan.num_terms) if t not in factored]
    rest = None
    if remaining:
        terms = plan.terms
        only = Only(frozenset(terms[t] for t in remaining))
        rest = EquivariantPlan(
            plan.spec, plan.spec_out, fixed=plan.fixed, terms=only, normalize=plan.normalize
        )
    return Factors(up, down, rest, groups, remaining)


def _plan(
    plan: EquivariantPlan,
    spec: WeightSpec,
    spec_out: WeightSpec,
    keys: Sequence[tuple[str, Operand]],
    upward: bool,
) -> tuple[EquivariantPlan, dict[tuple[str, Operand] | None, int]]:
    """The plan up or down, and the number of each operand's term in it."""
    through = Through(frozenset(keys), upward)
    made = EquivariantPlan(
        spec, spec_out, fixed=plan.fixed, terms=through, normalize=plan.normalize
    )
    return made, {through.key(term): t for t, term in enumerate(made.terms)}


def _full_blocks(each: Type) -> Iterator[tuple[list[int], list[int]]]:
    """Readers and writers of a type, all of whose terms there are."""
    found: dict[tuple[int, ...], list[int]] = {}
    for r, row in enumerate(each.table):
        columns = tuple(w for w, t in enumerate(row) if t >= 0)
        found.setdefault(columns, []).append(r)
    for columns, rows in found.items():
        if columns:
            yield rows, list(columns)


def _operand(side: Side, number: int, dims: tuple[int, ...]) -> Operand:
    node = root = side.nodes[number]
    while root.parent is not None:
        root = side.nodes[root.parent]
    kept = tuple(node.blocks[d] for d in dims)
    return Operand(str(side.parts[node.part]), kept, frozenset(root.blocks).difference(kept))


class _Names:
    """A plan's specs with a label on every axis that is permuted."""

    def __init__(self, plan: EquivariantPlan) -> None:
        self.plan = plan
        self.taken = {*plan.spec.labels, *plan.spec_out.labels}
        self.given: dict[Label, str] = {}
        self.spec_in = self._labelled(plan.spec, plan.inputs)
        same = plan.spec == plan.spec_out
        self.spec_out = self.spec_in if same else self._labelled(plan.spec_out, plan.outputs)

    def of(self, each: Type) -> tuple[str, ...]:
        """The labels of a type's dimensions."""
        number, dims = each.readers[0]
        node = self.plan.inputs.nodes[number]
        axes = self.plan.inputs.parts[node.part].axes
        return tuple(self._name(axes[node.blocks[d][0]]) for d in dims)

    def _name(self, axis: Axis) -> str:
        if axis.label not in self.given:
            free = (name for n in count() if (name := f"fixed{n}") not in self.taken)
            name = axis.label if isinstance(axis.label, str) else next(free)
            self.taken.add(name)
            self.given[axis.label] = name
        return self.given[axis.label]

    def _labelled(self, spec: WeightSpec, side: Side) -> WeightSpec:
        if self.plan.fixed != "permute":
            return spec
        axes: dict[str, list] = {}
        sizes = dict(spec.labels)
        for part, (tensor, shape) in zip(side.parts, spec.shapes.items(), strict=True):
            atoms = iter(part.axes)
            entries: list[str | tuple[str, ...]] = []
            for axis in range(len(shape)):
                named = [(self._name(next(atoms)), size) for _, size in spec.factors(tensor, axis)]
                sizes.update(named)
                labels = tuple(name for name, _ in named)
                entries.append(labels if len(labels) > 1 else labels[0])
            axes[tensor] = entries
        return WeightSpec(axes, spec.shapes, sizes=sizes)
