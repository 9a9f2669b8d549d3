"""Loss and error along the segment between two networks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from weightops import _check
from weightops.align._evaluation import Loss, evaluate
from weightops.align.statistics import check_network
from weightops.spec import WeightSpec


@dataclass(frozen=True)
class Barrier:
    """What :func:`barrier` measured, at ``L`` points from start to end.

    Attributes:
        alphas: ``[L]`` positions, 0 at the start and 1 at the end.
        losses: ``[L]`` mean loss, of a classifier its cross-entropy in nats.
        errors: ``[L]`` share of wrong predictions; NaN where :func:`barrier` was given a loss.
    """

    alphas: Tensor
    losses: Tensor
    errors: Tensor

    @property
    def loss(self) -> float:
        """The loss barrier: the largest excess over the line between the two ends' losses."""
        return self._excess(self.losses)

    @property
    def error(self) -> float:
        """The error barrier, likewise."""
        return self._excess(self.errors)

    def _excess(self, values: Tensor) -> float:
        line = (1 - self.alphas) * values[0] + self.alphas * values[-1]
        return (values - line).max().item()


def barrier(
    model: nn.Module,
    spec: WeightSpec,
    start: Tensor,
    end: Tensor,
    inputs: Tensor,
    targets: Tensor,
    *,
    points: int = 11,
    loss: Loss | None = None,
    batch_size: int = 1000,
    norm_inputs: Tensor | None = None,
    norm: str = "reset",
    progress: bool = True,
) -> Barrier:
    """Evaluate a model along ``(1 - a) start + a end``, a from 0 to 1.

    Args:
        model: the architecture; it is copied, and neither its weights nor its mode change.
        spec: layout of its weights.
        start: network ``[P]``.
        end: network ``[P]``; align it first (:func:`weightops.align.match`) for the barrier modulo
            permutation.
        inputs: ``[B, ...]`` inputs of the model.
        targets: ``[B]`` int64 classes; with a loss of your own ``[B, ...]`` of any kind, such as the
            next tokens ``[B, T]``.
        points: number of points, both ends included.
        loss: ``loss(outputs, targets)`` of a batch, one loss a sample ``[B]``; by default the model is a
            classifier, with cross-entropies.
        batch_size: inputs evaluated at once.
        norm_inputs: inputs on which statistics are estimated anew at every point; without them batch
            norms use interpolated ones, which belong to no network.
        norm: what to estimate: ``"reset"`` batch norms, or ``"repair"`` every unit
            (:func:`weightops.align.repair`).
        progress: show a progress bar on a terminal.

    Source: Sharma et al. 2024 (arXiv 2404.06498), section 2.

    Raises:
        ValueError: shapes or devices do not fit, fewer than two points, or a batch of ``norm_inputs``
            too small for statistics.
        TypeError: an argument has the wrong type or dtype.
    """
    where = "barrier"
    check_network(where, model, spec)
    for name, row in (("start", start), ("end", end)):
        spec.check_flat(where, row, name, dims=1)
        _check.floating(where, name, row)
    if end.dtype != start.dtype:
        raise TypeError(f"{where}: end is {end.dtype}, but start is {start.dtype}")
    _check.same_device(where, "end", end, "start", start)
    _check.count(where, "points", points, 2)
    alphas = torch.linspace(0, 1, points, dtype=torch.float64)
    losses, errors = evaluate(
        where,
        model,
        spec,
        torch.stack([start, end]),
        torch.stack([1 - alphas, alphas], 1),
        inputs,
        targets,
        loss=loss,
        batch_size=batch_size,
        norm_inputs=norm_inputs,
        norm=norm,
        progress=progress,
    )
    return Barrier(alphas, losses, errors)
