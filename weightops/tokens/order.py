"""One order of the neurons for all networks of a zoo."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from weightops import _check
from weightops.align.matching import match
from weightops.ops.permute import permute
from weightops.spec import WeightSpec


def canonical(flat: Tensor, spec: WeightSpec, reference: Tensor, **options: Any) -> Tensor:
    """Permute networks into the order of a reference network (:func:`weightops.align.match`).

    Args:
        flat: networks ``[N, P]``, floating point.
        spec: axes and layout of one network.
        reference: the network ``[P]`` whose order the others get.
        options: of :func:`weightops.align.match`, such as ``method`` and ``seed``.

    Returns:
        ``[N, P]``: the same functions as ``flat``.

    Raises:
        ValueError: shapes, devices or names do not fit, or a weight is not finite.
        TypeError: an argument has the wrong type or dtype.
    """
    where = "canonical"
    if not isinstance(spec, WeightSpec):
        raise TypeError(f"{where}: spec must be a WeightSpec, not {_check.describe(spec)}")
    _check.tensor(where, "reference", reference, "[P]", 1)
    spec.check_flat(where, reference, "reference")
    spec.check_flat(where, flat, dims=2)
    for name, value in (("reference", reference), ("flat", flat)):
        _check.floating(where, name, value)
    if flat.dtype != reference.dtype:
        raise TypeError(f"{where}: flat is {flat.dtype}, but reference is {reference.dtype}")
    _check.same_device(where, "flat", flat, "reference", reference)
    for name, value in (("reference", reference), ("flat", flat)):
        _check.finite(where, name, value)
    return permute(flat, match(spec, reference, flat, **options).perms, spec)
