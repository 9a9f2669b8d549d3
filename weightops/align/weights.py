"""Matching by weights, and what every method of matching returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from weightops import _check
from weightops.align._arguments import is_statistic
from weightops.ops.match import match_weights, plan
from weightops.ops.permute import permute
from weightops.spec import Permutations, WeightSpec


@dataclass(frozen=True)
class Match:
    """What :func:`weightops.align.match` found.

    Attributes:
        perms: label -> int64 ``[N, size]``; ``permute(flat, perms, spec)`` is the aligned networks.
        objective: ``[N]`` float64, the inner product of each aligned network with the reference,
            over the tensors that count.
        history: float64 ``[sweeps + 1, N]``, by ``"weight"`` the objective before and after each
            sweep, by ``"activation"`` before and after (``[2, N]``); by the learned methods
            ``[steps + 1, N]``, the loss half way to the reference.
    """

    perms: dict[str, Tensor]
    objective: Tensor
    history: Tensor


def match_by_weights(
    spec: WeightSpec,
    reference: Tensor,
    flat: Tensor,
    *,
    seed: int = 0,
    counted: Sequence[str] | None = None,
    max_sweeps: int = 100,
) -> Match:
    """:func:`weightops.align.match` with ``method="weight"``, for arguments that have been checked."""
    ours, theirs = (t.detach() for t in (reference, flat))
    if ours.dim() == 1:
        ours, theirs = ours[None], theirs[:, None]
    if ours.dtype not in (torch.float32, torch.float64):
        ours, theirs = ours.float(), theirs.float()
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(max_sweeps, len(spec.labels), generator=generator).argsort(1)
    try:
        found, history, sweeps = match_weights(
            ours.cpu(), theirs.cpu(), plan(spec, counted or weights_of(spec), len(ours)), order
        )
    except RuntimeError:
        _check.finite("match", "reference", reference)
        _check.finite("match", "flat", flat)
        raise ValueError(
            f"match: products of weights overflow {ours.dtype}; scale the networks"
        ) from None
    sizes = list(spec.labels.values())
    perms = dict(zip(spec.labels, found.to(flat.device).split(sizes, 1), strict=True))
    last = int(sweeps.max()) if len(sweeps) else 0
    # Networks that were done earlier stay where they were.
    history = history[: last + 1].gather(0, torch.arange(last + 1)[:, None].minimum(sweeps))
    history = history.to(flat.device)
    return Match(perms, history[-1], history)


def weights_of(spec: WeightSpec) -> list[str]:
    """The tensors that count unless told otherwise: all but running statistics."""
    return [name for name in spec.shapes if not is_statistic(name)]


def objective(
    spec: WeightSpec,
    reference: Tensor,
    flat: Tensor,
    perms: Permutations,
    counted: Sequence[str],
) -> Tensor:
    """``[N]`` float64: inner products of permuted networks ``[N, P]`` or ``[N, T, P]`` with the reference."""
    copies = 1 if flat.dim() == 2 else flat.shape[1]
    if not (len(flat) and counted):
        return flat.new_zeros(len(flat), dtype=torch.float64)
    rows = {label: p.repeat_interleave(copies, 0) for label, p in perms.items()}
    aligned = permute(flat.reshape(-1, spec.numel), rows, spec).view(len(flat), copies, -1)
    ours, theirs = spec.unflatten(reference.view(copies, -1)), spec.unflatten(aligned)
    products = [
        theirs[name].flatten(1).double() @ ours[name].flatten().double() for name in counted
    ]
    return torch.stack(products).sum(0)
