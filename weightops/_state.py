"""Reads the tensors of a spec out of a module or a state dict."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from weightops import _check
from weightops._parts import Place


def read_state(
    where: str, name: str, model: Any, places: Mapping[str, Place], wholes: Mapping[str, torch.Size]
) -> dict[str, Tensor]:
    """The spec's tensors, in its order, as views of the model's; ``name`` is the model in messages.

    Raises:
        ValueError: a tensor is missing, has another shape, or is not in the spec.
        TypeError: ``model`` is no model, or holds something else than a dense tensor.
    """
    if not isinstance(model, (nn.Module, Mapping)):
        raise TypeError(
            f"{where}: {name} must be a module or a state dict, not {_check.describe(model)}"
        )
    given = model.state_dict() if isinstance(model, nn.Module) else model
    for key, shape in wholes.items():
        if key not in given:
            raise ValueError(f"{where}: {name} has no tensor {key!r}, which the spec names")
        _check.tensor(where, f"{name}[{key!r}]", given[key], str(list(shape)))
        if given[key].shape != shape:
            spec = "the spec's is" if key in places else "the spec's parts of it cover"
            raise ValueError(
                f"{where}: {key} has shape {list(given[key].shape)}, {spec} {list(shape)}"
            )
    known = {storage(given[key]) for key in wholes}
    for key, tensor in given.items():
        counted = isinstance(tensor, Tensor) and (tensor.is_floating_point() or tensor.is_complex())
        if key not in wholes and counted and storage(tensor) not in known:
            raise ValueError(f"{where}: {name} has a tensor {key!r}, which the spec lacks")
    return {
        key: given[tensor] if index is None else given[tensor][index]
        for key, (tensor, index) in places.items()
    }


def storage(tensor: Tensor) -> tuple:
    """The same for tensors that share their memory (tied weights)."""
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride()
