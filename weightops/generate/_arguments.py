"""What the functions of this package ask of their arguments alike."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from weightops import _check
from weightops.generate import _files
from weightops.generate.zoo import Zoo
from weightops.spec import WeightSpec
from weightops.tracing.export import read_weights


def check_dtype(where: str, name: str, value: Tensor) -> None:
    if value.dtype not in _files.DTYPES:
        raise TypeError(
            f"{where}: {name} must be float16, bfloat16, float32 or float64, not {value.dtype}"
        )


def check_like(where: str, name: str, value: Any, shape: str, like: Tensor) -> None:
    """``value`` must be a tensor of the dtype and on the device of a module's weights ``like``."""
    _check.tensor(where, name, value, shape)
    if value.dtype != like.dtype:
        raise TypeError(f"{where}: {name} must be {like.dtype}, not {value.dtype}")
    _check.same_device(where, name, value, "the model", like)


def check_generator(
    where: str, value: Any, device: torch.device | None = None, *, optional: bool = False
) -> None:
    """``generator`` must be one of torch, where it matters of ``device``."""
    if optional and value is None:
        return
    if not isinstance(value, torch.Generator):
        expected = "a torch.Generator" + (" or None" if optional else "")
        raise TypeError(f"{where}: generator must be {expected}, not {_check.describe(value)}")
    if device is not None and value.device.type != device.type:
        raise ValueError(f"{where}: generator is on {value.device}, but the model is on {device}")


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


def check_population(where: str, flat: Any, model: Any) -> None:
    """``flat`` must hold networks of ``model``, in the order of its state dict."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{where}: model must be a module, not {_check.describe(model)}")
    _check.tensor(where, "flat", flat, "[N, P]", 2)
    if flat.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{where}: flat must be float32 or float64, not {flat.dtype}")
    numel = sum(map(prod, read_weights(model).shapes.values()))
    if flat.shape[1] != numel:
        raise ValueError(
            f"{where}: flat has shape {list(flat.shape)}, but model has {numel} weights"
        )


def in_order_of(where: str, model: Any, spec: WeightSpec, flat: Tensor) -> Tensor:
    """Networks ``flat`` of ``spec``, laid out as the model's state dict."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{where}: model must be a module, not {_check.describe(model)}")
    spec._state(where, "model", model)
    weights = read_weights(model)
    if list(weights.shapes) == list(spec.shapes):
        return flat
    # Of tied tensors the spec may have another name than the first.
    state = {weights.names[name]: each for name, each in spec.state_dict(flat).items()}
    return torch.cat(
        [state[name].reshape(len(flat), prod(shape)) for name, shape in weights.shapes.items()], 1
    )


@contextmanager
def named(where: str) -> Iterator[None]:
    """Errors of :func:`weightops.population.population_forward` are the caller's."""
    try:
        yield
    except (TypeError, ValueError) as error:
        message = (
            str(error)
            .removeprefix("population_forward: ")
            .removeprefix("population_train: ")
            .replace("spec_or_model", "model")
        )
        raise type(error)(f"{where}: {message}") from None
