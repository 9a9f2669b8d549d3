"""What the functions of this package ask of their arguments alike."""

from __future__ import annotations

import warnings
from typing import Any

from weightops import _check, _parts
from weightops.spec import WeightSpec


def check_spec(where: str, spec: Any, depth: int = 1) -> None:
    """``spec`` must be a WeightSpec; one that is a guess and was never verified is warned of.

    ``depth`` is how many calls below the user's this is made.
    """
    if not isinstance(spec, WeightSpec):
        raise TypeError(f"{where}: spec must be a WeightSpec, not {_check.describe(spec)}")
    if spec.unverified:
        warnings.warn(
            f"{where}: spec was never verified; call weightops.verify(spec, model, *inputs) first",
            stacklevel=2 + depth,
        )


def is_statistic(name: str) -> bool:
    """Whether a tensor is batch norm's running statistic, whose size has nothing to do with the weights'."""
    return _parts.parse(name)[0].endswith(("running_mean", "running_var"))
