"""Permutations that bring networks close to a reference network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from weightops import _check
from weightops.align._arguments import check_spec, is_statistic
from weightops.ops.match import match_weights, plan
from weightops.spec import WeightSpec

METHODS = ("weight",)


@dataclass(frozen=True)
class Match:
    """What :func:`match` found.

    Attributes:
        perms: label -> int64 ``[N, size]``; ``permute(flat, perms, spec)`` is the aligned networks.
        objective: ``[N]`` float64, the inner product of each aligned network with the reference.
        history: ``[sweeps + 1, N]`` float64, the objective before and after each sweep.
    """

    perms: dict[str, Tensor]
    objective: Tensor
    history: Tensor


def match(
    spec: WeightSpec,
    reference: Tensor,
    flat: Tensor,
    *,
    method: str = "weight",
    seed: int = 0,
    tensors: Sequence[str] | None = None,
    max_sweeps: int = 100,
) -> Match:
    """Permute networks towards a reference: maximise ``<reference, P(flat[n])>`` for each n.

    Weight matching by coordinate descent (Git Re-Basin, algorithm 1): label by label, in random
    order, the best permutation given all others is a linear assignment on a sum of Gram matrices.
    All networks are matched at once. Ends when a sweep changes none, at a local optimum.

    Args:
        spec: axes and layout of one network.
        reference: the network ``[P]`` to align to; or T networks ``[T, P]``, such as the
            checkpoints of one training.
        flat: networks ``[N, P]`` to align, of the same floating dtype; with ``[T, P]`` references
            ``[N, T, P]``, whose T networks get one permutation, at the best sum over all T.
        method: ``"weight"``.
        seed: of the order in which labels are visited.
        tensors: names that count in the objective; by default all but batch norm's running
            statistics, whose size has nothing to do with the weights'.
        max_sweeps: give up after so many sweeps over the labels.

    Raises:
        ValueError: shapes, devices or names do not fit, or a weight is not finite.
        TypeError: an argument has the wrong type or dtype.
    """
    counted = _check_arguments(spec, reference, flat, method, seed, tensors, max_sweeps)
    ours, theirs = (t.detach() for t in (reference, flat))
    if ours.dim() == 1:
        ours, theirs = ours[None], theirs[:, None]
    if ours.dtype not in (torch.float32, torch.float64):
        ours, theirs = ours.float(), theirs.float()
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(max_sweeps, len(spec.labels), generator=generator).argsort(1)
    try:
        found, history, sweeps = match_weights(
            ours.cpu(), theirs.cpu(), plan(spec, counted, len(ours)), order
        )
    except RuntimeError:
        _check.finite("match", "reference", reference)
        _check.finite("match", "flat", flat)
        raise
    sizes = list(spec.labels.values())
    perms = dict(zip(spec.labels, found.to(flat.device).split(sizes, 1), strict=True))
    last = int(sweeps.max()) if len(sweeps) else 0
    # Networks that were done earlier stay where they were.
    history = history[: last + 1].gather(0, torch.arange(last + 1)[:, None].minimum(sweeps))
    history = history.to(flat.device)
    return Match(perms, history[-1], history)


def _check_arguments(
    spec: WeightSpec,
    reference: Tensor,
    flat: Tensor,
    method: str,
    seed: int,
    tensors: Sequence[str] | None,
    max_sweeps: int,
) -> list[str]:
    """The names of the tensors that count."""
    check_spec("match", spec)
    _check.tensor("match", "reference", reference, "[P] or [T, P]")
    spec.check_flat("match", reference, "reference")
    if reference.dim() > 2:
        raise ValueError(
            f"match: reference must have shape [P] or [T, P], not {list(reference.shape)}"
        )
    shape = "[N, P]" if reference.dim() == 1 else "[N, T, P]"
    _check.tensor("match", "flat", flat, shape, reference.dim() + 1)
    spec.check_flat("match", flat)
    if reference.dim() == 2:
        _check.size("match", "flat axis 1", flat.shape[1], reference.shape[0], "reference's axis 0")
    _check.floating("match", "reference", reference)
    if flat.dtype != reference.dtype:
        raise TypeError(f"match: flat is {flat.dtype}, but reference is {reference.dtype}")
    _check.same_device("match", "flat", flat, "reference", reference)
    _check.choice("match", "method", method, METHODS)
    _check.count("match", "max_sweeps", max_sweeps)
    _check.count("match", "seed", seed, least=0)
    if tensors is None:
        return [name for name in spec.shapes if not is_statistic(name)]
    if not tensors:
        raise ValueError("match: tensors is empty, so nothing would count")
    for name in tensors:
        if name not in spec.shapes:
            raise ValueError(f"match: tensors has {name!r}, the spec has {list(spec.shapes)}")
    return list(tensors)
