"""Gradients and optimisation steps of whole populations; ``weightops.population`` has their public faces."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from weightops import _op
from weightops.ops.population import grouped, population_eval, training_reference

__all__ = ["population_loss", "population_loss_grad", "population_steps", "steps_by_torch"]


def steps_by_torch(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As :data:`population_steps` without its kernel."""
    return training_reference.population_steps(*args, train_grad=grouped.population_train_grad)


def _fake_loss_grad(
    flat: Tensor, x: Tensor, targets: Tensor, code: Sequence[int], shared: bool
) -> tuple[Tensor, Tensor]:
    return flat.new_empty(len(flat)), torch.empty_like(flat)


#: not differentiable itself: it is what differentiates
population_loss_grad: Callable = _op.define(
    "population_loss_grad(Tensor flat, Tensor x, Tensor targets, int[] code, bool shared)"
    " -> (Tensor, Tensor)",
    reference=grouped.population_loss_grad,
    fake=_fake_loss_grad,
    vmap=_op.lane_by_lane(lambda: population_loss_grad),
)


def _of(code: Sequence[int], shared: bool, targets: Tensor) -> Callable:
    return lambda flat, x: grouped.losses(flat, x, targets, code, shared)


def _loss_backward(args: Sequence, needs: Sequence[bool], grad: Tensor) -> tuple:
    flat, x, targets, code, shared = args
    # What is differentiated again, and what belongs to the samples, is left to torch.
    if needs[1] or torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
        pull: Any = torch.func.vjp(_of(code, shared, targets), flat, x)[1]
        of_flat, of_x = pull(grad)
        return of_flat, of_x if needs[1] else None, None, None, None
    grads = population_loss_grad(flat, x, targets, code, shared)[1]
    return grads * grad[:, None], None, None, None, None


def _loss_jvp(args: Sequence, *tangents: Tensor | None) -> Tensor:
    flat, x, targets, code, shared = args
    return _op.push(_of(code, shared, targets), (flat, x), tangents)


#: mean losses ``[N]``
population_loss: Callable = _op.define(
    "population_loss(Tensor flat, Tensor x, Tensor targets, int[] code, bool shared) -> Tensor",
    reference=grouped.losses,
    fake=lambda flat, *others: flat.new_empty(len(flat)),
    vmap=_op.lane_by_lane(lambda: population_loss),
    backward=_loss_backward,
    jvp=_loss_jvp,
)


_op.serve(
    "population_loss",
    "cpu",
    lambda flat, x, targets, code, shared: population_eval(flat, x, targets, code, shared, "loss"),
    by="population_eval",
)


def _fake_steps(
    flat: Tensor, state: Tensor, x: Tensor, targets: Tensor, batches: Tensor, *others: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    steps, networks = len(batches), len(flat)
    first, probe = others[-2:]
    recorded = len(range(-first % probe[3], steps, probe[3])) if probe else 0
    signals = flat.new_empty(recorded, networks, (probe[1] - 1) // 2 if probe else 0)
    losses = flat.new_empty(steps, networks)
    return torch.empty_like(flat), torch.empty_like(state), losses, signals


population_steps: Callable = _op.define(
    "population_steps(Tensor flat, Tensor state, Tensor x, Tensor targets, Tensor batches, Tensor rates,"
    " int[] code, bool shared, int[] frozen, str optimizer, float[] settings, int first_step,"
    " int[] probe) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=steps_by_torch,
    fake=_fake_steps,
    vmap=_op.lane_by_lane(lambda: population_steps),
)
