"""What the functions of this package ask of their arguments alike."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from weightops import _check, _parts
from weightops.spec import WeightSpec


def check_spec(where: str, spec: Any, name: str = "spec", depth: int = 1) -> None:
    """``spec`` must be a WeightSpec; one that is a guess and was never verified is warned of.

    ``name`` is what the caller's argument is called, ``depth`` how many calls below the user's this is.
    """
    if not isinstance(spec, WeightSpec):
        raise TypeError(f"{where}: {name} must be a WeightSpec, not {_check.describe(spec)}")
    if spec.unverified:
        warnings.warn(
            f"{where}: {name} was never verified; call weightops.verify({name}, model, *inputs) first",
            stacklevel=2 + depth,
        )


def check_names(where: str, tensors: Any, spec: WeightSpec) -> None:
    """``tensors`` must list names of the spec's, one or more."""
    if isinstance(tensors, str) or not isinstance(tensors, Sequence):
        raise TypeError(f"{where}: tensors must be a list of names, not {_check.describe(tensors)}")
    if not tensors:
        raise ValueError(f"{where}: tensors is empty, so nothing would count")
    for name in tensors:
        if not isinstance(name, str):
            raise TypeError(f"{where}: tensors must hold names, not {_check.describe(name)}")
        if name not in spec.shapes:
            raise ValueError(f"{where}: tensors has {name!r}, the spec has {list(spec.shapes)}")


def is_statistic(name: str) -> bool:
    """Whether a tensor is batch norm's running statistic, whose size has nothing to do with the weights'."""
    return _parts.parse(name)[0].endswith(("running_mean", "running_var"))
