"""The training loop, flat weights in and flat weights and probes out. What runs it faster goes here."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from weightops.circles.model import _spec, forward
from weightops.ops.fourier import fourier_signal

#: networks at once: more of them take memory, and are no faster
_GROUP = 8


def steps(
    flat: Tensor,
    moments: Tensor,
    pairs: Tensor,
    sizes: tuple[int, int, int],
    rates: Tensor,
    settings: Sequence[float],
    frozen: int,
    first_step: int,
    count: int,
    every: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``count`` full-batch steps of AdamW on the cross-entropy of ``(a + b) mod p``, for each network by itself.

    Args:
        flat: ``[M, P]``, in the layout of ``pair_spec(*sizes)``.
        moments: ``[2, M, P]``, of the steps before.
        pairs: int64 ``[M, B, 2]``, tokens in 0 .. p - 1.
        sizes: p, d and width.
        rates: learning rates ``[M]``, float64.
        settings: ``(weight decay, beta1, beta2, eps)``.
        frozen: so many numbers in front of each row stay as they are: 0, or p d, the embedding.
        first_step: steps made before, which the bias correction counts.
        every: of how many steps, counted from 0, losses and signals are recorded.

    Returns:
        ``flat`` and ``moments`` behind the steps, and of R recorded steps the losses ``[R, M]`` and the signals
        ``[R, M, K]`` before them. All steps at once are, to the bit, the same as one after the other.

    Source: ``torch.optim.AdamW``; Ding et al. 2024, arXiv 2405.17420.
    """
    flat, moments = flat.clone(), moments.clone()
    recorded = len(range(-first_step % every, count, every))
    losses = flat.new_empty(recorded, len(flat))
    signals = flat.new_empty(recorded, len(flat), (sizes[0] - 1) // 2)
    for begin in range(0, len(flat), _GROUP):
        at = slice(begin, begin + _GROUP)
        targets = (pairs[at].sum(2) % sizes[0]).flatten()
        record = 0
        for step in range(first_step, first_step + count):
            loss, parts, grads = _gradients(flat[at], pairs[at], targets, sizes, frozen)
            if step % every == 0:
                losses[record, at], signals[record, at] = loss, fourier_signal(parts[0].detach())
                record += 1
            trained = flat[at, frozen:], moments[:, at, frozen:]
            _adamw_(*trained, grads, rates[at, None], settings, step + 1)
    return flat, moments, losses, signals


def _gradients(
    flat: Tensor, pairs: Tensor, targets: Tensor, sizes: tuple[int, int, int], frozen: int
) -> tuple[Tensor, list[Tensor], Tensor]:
    """Losses ``[M]``, the networks' tensors, and the gradients ``[M, P - frozen]``."""
    parts = [part.detach() for part in _spec(*sizes).unflatten(flat).values()]
    trained = parts[1:] if frozen else parts
    for part in trained:
        part.requires_grad_()
    with torch.enable_grad():
        logits = forward(parts, pairs).flatten(0, 1)
        loss = F.cross_entropy(logits, targets, reduction="none").view(len(flat), -1).mean(1)
        grads = torch.autograd.grad(loss.sum(), trained)
    return loss.detach(), parts, torch.cat([grad.flatten(1) for grad in grads], 1)


def _adamw_(
    flat: Tensor,
    moments: Tensor,
    grads: Tensor,
    rates: Tensor,
    settings: Sequence[float],
    step: int,
) -> None:
    decay, beta1, beta2, eps = settings
    first, second = moments
    first.lerp_(grads, 1 - beta1)
    second.mul_(beta2).addcmul_(grads, grads, value=1 - beta2)
    divisor = (second.sqrt() / (1 - beta2**step) ** 0.5).add_(eps)
    flat.mul_((1 - rates * decay).to(flat))
    flat.addcmul_(first / divisor, (rates / (beta1**step - 1)).to(flat))
