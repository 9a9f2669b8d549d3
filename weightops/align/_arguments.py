"""What the functions of this package ask of their arguments alike."""

from __future__ import annotations

import warnings
from typing import Any

from weightops import _check, _parts
from weightops.spec import WeightSpec


def check_spec(where: str, spec: Any) -> None:
    """``spec`` must be a WeightSpec; one that was traced and never verified is warned of."""
    if not isinstance(spec, WeightSpec):
        raise TypeError(f"{where}: spec must be a WeightSpec, not {_check.describe(spec)}")
    if getattr(spec, "unverified", False):
        warnings.warn(
            f"{where}: spec was traced and never verified; call weightops.verify(spec, model, *inputs) first",
            stacklevel=3,
        )


def is_statistic(name: str) -> bool:
    """Whether a tensor is batch norm's running statistic, whose size has nothing to do with the weights'."""
    return _parts.parse(name)[0].endswith(("running_mean", "running_var"))
