"""Permutations that bring many networks into one common arrangement."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from weightops import _check
from weightops._progress import track
from weightops.align._arguments import check_names, check_spec, is_statistic
from weightops.align.matching import match
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
    tolerance: float = 1e-5,
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
        tolerance: end Frank-Wolfe when a step gains no more than this share of the objective.
        progress: show a progress bar on a terminal.

    Source: Crisostomi et al. 2024, "C2M3: cycle-consistent multi-model merging" (arXiv 2405.17897),
    section 3; Ainsworth et al. 2022, "Git Re-Basin" (arXiv 2209.04836), algorithm 3.

    Raises:
        ValueError: shapes or names do not fit, fewer than two networks, or a weight is not finite.
        TypeError: an argument has the wrong type or dtype.
    """
    check_spec("match_all", spec, depth=2)
    _check_arguments(spec, flat, method, seed, tensors, max_sweeps, tolerance, progress)
    counted = [
        name
        for name in spec.shapes
        if (name in tensors if tensors is not None else not is_statistic(name))
    ]
    # A spec of its own, of which match does not warn once more.
    spec = WeightSpec(spec.axes, spec.shapes, sizes=spec.labels)
    flat = flat if flat.dtype in (torch.float32, torch.float64) else flat.float()
    perms = {label: p.to(flat.device) for label, p in spec.identity(len(flat)).items()}
    history: list[float] = []
    if method == "universe":
        projected, history = frank_wolfe(spec, flat, counted, max_sweeps, tolerance, progress)
        moved = permute(flat, projected, spec)
        if _objective(spec, moved, counted) > _objective(spec, flat, counted):
            perms = projected  # projecting may lose what the soft matrices gained
    history += _merge_many(spec, flat, perms, counted, seed, max_sweeps, progress)
    to_first = spec.invert({label: index[0] for label, index in perms.items()})
    return MatchAll(
        spec.compose(perms, to_first), history[-1], torch.tensor(history, dtype=torch.float64)
    )


def _merge_many(
    spec: WeightSpec,
    flat: Tensor,
    perms: dict[str, Tensor],
    counted: Sequence[str],
    seed: int,
    max_sweeps: int,
    progress: bool,
) -> list[float]:
    """Match each network to the mean of the others; updates ``perms``, returns the objectives on the way."""
    labelled = {name for label in spec.labels for name, _ in spec.occurrences(label)}
    movable = [name for name in counted if name in labelled]
    generator = torch.Generator().manual_seed(seed)
    current = permute(flat, perms, spec)
    history = [_objective(spec, current, counted)]
    for _ in track(range(max_sweeps if movable else 0), "match_all: merge-many", enabled=progress):
        for i in torch.randperm(len(flat), generator=generator).tolist():
            others = (current.sum(0) - current[i]) / (len(flat) - 1)
            labels_seed = int(torch.randint(2**31, (), generator=generator))
            found = match(spec, others, current[i : i + 1], seed=labels_seed, tensors=movable)
            for label, move in found.perms.items():
                perms[label][i] = perms[label][i, move[0]]
            current[i] = permute(current[i : i + 1], found.perms, spec)[0]
        history.append(_objective(spec, current, counted))
        if history[-1] <= history[-2]:
            break
    return history


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
    spec.check_flat(where, flat, dims=2)
    _check.floating(where, "flat", flat)
    if len(flat) < 2:
        raise ValueError(f"{where}: flat must hold 2 networks or more, not {len(flat)}")
    _check.choice(where, "method", method, METHODS)
    _check.seed(where, seed)
    if tensors is not None:
        check_names(where, tensors, spec)
    _check.count(where, "max_sweeps", max_sweeps)
    _check.number(where, "tolerance", tolerance, 0, 1)
    _check.flag(where, "progress", progress)
    _check.finite(where, "flat", flat)
