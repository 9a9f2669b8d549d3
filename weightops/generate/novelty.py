"""How far networks are from those of a zoo: no copies, modulo permutation, and wrong on other examples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from weightops import _check
from weightops._progress import track
from weightops.align import match
from weightops.generate._arguments import check_networks
from weightops.ops.permute import permute
from weightops.spec import WeightSpec


@dataclass(frozen=True)
class Novelty:
    """What :func:`weightops.generate.novelty` found.

    Attributes:
        distance: ``[N]``, L2 distance to the nearest network of the zoo.
        nearest: int64 ``[N]``, which one that is.
        overlap: ``[N]``, the largest overlap of wrong predictions with a network of the zoo: the
            share that both get wrong of those that either does. ``None`` without errors.
    """

    distance: Tensor
    nearest: Tensor
    overlap: Tensor | None


@torch.no_grad()
def novelty(
    flat: Tensor,
    zoo_flat: Tensor,
    spec: WeightSpec | None = None,
    *,
    errors: Tensor | None = None,
    zoo_errors: Tensor | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Novelty:
    """Distances of networks to the nearest network of a zoo, and overlaps of their wrong predictions.

    With a ``spec``, distances are modulo permutation: all networks of the zoo are matched to each of
    ``flat`` (:func:`weightops.align.match` by weights, a local optimum), N M matches in all.

    Args:
        flat: networks ``[N, P]``.
        zoo_flat: networks of the zoo ``[M, P]``, of the same dtype.
        spec: their axes and layout, or ``None`` for plain distances.
        errors: bool ``[N, B]``, whether each prediction of B examples is wrong.
        zoo_errors: bool ``[M, B]``, the zoo's on the same examples.
        seed: of matching.
        progress: show a bar.

    Raises:
        ValueError: shapes or devices do not fit, there is no network of the zoo, or a weight is not
            finite.
        TypeError: an argument has the wrong type or dtype; one of both errors is missing.
    """
    where = "novelty"
    _check.tensor(where, "flat", flat, "[N, P]", 2)
    layout = WeightSpec({"weights": (None,)}, {"weights": flat.shape[1:]}) if spec is None else spec
    check_networks(where, "flat", flat, layout, empty=True)
    _check.tensor(where, "zoo_flat", zoo_flat, "[M, P]", 2)
    check_networks(where, "zoo_flat", zoo_flat, layout)
    if zoo_flat.dtype != flat.dtype:
        raise TypeError(f"{where}: zoo_flat is {zoo_flat.dtype}, but flat is {flat.dtype}")
    _check.same_device(where, "zoo_flat", zoo_flat, "flat", flat)
    _check.seed(where, seed)
    _check.flag(where, "progress", progress)
    overlap = _largest_overlap(where, errors, zoo_errors, len(flat), len(zoo_flat))
    distances = flat.new_empty(len(flat), len(zoo_flat), dtype=torch.float64)
    for n in track(range(len(flat)), where, enabled=progress):
        nearer = (zoo_flat - flat[n]).norm(dim=1, dtype=torch.float64)
        if spec is not None and spec.labels:
            perms = match(spec, flat[n], zoo_flat, seed=seed).perms
            matched = permute(zoo_flat, perms, spec) - flat[n]
            # Matching looks at products of weights, not at running statistics.
            nearer = nearer.minimum(matched.norm(dim=1, dtype=torch.float64))
        distances[n] = nearer
    found = distances.min(1)
    return Novelty(found.values, found.indices, overlap)


def _largest_overlap(where: str, errors: Any, zoo_errors: Any, n: int, m: int) -> Tensor | None:
    """Jaccard indices of the sets of wrong predictions, each network's largest ``[N]``."""
    if errors is None and zoo_errors is None:
        return None
    for name, value, shape, count in (
        ("errors", errors, "[N, B]", n),
        ("zoo_errors", zoo_errors, "[M, B]", m),
    ):
        _check.tensor(where, name, value, shape, 2)
        if value.dtype != torch.bool:
            raise TypeError(f"{where}: {name} must be bool, not {value.dtype}")
        _check.size(where, name, len(value), count, "the number of networks")
    _check.size(where, "errors axis 1", errors.shape[1], zoo_errors.shape[1], "zoo_errors's axis 1")
    _check.same_device(where, "zoo_errors", zoo_errors, "errors", errors)
    ours, theirs = errors.double(), zoo_errors.double()
    both = ours @ theirs.mT
    either = ours.sum(1)[:, None] + theirs.sum(1) - both
    # Two networks without a wrong prediction have the same ones.
    return torch.where(either == 0, 1, both / either).amax(1)
