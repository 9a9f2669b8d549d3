"""Batched exact linear assignment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from weightops import _check, _load, _op
from weightops.ops.assign import reference


def _fake(score: Tensor, maximize: bool, duals: Tensor | None) -> tuple[Tensor, Tensor]:
    problems, rows, cols = score.shape
    return (
        score.new_empty(problems, rows, dtype=torch.int64),
        score.new_empty(problems, cols, dtype=torch.float64),
    )


def _refuse_infinite(score: Tensor, maximize: bool, duals: Tensor | None) -> None:
    if not torch.isfinite(score).all():
        raise RuntimeError("assign: score must be finite")


def _vmap(
    size: int, dims: Sequence, score: Tensor, maximize: bool, duals: Tensor | None
) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    score = _op.moved_front(score, dims[0], size).flatten(0, 1)
    if duals is not None:
        duals = _op.moved_front(duals, dims[2], size).flatten(0, 1)
    columns, potentials = _assign(score, maximize, duals)
    return (columns.unflatten(0, (size, -1)), potentials.unflatten(0, (size, -1))), (0, 0)


_assign = _op.define(
    "assign(Tensor score, bool maximize, Tensor? duals) -> (Tensor, Tensor)",
    reference=reference.assign,
    fake=_fake,
    check=_refuse_infinite,
    vmap=_vmap,
)


def assign(
    score: Tensor | np.ndarray,
    *,
    maximize: bool = True,
    duals: Tensor | np.ndarray | None = None,
    return_duals: bool = False,
) -> Any:
    """Give every row of each score matrix its own column, at the best possible sum.

    Exact, in float64 arithmetic on the scores as they are. Solved on the CPU: a GPU's scores are
    copied there and the result back.

    Args:
        score: ``[B, n, m]`` or ``[n, m]`` with n <= m, a real tensor or numpy array, finite.
        maximize: look for the largest sum, or the smallest.
        duals: column potentials ``[B, m]`` of earlier, similar problems to start from. They change
            the time (three times faster after a small change of Gram matrices; useless ones are
            dropped early), never the sum.
        return_duals: also return the column potentials, to be passed to a later call.

    Returns:
        Columns ``[B, n]``, int64; with ``return_duals`` also potentials ``v`` ``[B, m]``, float64,
        such that ``score[i, j] - v[j]`` is best at row i's own column. numpy in, numpy out. Not
        differentiable.

    Raises:
        ValueError: a shape does not fit, n > m, or a score is NaN or infinite.
        TypeError: an argument has the wrong type or dtype.

    Source:
        Jonker and Volgenant, "A shortest augmenting path algorithm for dense and sparse linear
        assignment problems", Computing 38 (1987).
    """
    _check.flag("assign", "maximize", maximize)
    _check.flag("assign", "return_duals", return_duals)
    arrays = isinstance(score, np.ndarray)
    given = _shared(score)
    _check.tensor("assign", "score", given, "[B, n, m]")
    if given.dim() not in (2, 3):
        raise ValueError(
            f"assign: score must have shape [B, n, m] or [n, m], not {list(given.shape)}"
        )
    if given.is_complex() or given.dtype == torch.bool:
        raise TypeError(f"assign: score must be real numbers, not {given.dtype}")
    rows, cols = given.shape[-2:]
    if rows > cols:
        raise ValueError(
            f"assign: score has {rows} rows and {cols} columns; each row needs a column of its own, "
            "so give the transposed scores"
        )
    start = None
    if duals is not None:
        start = _shared(duals)
        shape = [*given.shape[:-2], cols]
        _check.tensor("assign", "duals", start, str(shape))
        if list(start.shape) != shape:
            raise ValueError(f"assign: duals must have shape {shape}, not {list(start.shape)}")
        _check.floating("assign", "duals", start)
        _check.same_device("assign", "duals", start, "score", given)
        start = start.detach().double()
        start = start if start.dim() == 2 else start[None]
    problems = given.detach() if given.dim() == 3 else given.detach()[None]
    if problems.dtype not in (torch.float32, torch.float64):
        exact = problems.dtype in (
            torch.float16,
            torch.bfloat16,
            torch.int8,
            torch.int16,
            torch.uint8,
        )
        problems = problems.to(torch.float32 if exact else torch.float64)
    columns, potentials = _solve(given, problems, maximize, start, arrays)
    if given.dim() == 2:
        columns, potentials = columns[0], potentials[0]
    found = (columns.numpy(), potentials.numpy()) if arrays else (columns, potentials)
    return found if return_duals else found[0]


def _shared(value: Any) -> Any:
    """A numpy array of numbers as a tensor, without a copy where torch can share its memory."""
    if not isinstance(value, np.ndarray):
        return value
    if value.dtype.kind not in "biufc" or value.dtype.char in "gG":
        return value
    shared = np.require(value, value.dtype.newbyteorder("="), ["C", "W"])
    # An array of one number is contiguous whatever its stride, but torch refuses negative ones.
    return torch.from_numpy(shared.copy() if min(shared.strides, default=0) < 0 else shared)


def _solve(
    given: Tensor, problems: Tensor, maximize: bool, start: Tensor | None, arrays: bool
) -> tuple[Tensor, Tensor]:
    device = problems.device
    try:
        if arrays and (host := _load.host()) is not None:
            duals = None if start is None else start.numpy()
            found = host.assign(problems.numpy(), maximize, duals, torch.get_num_threads())
            return torch.from_numpy(found[0]), torch.from_numpy(found[1])
        if device.type not in ("cpu", "meta"):
            start = None if start is None else start.cpu()
            columns, potentials = _assign(problems.cpu(), maximize, start)
            return columns.to(device), potentials.to(device)
        return _assign(problems, maximize, start)
    except (RuntimeError, ValueError):
        _check.finite("assign", "score", given)
        raise
