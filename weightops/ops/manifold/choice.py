"""Which calls of ``manifold_linear`` torch's own products serve best: those too small to repay the kernels' packing."""

from __future__ import annotations

import torch
from torch import Tensor

from weightops import _op

# Weights of that many entries no longer lie in the caches.
_LARGE = 1 << 20


def by_torch(x: Tensor, coeffs: Tensor, weight: Tensor, index: Tensor | None) -> bool:
    """Whether :func:`contract` is the faster way on a CPU: a rule measured on AVX-512 and AMX.

    Only where entries of ``x`` ``[B, in]`` have contexts of their own; not for half types, which it would
    round once a basis, as autocast would.
    """
    if index is not None or coeffs.dim() != 2 or x.dim() != 2 or x.device.type != "cpu":
        return False
    rows, entries = x.shape[0], weight.numel()
    symbolic = not (isinstance(rows, int) and isinstance(entries, int))
    if symbolic or torch.compiler.is_compiling() or x.dtype not in (torch.float32, torch.float64):
        return False
    if torch.is_autocast_enabled("cpu"):
        return False
    large = entries > _LARGE
    if _op.matmul_precision(x.dtype) != "highest":
        return large and 2 < rows <= 64
    if torch.is_grad_enabled() and any(each.requires_grad for each in (x, coeffs, weight)):
        return rows <= (32 if large else 128)
    return not large and rows <= 64


def contract(x: Tensor, coeffs: Tensor, weight: Tensor) -> Tensor:
    """``sum_k coeffs[b, k] weight[k] x[b]``, ``[B, out]``: one product of all bases, whose results are mixed."""
    bases, outputs, inputs = weight.shape
    products = (x @ weight.reshape(bases * outputs, inputs).T).view(x.shape[0], bases, outputs)
    return torch.bmm(coeffs.unsqueeze(1), products).squeeze(1)
