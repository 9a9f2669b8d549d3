"""What the functions of this package ask of their arguments alike."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from weightops import _check
from weightops.generate import _files
from weightops.generate._population import layout, population_forward
from weightops.generate.zoo import Zoo
from weightops.spec import WeightSpec


def check_dtype(where: str, name: str, value: Tensor) -> None:
    if value.dtype not in _files.DTYPES:
        raise TypeError(
            f"{where}: {name} must be float16, bfloat16, float32 or float64, not {value.dtype}"
        )


def check_networks(
    where: str, name: str, zoo: Any, spec: Any, *, empty: bool = False, finite: bool = True
) -> WeightSpec:
    """``zoo`` must be a zoo, or networks ``[N, P]`` of ``spec``; the spec is returned."""
    if isinstance(zoo, Zoo):
        if spec is not None and spec != zoo.spec:
            raise ValueError(f"{where}: spec is not that of {name}")
        return zoo.spec
    if not isinstance(spec, WeightSpec):
        raise TypeError(f"{where}: spec must be a WeightSpec, not {_check.describe(spec)}")
    spec.check_flat(where, zoo, name, 2)
    check_dtype(where, name, zoo)
    if zoo.is_meta:
        raise ValueError(f"{where}: {name} is on meta, where tensors hold no values")
    if not (empty or len(zoo)):
        raise ValueError(f"{where}: {name} holds no network")
    fault = _files.finite_fault(zoo, spec) if finite else None
    if fault:
        raise ValueError(f"{where}: {name}[{fault[0]}]: {fault[1]}")
    return spec


def in_order_of(where: str, model: Any, spec: WeightSpec, flat: Tensor) -> Tensor:
    """Networks ``flat`` of ``spec``, laid out as the model's state dict."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{where}: model must be a module, not {_check.describe(model)}")
    spec._state(where, "model", model)
    if list(layout(model)) == list(spec.shapes):
        return flat
    state = spec.state_dict(flat)
    # Of tied tensors the spec may have another name than the first.
    held = model.state_dict(keep_vars=True)
    names = {id(held[name]): name for name in state}
    pieces = [
        state[names[id(each)]].reshape(len(flat), each.numel()) for each in layout(model).values()
    ]
    return torch.cat(pieces, 1)


def check_set(
    where: str,
    flat: Any,
    model: Any,
    x: Any,
    targets: Any,
    names: tuple[str, str] = ("x", "targets"),
) -> None:
    """Networks, their architecture, examples ``x`` and classes ``targets`` must go together."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{where}: model must be a module, not {_check.describe(model)}")
    _check.tensor(where, "flat", flat, "[N, P]", 2)
    check_dtype(where, "flat", flat)
    numel = sum(tensor.numel() for tensor in layout(model).values())
    if flat.shape[1] != numel:
        raise ValueError(
            f"{where}: flat has shape {list(flat.shape)}, but model has {numel} weights"
        )
    if flat.is_meta:
        raise ValueError(f"{where}: flat is on meta, where tensors hold no values")
    _check.tensor(where, names[0], x, "[B, ...]")
    if x.dim() == 0 or len(x) == 0:
        raise ValueError(f"{where}: {names[0]} must hold examples, not shape {list(x.shape)}")
    _check.same_device(where, names[0], x, "flat", flat)
    _check.tensor(where, names[1], targets, "[B]", 1)
    if targets.dtype != torch.int64:
        raise TypeError(f"{where}: {names[1]} must be int64 classes, not {targets.dtype}")
    _check.size(where, names[1], len(targets), len(x), f"the batch of {names[0]}")
    _check.same_device(where, names[1], targets, names[0], x)
    try:
        probe = population_forward(flat.new_zeros(1, numel), model, x[:1])
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise ValueError(
            f"{where}: model can't compute {_check.describe(x)} with weights of {flat.dtype}: "
            f"{(str(error).splitlines() or [''])[0]}"
        ) from None
    if probe.dim() != 3:
        raise ValueError(
            f"{where}: model must return logits [B, K], not shape {list(probe.shape[1:])}"
        )
    fault = _check.index_fault(targets, probe.shape[2])
    if fault:
        raise ValueError(f"{where}: {names[1]}{fault} (the model has {probe.shape[2]} classes)")
