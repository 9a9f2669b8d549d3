"""The definition of functional, in plain torch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from weightops.ops.equivariant import _linear


def features(
    flat: Tensor, grads: Tensor, momenta: Tensor, sizes: Sequence[int], eps: float
) -> Tensor:
    """Weights, gradients and momenta, each over its root mean square in the tensor.

    Args:
        flat, grads: ``[N, P]``.
        momenta: ``[R, N, P]``.
        sizes: of the tensors that the P weights are of.
        eps: added to mean squares.

    Returns:
        ``[N, P, 2 + R]``, strided: a channel's numbers lie together.
    """
    raw = torch.cat([flat[None], grads[None], momenta])
    scaled = [piece * _scale(piece, eps) for piece in raw.split(list(sizes), -1)]
    return (torch.cat(scaled, -1) if scaled else raw).movedim(0, -1)


def _scale(piece: Tensor, eps: float) -> Tensor:
    return (piece.square().mean(-1, keepdim=True) + eps).rsqrt()


def update(
    momenta: Tensor, flat: Tensor, grads: Tensor, shares: Tensor, shared: Tensor, *others: Any
) -> Tensor:
    """:func:`functional` of momenta ``[R, N, P]`` that are first moved, in place, by ``shares`` ``[R, 1 or N]``.

    Those behind the ones that ``widths`` count are moved only.
    """
    used = others[2][0] - 2 - shared.shape[1]
    momenta.lerp_(grads, shares[..., None])
    return functional(flat, grads, momenta[:used], shared, *others)


def functional(
    flat: Tensor,
    grads: Tensor,
    momenta: Tensor,
    shared: Tensor,
    theta: Tensor,
    sizes: Sequence[int],
    widths: Sequence[int],
    plan: Sequence[int],
    eps: float,
) -> Tensor:
    """Networks ``[N, P]``, what is shared ``[1 or N, S]`` and theta ``[1 or N, D]`` -> f ``[N, P]``."""
    x = features(flat, grads, momenta, sizes, eps)
    if not len(flat):
        theta = theta.new_zeros(1, theta.shape[1])
    rows, layers = len(theta), len(widths) - 1
    counts = [1] * (layers - 1) + [plan[2]]
    lengths = [n * i * o for n, (i, o) in zip(counts, pairwise(widths), strict=True)]
    lengths += widths[1:-1]
    *pieces, last_bias = theta.split([*lengths, theta.shape[1] - sum(lengths)], -1)
    weights = [
        piece.reshape(rows, n, i, o)
        for piece, n, (i, o) in zip(pieces, counts, pairwise(widths), strict=False)
    ]
    channels = x.shape[-1]
    for n, bias in enumerate(pieces[layers:]):
        weight, bias = weights[n][:, 0], bias[:, None]
        if n == 0:
            # What all weights share is summed once, with the bias.
            bias = bias + shared[:, None] @ weight[:, channels:]
            weight = weight[:, :channels]
        x = (x @ weight + bias).relu()
    return _linear.reference(x, weights[-1], last_bias[..., None], plan, False)[..., 0]  # type: ignore[attr-defined]
