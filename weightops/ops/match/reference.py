"""The definition of match_weights: coordinate descent as in Git Re-Basin, network by network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

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


class _Side(NamedTuple):
    """A label's units in one tensor, ``[n, positions of the other factors, run]``."""

    ours: Tensor  # [n, ...], flattened
    theirs: Tensor
    labels: list[int]  # of theirs' further axes
    counts: int


def _sides(plan: Decoded, reference: Tensor, network: Tensor) -> list[list[_Side]]:
    def view(flat: Tensor, size: int, place: Place) -> Tensor:
        flat = flat.contiguous()
        sizes = [size, *(factor.size for factor in place.others), place.run]
        strides = [place.stride, *(factor.stride for factor in place.others), 1]
        return flat.as_strided(sizes, strides, flat.storage_offset() + place.offset)

    return [
        [
            _Side(
                view(reference, size, place).reshape(size, -1),
                view(network, size, place),
                [factor.label for factor in place.others],
                place.counts,
            )
            for place in places
        ]
        for size, places in zip(plan.sizes, plan.places, strict=True)
    ]


def _descend(
    plan: Decoded, reference: Tensor, network: Tensor, order: list[list[int]]
) -> tuple[list[Tensor], list[float]]:
    from scipy.optimize import linear_sum_assignment

    sides = _sides(plan, reference, network)
    ours, theirs = reference.reshape(-1).double(), network.reshape(-1).double()
    fixed = sum(torch.dot(ours[begin:end], theirs[begin:end]).item() for begin, end in plan.fixed)

    def objective(perms: list[Tensor]) -> float:
        return fixed + sum(
            (side.ours.double() * _rows(side, perms)[perms[label]].double()).sum().item()
            for label, each in enumerate(sides)
            for side in each
            if side.counts
        )

    perms = [torch.arange(size) for size in plan.sizes]
    objectives = [objective(perms)]
    for labels in order:
        gained = 0.0
        for label in labels:
            if not sides[label]:
                continue
            # What the objective gains when unit j of the network comes to i.
            score = sum(side.ours @ _rows(side, perms).T for side in sides[label])
            assert isinstance(score, Tensor)
            move = torch.from_numpy(linear_sum_assignment(score.numpy(), maximize=True)[1])
            before, after = (score.gather(1, p[:, None])[:, 0] for p in (perms[label], move))
            moved = move != perms[label]
            gain = (after - before).double()[moved].sum().item()
            magnitude = (after.abs() + before.abs()).double()[moved].sum().item()
            # What is less is rounding, and would be traded back and forth.
            if gain <= 4 * torch.finfo(score.dtype).eps * magnitude:
                continue
            candidate = [*perms[:label], move, *perms[label + 1 :]]
            if any(label in side.labels for side in sides[label]):
                # The label stands twice in a tensor: scores are a linearisation that may mislead.
                now = objective(perms)
                gain = objective(candidate) - now
                if gain <= 1e-12 * abs(now):
                    continue
            perms, gained = candidate, gained + gain
        objectives.append(objectives[-1] + gained)
        if gained == 0:
            break
    objectives[-1] = objective(perms)
    return perms, objectives


def _rows(side: _Side, perms: list[Tensor]) -> Tensor:
    """The network's units ``[n, ...]``, whose other axes are permuted."""
    rows = side.theirs
    for axis, label in enumerate(side.labels, 1):
        if label != FIXED:
            rows = rows.index_select(axis, perms[label])
    return rows.reshape(len(rows), -1)
