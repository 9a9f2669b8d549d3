"""The definition of an equivariant layer, one term at a time."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from weightops.ops.equivariant.basis import Axis, Part, Term, term
from weightops.ops.equivariant.plan import EquivariantPlan


def per_term(x: Tensor, theta: Tensor, bias: Tensor | None, plan: EquivariantPlan) -> Tensor:
    """An equivariant layer as its definition reads: every term writes at full size (arXiv 2402.05232, eq. 6).

    Args:
        x: features ``[B, P_in, C_in]``, floating point.
        theta: ``[T, C_in, C_out]``, or ``[B, T, C_in, C_out]`` for parameters of each sample's own.
        bias: ``[num_biases, C_out]``, ``[B, num_biases, C_out]`` or ``None``.
        plan: the layer's plan.

    Returns:
        ``[B, P_out, C_out]``, computed in ``x``'s dtype throughout and differentiable.
    """
    batch, channels = x.shape[0], theta.shape[-1]
    found: dict[Part, Tensor] = {}
    for number, (output, input, match) in enumerate(plan._matches()):
        each = term(output, input, match)
        read = _read(_select(x, input), each, plan.normalize == "mean")
        matrix = theta[..., number, :, :]
        if theta.dim() == 4:
            matrix = matrix.reshape(batch, *[1] * (read.dim() - 3), *matrix.shape[1:])
        mixed = read @ matrix if read.dim() > 2 else (read[:, None] @ matrix)[:, 0]
        written = _write(mixed, each, output)
        found[output] = found[output] + written if output in found else written
    y = x.new_zeros(batch, plan.spec_out.numel, channels)
    for number, part in enumerate(plan.outputs.parts):
        shape = (batch, prod(axis.size for axis in part.axes), channels)
        value = found[part].reshape(shape) if part in found else x.new_zeros(shape)
        if bias is not None:
            value = value + bias[..., number, None, :]
        y = y.index_copy(1, _positions(part, x.device).flatten(), value)
    return y


def _positions(part: Part, device: torch.device) -> Tensor:
    """Where each entry of ``part`` lies in the flat layout, ``[*sizes]``."""
    at = torch.tensor(part.offset, device=device)
    for size, stride in [(axis.size, axis.stride) for axis in part.axes]:
        at = at[..., None] + stride * torch.arange(size, device=device)
    return at


def _select(x: Tensor, part: Part) -> Tensor:
    """``part`` of ``x`` [B, P, C] as [B, *sizes, C]; a view where its entries lie one after another."""
    sizes = [axis.size for axis in part.axes]
    if _dense(part.axes):
        return x[:, part.offset : part.offset + prod(sizes)].reshape(x.shape[0], *sizes, x.shape[2])
    return x[:, _positions(part, x.device)]


def _dense(axes: tuple[Axis, ...]) -> bool:
    rest = prod(axis.size for axis in axes)
    for axis in axes:
        rest = rest // axis.size if axis.size else 0
        if axis.stride != rest:
            return False
    return True


def _read(x: Tensor, each: Term, mean: bool) -> Tensor:
    """The indices of ``each`` that are kept, in the order of the output's: [B, *kept, C]."""
    diagonal = "".join(dict.fromkeys(each.input_indices))
    kept = "".join(i for i in dict.fromkeys(each.output_indices) if i in diagonal)
    averaged = "".join(i for i in diagonal if i not in kept)
    x = torch.einsum(f"Y{each.input_indices}Z->Y{kept}{averaged}Z", x)
    dims = list(range(1 + len(kept), 1 + len(diagonal)))
    if not dims:
        return x
    count = prod(x.shape[d] for d in dims)
    total = x.sum(dims)
    return total / max(1, count) if mean else total


def _write(x: Tensor, each: Term, output: Part) -> Tensor:
    """[B, *kept, C] at the output's full size: broadcast, and on diagonals through a mask."""
    sizes = [axis.size for axis in output.axes]
    first = {index: axis for axis, index in reversed(list(enumerate(each.output_indices)))}
    shape = [1] * len(sizes)
    kept = [i for i in dict.fromkeys(each.output_indices) if i in each.input_indices]
    for index in kept:
        shape[first[index]] = sizes[first[index]]
    x = x.reshape(x.shape[0], *shape, x.shape[-1]).expand(x.shape[0], *sizes, x.shape[-1])
    for axis, index in enumerate(each.output_indices):
        if first[index] != axis:
            grid = [1] * len(sizes)
            grid[axis] = sizes[axis]
            here = torch.arange(sizes[axis], device=x.device)
            there = here.reshape(
                [sizes[axis] if a == first[index] else 1 for a in range(len(sizes))]
            )
            x = torch.where((here.reshape(grid) == there)[..., None], x, 0)
    return x
