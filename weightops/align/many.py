"""Permutations that bring many networks into one common arrangement."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from weightops import _check
from weightops._progress import track
from weightops.align.matching import _is_statistic, match
from weightops.align.universe import frank_wolfe, pairs
from weightops.ops.permute import permute
from weightops.spec import WeightSpec

METHODS = ("universe", "merge-many")


@dataclass(frozen=True)
class MatchAll:
    """What :func:`match_all` found.

    Attributes:
        perms: label -> int64 ``[N, size]``; ``permute(flat, perms, spec)`` is all networks in the
            arrangement of the first, whose own row is the identity.
        objective: the sum over all pairs of the aligned networks' inner products.
        history: float64, the objective before and after each sweep. With ``"universe"`` first that
            of the soft matrices, then that of the permutations from their projection on, which alone
            may lower it.
    """

    perms: dict[str, Tensor]
    objective: float
    history: Tensor


@torch.no_grad()
def match_all(
    spec: WeightSpec,
    flat: Tensor,
    *,
    method: str = "universe",
    seed: int = 0,
    tensors: Sequence[str] | None = None,
    max_sweeps: int = 100,
    tolerance: float = 1e-6,
    progress: bool = True,
) -> MatchAll:
    """Permute all networks towards each other: maximise ``sum_{i<j} <P_i(flat[i]), P_j(flat[j])>``.

    Each network has one permutation, so those between pairs, ``compose(perms_a, invert(perms_b))``
    from a to b, are consistent along every cycle.

    ``"merge-many"`` matches one network after the other, in random order, to the mean of all others
    (Git Re-Basin, algorithm 3). ``"universe"`` moves all at once through doubly stochastic matrices
    (Frank-Wolfe), projects them, and lets merge-many lead the permutations to a local optimum. It
    holds 2^k - 1 copies of a tensor with k labelled axes.

    Args:
        spec: axes and layout of one network.
        flat: networks ``[N, P]``, N >= 2, floating point.
        method: ``"universe"`` or ``"merge-many"``.
        seed: of the orders in which networks and labels are visited.
        tensors: names that count in the objective; by default all but batch norm's running
            statistics, whose size has nothing to do with the weights'.
        max_sweeps: give up after so many sweeps over the networks (each stage of ``"universe"``).
        tolerance: end when a sweep gains less than this share of the objective.
        progress: show a progress bar on a terminal.

    Source: Crisostomi et al. 2024, "C2M3: cycle-consistent multi-model merging" (arXiv 2405.17897),
    section 3; Ainsworth et al. 2022, "Git Re-Basin" (arXiv 2209.04836), algorithm 3.

    Raises:
        ValueError: shapes or names do not fit, fewer than two networks, or a weight is not finite.
        TypeError: an argument has the wrong type or dtype.
    """
    _check_arguments(spec, flat, method, seed, tensors, max_sweeps, tolerance, progress)
    counted = [
        name
        for name in spec.shapes
        if (name in tensors if tensors is not None else not _is_statistic(name))
    ]
    flat = flat if flat.dtype in (torch.float32, torch.float64) else flat.float()
    start = {label: p.to(flat.device) for label, p in spec.identity(len(flat)).items()}
    history: list[float] = []
    if method == "universe":
        projected, history = frank_wolfe(spec, flat, counted, max_sweeps, tolerance, progress)
        moved = permute(flat, projected, spec)
        if _objective(spec, moved, counted) > _objective(spec, flat, counted):
            start = projected  # projecting may lose what the soft matrices gained
    perms, hard = _merge_many(spec, flat, start, counted, seed, max_sweeps, tolerance, progress)
    to_first = spec.invert({label: index[0] for label, index in perms.items()})
    return MatchAll(
        spec.compose(perms, to_first), hard[-1], torch.tensor(history + hard, dtype=torch.float64)
    )


def _merge_many(
    spec: WeightSpec,
    flat: Tensor,
    perms: dict[str, Tensor],
    counted: Sequence[str],
    seed: int,
    max_sweeps: int,
    tolerance: float,
    progress: bool,
) -> tuple[dict[str, Tensor], list[float]]:
    """Match each network to the mean of the others, from ``perms`` on; the objectives on the way."""
    generator = torch.Generator().manual_seed(seed)
    current = permute(flat, perms, spec)
    history = [_objective(spec, current, counted)]
    for _ in track(range(max_sweeps), "match_all: merge-many", enabled=progress):
        for i in torch.randperm(len(flat), generator=generator).tolist():
            others = (current.sum(0) - current[i]) / (len(flat) - 1)
            labels_seed = int(torch.randint(2**31, (), generator=generator))
            found = match(spec, others, current[i : i + 1], seed=labels_seed, tensors=counted)
            row = {label: index[i : i + 1] for label, index in perms.items()}
            row = spec.compose(row, found.perms)
            perms = {
                label: index.index_copy(0, torch.tensor([i], device=index.device), row[label])
                for label, index in perms.items()
            }
            current[i] = permute(flat[i : i + 1], row, spec)[0]
        history.append(_objective(spec, current, counted))
        if history[-1] - history[-2] <= tolerance * abs(history[-1]):
            break
    return perms, history


def _objective(spec: WeightSpec, flat: Tensor, counted: Sequence[str]) -> float:
    views = spec.unflatten(flat)
    return pairs(views[name].double() for name in counted)


def _check_arguments(
    spec: WeightSpec,
    flat: Tensor,
    method: str,
    seed: int,
    tensors: Sequence[str] | None,
    max_sweeps: int,
    tolerance: float,
    progress: bool,
) -> None:
    where = "match_all"
    if not isinstance(spec, WeightSpec):
        raise TypeError(f"{where}: spec must be a WeightSpec, not {_check.describe(spec)}")
    spec.check_flat(where, flat, dims=2)
    _check.floating(where, "flat", flat)
    if len(flat) < 2:
        raise ValueError(f"{where}: flat must hold 2 networks or more, not {len(flat)}")
    _check.choice(where, "method", method, METHODS)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"{where}: seed must be an integer, not {_check.describe(seed)}")
    if tensors is not None and not tensors:
        raise ValueError(f"{where}: tensors is empty, so nothing would count")
    for name in tensors or ():
        if name not in spec.shapes:
            raise ValueError(f"{where}: tensors has {name!r}, the spec has {list(spec.shapes)}")
    _check.count(where, "max_sweeps", max_sweeps)
    _check.number(where, "tolerance", tolerance, 0, 1)
    _check.flag(where, "progress", progress)
    _check.finite(where, "flat", flat)
