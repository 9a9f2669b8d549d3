"""Loss and error on the simplex between several networks: the segment, the triangle and beyond."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from weightops import _check
from weightops.align._evaluation import Loss, evaluate
from weightops.align.statistics import check_network
from weightops.spec import WeightSpec


@dataclass(frozen=True)
class Simplex:
    """What :func:`barrier_simplex` measured, at ``L`` points between ``M`` corners.

    Attributes:
        weights: ``[L, M]`` barycentric coordinates of the points, float64; rows sum to 1.
        losses: ``[L]`` mean loss, of a classifier its cross-entropy in nats.
        errors: ``[L]`` share of wrong predictions; NaN where a loss was given.
        corner_losses: ``[M]`` the corners' losses.
        corner_errors: ``[M]`` the corners' errors.
    """

    weights: Tensor
    losses: Tensor
    errors: Tensor
    corner_losses: Tensor
    corner_errors: Tensor

    @property
    def loss(self) -> float:
        """The loss barrier: the largest excess over the corners' losses, interpolated."""
        return self._excess().max().item()

    @property
    def error(self) -> float:
        """The error barrier, likewise."""
        return (self.errors - self.weights @ self.corner_errors).max().item()

    @property
    def worst(self) -> Tensor:
        """Coordinates ``[M]`` of the point whose loss has the largest excess."""
        return self.weights[self._excess().argmax()]

    def _excess(self) -> Tensor:
        return self.losses - self.weights @ self.corner_losses


def barrier_simplex(
    model: nn.Module,
    spec: WeightSpec,
    corners: Tensor,
    inputs: Tensor,
    targets: Tensor,
    *,
    points: int = 11,
    weights: Tensor | None = None,
    loss: Loss | None = None,
    batch_size: int = 1000,
    norm_inputs: Tensor | None = None,
    norm: str = "reset",
    progress: bool = True,
) -> Simplex:
    """Evaluate a model at ``sum_m weights[l, m] corners[m]``, all over the simplex of the corners.

    Three networks that are strongly linearly connected modulo permutation have no barrier anywhere in
    their triangle, once each is aligned.

    Args:
        corners: networks ``[M, P]``, M at least 2.
        points: points on each edge, both ends included: ``C(points + M - 2, M - 1)`` in all, evenly
            spread.
        weights: ``[L, M]`` coordinates of the points instead, rows that sum to 1.
        model, spec, inputs, targets, loss, batch_size, norm_inputs, norm, progress: as for
            :func:`weightops.align.barrier`.

    Source: Sharma et al. 2024 (arXiv 2404.06498), section 2.

    Raises:
        ValueError, TypeError: as :func:`weightops.align.barrier`.
    """
    where = "barrier_simplex"
    check_network(where, model, spec)
    spec.check_flat(where, corners, "corners", dims=2)
    _check.floating(where, "corners", corners)
    if len(corners) < 2:
        raise ValueError(f"{where}: corners must hold at least 2 networks, not {len(corners)}")
    _check.count(where, "points", points, 2)
    rows = _lattice(len(corners), points) if weights is None else _rows(where, weights, corners)
    # The corners themselves are evaluated in any case.
    ends = torch.eye(len(corners), dtype=rows.dtype)
    missing = [m for m, end in enumerate(ends) if not (rows == end).all(1).any()]
    points_and_ends = torch.cat([rows, ends[missing]])
    losses, errors = evaluate(
        where,
        model,
        spec,
        corners,
        points_and_ends,
        inputs,
        targets,
        loss=loss,
        batch_size=batch_size,
        norm_inputs=norm_inputs,
        norm=norm,
        progress=progress,
    )
    at = torch.stack([(points_and_ends == end).all(1).nonzero()[0, 0] for end in ends])
    count = len(rows)
    return Simplex(rows, losses[:count], errors[:count], losses[at], errors[at])


def _lattice(corners: int, points: int) -> Tensor:
    """Every ``[M]`` of multiples of 1 / (points - 1) that sum to 1, from the first corner to the last."""
    steps = points - 1
    bars = torch.tensor(list(combinations(range(steps + corners - 1), corners - 1)))
    edges = torch.nn.functional.pad(bars, (1, 0), value=-1)
    counts = torch.nn.functional.pad(edges, (0, 1), value=steps + corners - 1).diff() - 1
    return counts.flip(0).double() / steps


def _rows(where: str, weights: Any, corners: Tensor) -> Tensor:
    _check.tensor(where, "weights", weights, "[L, M]", 2)
    _check.size(where, "weights", weights.shape[1], len(corners), "the corners")
    _check.floating(where, "weights", weights)
    if len(weights) == 0:
        raise ValueError(f"{where}: weights holds no point")
    _check.finite(where, "weights", weights)
    rows = weights.detach().double().cpu()
    off = (rows.sum(1) - 1).abs() > 1e-5
    if off.any():
        row = off.nonzero()[0].item()
        raise ValueError(
            f"{where}: rows of weights must sum to 1, but weights[{row}] sums to {rows[row].sum():g}"
        )
    return rows
