"""Layers whose weights lie on a manifold, and whole networks synthesised from its bases."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor

from weightops import _check, _op
from weightops.ops.manifold import arguments, choice
from weightops.ops.manifold.declaration import (
    _backward,
    _contract,
    _synthesize,
    _synthesize_into,
    _update,
)

__all__ = [
    "_backward",
    "_contract",
    "_synthesize",
    "_synthesize_into",
    "_update",
    "manifold_conv1d",
    "manifold_conv2d",
    "manifold_linear",
    "synthesize",
    "synthesize_update_",
]


def manifold_linear(
    x: Tensor,
    coeffs: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    index: Tensor | None = None,
) -> Tensor:
    """A linear layer with weights of its own for every context: ``y = x W(s).T + b(s)``.

    ``W(s) = sum_k coeffs[s, k] weight[k]``, and so the bias (Benjamin et al. 2025, "Walking the Weight
    Manifold", arXiv 2505.22994). No sample's weights are ever held in memory.

    Args:
        x: ``[..., in]``, float32, float64, bfloat16 or float16; the last two are summed in float32. Any strides.
        coeffs: a point of the manifold for each context, of ``x``'s dtype or the one that sums are taken in.
            ``[B, K]``: a context for each of the B entries of ``x``'s first axis. ``[G, K]`` with ``index``:
            entry b has context ``index[b]``. ``[K]``: one context for all of ``x``.
        weight: the bases ``[K, out, in]``, of ``x``'s dtype.
        bias: ``[K, out]`` of ``x``'s dtype, or ``None``.
        index: ``[B]``, int64 or int32, in any order; contexts that it does not name are allowed.

    Returns:
        ``[..., out]`` of ``x``'s dtype. Gradients flow to ``x``, ``coeffs``, ``weight`` and ``bias``.

    Raises:
        ValueError: shapes or devices do not fit, or an entry of ``index`` is not in 0..G-1. Under
            ``torch.compile`` and while a CUDA graph is captured the values of ``index`` are not looked at.
        TypeError: an argument has the wrong type or dtype.
    """
    where = "manifold_linear"
    rows, index = arguments.contexts(where, x, coeffs, weight, bias, index, 3)
    if x.shape[-1] != weight.shape[2]:
        raise ValueError(
            f"{where}: x has {x.shape[-1]} inputs (shape {list(x.shape)}), "
            f"but weight has {weight.shape[2]} (shape {list(weight.shape)})"
        )
    if choice.by_torch(x, coeffs, weight, index):
        y = choice.contract(x, rows, weight)
        return y if bias is None else y + rows @ bias
    *lead, inputs = x.shape
    if coeffs.dim() == 1:
        items = x.reshape(1, prod(lead), inputs)
    else:
        items = x.reshape(lead[0], prod(lead[1:]), inputs)
    shift = _shift(rows, bias)
    y = _contract(items, rows, index, weight, shift, (), _op.matmul_precision(x.dtype))
    return y.view(*lead, weight.shape[1])


def manifold_conv1d(
    x: Tensor,
    coeffs: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | tuple[int] = 1,
    padding: int | tuple[int] | str = 0,
    dilation: int | tuple[int] = 1,
    groups: int = 1,
    index: Tensor | None = None,
) -> Tensor:
    """:func:`manifold_conv2d` of one axis: ``x`` ``[B, C, L]``, ``weight`` ``[K, out, C / groups, k]``."""
    return _convolve(
        "manifold_conv1d", x, coeffs, weight, bias, stride, padding, dilation, groups, index
    )


def manifold_conv2d(
    x: Tensor,
    coeffs: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    index: Tensor | None = None,
) -> Tensor:
    """A convolution with weights of its own for every context: ``W(s) = sum_k coeffs[s, k] weight[k]``.

    Args:
        x: ``[B, C, H, W]``, float32, float64, bfloat16 or float16; the last two are summed in float32.
        coeffs: ``[B, K]``, ``[G, K]`` with ``index``, or ``[K]``, as for :func:`manifold_linear`.
        weight: the bases ``[K, out, C / groups, kh, kw]``, of ``x``'s dtype.
        bias: ``[K, out]`` of ``x``'s dtype, or ``None``.
        stride, padding, dilation, groups: as in ``torch.nn.functional.conv2d``; ``padding`` may be
            ``"valid"``, or with a stride of one ``"same"``.
        index: ``[B]``, int64 or int32, in any order.

    Returns:
        ``[B, out, H', W']`` of ``x``'s dtype. Gradients flow to ``x``, ``coeffs``, ``weight`` and ``bias``.

    Raises:
        ValueError, TypeError: as :func:`manifold_linear`; also where the kernel is larger than the padded input.
    """
    return _convolve(
        "manifold_conv2d", x, coeffs, weight, bias, stride, padding, dilation, groups, index
    )


def _convolve(
    where: str,
    x: Tensor,
    coeffs: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: Any,
    index: Tensor | None,
) -> Tensor:
    axes = 1 if where == "manifold_conv1d" else 2
    rows, index = arguments.contexts(where, x, coeffs, weight, bias, index, 3 + axes)
    geometry, beyond = arguments.geometry(where, x, weight, stride, padding, dilation, groups)
    if any(beyond):
        x = torch.nn.functional.pad(x, beyond)
    if axes == 1:
        x, weight = x.unsqueeze(2), weight.unsqueeze(3)
    shift = _shift(rows, bias)
    y = _contract(x, rows, index, weight, shift, geometry, _op.matmul_precision(x.dtype))
    return y.squeeze(2) if axes == 1 else y


def _shift(coeffs: Tensor, bias: Tensor | None) -> Tensor | None:
    """The biases [G, out] of contexts ``coeffs`` [G, K]."""
    # As an op of this library, which autocast leaves alone.
    return None if bias is None else _synthesize(coeffs, bias.to(coeffs.dtype))


def synthesize(coeffs: Tensor, bases: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Whole networks at points of a weight manifold: ``out[g] = sum_k coeffs[g, k] bases[k]``.

    Args:
        coeffs: ``[G, K]``, or ``[K]`` for one network, of ``bases``' dtype or the one that sums are taken in.
        bases: ``[K, P]``, float32, float64, bfloat16 or float16; the last two are summed in float32.
        out: buffer of the result's shape to write into and return; not differentiable.

    Returns:
        ``[G, P]`` or ``[P]`` of ``bases``' dtype. Gradients flow to ``coeffs`` and ``bases``.

    Raises:
        ValueError: shapes or devices do not fit.
        TypeError: an argument has the wrong type or dtype.
    """
    where = "synthesize"
    rows = arguments.bases(where, coeffs, bases)
    shape = (*coeffs.shape[:-1], bases.shape[1])
    if out is None:
        return _synthesize(rows, bases).view(shape)
    _check.out_buffer(where, out, shape, bases, (coeffs, bases))
    _synthesize_into(rows, bases, out if coeffs.dim() == 2 else out[None])
    return out


def synthesize_update_(
    bases: Tensor,
    grad: Tensor,
    coeffs: Tensor,
    *,
    lr: float | Tensor,
    inverse_gram: Tensor | None = None,
) -> Tensor:
    """Step down on a weight manifold in place, in the pass that takes the gradient by its coefficients.

    ``bases -= lr (coeffs @ inverse_gram).T @ grad``: steepest descent under a bound on how far the whole
    manifold moves (Benjamin et al. 2025, arXiv 2505.22994), G^-1 int phi(s) (x) g(s) ds with the integral
    taken over the contexts given.

    Args:
        bases: ``[K, P]``, changed in place.
        grad: gradients ``[G, P]`` by the synthesised networks, of ``bases``' dtype; ``[P]`` for one.
        coeffs: ``[G, K]`` or ``[K]``, at which they were synthesised, as for :func:`synthesize`.
        lr: step size, a number or a tensor of one.
        inverse_gram: ``[K, K]``, the inverse of G = int phi phi^T ds, of ``coeffs``' dtype or the one that
            sums are taken in; ``None`` for plain gradient descent.

    Returns:
        The gradient by ``coeffs``, ``grad @ bases.T`` of the bases before the step: ``[G, K]`` or ``[K]`` of
        the dtype that sums are taken in.

    Raises:
        ValueError: shapes or devices do not fit, memory is shared, or gradients would have to be recorded.
        TypeError: an argument has the wrong type or dtype.
    """
    rows, step = arguments.update(bases, grad, coeffs, lr, inverse_gram)
    to_coeffs = _update(bases, grad if grad.dim() == 2 else grad[None], rows, step)
    if not torch.compiler.is_compiling():
        # Kernels write behind autograd's back: it is to notice where bases were saved for a gradient.
        torch.autograd.graph.increment_version(bases)
    return to_coeffs.view(coeffs.shape)
