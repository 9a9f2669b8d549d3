"""Permutations that bring networks close to a reference network."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from weightops import _check
from weightops.ops.assign import assign
from weightops.ops.permute import permute
from weightops.spec import WeightSpec

METHODS = ("weight",)
#: gains below this share of the objective are rounding, and would be traded back and forth
TOLERANCE = 1e-7


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
        reference: the network ``[P]`` to align to.
        flat: networks ``[N, P]`` to align, of the same floating dtype.
        method: ``"weight"``.
        seed: of the order in which labels are visited.
        tensors: names that count in the objective; by default all but batch norm's running
            statistics, whose size has nothing to do with the weights'.
        max_sweeps: give up after so many sweeps over the labels.

    Raises:
        ValueError: shapes, devices or names do not fit, or a weight is not finite.
        TypeError: an argument has the wrong type or dtype.
    """
    _check_arguments(spec, reference, flat, method, seed, tensors, max_sweeps)
    counted = [
        name
        for name in spec.shapes
        if (name in tensors if tensors is not None else not _is_statistic(name))
    ]
    generator = torch.Generator().manual_seed(seed)
    perms = {label: p.to(flat.device) for label, p in spec.identity(flat.shape[0]).items()}
    labels = list(perms)
    current = flat
    views = {"reference": spec.unflatten(reference), "current": spec.unflatten(current)}
    objective = _inner(views, counted)
    history = [objective]
    for _ in range(max_sweeps):
        improved = False
        for i in torch.randperm(len(labels), generator=generator).tolist():
            label = labels[i]
            move = assign(_score(views, spec, label, counted, flat.shape[0]))
            candidate = {**perms, label: perms[label].gather(1, move)}
            permuted = permute(flat, candidate, spec)
            reached = _inner({**views, "current": spec.unflatten(permuted)}, counted)
            # Where a label stands twice in a tensor the scores are a linearisation that may mislead.
            better = reached > objective + TOLERANCE * objective.abs()
            if not better.any():
                continue
            improved = True
            perms[label] = torch.where(better[:, None], candidate[label], perms[label])
            current = permuted if better.all() else permute(flat, perms, spec)
            views["current"] = spec.unflatten(current)
            objective = torch.where(better, reached, objective)
        history.append(objective)
        if not improved:
            break
    return Match(perms, objective, torch.stack(history))


def _inner(views: dict[str, dict[str, Tensor]], counted: Sequence[str]) -> Tensor:
    """Inner products ``[N]`` of the current networks with the reference, over the counted tensors."""
    products = [
        views["current"][name].flatten(1).double() @ views["reference"][name].flatten().double()
        for name in counted
    ]
    return torch.stack(products).sum(0)


def _score(
    views: dict[str, dict[str, Tensor]],
    spec: WeightSpec,
    label: str,
    counted: Sequence[str],
    networks: int,
) -> Tensor:
    """``[N, n, n]``: what the objective gains when position j of the current network comes to i."""
    n = spec.labels[label]
    example = next(iter(views["reference"].values()))
    score = example.new_zeros(networks, n, n)
    for name, before, after in _places(spec, label, counted):
        ours = views["reference"][name].reshape(before, n, after).movedim(1, 0)
        theirs = views["current"][name].reshape(networks, before, n, after).movedim(2, 1)
        score += ours.reshape(n, -1) @ theirs.reshape(networks, n, -1).mT
    return score


def _places(spec: WeightSpec, label: str, counted: Sequence[str]) -> Iterator[tuple[str, int, int]]:
    """Each place of ``label``: the tensor, and the number of elements before and behind that factor."""
    for name in counted:
        factors = [
            factor for axis in range(len(spec.shapes[name])) for factor in spec.factors(name, axis)
        ]
        sizes = [size for _, size in factors]
        for i, (each, _) in enumerate(factors):
            if each == label:
                yield name, prod(sizes[:i]), prod(sizes[i + 1 :])


def _is_statistic(name: str) -> bool:
    return name.endswith(("running_mean", "running_var"))


def _check_arguments(
    spec: WeightSpec,
    reference: Tensor,
    flat: Tensor,
    method: str,
    seed: int,
    tensors: Sequence[str] | None,
    max_sweeps: int,
) -> None:
    if not isinstance(spec, WeightSpec):
        raise TypeError(f"match: spec must be a WeightSpec, not {_check.describe(spec)}")
    spec.check_flat("match", reference, "reference", dims=1)
    spec.check_flat("match", flat, dims=2)
    _check.floating("match", "reference", reference)
    if flat.dtype != reference.dtype:
        raise TypeError(f"match: flat is {flat.dtype}, but reference is {reference.dtype}")
    _check.same_device("match", "flat", flat, "reference", reference)
    if method not in METHODS:
        raise ValueError(f"match: method must be one of {METHODS}, not {_check.describe(method)}")
    if isinstance(max_sweeps, bool) or not isinstance(max_sweeps, int) or max_sweeps < 1:
        raise ValueError(
            f"match: max_sweeps must be an integer from 1, not {_check.describe(max_sweeps)}"
        )
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"match: seed must be an integer, not {_check.describe(seed)}")
    if tensors is not None and not tensors:
        raise ValueError("match: tensors is empty, so nothing would count")
    for name in tensors or ():
        if name not in spec.shapes:
            raise ValueError(f"match: tensors has {name!r}, the spec has {list(spec.shapes)}")
    _check.finite("match", "reference", reference)
    _check.finite("match", "flat", flat)
