"""What a learned optimizer sees of every weight: plain torch on flat tensors, which a kernel can replace."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from weightops.spec import WeightSpec

#: of the momenta, and time scales in steps (as in the paper's code, which has them of ``learned_optimization``)
DECAYS = (0.1, 0.5, 0.9, 0.99, 0.999, 0.9999)
TIMESCALES = (1, 3, 10, 30, 100, 300, 1000, 3000, 10_000, 30_000, 100_000)
#: weight, gradient and momenta of one weight; and what all weights share
FEATURES, TIMES = 2 + len(DECAYS), len(TIMESCALES)


def features(flat: Tensor, grads: Tensor, momenta: Tensor, spec: WeightSpec, eps: float) -> Tensor:
    """Weights, gradients and momenta, each over its root mean square in the tensor.

    Args:
        flat, grads: ``[N, P]``.
        momenta: ``[R, N, P]``, of which the first six are taken.
        spec: of the P weights.
        eps: added to mean squares.

    Returns:
        ``[N, P, 8]``, strided: a channel's numbers lie together. Differentiable.
    """
    raw = torch.cat([flat[None], grads[None], momenta[: len(DECAYS)]])
    sizes = [prod(shape) for shape in spec.shapes.values()]
    scaled = [piece * _scale(piece, eps) for piece in raw.split(sizes, -1)]
    return (torch.cat(scaled, -1) if scaled else raw).movedim(0, -1)


def _scale(piece: Tensor, eps: float) -> Tensor:
    return (piece.square().mean(-1, keepdim=True) + eps).rsqrt()


def time_features(step: int | Tensor, like: Tensor) -> Tensor:
    """``tanh(step / scale - 1)`` for all time scales: ``[11]``, or ``[N, 11]`` of steps ``[N]``."""
    scales = torch.tensor(TIMESCALES, dtype=like.dtype, device=like.device)
    at = torch.as_tensor(step, dtype=like.dtype, device=like.device)
    return (at[..., None] / scales - 1).tanh()
