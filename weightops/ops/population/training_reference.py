"""The definition of a population's training: gradients and optimisers in plain torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from weightops.ops.population import reference

#: one network: ``(row [P], x [B, ...]) -> logits [B, K]``
Forward = Callable[[Tensor, Tensor], Tensor]


def loss(logits: Tensor, targets: Tensor) -> Tensor:
    """One network's mean loss: cross-entropy of classes ``[B]``, mean squared error of values ``[B, K]``."""
    if targets.is_floating_point():
        return (logits - targets).square().mean()
    return F.cross_entropy(logits, targets)


def own_targets(targets: Tensor) -> bool:
    """Whether every network has targets of its own."""
    return targets.dim() == (3 if targets.is_floating_point() else 2)


def losses(flat: Tensor, x: Tensor, targets: Tensor, code: Sequence[int], shared: bool) -> Tensor:
    """Mean losses ``[N]`` of networks ``[N, P]``, in eval mode."""

    def one(row: Tensor, x: Tensor, targets: Tensor) -> Tensor:
        return loss(reference.run(row, x, code), targets)

    dims = 0, None if shared else 0, 0 if own_targets(targets) else None
    return torch.func.vmap(one, dims)(flat, x, targets)


def loss_grad(
    forward: Forward, flat: Tensor, x: Tensor, targets: Tensor, shared: bool
) -> tuple[Tensor, Tensor]:
    """Mean losses ``[N]`` and their gradients ``[N, P]``."""

    def one(row: Tensor, x: Tensor, targets: Tensor) -> Tensor:
        return loss(forward(row, x), targets)

    dims = 0, None if shared else 0, 0 if own_targets(targets) else None
    grads, losses = torch.func.vmap(torch.func.grad_and_value(one), dims)(flat, x, targets)
    return losses, grads


def population_loss_grad(
    flat: Tensor, x: Tensor, targets: Tensor, code: Sequence[int], shared: bool
) -> tuple[Tensor, Tensor]:
    """Mean losses ``[N]`` of networks ``[N, P]`` and their gradients ``[N, P]``, in eval mode."""
    return loss_grad(lambda row, x: reference.run(row, x, code), flat, x, targets, shared)


def population_steps(
    flat: Tensor,
    state: Tensor,
    x: Tensor,
    targets: Tensor,
    batches: Tensor,
    rates: Tensor,
    code: Sequence[int],
    shared: bool,
    frozen: Sequence[int],
    optimizer: str,
    settings: Sequence[float],
    first_step: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`steps` of a program; batch norm goes by the batch's own statistics."""
    return steps(
        lambda row, x: reference.run(row, x, code, training=True),
        *(flat, state, x, targets, batches, rates, shared, frozen, optimizer, settings, first_step),
    )


def steps(
    forward: Forward,
    flat: Tensor,
    state: Tensor,
    x: Tensor,
    targets: Tensor,
    batches: Tensor,
    rates: Tensor,
    shared: bool,
    frozen: Sequence[int],
    optimizer: str,
    settings: Sequence[float],
    first_step: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Optimisation steps of every network.

    Args:
        flat: ``[N, P]``.
        state: adamw: both moments ``[2, N, P]``; sgd: the momentum ``[1, N, P]``.
        x, targets: samples ``[D, ...]`` (``shared``) or ``[N, D, ...]``; classes ``[D]`` or ``[N, D]``, or
            values ``[D, K]`` or ``[N, D, K]``.
        batches: rows of each step's samples, int64 ``[S, N, b]``; b = 0: all of them.
        rates: learning rates ``[N]``, float64.
        frozen: begins and ends of ranges of P that stay as they are.
        settings: adamw ``(weight decay, beta1, beta2, eps)``; sgd ``(weight decay, momentum, nesterov)``.
        first_step: steps made before, which adamw's bias correction counts.

    Returns:
        ``flat`` and ``state`` behind the steps, and each step's losses before it ``[S, N]``.

    Source: ``torch.optim.AdamW`` and ``torch.optim.SGD``.
    """
    update = {"adamw": _adamw, "sgd": _sgd}[optimizer]
    moves = torch.ones(flat.shape[1], dtype=torch.bool, device=flat.device)
    for begin, end in zip(frozen[::2], frozen[1::2], strict=True):
        moves[begin:end] = False
    rates = rates.to(flat)[:, None]
    losses = flat.new_empty(len(batches), len(flat))
    for s, rows in enumerate(batches):
        if batches.shape[2]:
            taken = _take(x, rows, shared), _take(targets, rows, not own_targets(targets))
            losses[s], grads = loss_grad(forward, flat, *taken, False)
        else:
            losses[s], grads = loss_grad(forward, flat, x, targets, shared)
        new, moments = update(flat, state, grads, rates, settings, first_step + s + 1)
        flat, state = torch.where(moves, new, flat), torch.where(moves, moments, state)
    return flat.clone(), state.clone(), losses


def _take(values: Tensor, rows: Tensor, shared: bool) -> Tensor:
    """Each network's rows ``[N, b]`` of ``[D, ...]`` or ``[N, D, ...]`` -> ``[N, b, ...]``."""
    if shared:
        return values[rows]
    return values[torch.arange(len(rows), device=rows.device)[:, None], rows]


def _adamw(
    flat: Tensor, state: Tensor, grads: Tensor, rates: Tensor, settings: Sequence[float], step: int
) -> tuple[Tensor, Tensor]:
    decay, beta1, beta2, eps = settings
    first = state[0].lerp(grads, 1 - beta1)
    second = state[1] * beta2 + grads.square() * (1 - beta2)
    flat = flat * (1 - rates * decay)
    divisor = second.sqrt() / (1 - beta2**step) ** 0.5 + eps
    return flat - rates / (1 - beta1**step) * first / divisor, torch.stack([first, second])


def _sgd(
    flat: Tensor, state: Tensor, grads: Tensor, rates: Tensor, settings: Sequence[float], step: int
) -> tuple[Tensor, Tensor]:
    decay, momentum, nesterov = settings
    grads = grads + decay * flat
    buffer = momentum * state[0] + grads
    return flat - rates * (grads + momentum * buffer if nesterov else buffer), buffer[None]
