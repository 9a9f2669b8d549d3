"""Layers on a weight manifold on GPUs: which of Triton's kernels, or torch's own products, serve a call.

One context for all, and convolutions of single channels: torch's (``vendor.py``). Contexts of many rows: weights
are synthesised as they are loaded. Contexts of few rows: a product for each basis. The kernels have no atomics, so
their results are the same every time.

Sums are taken in float32 (float64 for float64). Of float16 and bfloat16 what is given is multiplied as it is;
synthesised weights, and in the bases' gradient what coefficients scale, are rounded to that dtype first.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from weightops.ops.manifold import reference, vendor
from weightops.ops.manifold.declaration import _result_shape
from weightops.ops.manifold.triton_contract import contract_groups, contract_rows, outer
from weightops.ops.manifold.triton_plan import (
    PRECISION,
    Contexts,
    Layer,
    Tile,
    for_bases,
    tile_for,
    way,
)
from weightops.ops.manifold.triton_synthesize import (
    TYPES,
    gathered,
    gradients,
    on,
    serves,
)

# Offsets within an item and within a basis have 32 bits.
_MOST = 2**31 - 2**16
# So many bytes of gradients by contexts' weights are held at once.
_HELD = 1 << 26
# Products with fewer tiles share out their rows until there are as many programs.
_PROGRAMS = 256


def contract(
    x: Tensor,
    coeffs: Tensor,
    index: Tensor | None,
    weight: Tensor,
    shift: Tensor | None,
    geometry: Sequence[int],
    precision: str,
) -> Tensor:
    """As :func:`reference.contract`, which also serves what these kernels do not."""
    shape = _result_shape(x, weight, geometry)
    fits = shift is None or shift.dtype == coeffs.dtype
    if not (fits and _serves(coeffs, weight, x, shape)):
        return reference.contract(x, coeffs, index, weight, shift, geometry, precision)
    if vendor.serves(x, coeffs, weight, geometry, prod(shape)):
        return vendor.contract(x, coeffs, index, weight, shift, geometry, precision)
    y, layer = x.new_empty(shape), Layer.of(x.shape, shape, weight.shape, geometry, False)
    x, coeffs, weight = x.contiguous(), coeffs.contiguous(), _plain(weight)
    index = None if index is None else index.contiguous()
    shift = None if shift is None else shift.contiguous()
    with on(x):
        if _pays(layer, coeffs, precision, x.dtype):
            contexts = Contexts.of(index, coeffs.shape[0], x.device)
            _by_groups(layer, x, coeffs, contexts, weight, shift, y, precision)
        else:
            _by_rows(layer, x, coeffs, index, weight, shift, y, None, precision)
    return y


def contract_backward(
    grad: Tensor,
    x: Tensor,
    coeffs: Tensor,
    index: Tensor | None,
    weight: Tensor,
    geometry: Sequence[int],
    need_x: bool,
    need_coeffs: bool,
    need_weight: bool,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`reference.contract_backward`, which also serves what these kernels do not."""
    needs = (need_x, need_coeffs, need_weight)
    if not (grad.dtype == x.dtype and _serves(coeffs, weight, x, grad.shape)):
        return reference.contract_backward(
            grad, x, coeffs, index, weight, geometry, *needs, precision
        )
    found: tuple[Tensor | None, ...]
    if vendor.serves(x, coeffs, weight, geometry, grad.numel()):
        args = (grad, x, coeffs, index, weight, geometry)
        found = vendor.contract_backward(*args, *needs, precision)
    else:
        grad, x, coeffs = grad.contiguous(), x.contiguous(), coeffs.contiguous()
        index = None if index is None else index.contiguous()
        layer = Layer.of(x.shape, grad.shape, weight.shape, geometry, False)
        pays = _pays(layer, coeffs, precision, x.dtype)
        run = _backward_by_groups if pays else _backward_by_rows
        with on(x):
            found = run(layer, grad, x, coeffs, index, _plain(weight), geometry, *needs, precision)
    to_x, to_coeffs, to_weight = (
        like.new_empty(0) if each is None else each
        for each, like in zip(found, (x, coeffs, weight), strict=True)
    )
    return to_x, to_coeffs, to_weight


