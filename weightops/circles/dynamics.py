"""Signals over time as a linear system: fitted, and run from the start."""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from weightops import _check
from weightops.circles.signals import check_signals


@dataclass(frozen=True)
class Dynamics:
    """``s(t + 1) - s(t) = A s(t) + b`` of each network.

    Attributes:
        matrix: A, ``[M, K, K]``, float64; NaN for a network whose signals are not finite.
        offset: b, ``[M, K]``.
        r2: how much of the changes is explained, ``[M]``: 1 minus the share of the variance that is left, the
            mean over the frequencies.
    """

    matrix: Tensor
    offset: Tensor
    r2: Tensor

    def rollout(self, start: Tensor, steps: int) -> Tensor:
        """The signals ``[steps + 1, M, K]`` that follow from those at the start, ``[M, K]``."""
        where = "rollout"
        _check.tensor(where, "start", start, "[M, K]", 2)
        _check.floating(where, "start", start)
        _refuse_meta(where, "start", start)
        _check.count(where, "steps", steps, 0)
        if start.shape != self.offset.shape:
            raise ValueError(
                f"{where}: start must have shape {list(self.offset.shape)}, not {list(start.shape)}"
            )
        found = [start.detach().double().cpu()]
        for _ in range(steps):
            change = torch.einsum("mij,mj->mi", self.matrix, found[-1]) + self.offset
            found.append(found[-1] + change)
        return torch.stack(found)


def _refuse_meta(where: str, name: str, value: Tensor) -> None:
    if value.is_meta:
        raise ValueError(f"{where}: {name} must have values, which a meta tensor has not")


def fit_dynamics(signals: Tensor, *, alpha: float | None = None) -> Dynamics:
    """Fit a linear system to signals over time, for each network by itself.

    Args:
        signals: ``[T, M, K]`` of T steps one after the other, as :func:`train` records them; the paper takes the
            first 1,000.
        alpha: of a Lasso, whose matrix is sparse; least squares by default.

    Raises:
        ValueError: fewer than two changes, alpha out of range.
        TypeError: wrong types.

    Source: Ding et al. 2024, arXiv 2405.17420, section 5.
    """
    where = "fit_dynamics"
    check_signals(where, signals, "[T, M, K]", 3)
    _check.tensor(where, "signals", signals, "[T, M, K]", 3)
    _refuse_meta(where, "signals", signals)
    if len(signals) < 3 or signals.shape[2] < 1:
        raise ValueError(
            f"{where}: signals must have 3 steps and a frequency at least, not shape {list(signals.shape)}"
        )
    if alpha is not None:
        _check.number(where, "alpha", alpha, 0, sys.float_info.max)
        if alpha == 0:
            raise ValueError(f"{where}: alpha must be above 0, or None for least squares")
    values = signals.detach().double().cpu().numpy()
    networks, count = values.shape[1:]
    matrix = np.full((networks, count, count), np.nan)
    offset, r2 = np.full((networks, count), np.nan), np.full(networks, np.nan)
    for m in range(networks):
        if np.isfinite(values[:, m]).all():
            matrix[m], offset[m], r2[m] = _fit(values[:-1, m], np.diff(values[:, m], axis=0), alpha)
    return Dynamics(*map(torch.from_numpy, (matrix, offset, r2)))


def _fit(states: np.ndarray, changes: np.ndarray, alpha: float | None) -> tuple[Any, Any, float]:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import Lasso, LinearRegression

    fit: Any = (
        LinearRegression()
        if alpha is None
        else Lasso(alpha=alpha, precompute=True, max_iter=10_000)
    )
    with warnings.catch_warnings():
        # What a descent leaves then is far below what alpha shrinks.
        warnings.simplefilter("ignore", ConvergenceWarning)
        fit.fit(states, changes)
    return fit.coef_, fit.intercept_, fit.score(states, changes)
