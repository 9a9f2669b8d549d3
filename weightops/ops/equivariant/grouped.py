"""Equivariant layers in plain torch by types: one matrix product a type, whatever the number of terms.

Readers are pooled one from another, all readers of a type stand side by side in the channels, and what
writers take is folded upward before it is written. Traceable, and right under ``torch.func``; float16
and bfloat16 are computed in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor
from torch.autograd import forward_ad

from weightops import _op
from weightops.ops.equivariant import decode as _decode
from weightops.ops.equivariant.decode import Decoded, Operand, Side, Type, decode

_HALVES = (torch.float16, torch.bfloat16)


def linear(
    x: Tensor, theta: Tensor, bias: Tensor | None, code: Sequence[int], transpose: bool = False
) -> Tensor:
    """One layer: ``x`` [B, P_in, C_in], ``theta`` [G, T, C_in, C_out], ``bias`` [G, num_biases, C_out].

    Sample b uses group ``b // (B // G)``. The result is [B, P_out, C_out]. With ``transpose``, ``x`` is
    [B, P_out, C_out] and the result [B, P_in, C_in]: the adjoint, which has no bias.
    """
    plan = decode(code)
    source, target = (plan.outputs, plan.inputs) if transpose else (plan.inputs, plan.outputs)
    values = _read(_wide(x), source)
    mixed = _Totals(target, x.shape[0])
    matrices = _matrices(_wide(theta), plan)
    for each, matrix in zip(plan.types, matrices, strict=True):
        readers, writers = each.readers, each.writers
        if transpose:
            matrix, readers, writers = matrix.mT, writers, readers
        mixed.spread(_mix(_rows(values, readers, each), matrix), writers, each)
    if bias is not None:
        mixed.add_bias(_wide(bias))
    channels = theta.shape[2 if transpose else 3]
    return mixed.write(_wide(x).new_zeros(x.shape[0], 0, channels)).to(x.dtype)


def backward(
    x: Tensor, theta: Tensor, grad: Tensor, code: Sequence[int], need_x: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a layer: ``x``'s (an empty tensor unless ``need_x``), ``theta``'s, ``bias``'s.

    ``grad`` is [B, P_out, C_out]; the other shapes are as for :func:`linear`, and those of ``theta``
    and ``bias`` are summed over the samples of a group.
    """
    plan = decode(code)
    groups, _, c_in, c_out = theta.shape
    values, grads = _read(_wide(x), plan.inputs), _read(_wide(grad), plan.outputs)
    mixed = _Totals(plan.inputs, x.shape[0])
    found = []
    matrices = _matrices(_wide(theta), plan) if need_x else [None] * len(plan.types)
    for each, matrix in zip(plan.types, matrices, strict=True):
        above = _rows(grads, each.writers, each)
        product = _outer(_rows(values, each.readers, each), above, groups)
        r, w = len(each.readers), len(each.writers)
        product = product.reshape(groups, r, c_in, w, c_out).transpose(2, 3)
        found.append(product.reshape(groups, r * w, c_in, c_out))
        if matrix is not None:
            mixed.spread(_mix(above, matrix.mT), each.readers, each)
    to_theta = _wide(theta).new_zeros(groups, 0, c_in, c_out)
    if found:
        to_theta = torch.cat(found, 1).index_select(1, _constant(plan.inverse, x.device))
    sums = [grads[number] for number in plan.outputs.scalars]
    to_bias = _wide(grad).new_zeros(groups, 0, c_out)
    if sums:
        by_group = (groups, x.shape[0] // groups, len(sums), c_out)
        to_bias = torch.stack(sums, 1).reshape(by_group).sum(1)
    to_x = x.new_empty(0)
    if need_x:
        to_x = mixed.write(_wide(x).new_zeros(x.shape[0], 0, c_in)).to(x.dtype)
    return to_x, to_theta.to(theta.dtype), to_bias.to(theta.dtype)


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in _HALVES else x


def _constant(values: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device=device)


def _read(x: Tensor, side: Side) -> list[Tensor]:
    """``x`` [B, P, C]'s nodes [B, *sizes, C]."""
    if not side.ordered:
        x = x.index_select(1, _decode.layout(side, x.device))
    values: list[Tensor] = []
    for number, node in enumerate(side.nodes):
        part = side.parts[node.part]
        if node.parent >= 0:
            value = values[node.parent].sum(1 + node.dropped)
            if side.mean:
                value = value / _length(side, number)
        else:
            whole = _shaped(x.narrow(1, part.start, prod(part.sizes)), part.sizes)
            value = _diagonal(whole, node.which)
        values.append(value)
    return values


def _length(side: Side, number: int) -> int:
    """How many numbers a mean is over; nothing at all has the mean 0."""
    node = side.nodes[number]
    return max(1, side.nodes[node.parent].sizes[node.dropped])


def _pairs(which: Sequence[int]) -> list[tuple[int, int]]:
    """Axes to be merged, first into second, one pair after another; the first falls out each time."""
    left, found = list(which), []
    for axis in reversed(range(len(left))):
        if left.index(left[axis]) != axis:
            found.append((axis, left.index(left[axis])))
            left.pop(axis)
    return found


def _diagonal(x: Tensor, which: Sequence[int]) -> Tensor:
    """The view of ``x`` [B, *sizes, C] where axes of equal ``which`` have equal indices."""
    for axis, onto in _pairs(which):
        x = x.diagonal(0, 1 + onto, 1 + axis).movedim(-1, 1 + onto)
    return x


def _embed(x: Tensor, which: Sequence[int]) -> Tensor:
    """The tensor whose diagonal is ``x``, zero elsewhere."""
    for axis, onto in reversed(_pairs(which)):
        x = torch.diag_embed(x.movedim(1 + onto, -1), 0, 1 + onto, 1 + axis)
    return x


def _shaped(x: Tensor, sizes: Sequence[int]) -> Tensor:
    return x.unflatten(1, sizes) if sizes else x.select(1, 0)


def _rows(values: Sequence[Tensor], operands: Sequence[Operand], each: Type) -> Tensor:
    """The operands of a type side by side, [B, n, operands * C]."""
    pieces = [
        values[number].permute(0, *(1 + d for d in dims), 1 + len(dims))
        for number, dims in operands
    ]
    rows = pieces[0] if len(pieces) == 1 else torch.cat(pieces, -1)
    return rows.reshape(rows.shape[0], prod(each.sizes), rows.shape[-1])


def _matrices(theta: Tensor, plan: Decoded) -> list[Tensor]:
    """Per type [G, readers * C_in, writers * C_out]."""
    groups, _, c_in, c_out = theta.shape
    if len(plan.order) != plan.num_terms:
        theta = torch.cat([theta, theta.new_zeros(groups, 1, c_in, c_out)], 1)
    theta = theta.index_select(1, _constant(plan.order, theta.device))
    found = []
    for each in plan.types:
        r, w = len(each.readers), len(each.writers)
        block = theta.narrow(1, each.start, r * w).reshape(groups, r, w, c_in, c_out)
        found.append(block.transpose(2, 3).reshape(groups, r * c_in, w * c_out))
    return found


def _mix(rows: Tensor, matrix: Tensor) -> Tensor:
    """``rows`` [B, n, K] times the matrix of each sample's group [G, K, N]."""
    groups = matrix.shape[0]
    if groups == 1:
        return rows @ matrix[0]
    batch = rows.shape[0]
    by_group = rows.unflatten(0, (groups, batch // groups)) @ matrix[:, None]
    return by_group.flatten(0, 1)


def _outer(rows: Tensor, above: Tensor, groups: int) -> Tensor:
    """Per group the sum of ``rows``.T @ ``above`` over its samples and rows, [G, K, N]."""
    batch, n, k = rows.shape
    width = above.shape[2]
    each = batch // groups
    if k * width <= n * (k + width):
        # A product a sample, as rows of different samples seldom lie one after another.
        return (rows.mT @ above).reshape(groups, each, k, width).sum(1)
    rows = rows.reshape(groups, each * n, k)
    return rows.mT @ above.reshape(groups, each * n, width)


class _Totals:
    """What the nodes of one side are to add up to."""

    def __init__(self, side: Side, batch: int) -> None:
        self.side, self.batch = side, batch
        self.totals: list[Tensor | None] = [None] * len(side.nodes)
        self.owned = [False] * len(side.nodes)
        # Under vmap one addend may be batched where the other is not, so it cannot be added in place.
        self.functional = (
            torch.compiler.is_compiling()
            or _op._transforms_active()
            or forward_ad._current_level >= 0
        )

    def add(self, number: int, piece: Tensor, owned: bool) -> None:
        """``owned`` says that nothing else looks at ``piece``."""
        total = self.totals[number]
        if total is None:
            self.totals[number], self.owned[number] = piece, owned
        elif self.owned[number] and not self.functional:
            total.add_(piece)
        else:
            self.totals[number], self.owned[number] = total + piece, True

    def spread(self, mixed: Tensor, operands: Sequence[Operand], each: Type) -> None:
        """Take [B, n, operands * C] apart."""
        channels = mixed.shape[2] // len(operands)
        mixed = mixed.reshape(self.batch, *each.sizes, len(operands), channels)
        for i, (number, dims) in enumerate(operands):
            back = [1 + dims.index(d) for d in range(len(dims))]
            self.add(number, mixed.select(-2, i).permute(0, *back, 1 + len(dims)), True)

    def add_bias(self, bias: Tensor) -> None:
        groups = bias.shape[0]
        if groups > 1:
            bias = bias.repeat_interleave(self.batch // groups, 0)
        bias = bias.expand(self.batch, -1, -1)
        for part, number in enumerate(self.side.scalars):
            self.add(number, bias.select(1, part), False)

    def write(self, empty: Tensor) -> Tensor:
        """The nodes folded upward and laid out, [B, P, C]."""
        side, batch, channels = self.side, self.batch, empty.shape[2]
        for number in reversed(range(len(side.nodes))):
            total, node = self.totals[number], side.nodes[number]
            if total is not None and node.parent >= 0:
                if side.mean:
                    total = total / _length(side, number)
                above = side.nodes[node.parent].sizes
                whole = total.unsqueeze(1 + node.dropped).expand(batch, *above, channels)
                self.add(node.parent, whole, False)
        for number in side.diagonals:
            self._add_diagonal(number, side.wholes[side.nodes[number].part])
        pieces = [empty]
        for part, number in zip(side.parts, side.wholes, strict=True):
            total, shape = self.totals[number], (batch, prod(part.sizes), channels)
            pieces.append(empty.new_zeros(shape) if total is None else total.reshape(shape))
        out = torch.cat(pieces, 1)
        if not side.ordered:
            out = out.index_select(1, _decode.layout(side, out.device).argsort())
        return out

    def _add_diagonal(self, number: int, whole: int) -> None:
        value, total, which = self.totals[number], self.totals[whole], self.side.nodes[number].which
        if value is None:
            return
        if total is not None and self.owned[whole] and not self.functional:
            _diagonal(total, which).add_(value)
        else:
            self.add(whole, _embed(value, which), True)
