"""The definition of assign: scipy's solver, one problem at a time, and the potentials that prove it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def assign(score: Tensor, maximize: bool, duals: Tensor | None) -> tuple[Tensor, Tensor]:
    """``score`` [B, n, m] -> columns [B, n] and column potentials [B, m]; ``duals`` only speed it up."""
    columns, potentials = assign_numpy(score.detach().cpu().numpy(), maximize)
    return (
        torch.from_numpy(columns).to(score.device),
        torch.from_numpy(potentials).to(score.device),
    )


def assign_numpy(score: np.ndarray, maximize: bool) -> tuple[np.ndarray, np.ndarray]:
    from scipy.optimize import linear_sum_assignment  # 0.2 s that most programs never need

    problems, rows, cols = score.shape
    columns = np.empty((problems, rows), dtype=np.int64)
    potentials = np.zeros((problems, cols))
    for b in range(problems):
        cost = score[b].astype(np.float64)
        cost = -cost if maximize else cost
        columns[b] = linear_sum_assignment(cost)[1]
        found = column_potentials(cost, columns[b])
        potentials[b] = -found if maximize else found
    return columns, potentials


def column_potentials(cost: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Potentials v, at most 0, with ``cost[i, j] - v[j]`` least at row i's own column.

    Moving row i from its column to j costs ``cost[i, j] - cost[i, own]``; v are the shortest paths
    of these moves from anywhere (Bellman and Ford), which exist just because no cycle of them gains.
    """
    moves = cost - np.take_along_axis(cost, columns[:, None], 1)
    v = np.zeros(cost.shape[1])
    for _ in range(len(columns)):
        shorter = np.minimum(v, (v[columns][:, None] + moves).min(0, initial=0.0))
        if np.array_equal(shorter, v):
            break
        v = shorter
    return v
