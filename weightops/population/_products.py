"""Populations whose linear layers are large: one product for many networks, by the kernels for that."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod

import torch
from torch import Tensor

from weightops.ops.manifold import manifold_linear
from weightops.ops.population import Program, reference

#: weights of a linear layer from which on a product for many networks is faster (measured at 2,048 and 100,352)
LARGE = 1 << 15
#: numbers that a product makes of a sample: a group's values stay in the caches
_MADE = 2048
_ELEMENTWISE = ("relu", "silu", "gelu", "gelu_tanh", "tanh", "add")


def is_large(program: Program) -> bool:
    """Whether a linear layer has so many weights."""
    return any(
        layer.kind == "linear" and prod(layer.taken) * prod(layer.made) >= LARGE
        for layer in program.layers
    )


def products(
    program: Program, code: Sequence[int], flat: Tensor, x: Tensor, shared: bool
) -> Iterator[tuple[slice, Tensor]]:
    """Groups of networks: which ones, and their outputs ``[n, B, K]``."""
    dense = all(
        layer.kind in ("linear", *_ELEMENTWISE) and len(layer.made) == 1 for layer in program.layers
    )
    widest = max(prod(layer.made) for layer in program.layers)
    size = max(1, _MADE // widest) if dense else 1
    for begin in range(0, len(flat), size):
        group = slice(begin, begin + size)
        own = x if shared else x[group]
        if dense:
            yield group, _dense(flat[group], own.flatten(1 if shared else 2), code)
        else:
            yield group, reference.run(flat[begin], x if shared else x[begin], code)[None]


def _dense(flat: Tensor, x: Tensor, code: Sequence[int]) -> Tensor:
    """``[n, B, K]`` of networks ``[n, P]`` without convolutions; ``x [B, I]`` or ``[n, B, I]``."""
    networks, values = len(flat), [x]
    for layer in reference.decode(code)[1]:
        value, *others = (values[i] for i in layer["inputs"])
        if layer["kind"] != "linear":
            values.append(reference.apply(layer, flat, value, *others))
            continue
        inputs, outputs = layer["taken"][0], layer["made"][0]
        at, bias_at = layer["places"][:2]
        weight = flat[:, at : at + outputs * inputs].reshape(networks, outputs, inputs)
        bias = flat[:, bias_at : bias_at + outputs] if bias_at >= 0 else flat.new_zeros(1, outputs)
        if value.dim() == 3:
            values.append(torch.baddbmm(bias[:, None], value, weight.mT))
            continue
        stacked = bias.expand(networks, outputs).reshape(1, -1)
        made = manifold_linear(value, flat.new_ones(1), weight.reshape(1, -1, inputs), stacked)
        values.append(made.view(len(x), networks, outputs).transpose(0, 1))
    made = values[-1]
    return made if made.dim() == 3 else made.expand(networks, *made.shape)
