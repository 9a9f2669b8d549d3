"""The definition of layers on a weight manifold and of synthesis, in plain torch.

Contexts are ``coeffs`` [G, K] of the dtype that sums are taken in. Item n of a batch of N has context
``index[n]``; without an index it has context n, or the only one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def of_items(contexts: Tensor, index: Tensor | None, items: int) -> Tensor:
    """What belongs to contexts [G, ...], for every item: [N, ...]."""
    if index is not None:
        return contexts[index]
    return contexts.expand(items, *contexts.shape[1:])


def to_contexts(values: Tensor, index: Tensor | None, contexts: int) -> Tensor:
    """The transpose of :func:`of_items`: the sums [G, ...] of what belongs to items [N, ...]."""
    if index is not None:
        return values.new_zeros(contexts, *values.shape[1:]).index_add(0, index, values)
    return values if contexts == values.shape[0] else values.sum(0, keepdim=True)


def contract(
    x: Tensor,
    coeffs: Tensor,
    index: Tensor | None,
    weight: Tensor,
    shift: Tensor | None,
    geometry: Sequence[int],
    precision: str,
) -> Tensor:
    """``y[n] = S(x[n]) + shift[n]`` with the layer S of ``sum_k coeffs[n, k] weight[k]``.

    Linear: ``x`` [N, R, I], ``weight`` [K, O, I] to [N, R, O]. Convolution, with strides, paddings, dilations
    and groups in ``geometry``: ``x`` [N, C, H, W], ``weight`` [K, O, C / groups, kh, kw] to [N, O, H', W'].
    """
    c = of_items(coeffs, index, x.shape[0])
    wide, bases = x.to(c.dtype), weight.to(c.dtype)
    if geometry:
        y = torch.nn.functional.conv2d(
            _scaled(wide, c, geometry), _joined(bases), None, *_pairs(geometry)
        )
    else:
        y = torch.einsum("nk,nri,koi->nro", c, wide, bases)
    if shift is not None:
        added = of_items(shift, index, x.shape[0])
        y = y + (added[:, :, None, None] if geometry else added[:, None, :])
    return y.to(x.dtype).contiguous()


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
    """The gradients of ``contract(...) . grad`` by x, coeffs and weight; empty where not needed."""
    c = of_items(coeffs, index, x.shape[0])
    wide, bases, cotangent = x.to(c.dtype), weight.to(c.dtype), grad.to(c.dtype)
    to_x, to_coeffs, to_weight = x.new_empty(0), coeffs.new_empty(0), weight.new_empty(0)
    if need_x or need_coeffs:
        parts = _by_basis(cotangent, wide, bases, geometry)
        if need_x:
            to_x = torch.einsum("nk,nk...->n...", c, parts).to(x.dtype).contiguous()
        if need_coeffs:
            to_items = (parts * wide[:, None]).flatten(2).sum(2)
            to_coeffs = to_contexts(to_items, index, coeffs.shape[0]).contiguous()
    if need_weight:
        if geometry:
            joined = _joined(bases)
            scaled = _scaled(wide, c, geometry)
            to_joined = _convolution_backward(cotangent, scaled, joined, geometry)[1]
            k, o, *rest = weight.shape
            summed = to_joined.reshape(o, k, *rest).transpose(0, 1)
        else:
            summed = torch.einsum("nk,nri,nro->koi", c, wide, cotangent)
        to_weight = summed.to(weight.dtype).contiguous()
    return to_x, to_coeffs, to_weight


def _by_basis(grad: Tensor, x: Tensor, weight: Tensor, geometry: Sequence[int]) -> Tensor:
    """[N, K, *x.shape[1:]]: the gradient by x through each basis alone."""
    if not geometry:
        return torch.einsum("nro,koi->nkri", grad, weight)
    n, channels, *pixels = x.shape
    k, groups = weight.shape[0], geometry[6]
    like = x.new_empty(1).expand(n, channels * k, *pixels)
    found = _convolution_backward(grad, like, _joined(weight), geometry)[0]
    by_group = found.reshape(n, groups, k, channels // groups, *pixels)
    return by_group.transpose(1, 2).flatten(2, 3)


def _scaled(x: Tensor, c: Tensor, geometry: Sequence[int]) -> Tensor:
    """[N, C, H, W] as [N, K C, H, W], where every group has its channels times each coefficient."""
    n, channels, *pixels = x.shape
    groups = geometry[6]
    each = x.reshape(n, groups, 1, channels // groups, *pixels) * c[:, None, :, None, None, None]
    return each.reshape(n, channels * c.shape[1], *pixels)


def _joined(weight: Tensor) -> Tensor:
    """[K, O, C / groups, kh, kw] as [O, K C / groups, kh, kw]: what meets the scaled channels."""
    return weight.transpose(0, 1).flatten(1, 2)


def _pairs(geometry: Sequence[int]) -> tuple:
    stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, groups = geometry
    return (stride_h, stride_w), (pad_h, pad_w), (dilation_h, dilation_w), groups


def _convolution_backward(
    grad: Tensor, x: Tensor, weight: Tensor, geometry: Sequence[int]
) -> Sequence[Tensor]:
    stride, padding, dilation, groups = _pairs(geometry)
    backward = torch.ops.aten.convolution_backward
    where = (stride, padding, dilation, False, (0, 0), groups)
    return backward(grad, x, weight, None, *where, (True, True, False))


def synthesize(coeffs: Tensor, bases: Tensor) -> Tensor:
    """``coeffs`` [G, K] times ``bases`` [K, P]."""
    return (coeffs @ bases.to(coeffs.dtype)).to(bases.dtype)


def synthesize_update(bases: Tensor, grad: Tensor, coeffs: Tensor, step: Tensor) -> Tensor:
    """``grad @ bases.T`` [G, K], and then ``bases -= step.T @ grad``."""
    wide = grad.to(coeffs.dtype)
    to_coeffs = wide @ bases.to(coeffs.dtype).mT
    bases.sub_(step.mT @ wide)
    return to_coeffs
