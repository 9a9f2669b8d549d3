"""Layers on a weight manifold by torch's own products and convolutions, of weights synthesised first.

For one context that is all there is to do. Convolutions of single channels have weights so small that each item's
are held, and the items' channels become channels of one image. On CUDA the products are cuBLAS', the convolutions
cuDNN's or torch's, so whether these repeat to the last bit is torch's to say.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from weightops.ops.manifold import reference
from weightops.ops.manifold.triton_plan import Contexts
from weightops.ops.manifold.triton_synthesize import gathered, gradients, synthesize

# Torch's convolutions of single channels count in 32 bits.
_MOST = 2**31 - 2**16
_setting = threading.Lock()


def serves(x: Tensor, coeffs: Tensor, weight: Tensor, geometry: Sequence[int], y: int) -> bool:
    """Whether torch's way is the one for these arguments of :func:`contract`, whose result has ``y`` entries."""
    if coeffs.shape[0] == 1:
        return True
    single = bool(geometry) and weight.shape[2] == 1 and geometry[6] > 1
    held = x.shape[0] * weight[0].numel()
    return single and held <= x.numel() + y and max(x.numel(), y) < _MOST


def contract(
    x: Tensor,
    coeffs: Tensor,
    index: Tensor | None,
    weight: Tensor,
    shift: Tensor | None,
    geometry: Sequence[int],
    precision: str,
) -> Tensor:
    """As :func:`reference.contract`, where :func:`serves` says so."""
    lanes = 1 if coeffs.shape[0] == 1 else x.shape[0]
    w = _weights(coeffs, index, weight, lanes)
    b = None
    if shift is not None:
        b = _of_lanes(shift, index, lanes).flatten().to(x.dtype)
    if not geometry:
        return torch.nn.functional.linear(x, w, b).contiguous()
    stride, padding, gap, groups = _pairs(geometry, lanes)
    with _as_precise(x.dtype, precision):
        y = torch.nn.functional.conv2d(_joined(x, lanes), w, b, stride, padding, gap, groups)
    return y.reshape(len(x), -1, *y.shape[2:]).contiguous()


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
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """As :func:`reference.contract_backward`, where :func:`serves` says so; ``None`` where not needed."""
    lanes = 1 if coeffs.shape[0] == 1 else x.shape[0]
    to_x = product = None
    if not geometry:
        if need_x:
            to_x = grad @ _weights(coeffs, None, weight, 1)
        if need_coeffs or need_weight:
            product = grad.flatten(0, 1).mT @ x.flatten(0, 1)
    elif need_x or need_coeffs or need_weight:
        stride, padding, gap, groups = _pairs(geometry, lanes)
        w = _weights(coeffs, index, weight, lanes)
        wanted = (need_x, need_coeffs or need_weight, False)
        with _as_precise(x.dtype, precision):
            to_x, product, _ = torch.ops.aten.convolution_backward(
                _joined(grad, lanes), _joined(x, lanes), w, None,
                stride, padding, gap, False, (0, 0), groups, wanted,
            )  # fmt: skip
    if to_x is not None:
        to_x = to_x.reshape(x.shape).contiguous()
    if product is None:
        return to_x, None, None
    by_context = product.reshape(lanes, -1)
    if coeffs.shape[0] > 1 and index is not None:
        contexts = Contexts.of(index, coeffs.shape[0], x.device)
        by_context = gathered(by_context.to(coeffs.dtype), contexts)
        coeffs = contexts.used(coeffs)
    return to_x, *gradients(coeffs, by_context, weight, need_coeffs, need_weight, weight.dtype)


def _weights(coeffs: Tensor, index: Tensor | None, weight: Tensor, lanes: int) -> Tensor:
    """[lanes * out, ...]: the weights of the one context, or of each item."""
    made = _of_lanes(synthesize(coeffs, weight.flatten(1)), index, lanes)
    return made.reshape(lanes * weight.shape[1], *weight.shape[2:])


def _of_lanes(contexts: Tensor, index: Tensor | None, lanes: int) -> Tensor:
    """What belongs to the one context, [1, ...], or to each item's."""
    return contexts if len(contexts) == 1 else reference.of_items(contexts, index, lanes)


def _joined(x: Tensor, lanes: int) -> Tensor:
    """Items [N, C, H, W], or their channels side by side [1, N * C, H, W]."""
    return x if lanes == 1 else x.reshape(1, -1, *x.shape[2:])


def _pairs(geometry: Sequence[int], lanes: int) -> tuple:
    stride_h, stride_w, pad_h, pad_w, gap_h, gap_w, groups = geometry
    return (stride_h, stride_w), (pad_h, pad_w), (gap_h, gap_w), groups * lanes


@contextmanager
def _as_precise(dtype: torch.dtype, precision: str) -> Iterator[None]:
    """What is asked of products of float32 holds for cuDNN, which has a setting of its own, TF32 by default."""
    if dtype != torch.float32 or precision != "highest":
        yield
        return
    setting: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    # It is one for all threads: of two at once the second would find, and leave, what the first has set.
    with _setting:
        before = setting.fp32_precision
        setting.fp32_precision = "ieee"
        try:
            yield
        finally:
            setting.fp32_precision = before
