"""Loss and error along the segment between two networks."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from weightops import _check
from weightops._progress import track
from weightops.ops.permute import merge
from weightops.spec import WeightSpec


@dataclass(frozen=True)
class Barrier:
    """What :func:`barrier` measured, at ``L`` points from start to end.

    Attributes:
        alphas: ``[L]`` positions, 0 at the start and 1 at the end.
        losses: ``[L]`` mean cross-entropy, nats.
        errors: ``[L]`` share of wrong predictions.
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


@torch.no_grad()
def barrier(
    model: nn.Module,
    spec: WeightSpec,
    start: Tensor,
    end: Tensor,
    inputs: Tensor,
    targets: Tensor,
    *,
    points: int = 11,
    batch_size: int = 1000,
    norm_inputs: Tensor | None = None,
    progress: bool = True,
) -> Barrier:
    """Evaluate a classifier along ``(1 - a) start + a end``, a from 0 to 1.

    Args:
        model: the architecture; it is copied, and neither its weights nor its mode change.
        spec: layout of its weights.
        start: network ``[P]``.
        end: network ``[P]``; align it first (:func:`weightops.align.match`) for the barrier modulo
            permutation.
        inputs: ``[B, ...]`` inputs of the model.
        targets: ``[B]`` int64 classes.
        points: number of points, both ends included.
        batch_size: inputs evaluated at once.
        norm_inputs: inputs on which batch norm's statistics are estimated anew at every point
            ("reset"); without them interpolated statistics are used, which belong to no network.
        progress: show a progress bar on a terminal.

    Source: Sharma et al. 2024 (arXiv 2404.06498), section 2.

    Raises:
        ValueError: shapes or devices do not fit, or fewer than two points.
        TypeError: an argument has the wrong type or dtype.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"barrier: model must be a module, not {_check.describe(model)}")
    if not isinstance(spec, WeightSpec):
        raise TypeError(f"barrier: spec must be a WeightSpec, not {_check.describe(spec)}")
    for name, row in (("start", start), ("end", end)):
        spec.check_flat("barrier", row, name, dims=1)
        _check.floating("barrier", name, row)
    if end.dtype != start.dtype:
        raise TypeError(f"barrier: end is {end.dtype}, but start is {start.dtype}")
    _check.same_device("barrier", "end", end, "start", start)
    _check.tensor("barrier", "inputs", inputs, "[B, ...]")
    _check.tensor("barrier", "targets", targets, "[B]", 1)
    if targets.dtype != torch.int64:
        raise TypeError(f"barrier: targets must be int64 classes, not {targets.dtype}")
    if inputs.dim() == 0 or len(inputs) == 0:
        raise ValueError(f"barrier: inputs must hold examples, not shape {list(inputs.shape)}")
    _check.size("barrier", "targets", len(targets), len(inputs), "the batch of inputs")
    if norm_inputs is not None:
        _check.tensor("barrier", "norm_inputs", norm_inputs, "[B, ...]")
    for name, value, least in (("points", points, 2), ("batch_size", batch_size, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(
                f"barrier: {name} must be an integer from {least}, not {_check.describe(value)}"
            )

    network = copy.deepcopy(model).eval()
    alphas = torch.linspace(0, 1, points, dtype=torch.float64)
    path = merge(
        torch.stack([start, end]), torch.stack([1 - alphas, alphas], 1).to(start.device), spec
    )
    measured = []
    for row in track(path.unbind(), "barrier", enabled=progress):
        spec.load_(network, row)
        if norm_inputs is not None:
            reset_batch_norm(network, norm_inputs, batch_size)
        measured.append(_evaluate(network, inputs, targets, batch_size))
    losses, errors = torch.tensor(measured, dtype=torch.float64).unbind(1)
    return Barrier(alphas, losses, errors)


@torch.no_grad()
def reset_batch_norm(model: nn.Module, inputs: Tensor, batch_size: int) -> None:
    """Estimate the running statistics of every batch norm in ``model`` anew, over all of ``inputs``."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over the batches
        norm.train()
    if norms:
        for batch in inputs.split(batch_size):
            model(batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()


def _evaluate(
    model: nn.Module, inputs: Tensor, targets: Tensor, batch_size: int
) -> tuple[float, float]:
    loss = wrong = 0.0
    for x, y in zip(inputs.split(batch_size), targets.split(batch_size), strict=True):
        logits = model(x)
        loss += nn.functional.cross_entropy(logits, y, reduction="sum").item()
        wrong += (logits.argmax(1) != y).sum().item()
    return loss / len(targets), wrong / len(targets)