def _serves(coeffs: Tensor, weight: Tensor, x: Tensor, y: Sequence[int]) -> bool:
    return serves(weight, coeffs, x) and all(
        0 < prod(shape[1:]) < _MOST and shape[0] > 0 for shape in (weight.shape, x.shape, y)
    )


def _plain(weight: Tensor) -> Tensor:
    return weight if weight[0].is_contiguous() else weight.contiguous()


def _pays(layer: Layer, coeffs: Tensor, precision: str, dtype: torch.dtype) -> bool:
    """Whether contexts have rows enough to pay for the synthesis of their weights.

    Tensor cores leave less time for it. Both numbers are guessed from counts of instructions, not measured.
    """
    contexts, bases = coeffs.shape
    fast = way(dtype, precision) not in ("ieee", "double")
    return layer.rows * (bases - 1) >= min(contexts, layer.items) * (256 if fast else 64)


def _or(given: Tensor | None, other: Tensor) -> Tensor:
    """``given``, or for a kernel that does not look at it any other tensor."""
    return other if given is None else given


def _input(a: Tensor, precision: str) -> str:
    return PRECISION[precision] if a.dtype == torch.float32 else "ieee"


def _tile(
    kernel: str, layer: Layer, a: Tensor, rows: int, columns: int, times: int, precision: str
) -> Tile:
    aligned = layer.aligned(a.itemsize)
    return tile_for(kernel, way(a.dtype, precision), aligned, rows, columns, times)


