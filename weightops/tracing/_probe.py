"""A model as a function of its weights, in float64, and how far a permutation is from changing nothing."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from math import inf, isfinite
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from weightops import _check
from weightops.ops.permute import permute
from weightops.spec import Permutations, WeightSpec

_DOUBLE = {
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.float32: torch.float64,
    torch.complex64: torch.complex128,
}


class _Doubles(TorchDispatchMode):
    """Casts to a lower precision, as norms and softmaxes ask for, are casts to float64."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if kwargs.get("dtype") in _DOUBLE:
            kwargs = kwargs | {"dtype": _DOUBLE[kwargs["dtype"]]}
        return func(*args, **kwargs)


class Network:
    """``network(row)`` runs a float64 copy of ``model`` in eval mode with the weights ``row`` ``[P]``."""

    def __init__(
        self, spec: WeightSpec, model: nn.Module, inputs: tuple, kwargs: Mapping[str, Any]
    ) -> None:
        self.spec = spec
        try:
            self.model = copy.deepcopy(model).double().eval().requires_grad_()
        except Exception as error:
            raise ValueError(f"verify: model can't be copied to float64: {error}") from error
        self.inputs = tree_map(_double, (inputs, dict(kwargs)))
        self.parameters = dict(self.model.named_parameters(remove_duplicate=False))
        spec._state("verify", "model", self.model)
        self.row = spec.flatten(self.model)[0]
        self.functional: list[Tensor] = []

    def generic_row(self, generator: torch.Generator) -> Tensor:
        """The model's weights with noise, so that no two are equal by initialisation.

        Zeros become small numbers and others keep their sign. Buffers get noise only where all
        entries are equal (fresh running statistics): a table of constants belongs to the model.
        """
        row = self.row.clone()
        for name, view in self.spec.unflatten(row).items():
            noise = 0.2 * torch.rand(view.shape, generator=generator).to(row) - 0.1
            if self.spec._places[name][0] not in self.parameters:
                if view.numel() and (view != view.flatten()[0]).any():
                    continue
                noise = noise.abs()  # variances
            view.copy_(torch.where(view == 0, noise, view * (1 + noise)))
        return row

    def __call__(
        self, row: Tensor, *, gradients: bool = True
    ) -> tuple[list[Tensor], Tensor | None]:
        """Floating outputs, and the gradients ``[P]`` of one random functional of them."""
        self.spec.load_(self.model, row)
        args, kwargs = tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, self.inputs)
        default = torch.get_default_dtype()
        try:
            torch.set_default_dtype(torch.float64)
            with torch.set_grad_enabled(gradients), _Doubles():
                outputs = list(_floating(self.model(*args, **kwargs)))
        except Exception as error:
            raise ValueError(
                f"verify: model does not run in float64 on these inputs: {error!r}"
            ) from error
        finally:
            torch.set_default_dtype(default)
        if not self.functional:
            generator = torch.Generator().manual_seed(len(outputs))
            self.functional = [
                torch.randn(out.shape, dtype=torch.float64, generator=generator).to(out.device)
                for out in outputs
            ]
        if [out.shape for out in outputs] != [each.shape for each in self.functional]:
            return [], None
        if not (gradients and outputs):
            return outputs, None
        total = torch.stack(
            [(out * each).sum() for out, each in zip(outputs, self.functional, strict=True)]
        ).sum()
        return [out.detach() for out in outputs], self._gradients(total)

    def _gradients(self, total: Tensor) -> Tensor | None:
        if not total.requires_grad:
            return None
        unique = list(self.model.parameters())
        grads = torch.autograd.grad(total, unique, allow_unused=True, materialize_grads=True)
        of = dict(zip(map(id, unique), grads, strict=True))
        state = {
            name: of[id(self.parameters[name])] if name in self.parameters else 0 * tensor
            for name, tensor in self.model.state_dict().items()
        }
        return self.spec.flatten(state)[0]


class Probe:
    """A network at one point: how far permuting it is from changing nothing."""

    def __init__(self, network: Network, row: Tensor) -> None:
        self.network, self.row = network, row
        self.outputs, grads = network(row)
        if not self.outputs:
            raise ValueError("verify: model has no floating output to compare")
        for n, out in enumerate(self.outputs):
            _check.finite("verify", f"output {n} of the model", out)
        self.steepest = 0.0 if grads is None else grads.abs().max().item()
        if grads is None or not self.steepest:
            raise ValueError("verify: no output of the model has a gradient by its weights")
        if not isfinite(self.steepest):
            raise ValueError("verify: a gradient of the outputs is not finite")
        self.grads = grads

    def error(self, spec: WeightSpec, perms: Permutations, *, gradients: bool = True) -> float:
        """How far permuting by ``perms`` as ``spec`` says changes the network."""
        row = permute(self.row[None], perms, spec)[0]
        return self.error_at(row, spec, perms, gradients=gradients)

    def error_at(
        self, row: Tensor, spec: WeightSpec, perms: Permutations, *, gradients: bool = True
    ) -> float:
        """The largest change of an output or a gradient at ``row``, over the largest entry of its kind."""
        outputs, grads = self.network(row, gradients=gradients)
        if len(outputs) != len(self.outputs):
            return inf
        errors = [
            _distance(given, due) / (due.abs().max().item() or 1.0)
            for given, due in zip(outputs, self.outputs, strict=True)
            if due.numel()
        ]
        if gradients:
            expected = permute(self.grads[None], perms, spec)[0]
            missing = torch.zeros_like(expected) if grads is None else grads
            errors.append(_distance(expected, missing) / self.steepest)
        return max((error if isfinite(error) else inf for error in errors), default=0.0)


def _distance(a: Tensor, b: Tensor) -> float:
    return (a - b).abs_().max().item()


def _double(value: Any) -> Any:
    return value.to(_DOUBLE.get(value.dtype, value.dtype)) if isinstance(value, Tensor) else value


def _floating(output: Any) -> Iterator[Tensor]:
    for leaf in tree_leaves(output):
        if isinstance(leaf, Tensor):
            if leaf.is_complex():
                leaf = torch.view_as_real(leaf)
            if leaf.is_floating_point():
                yield leaf.double()
        elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            yield from _floating([getattr(leaf, field.name) for field in dataclasses.fields(leaf)])
