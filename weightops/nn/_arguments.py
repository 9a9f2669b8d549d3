"""What the layers share: checks of their arguments, one plan for equal layers, a walk over tensors."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any
from weakref import WeakValueDictionary

from torch import Tensor

from weightops import _check
from weightops.ops.equivariant import EquivariantPlan
from weightops.ops.equivariant.plan import Selection
from weightops.spec import WeightSpec

count, number = _check.count, _check.number


def is_spec(where: str, name: str, value: Any) -> None:
    if not isinstance(value, WeightSpec):
        raise TypeError(f"{where}: {name} must be a WeightSpec, not {_check.describe(value)}")


def features(where: str, x: Any, spec: WeightSpec, channels: int | None = None) -> None:
    """``x`` must be features ``[B, P, C]`` of ``spec``, with ``channels`` of them where given."""
    _check.tensor(where, "x", x, "[B, P, C]", 3)
    _check.floating(where, "x", x)
    if x.shape[1] != spec.numel or channels not in (None, x.shape[2]):
        expected = f"[B, {spec.numel}, {'C' if channels is None else channels}]"
        raise ValueError(f"{where}: x must have shape {expected}, not {list(x.shape)}")


def pieces(x: Tensor, spec: WeightSpec) -> Iterator[Tensor]:
    """The tensors' views ``[B, n, C]`` of features ``[B, P, C]``, those without weights included."""
    for shape, offset in zip(spec.shapes.values(), spec.offsets.values(), strict=True):
        yield x.narrow(1, offset, prod(shape))


def plan_of(
    spec: WeightSpec,
    spec_out: WeightSpec | None,
    *,
    fixed: str,
    terms: Selection,
    normalize: str,
) -> EquivariantPlan:
    """The plan of these options: the same object for as long as a layer of ``spec`` holds it."""
    is_spec("EquivariantLinear", "spec", spec)
    plans = spec._cache.setdefault("equivariant", WeakValueDictionary())
    try:
        key: Any = (spec_out or spec, fixed, terms, normalize)
        plan = plans.get(key)
    except TypeError:  # something that no plan accepts, or a predicate that can't be hashed
        key = plan = None
    if plan is None:
        plan = EquivariantPlan(spec, spec_out, fixed=fixed, terms=terms, normalize=normalize)
        if key is not None:
            plans[key] = plan
    return plan
