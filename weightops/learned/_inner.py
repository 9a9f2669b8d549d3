"""What particles of a meta-training are trained on: mini-batches, losses and gradients of all of them at once."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from weightops import _check
from weightops.ops.population import training_reference
from weightops.ops.population.training import population_loss, population_loss_grad
from weightops.population._resolve import resolve
from weightops.population.forward import check_targets
from weightops.spec import WeightSpec


class Inner:
    """The losses of networks ``[N, P]``, each on rows of its own of data that all share."""

    def __init__(self, where: str, flat: Tensor, model: WeightSpec | nn.Module, data: Any) -> None:
        if not (isinstance(data, (tuple, list)) and len(data) == 2):
            raise TypeError(
                f"{where}: data must be a pair (x, targets), not {_check.describe(data)}"
            )
        x, targets = data
        runner, x = resolve(where, flat, model, x)
        if not runner.shared:
            raise ValueError(f"{where}: data must be samples [D, ...] that all networks share")
        self.targets = check_targets(where, runner, flat, x, targets)
        if len(targets) != len(x):
            raise ValueError(f"{where}: data must have targets [D, ...] that all networks share")
        self.x, self.runner = x, replace(runner, shared=False)

    def loss_grad(self, flat: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Losses ``[N]`` and gradients ``[N, P]`` on rows ``[N, B]``."""
        x, targets, runner = self.x[rows], self.targets[rows], self.runner
        if runner.call is None:
            return population_loss_grad(flat, x, targets, runner.code, False)
        losses, grads, _ = training_reference.loss_grad(self._forward, flat, x, targets, False)
        return losses, grads

    def losses(self, flat: Tensor, rows: Tensor) -> Tensor:
        """Losses ``[N]`` on rows ``[N, B]``, to be differentiated twice."""
        x, targets, runner = self.x[rows], self.targets[rows], self.runner
        if runner.call is None:
            return population_loss(flat, x, targets, runner.code, False)

        def one(row: Tensor, x: Tensor, targets: Tensor) -> Tensor:
            return training_reference.loss(self._forward(row, x)[0], targets)

        return torch.func.vmap(one)(flat, x, targets)

    def _forward(self, row: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        assert self.runner.call is not None
        return self.runner.call(row, x).flatten(1), row
