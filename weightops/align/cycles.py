"""Permutations composed along paths and around cycles of networks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from weightops import _check
from weightops.align._arguments import check_spec
from weightops.spec import Permutations, WeightSpec


@dataclass(frozen=True)
class CycleError:
    """What :func:`cycle_error` counted: shares in 0 .. 1, float64, ``[n]`` or ``[]`` as the cycle's rows.

    Attributes:
        labels: label -> share of its units that do not come back to their place.
        units: the share of all labels' units.
    """

    labels: dict[str, Tensor]
    units: Tensor


def compose_path(spec: WeightSpec, path: Sequence[Permutations]) -> dict[str, Tensor]:
    """The permutations that act like those of ``path`` one after the other, the first first.

    ``match(spec, b, a).perms`` leads from a to b: ``permute(a, perms, spec)`` lies on b. The composition
    of a -> b, b -> c is thus the permutation a -> c, and in :func:`match_all`'s arrangement that from a
    to b is ``compose_path(spec, [perms_a, spec.invert(perms_b)])``.

    Args:
        spec: axes of one network.
        path: for each step label -> int64 or int32 ``[size]`` or ``[n, size]``; an absent label stays.

    Returns:
        Label -> int64 ``[size]``, or ``[n, size]`` where a step has n rows; only labels of some step.

    Raises:
        ValueError: no steps, unequal numbers of rows, or an entry is no permutation of the spec's labels.
        TypeError: an argument has the wrong type or dtype.
    """
    check_spec("compose_path", spec)
    return _compose("compose_path", "path", spec, path)


def cycle_error(spec: WeightSpec, cycle: Sequence[Permutations]) -> CycleError:
    """The share of units that a closed cycle of matchings does not bring back to their place.

    Args:
        spec: axes of one network.
        cycle: as :func:`compose_path`'s path, closed: a -> b, b -> c, c -> a. Zero for permutations of
            :func:`match_all`; matchings of pairs, each found for itself, need not agree.

    Raises:
        ValueError: no steps, unequal numbers of rows, or an entry is no permutation of the spec's labels.
        TypeError: an argument has the wrong type or dtype.
    """
    check_spec("cycle_error", spec)
    whole = _compose("cycle_error", "cycle", spec, cycle)
    astray = {
        label: (index != torch.arange(spec.labels[label], device=index.device)).double().sum(-1)
        for label, index in whole.items()
    }
    none = torch.zeros((), dtype=torch.float64)
    shares = {label: astray.get(label, none) / max(size, 1) for label, size in spec.labels.items()}
    return CycleError(shares, sum(astray.values(), none) / max(sum(spec.labels.values()), 1))


def _compose(where: str, name: str, spec: WeightSpec, path: Any) -> dict[str, Tensor]:
    if isinstance(path, (str, Mapping)) or not isinstance(path, Sequence):
        raise TypeError(
            f"{where}: {name} must be a list of permutations, not {_check.describe(path)}"
        )
    if not path:
        raise ValueError(f"{where}: {name} has no steps")
    rows: dict[int, str] = {}
    for step, perms in enumerate(path):
        spec.check_permutations(where, perms, name=f"{name}[{step}]")
        for label, index in perms.items():
            if index.dim() == 2:
                rows.setdefault(len(index), f"{name}[{step}][{label!r}]")
    if len(rows) > 1:
        (first, one), (second, other), *_ = rows.items()
        raise ValueError(f"{where}: {one} has {first} rows, but {other} has {second}")
    start: dict[str, Tensor] = {}
    return reduce(spec.compose, path, start)
