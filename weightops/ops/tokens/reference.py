"""The definition of token_pack, token_unpack and token_moments, in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from weightops.ops.tokens.plan import decode


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def pack(flat: Tensor, shift: Tensor | None, scale: Tensor | None, code: Sequence[int]) -> Tensor:
    """``flat`` [N, P] as tokens [N, T, D] of ``(flat - shift) * scale``, zero where there is no weight.

    Args:
        shift, scale: ``[tensors]`` of the dtype of the sums (float64 for float64, else float32), or
            ``None`` for 0 and 1.
    """
    plan, n = decode(code), flat.shape[0]
    tokens = []
    for group in plan.groups:
        columns = []
        for tensor, offset, width in group.pieces:
            piece = flat.narrow(1, offset, group.rows * width).reshape(n, group.rows, width)
            if shift is not None or scale is not None:
                wide = piece.to(_sum_dtype(flat))
                wide = wide if shift is None else wide - shift[tensor]
                wide = wide if scale is None else wide * scale[tensor]
                piece = wide.to(flat.dtype)
            columns.append(piece)
        if columns:
            padding = group.tokens * plan.size - group.length
            rows = F.pad(torch.cat(columns, 2), (0, padding))
            tokens.append(rows.reshape(n, group.rows * group.tokens, plan.size))
    # Never an alias of flat.
    return torch.cat(tokens, 1) if tokens else flat.new_zeros(n, 0, plan.size)


def unpack(
    tokens: Tensor, shift: Tensor | None, scale: Tensor | None, code: Sequence[int]
) -> Tensor:
    """``tokens`` [N, T, D] as networks [N, P] of ``tokens * scale + shift``; the padding is not looked at."""
    plan, n, first = decode(code), tokens.shape[0], 0
    found: list[tuple[int, Tensor]] = []
    for group in plan.groups:
        count = group.rows * group.tokens
        rows = tokens.narrow(1, first, count).reshape(n, group.rows, group.tokens * plan.size)
        first, start = first + count, 0
        for tensor, offset, width in group.pieces:
            piece = rows.narrow(2, start, width).reshape(n, group.rows * width)
            start += width
            if shift is not None or scale is not None:
                wide = piece.to(_sum_dtype(tokens))
                wide = wide if scale is None else wide * scale[tensor]
                wide = wide if shift is None else wide + shift[tensor]
                piece = wide.to(tokens.dtype)
            found.append((offset, piece))
    found.sort(key=lambda each: each[0])
    return torch.cat([piece for _, piece in found], 1) if found else tokens.new_zeros(n, plan.numel)


def moments(flat: Tensor, sizes: Sequence[int]) -> Tensor:
    """Mean, and sum of squared deviations from it, of each tensor of each network.

    Args:
        flat: ``[N, P]``.
        sizes: the tensors' numbers of weights, in the order of the layout.

    Returns:
        ``[N, tensors, 2]``, float64; zero for a tensor without weights. Of a constant tensor the
        mean is its value and the sum of squares 0, exactly.
    """
    found = []
    for piece in flat.split(list(sizes), 1):
        if not piece.shape[1]:
            found.append(flat.new_zeros(flat.shape[0], 2, dtype=torch.float64))
            continue
        origin = piece[:, :1].double()
        centred = piece.double() - origin
        mean = centred.mean(1, keepdim=True)
        squares = (centred - mean).square().sum(1, keepdim=True)
        found.append(torch.cat([origin + mean, squares], 1))
    if not found:
        return flat.new_zeros(flat.shape[0], 0, 2, dtype=torch.float64)
    return torch.stack(found, 1)
