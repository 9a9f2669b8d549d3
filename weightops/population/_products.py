"""Populations whose linear layers are large: one product for many networks, by the kernels for that."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod

from torch import Tensor

from weightops.ops.manifold import manifold_linear
from weightops.ops.population import Program, grouped

#: weights of a linear layer from which on a product for many networks is faster (measured at 2,048 and 100,352)
LARGE = 1 << 15
#: numbers that a product makes of a sample: a group's values stay in the caches
_MADE = 2048
_ELEMENTWISE = ("relu", "silu", "gelu", "gelu_tanh", "tanh", "sine", "add")


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
        yield group, grouped.population_logits(flat[group], own, code, shared, product=_product)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return manifold_linear(x, x.new_ones(1), weight[None], None if bias is None else bias[None])
