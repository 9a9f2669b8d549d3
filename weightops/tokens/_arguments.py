"""Checks that the functions on tokens share."""

from __future__ import annotations

import json
from itertools import chain
from typing import Any

import torch

from weightops import _check
from weightops.spec import WeightSpec

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_numbers(where: str, name: str, value: Any, shape: str) -> None:
    """``value`` must be a tensor of a dtype that the kernels take."""
    _check.tensor(where, name, value, shape)
    if value.dtype not in DTYPES:
        raise TypeError(
            f"{where}: {name} must be float16, bfloat16, float32 or float64, not {value.dtype}"
        )


def check_networks(where: str, flat: Any, spec: WeightSpec) -> None:
    """``flat`` must be networks ``[N, P]`` of ``spec``, or one ``[P]``."""
    check_numbers(where, "flat", flat, "[N, P] or [P]")
    if flat.dim() not in (1, 2):
        raise ValueError(f"{where}: flat must have shape [N, P] or [P], not {list(flat.shape)}")
    spec.check_flat(where, flat)


def read_json(where: str, what: str, text: Any, spec: Any) -> dict[str, Any]:
    """The object in ``text``, its ``"spec"`` read, which has to equal ``spec`` where one is given."""
    if not isinstance(text, str):
        raise TypeError(f"{where}: text must be a string, not {_check.describe(text)}")
    if spec is not None and not isinstance(spec, WeightSpec):
        raise TypeError(f"{where}: spec must be a WeightSpec or None, not {_check.describe(spec)}")
    try:
        data = json.loads(text)
        data["spec"] = WeightSpec.from_json(json.dumps(data["spec"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{where}: text is not {what}: {error!r}") from None
    if spec is not None:
        check_spec(where, "text is", data["spec"], spec)
    return data


def check_spec(where: str, given: str, of: WeightSpec, spec: WeightSpec) -> None:
    """Raise where what is ``given`` is of another spec than ``spec``, naming the first difference."""
    if of == spec:
        return
    ours, theirs = (
        {name: (shape, each.axes[name]) for name, shape in each.shapes.items()}
        for each in (spec, of)
    )
    names = (name for name in chain(ours, theirs) if ours.get(name) != theirs.get(name))
    differs = next(names, "the order of tensors or the sizes of labels")
    raise ValueError(f"{where}: {given} of another spec: they differ in {differs}")
