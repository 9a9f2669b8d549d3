"""The definition of match_weights: coordinate descent as in Git Re-Basin, network by network."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from weightops.ops.match.plan import FIXED, Decoded, Place, decode


def match_weights(
    reference: Tensor, flat: Tensor, code: Sequence[int], order: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Permutations that bring each network close to the reference.

    Args:
        reference: ``[T, P]``, T networks side by side.
        flat: ``[N, T, P]``.
        code: :func:`weightops.ops.match.plan.plan` of T copies.
        order: ``[sweeps, labels]``, int64, the order in which labels are visited.

    Returns:
        Permutations of all labels side by side ``[N, sizes]``, int64; the objective before and after
        each sweep ``[sweeps + 1, N]``, float64, and the number of sweeps made ``[N]``.

    Source: Ainsworth et al. 2022 (arXiv 2209.04836), algorithm 1.
    """
    plan = decode(code)
    history = torch.zeros(len(order) + 1, len(flat), dtype=torch.float64)
    perms, sweeps = [], []
    for n, network in enumerate(flat.cpu()):
        found, objectives = _descend(plan, reference.cpu(), network, order.tolist())
        perms.append(torch.cat([torch.empty(0, dtype=torch.int64), *found]))
        history[: len(objectives), n] = torch.tensor(objectives, dtype=torch.float64)
        sweeps.append(len(objectives) - 1)
    found_perms = (
        torch.stack(perms) if perms else torch.empty(0, sum(plan.sizes), dtype=torch.int64)
    )
    counts = torch.tensor(sweeps, dtype=torch.int64)
    return tuple(t.to(flat.device) for t in (found_perms, history, counts))  # type: ignore[return-value]


def _descend(
    plan: Decoded, reference: Tensor, network: Tensor, order: list[list[int]]
) -> tuple[list[Tensor], list[float]]:
    from scipy.optimize import linear_sum_assignment

    perms = [torch.arange(size) for size in plan.sizes]
    objectives = [_objective(plan, reference, network, perms)]
    for labels in order:
        gained = 0.0
        for label in labels:
            score = _score(plan, reference, network, perms, label)
            columns = linear_sum_assignment(score.numpy(), maximize=True)[1]
            move = torch.from_numpy(columns)
            before, after = (score.gather(1, p[:, None])[:, 0] for p in (perms[label], move))
            moved = move != perms[label]
            gain = (after - before).double()[moved].sum().item()
            magnitude = (after.abs() + before.abs()).double()[moved].sum().item()
            # What is less is rounding, and would be traded back and forth.
            if gain <= 4 * torch.finfo(score.dtype).eps * magnitude:
                continue
            candidate = [*perms[:label], move, *perms[label + 1 :]]
            if any(each.label == label for p in plan.places[label] for each in p.others):
                # The label stands twice in a tensor: scores are a linearisation that may mislead.
                now = _objective(plan, reference, network, perms)
                gain = _objective(plan, reference, network, candidate) - now
                if gain <= 1e-12 * abs(now):
                    continue
            perms, gained = candidate, gained + gain
        objectives.append(objectives[-1] + gained)
        if gained == 0:
            break
    objectives[-1] = _objective(plan, reference, network, perms)
    return perms, objectives


def _score(
    plan: Decoded, reference: Tensor, network: Tensor, perms: list[Tensor], label: int
) -> Tensor:
    """``[n, n]``: what the objective gains when unit j of the network comes to i."""
    size = plan.sizes[label]
    score = reference.new_zeros(size, size)
    for place in plan.places[label]:
        score += _rows(reference, place, size) @ _rows(network, place, size, perms).T
    return score


def _rows(flat: Tensor, place: Place, size: int, perms: list[Tensor] | None = None) -> Tensor:
    """A label's units ``[n, ...]`` in one tensor, whose other axes are permuted."""
    sizes = [size, *(factor.size for factor in place.others), place.run]
    strides = [place.stride, *(factor.stride for factor in place.others), 1]
    rows = flat.contiguous().as_strided(sizes, strides, flat.storage_offset() + place.offset)
    for axis, factor in enumerate(place.others, 1):
        if perms is not None and factor.label != FIXED:
            rows = rows.index_select(axis, perms[factor.label])
    return rows.reshape(size, -1)


def _objective(plan: Decoded, reference: Tensor, network: Tensor, perms: list[Tensor]) -> float:
    ours, theirs = reference.reshape(-1).double(), network.reshape(-1).double()
    total = sum(torch.dot(ours[begin:end], theirs[begin:end]).item() for begin, end in plan.fixed)
    for label, (size, places) in enumerate(zip(plan.sizes, plan.places, strict=True)):
        for place in places:
            if place.counts:
                permuted = _rows(network, place, size, perms)[perms[label]]
                total += (_rows(reference, place, size).double() * permuted.double()).sum().item()
    return total
