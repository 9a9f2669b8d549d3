"""Stacks of equivariant layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weightops import _check, _op
from weightops.nn import _arguments
from weightops.nn.equivariant import EquivariantLinear
from weightops.nn.norm import EquivariantDropout, EquivariantNorm
from weightops.nn.pool import InvariantPool
from weightops.ops.equivariant import equivariant_stack
from weightops.ops.equivariant.plan import Selection
from weightops.spec import WeightSpec

Activation = Callable[[Tensor], Tensor]

#: name -> the activation, and the same in place
ACTIVATIONS: dict[str, tuple[Activation, Activation]] = {
    "relu": (torch.relu, torch.relu_),
    "silu": (F.silu, lambda y: F.silu(y, inplace=True)),
    "gelu": (F.gelu, torch.ops.aten.gelu_),
    "tanh": (torch.tanh, torch.tanh_),
}
#: whose gradient needs their result only
KEEP_RESULT = ("relu", "tanh")


class UNF(nn.Module):
    """A universal neural functional: equivariant layers with activations between (arXiv 2402.05232).

    ``[B, P, channels[0]]`` to ``[B, P, channels[-1]]``; with ``invariant`` to ``[B, features]``.

    Args:
        spec: the weight space.
        channels: features per weight of the input and after every layer, so one more than layers.
        activation: ``"relu"``, ``"silu"``, ``"gelu"``, ``"tanh"`` or a module, the same one everywhere.
            Behind the last layer there is one only with ``invariant``.
        fixed, terms, rank, normalize: as for :class:`EquivariantLinear`.
        norm: whether :class:`EquivariantNorm` stands before each activation.
        dropout: probability of :class:`EquivariantDropout` behind each activation.
        invariant: whether :class:`InvariantPool` stands at the end, as for predicting something about a
            network: R * channels[-1] features.
        out_features: what a linear layer makes of those; implies ``invariant``.
        device, dtype: of the parameters.

    Without gradients at most two features are held besides the input. Layers with relu alone between them
    are then one op, which on the CPU holds the output and two networks' features a thread.

    Raises:
        ValueError: an option is unknown, a number is out of range, or the parameters are too large.
        TypeError: an argument has the wrong type.
    """

    def __init__(
        self,
        spec: WeightSpec,
        channels: Sequence[int],
        activation: str | nn.Module = "relu",
        *,
        fixed: str = "permute",
        terms: Selection = "full",
        rank: int | None = None,
        normalize: str = "mean",
        norm: bool = False,
        dropout: float = 0.0,
        invariant: bool = False,
        out_features: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        where = "UNF"
        _arguments.is_spec(where, "spec", spec)
        if not isinstance(channels, Sequence) or isinstance(channels, str):
            raise TypeError(
                f"{where}: channels must list integers, not {_check.describe(channels)}"
            )
        if len(channels) < 2:
            raise ValueError(
                f"{where}: channels must have at least 2 entries, input and output, not {channels}"
            )
        for n, each in enumerate(channels):
            _arguments.count(where, f"channels[{n}]", each)
        if not isinstance(activation, nn.Module):
            _check.choice(where, "activation", activation, tuple(ACTIVATIONS), "a module")
        _check.flag(where, "norm", norm)
        _check.flag(where, "invariant", invariant)
        _arguments.number(where, "dropout", dropout, 0, 1)
        if out_features is not None:
            _arguments.count(where, "out_features", out_features)
        self.spec, self.channels = spec, tuple(channels)
        self.activation = activation
        self.layers = nn.ModuleList(
            EquivariantLinear(
                spec,
                into,
                out,
                fixed=fixed,
                terms=terms,
                rank=rank,
                normalize=normalize,
                device=device,
                dtype=dtype,
            )
            for into, out in pairwise(channels)
        )
        self.invariant = invariant or out_features is not None
        inner = channels[1:] if self.invariant else channels[1:-1]
        self.norms = nn.ModuleList(
            EquivariantNorm(spec, width, device=device, dtype=dtype) for width in inner if norm
        )
        self.dropout = EquivariantDropout(dropout)
        self.pool: InvariantPool | None = None
        self.head: nn.Linear | None = None
        if self.invariant:
            self.pool = InvariantPool(spec, fixed=fixed, normalize=normalize)
        if self.pool is not None and out_features is not None:
            features = self.pool.out_features(channels[-1])
            self.head = nn.Linear(features, out_features, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, P, channels[0]]`` to ``[B, P, channels[-1]]``, or to ``[B, features]`` if invariant.

        Raises:
            ValueError: P or the number of channels is not the module's.
            TypeError: ``x`` is no floating point tensor, or not of the parameters' dtype.
        """
        _arguments.features("UNF", x, self.spec, self.channels[0])
        if self._is_plain() and not self._needs_gradients(x):
            x = self._stacked(x)
        else:
            for n, layer in enumerate(self.layers):
                x = layer(x)
                if n + 1 < len(self.layers) or self.invariant:
                    x = self._between(x, n, _may_overwrite() and _is_fresh(layer))
        if self.pool is not None:
            x = self.pool(x)
        return x if self.head is None else self.head(x)

    def _is_plain(self) -> bool:
        """Whether nothing but relu stands between the layers, and nobody looks there."""
        layers: Any = self.layers
        return (
            self.activation == "relu"
            and not len(self.norms)
            and (self.dropout.p == 0 or not self.dropout.training)
            and not _is_watched(self.dropout)
            and all(_is_fresh(each) and each.factors is None for each in layers)
            and all(each.plan is layers[0].plan for each in layers)
            and len({each.bias is None for each in layers}) == 1
        )

    def _needs_gradients(self, x: Tensor) -> bool:
        return torch.is_grad_enabled() and (
            x.requires_grad or any(p.requires_grad for p in self.layers.parameters())
        )

    def _stacked(self, x: Tensor) -> Tensor:
        layers: Any = self.layers
        theta, bias = [each.theta for each in layers], [each.bias for each in layers]
        return equivariant_stack(x, theta, bias, layers[0].plan, activate_last=self.invariant)

    def _between(self, x: Tensor, n: int, inplace: bool) -> Tensor:
        if torch.is_grad_enabled():
            inplace = inplace and self.activation in KEEP_RESULT and not len(self.norms)
        if len(self.norms):
            norm: Any = self.norms[n]
            x = norm.forward_(x) if inplace and not _is_watched(norm) else norm(x)
        if isinstance(self.activation, nn.Module):
            x = self.activation(x)
        else:
            x = ACTIVATIONS[self.activation][inplace](x)
        return self.dropout(x)

    def extra_repr(self) -> str:
        name = "" if isinstance(self.activation, nn.Module) else f", activation={self.activation!r}"
        return f"{list(self.channels)}{name}"


def _may_overwrite() -> bool:
    """Whether a fresh feature is needed by nobody else; compilers plan memory themselves."""
    return not (torch.compiler.is_compiling() or _op._transforms_active())


def _is_watched(module: nn.Module) -> bool:
    """Whether a hook sees what goes in or comes out, and may keep or change it."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or nn.modules.module._has_any_global_hook()
    )


def _is_fresh(layer: nn.Module) -> bool:
    """Whether the layer's output is new memory that only the caller has."""
    return type(layer) is EquivariantLinear and not _is_watched(layer)
