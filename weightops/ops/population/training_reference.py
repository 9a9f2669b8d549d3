"""The definition of a population's training: gradients and optimisers in plain torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from weightops.ops.fourier import reference as fourier
from weightops.ops.population import reference
from weightops.ops.population.program import decode

#: at a step: ``(flat [N, P], x, targets, shared, step) -> mean losses [N], their gradients [N, P]``, and ``flat`` with
#: running statistics moved
TrainGrad = Callable[[Tensor, Tensor, Tensor, bool, int], tuple[Tensor, Tensor, Tensor]]


def loss(logits: Tensor, targets: Tensor) -> Tensor:
    """One network's mean loss: cross-entropy of classes ``[B]``, mean squared error of values ``[B, K]``."""
    if targets.is_floating_point():
        return (logits - targets).square().mean()
    return F.cross_entropy(logits, targets)


def losses(flat: Tensor, x: Tensor, targets: Tensor, code: Sequence[int], shared: bool) -> Tensor:
    """Mean losses ``[N]`` of networks ``[N, P]``, in eval mode."""

    def one(row: Tensor, x: Tensor, targets: Tensor) -> Tensor:
        return loss(reference.run(row, x, code), targets)

    dims = 0, None if shared else 0, 0 if reference.own_targets(targets) else None
    return torch.func.vmap(one, dims)(flat, x, targets)


def loss_grad(
    forward: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    flat: Tensor,
    x: Tensor,
    targets: Tensor,
    shared: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean losses ``[N]``, their gradients ``[N, P]``, and what else ``forward`` gives of each network."""

    def one(row: Tensor, x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits, moved = forward(row, x)
        return loss(logits, targets), moved

    dims = 0, None if shared else 0, 0 if reference.own_targets(targets) else None
    differentiated = torch.func.grad_and_value(one, has_aux=True)
    grads, (losses, moved) = torch.func.vmap(differentiated, dims)(flat, x, targets)
    return losses, grads, moved


def population_loss_grad(
    flat: Tensor,
    x: Tensor,
    targets: Tensor,
    code: Sequence[int],
    shared: bool,
) -> tuple[Tensor, Tensor]:
    """Mean losses ``[N]`` of networks ``[N, P]`` and their gradients ``[N, P]``, in eval mode."""

    def forward(row: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return reference.run(row, x, code), row

    losses, grads, _ = loss_grad(forward, flat, x, targets, shared)
    return losses, grads


def population_train_grad(
    flat: Tensor, x: Tensor, targets: Tensor, code: Sequence[int], shared: bool, step: int
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`population_loss_grad` in training, and ``flat`` with running statistics moved."""

    def forward(row: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return reference.run_training(row, x, code, reference.share_at(step))

    return loss_grad(forward, flat, x, targets, shared)


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
    probe: Sequence[int],
    *,
    train_grad: Callable = population_train_grad,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`steps` of a program; batch norm goes by the batch's own statistics, and the running ones follow."""
    statistics = [
        bound
        for layer in decode(code)[1]
        if layer["kind"] == "batch_norm"
        for at in layer["places"][2:]
        for bound in (at, at + layer["taken"][0])
    ]
    stays = [*frozen, *statistics]
    return steps(
        lambda flat, x, targets, shared, step: train_grad(flat, x, targets, code, shared, step),
        *(flat, state, x, targets, batches, rates, shared, stays, optimizer, settings, first_step),
        probe,
    )


def steps(
    train_grad: TrainGrad,
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
    probe: Sequence[int] = (),
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Optimisation steps of every network.

    Args:
        flat: ``[N, P]``.
        state: adamw: both moments ``[2, N, P]``; sgd: the momentum ``[1, N, P]``.
        x, targets: samples ``[D, ...]`` (``shared``) or ``[N, D, ...]``; classes ``[D]`` or ``[N, D]``, or
            values ``[D, K]`` or ``[N, D, K]``.
        batches: rows of each step's samples, int64 ``[S, N, b]``; b = 0: all of them.
        rates: learning rates ``[N]``, float64.
        frozen: begins and ends of ranges of P that are not optimised.
        settings: adamw ``(weight decay, beta1, beta2, eps)``; sgd ``(weight decay, momentum, nesterov)``.
        first_step: steps made before, which adamw's bias correction counts.
        probe: where in a row an embedding ``[p, d]`` begins, p, d, and of how many steps, counted from 0, its
            signals are recorded; or nothing.

    Returns:
        ``flat`` and ``state`` behind the steps, each step's losses before it ``[S, N]``, and the signals before
        R recorded steps ``[R, N, (p - 1) // 2]``, ``[0, N, 0]`` without a probe.

    Source: ``torch.optim.AdamW`` and ``torch.optim.SGD``.
    """
    update = {"adamw": _adamw, "sgd": _sgd}[optimizer]
    moves = torch.ones(flat.shape[1], dtype=torch.bool, device=flat.device)
    for begin, end in zip(frozen[::2], frozen[1::2], strict=True):
        moves[begin:end] = False
    rates = rates.to(flat)[:, None]
    losses = flat.new_empty(len(batches), len(flat))
    recorded = []
    for s, rows in enumerate(batches):
        step = first_step + s + 1
        if probe and (step - 1) % probe[3] == 0:
            recorded.append(signals(flat, *probe[:3]))
        if batches.shape[2]:
            taken = _take(x, rows, shared), _take(targets, rows, not reference.own_targets(targets))
            losses[s], grads, moved = train_grad(flat, *taken, False, step)
        else:
            losses[s], grads, moved = train_grad(flat, x, targets, shared, step)
        new, moments = update(flat, state, grads, rates, settings, step)
        flat, state = torch.where(moves, new, moved), torch.where(moves, moments, state)
    empty = flat.new_empty(0, len(flat), (probe[1] - 1) // 2 if probe else 0)
    found = torch.stack(recorded) if recorded else empty
    return flat.clone(), state.clone(), losses, found


def signals(flat: Tensor, place: int, p: int, d: int) -> Tensor:
    """Of the embeddings ``[p, d]`` at a place of the rows ``flat``."""
    embedding = flat[:, place : place + p * d].view(-1, p, d)
    return fourier.signal(embedding, fourier.transform(p, flat.dtype, flat.device))


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
