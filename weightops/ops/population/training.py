"""Gradients and optimisation steps of whole populations; ``weightops.population`` has their public faces."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from weightops import _op
from weightops.ops.population import training_reference

__all__ = ["population_loss_grad", "population_steps"]


def _vmap(op: Callable[[], Callable]) -> Callable:
    def run(size: int, dims: Sequence, *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        lanes = [
            op()(
                *(
                    arg.select(dim, lane) if isinstance(arg, Tensor) and dim is not None else arg
                    for arg, dim in zip(args, dims, strict=True)
                )
            )
            for lane in range(size)
        ]
        outputs = tuple(torch.stack(each) for each in zip(*lanes, strict=True))
        return outputs, (0,) * len(outputs)

    return run


def _fake_loss_grad(
    flat: Tensor, x: Tensor, targets: Tensor, code: Sequence[int], shared: bool
) -> tuple[Tensor, Tensor]:
    return flat.new_empty(len(flat)), torch.empty_like(flat)


#: not differentiable itself: it is what differentiates
population_loss_grad: Callable = _op.define(
    "population_loss_grad(Tensor flat, Tensor x, Tensor targets, int[] code, bool shared)"
    " -> (Tensor, Tensor)",
    reference=training_reference.population_loss_grad,
    fake=_fake_loss_grad,
    vmap=_vmap(lambda: population_loss_grad),
)


def _fake_steps(
    flat: Tensor, state: Tensor, x: Tensor, targets: Tensor, batches: Tensor, *others: Any
) -> tuple[Tensor, Tensor, Tensor]:
    losses = flat.new_empty(len(batches), len(flat))
    return torch.empty_like(flat), torch.empty_like(state), losses


population_steps: Callable = _op.define(
    "population_steps(Tensor flat, Tensor state, Tensor x, Tensor targets, Tensor batches, Tensor rates,"
    " int[] code, bool shared, int[] frozen, str optimizer, float[] settings, int first_step)"
    " -> (Tensor, Tensor, Tensor)",
    reference=training_reference.population_steps,
    fake=_fake_steps,
    vmap=_vmap(lambda: population_steps),
)