def _by_rows(
    layer: Layer,
    a: Tensor,
    coeffs: Tensor,
    index: Tensor | None,
    weight: Tensor,
    shift: Tensor | None,
    y: Tensor | None,
    x: Tensor | None,
    precision: str,
) -> Tensor | None:
    """Fill ``y``; where ``x`` is given, return its products with each basis' share of ``y``, [rows, K]."""
    tile = _tile("contract_rows", layer, a, layer.rows, layer.columns, layer.groups, precision)
    across = -(-layer.columns // tile.columns) * layer.groups
    partials = None if x is None else coeffs.new_empty(across, layer.rows, coeffs.shape[1])
    contract_rows[(-(-layer.rows // tile.rows) * across,)](
        a, coeffs, _or(index, a), weight, _or(shift, a), _or(x, a), _or(y, a), _or(partials, a),
        layer.rows, layer.per_item, layer.depth, layer.columns, layer.groups, coeffs.shape[1],
        weight.stride(0), weight.stride(1), *layer.strides, *layer.image,
        *layer.taps, layer.transposed, index is not None, shift is not None, y is not None,
        x is not None, *tile[:3], _input(a, precision), TYPES[coeffs.dtype], **tile.options,
    )  # fmt: skip
    return None if partials is None else partials.sum(0)


def _by_groups(
    layer: Layer,
    a: Tensor,
    coeffs: Tensor,
    contexts: Contexts,
    weight: Tensor,
    shift: Tensor | None,
    y: Tensor,
    precision: str,
) -> None:
    bases = coeffs.shape[1]
    tile = _tile("contract_groups", layer, a, layer.rows, layer.columns, layer.groups, precision)
    tile, unrolled = for_bases(tile, bases, a.itemsize)
    of_tiles, offsets = contexts.tiles(layer, tile.rows)
    across = -(-layer.columns // tile.columns) * layer.groups
    contract_groups[(len(of_tiles) * across,)](
        a, coeffs, _or(contexts.order, a), contexts.starts, of_tiles, offsets, weight, _or(shift, a), y,
        coeffs.shape[0], len(of_tiles), layer.per_item, layer.depth, layer.columns, layer.groups,
        weight.stride(0), weight.stride(1), *layer.strides, *layer.image,
        bases, unrolled, *layer.taps, layer.transposed, contexts.order is not None, shift is not None,
        *tile[:3], _input(a, precision), TYPES[coeffs.dtype], **tile.options,
    )  # fmt: skip


def _products(
    layer: Layer,
    grad: Tensor,
    x: Tensor,
    coeffs: Tensor,
    index: Tensor | None,
    contexts: Contexts | None,
    precision: str,
) -> Tensor:
    """Sums of outer products [.., shares, out, in]: for each basis, or for each of ``contexts``."""
    order, starts = (None, None) if contexts is None else contexts
    grouped = starts is not None
    count = coeffs.shape[0 if grouped else 1]
    # Each share is to have some 256 rows.
    most = -(-layer.rows // (256 * (count if grouped else 1)))
    times = layer.groups * count * most
    tile = _tile("outer", layer, x, layer.columns, layer.depth, times, precision)
    tiles = tile.over(layer.columns, layer.depth) * layer.groups
    shares = max(1, min(_PROGRAMS // (tiles * count), most))
    dtype = coeffs.dtype if grouped or shares > 1 else x.dtype
    shape = (count, shares, layer.groups * layer.columns, layer.depth)
    to = coeffs.new_empty(shape, dtype=dtype)
    outer[(tiles * count * shares,)](
        grad, x, coeffs, _or(index, x), _or(order, x), _or(starts, x), to,
        layer.rows, layer.per_item, layer.depth, layer.columns, layer.groups, coeffs.shape[1],
        shares, to[0, 0].numel(), *layer.strides, *layer.image,
        *layer.taps, grouped, (order if grouped else index) is not None,
        *tile[:3], _input(x, precision), TYPES[coeffs.dtype], **tile.options,
    )  # fmt: skip
    return to


def _backward_by_rows(
    layer: Layer,
    grad: Tensor,
    x: Tensor,
    coeffs: Tensor,
    index: Tensor | None,
    weight: Tensor,
    geometry: Sequence[int],
    need_x: bool,
    need_coeffs: bool,
    need_weight: bool,
    precision: str,
) -> tuple[Tensor | None, ...]:
    to_coeffs = to_weight = None
    to_x = torch.empty_like(x) if need_x else None
    if need_x or need_coeffs:
        back = Layer.of(grad.shape, x.shape, weight.shape, geometry, True)
        beside = x if need_coeffs else None
        inner = _by_rows(back, grad, coeffs, index, weight, None, to_x, beside, precision)
        if inner is not None:
            to_coeffs = inner.unflatten(0, (layer.items, -1)).sum(1)
            if index is not None:
                to_coeffs = gathered(to_coeffs, Contexts.of(index, coeffs.shape[0], x.device))
    if need_weight:
        products = _products(layer, grad, x, coeffs, index, None, precision)
        summed = products.sum(1).to(x.dtype) if products.shape[1] > 1 else products
        to_weight = summed.view(weight.shape)
    return to_x, to_coeffs, to_weight


def _backward_by_groups(
    layer: Layer,
    grad: Tensor,
    x: Tensor,
    coeffs: Tensor,
    index: Tensor | None,
    weight: Tensor,
    geometry: Sequence[int],
    need_x: bool,
    need_coeffs: bool,
    need_weight: bool,
    precision: str,
) -> tuple[Tensor | None, ...]:
    contexts = Contexts.of(index, coeffs.shape[0], x.device)
    to_x = torch.empty_like(x) if need_x else None
    if to_x is not None:
        back = Layer.of(grad.shape, x.shape, weight.shape, geometry, True)
        _by_groups(back, grad, coeffs, contexts, weight, None, to_x, precision)
    if not (need_coeffs or need_weight):
        return to_x, None, None
    used = contexts.used(coeffs)
    at_once = max(1, _HELD // (weight[0].numel() * coeffs.itemsize))
    dtype = weight.dtype if at_once >= len(used) else coeffs.dtype
    parts: list[Tensor] = []
    total: Tensor | None = None
    for first in range(0, coeffs.shape[0], at_once):
        some = used[first : first + at_once]
        of_some = Contexts(contexts.order, contexts.starts[first : first + at_once + 1])
        products = _products(layer, grad, x, some, None, of_some, precision)
        shares = products.shape[1]
        each = some.repeat_interleave(shares, 0)
        to_coeffs, to_weight = gradients(
            each, products.flatten(0, 1), weight, need_coeffs, need_weight, dtype
        )
        if to_coeffs is not None:
            parts.append(to_coeffs.unflatten(0, (-1, shares)).sum(1))
        if to_weight is not None:
            total = to_weight if total is None else total.add_(to_weight)
    return (
        to_x,
        torch.cat(parts) if need_coeffs else None,
        None if total is None else total.to(weight.dtype),
    )
