"""What the public functions of the manifold family check of their arguments, and make of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from weightops import _check, _op
from weightops.ops.manifold.declaration import _synthesize

#: dtype -> what its sums are taken in
ACCUMULATE = {
    torch.float32: torch.float32,
    torch.float64: torch.float64,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
}
_BY_DIMS = {
    3: ("[..., in]", "[K, out, in]"),
    4: ("[B, C, L]", "[K, out, C / groups, k]"),
    5: ("[B, C, H, W]", "[K, out, C / groups, kh, kw]"),
}


def contexts(
    where: str,
    x: Tensor,
    coeffs: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: Tensor | None,
    dims: int,
) -> tuple[Tensor, Tensor | None]:
    """``coeffs`` as [G, K] of the dtype sums are taken in, and ``index`` as int64."""
    if not (
        _plain(x)
        and _plain(coeffs)
        and _plain(weight)
        and (bias is None or (_plain(bias) and bias.dtype == x.dtype and bias.device == x.device))
        and x.dtype in ACCUMULATE
        and weight.dtype == x.dtype
        and weight.dim() == dims
        and (x.dim() == dims - 1 if dims > 3 else x.dim() > 0)
        and coeffs.device == weight.device == x.device
    ):
        _explain_types(where, x, coeffs, weight, bias, dims)
    rows = _rows(where, coeffs, x.dtype, "x")
    bases = weight.shape[0]
    if bases == 0:
        raise ValueError(f"{where}: weight has no basis (shape {list(weight.shape)})")
    if coeffs.shape[-1] != bases:
        raise ValueError(
            f"{where}: coeffs has {coeffs.shape[-1]} coefficients (shape {list(coeffs.shape)}), "
            f"but weight has {bases} bases (shape {list(weight.shape)})"
        )
    if bias is not None and bias.shape != weight.shape[:2]:
        expected = list(weight.shape[:2])
        raise ValueError(f"{where}: bias must have shape {expected}, not {list(bias.shape)}")
    if index is not None:
        return rows, _index(where, index, x, coeffs)
    if coeffs.dim() == 2 and (x.dim() == 1 or coeffs.shape[0] != x.shape[0]):
        raise ValueError(
            f"{where}: coeffs {list(coeffs.shape)} must have a context for each entry of the first "
            f"axis of x {list(x.shape)}, or come with index, or be [K] for one context"
        )
    return rows, None


def _plain(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout is torch.strided and not value.is_nested


def _rows(where: str, coeffs: Tensor, dtype: torch.dtype, of: str) -> Tensor:
    accumulate = ACCUMULATE[dtype]
    if coeffs.dtype != accumulate:
        if coeffs.dtype != dtype:
            expected = f"{dtype} as {of}" + (f" or {accumulate}" if dtype != accumulate else "")
            raise TypeError(f"{where}: coeffs must be {expected}, not {coeffs.dtype}")
        coeffs = coeffs.to(accumulate)
    if coeffs.dim() == 1:
        return coeffs[None]
    if coeffs.dim() != 2:
        raise ValueError(
            f"{where}: coeffs must have shape [contexts, K] or [K], not {list(coeffs.shape)}"
        )
    return coeffs


def _index(where: str, index: Any, x: Tensor, coeffs: Tensor) -> Tensor:
    _check.tensor(where, "index", index, "[B]", 1)
    _check.index_dtype(where, "index", index)
    _check.same_device(where, "index", index, "x", x)
    if coeffs.dim() == 1:
        raise ValueError(f"{where}: index needs coeffs [G, K], not {list(coeffs.shape)}")
    if x.dim() == 1 or index.shape[0] != x.shape[0]:
        raise ValueError(
            f"{where}: index has length {index.shape[0]}, but x has shape {list(x.shape)}: "
            "it must have an entry for each of the first axis"
        )
    if coeffs.shape[0] == 0 and index.shape[0] > 0:
        raise ValueError(f"{where}: coeffs has no context (shape {list(coeffs.shape)})")
    if fault := _check.index_fault(index, coeffs.shape[0]):
        raise ValueError(f"{where}: index{fault}")
    return index.long()


def _explain_types(where: str, x: Any, coeffs: Any, weight: Any, bias: Any, dims: int) -> None:
    x_shape, weight_shape = _BY_DIMS[dims]
    _check.tensor(where, "x", x, x_shape, dims - 1 if dims > 3 else None)
    _check.tensor(where, "coeffs", coeffs, "[B, K], [G, K] or [K]")
    _check.tensor(where, "weight", weight, weight_shape, dims)
    if bias is not None:
        _check.tensor(where, "bias", bias, "[K, out] or None")
    if x.dim() == 0:
        raise ValueError(f"{where}: x must have shape {x_shape}, not []")
    _dtype(where, "x", x)
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None and value.dtype != x.dtype:
            raise TypeError(f"{where}: {name} is {value.dtype}, but x is {x.dtype}")
    for name, value in (("coeffs", coeffs), ("weight", weight), ("bias", bias)):
        if value is not None:
            _check.same_device(where, name, value, "x", x)


def _dtype(where: str, name: str, value: Tensor) -> None:
    if value.dtype not in ACCUMULATE:
        raise TypeError(
            f"{where}: {name} must be float16, bfloat16, float32 or float64, not {value.dtype}"
        )


def geometry(
    where: str, x: Tensor, weight: Tensor, stride: Any, padding: Any, dilation: Any, groups: Any
) -> tuple[list[int], list[int]]:
    """What raw ops take, strides to groups, with two axes for one; and what to pad ``x`` by behind."""
    axes = x.dim() - 2
    kernel, pixels = weight.shape[3:], x.shape[2:]
    strides = _per_axis(where, "stride", stride, axes, 1)
    dilations = _per_axis(where, "dilation", dilation, axes, 1)
    _integer(where, "groups", groups, 1)
    channels, outputs = x.shape[1], weight.shape[1]
    if outputs % groups:
        raise ValueError(f"{where}: groups {groups} must divide the {outputs} outputs of weight")
    if channels != weight.shape[2] * groups:
        raise ValueError(
            f"{where}: x has {channels} channels (shape {list(x.shape)}), but weight has "
            f"{weight.shape[2]} in each of {groups} groups (shape {list(weight.shape)})"
        )
    if 0 in (channels, outputs, *kernel):
        raise ValueError(
            f"{where}: weight must have outputs, channels and taps, not shape {list(weight.shape)}"
        )
    if 0 in pixels:
        raise ValueError(f"{where}: x must have pixels, not shape {list(x.shape)}")
    reach = [d * (k - 1) for d, k in zip(dilations, kernel)]
    beyond: list[int] = []
    if isinstance(padding, str):
        _check.choice(where, "padding", padding, ("same", "valid"), "an integer for each axis")
        paddings = [0] * axes
        if padding == "same":
            if any(s != 1 for s in strides):
                raise ValueError(f"{where}: padding 'same' needs a stride of 1, not {stride}")
            paddings = [r // 2 for r in reach]
            # Of an odd sum the larger half lies behind, as in torch.
            for r in reversed(reach):
                beyond += [0, r % 2]
    else:
        paddings = _per_axis(where, "padding", padding, axes, 0)
    for d in range(axes):
        if pixels[d] + 2 * paddings[d] + (beyond[-1 - 2 * d] if beyond else 0) <= reach[d]:
            raise ValueError(
                f"{where}: weight's kernel {list(kernel)} with dilation {dilations} is larger than "
                f"x's {list(pixels)} with padding {paddings}"
            )
    padded = 1  # a loop: torch.compile traces no generator of symbols
    for n, p in zip(pixels, paddings):
        padded *= n + 2 * p
    if padded >= 2**31:
        raise ValueError(
            f"{where}: padding {paddings} makes images of {padded} pixels, and at most 2^31 - 1 can be"
        )
    if axes == 1:
        strides, paddings, dilations = [1, *strides], [0, *paddings], [1, *dilations]
    return [*strides, *paddings, *dilations, groups], beyond


def _per_axis(where: str, name: str, value: Any, axes: int, least: int) -> list[int]:
    if isinstance(value, (tuple, list)) and len(value) == axes:
        for each in value:
            _integer(where, name, each, least)
        return list(value)
    _integer(where, name, value, least, f" or {axes} of them")
    return [value] * axes


def _integer(where: str, name: str, value: Any, least: int, more: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{where}: {name} must be an integer{more}, not {_check.describe(value)}")
    if value < least:
        raise ValueError(f"{where}: {name} must be at least {least}, not {value}")
    if value >= 2**63:
        raise ValueError(f"{where}: {name} must be below 2^63, not {value}")


def bases(where: str, coeffs: Tensor, bases: Tensor) -> Tensor:
    """``coeffs`` as [G, K] of the dtype that sums are taken in."""
    if not (
        _plain(coeffs)
        and _plain(bases)
        and bases.dim() == 2
        and bases.dtype in ACCUMULATE
        and coeffs.device == bases.device
    ):
        _check.tensor(where, "coeffs", coeffs, "[G, K] or [K]")
        _check.tensor(where, "bases", bases, "[K, P]", 2)
        _dtype(where, "bases", bases)
        _check.same_device(where, "coeffs", coeffs, "bases", bases)
    rows = _rows(where, coeffs, bases.dtype, "bases")
    count = bases.shape[0]
    if count == 0:
        raise ValueError(f"{where}: bases has no basis (shape {list(bases.shape)})")
    if coeffs.shape[-1] != count:
        raise ValueError(
            f"{where}: coeffs has {coeffs.shape[-1]} coefficients (shape {list(coeffs.shape)}), "
            f"but bases has {count} bases (shape {list(bases.shape)})"
        )
    return rows


def update(
    at: Tensor, grad: Any, coeffs: Tensor, lr: Any, inverse_gram: Any
) -> tuple[Tensor, Tensor]:
    """``coeffs`` and the step ``lr coeffs @ inverse_gram``, both [G, K] of the dtype sums are taken in."""
    where = "synthesize_update_"
    rows = bases(where, coeffs, at)
    shape = [*coeffs.shape[:-1], at.shape[1]]
    _check.tensor(where, "grad", grad, str(shape))
    if list(grad.shape) != shape:
        raise ValueError(f"{where}: grad must have shape {shape}, not {list(grad.shape)}")
    if grad.dtype != at.dtype:
        raise TypeError(f"{where}: grad is {grad.dtype}, but bases is {at.dtype}")
    _check.same_device(where, "grad", grad, "bases", at)
    size = _size(where, lr, at)
    step = rows
    if inverse_gram is not None:
        k = at.shape[0]
        _check.tensor(where, "inverse_gram", inverse_gram, f"[{k}, {k}] or None")
        if list(inverse_gram.shape) != [k, k]:
            given = list(inverse_gram.shape)
            raise ValueError(f"{where}: inverse_gram must have shape [{k}, {k}], not {given}")
        if inverse_gram.dtype not in (at.dtype, rows.dtype):
            raise TypeError(
                f"{where}: inverse_gram must be {at.dtype} or {rows.dtype}, not {inverse_gram.dtype}"
            )
        _check.same_device(where, "inverse_gram", inverse_gram, "bases", at)
        # As an op of this library, which autocast leaves alone.
        step = _synthesize(rows, inverse_gram.to(rows.dtype))
    if _op._transforms_active():
        raise ValueError(f"{where}: works in place, so not under the transforms of torch.func")
    held = [v for v in (grad, coeffs, lr, inverse_gram) if isinstance(v, Tensor)]
    if torch.is_grad_enabled() and any(v.requires_grad for v in (at, *held)):
        raise ValueError(f"{where}: records no gradients; call it under torch.no_grad()")
    _check.writable(where, "bases", at, held)
    return rows, step * size


def _size(where: str, lr: Any, at: Tensor) -> Any:
    if isinstance(lr, Tensor):
        _check.dense(where, "lr", lr)
        if lr.dim() == 0 and lr.is_floating_point():
            if lr.device.type != "cpu":
                _check.same_device(where, "lr", lr, "bases", at)
            return lr
    elif isinstance(lr, (int, float)) and not isinstance(lr, bool):
        return lr
    raise TypeError(f"{where}: lr must be a number or a tensor of one, not {_check.describe(lr)}")
