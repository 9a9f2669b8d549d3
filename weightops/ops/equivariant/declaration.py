"""The raw ops of the equivariant family: schemas, shapes, derivatives, batching.

A layer is a trilinear form S(x, theta, y). Its gradients by x, theta and y are the transposed layer, the
sums that ``equivariant_backward`` takes and the layer itself, so all higher derivatives are these again.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from weightops import _op
from weightops.ops.equivariant import grouped
from weightops.ops.equivariant.decode import decode

Code = Sequence[int]


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise RuntimeError(f"equivariant: {what}")


def _check_theta(x: Tensor, theta: Tensor, code: Code) -> None:
    _require(x.dim() == 3, f"expected features [B, P, C], got {list(x.shape)}")
    _require(theta.dim() == 4, f"theta must be [G, T, C_in, C_out], not {list(theta.shape)}")
    groups, terms = theta.shape[:2]
    _require(terms == code[2], f"theta has {terms} terms, the plan has {code[2]}")
    _require(groups > 0 and x.shape[0] % groups == 0, f"{groups} groups for {x.shape[0]} samples")


def _check_linear(
    x: Tensor, theta: Tensor, bias: Tensor | None, code: Code, transpose: bool = False
) -> None:
    _check_theta(x, theta, code)
    numel, channels = code[1 if transpose else 0], theta.shape[3 if transpose else 2]
    _require(x.shape[1] == numel, f"features have {x.shape[1]} positions, the plan {numel}")
    _require(x.shape[2] == channels, f"features have {x.shape[2]} channels, theta {channels}")
    if bias is not None:
        _require(not transpose, "the transposed layer has no bias")
        _require(
            bias.dim() == 3 and (bias.shape[0], bias.shape[2]) == (theta.shape[0], theta.shape[3]),
            f"bias {list(bias.shape)} does not fit theta {list(theta.shape)}",
        )


def _check_backward(x: Tensor, theta: Tensor, grad: Tensor, code: Code, need_x: bool) -> None:
    _check_linear(x, theta, None, code)
    expected = [x.shape[0], code[1], theta.shape[3]]
    _require(list(grad.shape) == expected, f"grad must be {expected}, not {list(grad.shape)}")


def _linear_fake(
    x: Tensor, theta: Tensor, bias: Tensor | None, code: Code, transpose: bool = False
) -> Tensor:
    if transpose:
        return x.new_empty(x.shape[0], code[0], theta.shape[2])
    return x.new_empty(x.shape[0], code[1], theta.shape[3])


def _num_biases(code: Code) -> int:
    """The number of output parts, which stands behind the lists of input parts and nodes."""
    at = 5
    ranks = []
    for _ in range(code[4]):
        ranks.append(code[at + 1])
        at += 2 + 2 * code[at + 1]
    nodes, at = code[at], at + 1
    for _ in range(nodes):
        at += 3 + (ranks[code[at]] if code[at + 1] < 0 else 0)
    return code[at]


def _backward_fake(
    x: Tensor, theta: Tensor, grad: Tensor, code: Code, need_x: bool
) -> tuple[Tensor, Tensor, Tensor]:
    to_bias = theta.new_empty(theta.shape[0], _num_biases(code), theta.shape[3])
    to_theta = torch.empty_like(theta, memory_format=torch.contiguous_format)
    return x.new_empty(x.shape if need_x else (0,)), to_theta, to_bias


def _layer(
    x: Tensor | None, theta: Tensor | None, bias: Tensor | None, like: Tensor, code: Code
) -> Tensor | None:
    """The layer, where a ``theta`` (of ``like``'s shape) or an ``x`` of ``None`` stands for zeros."""
    if x is None or (theta is None and bias is None):
        return None
    return _linear(x, torch.zeros_like(like) if theta is None else theta, bias, code, False)


def _sum(*values: Tensor | None) -> Tensor | None:
    held = [value for value in values if value is not None]
    return sum(held[1:], held[0]) if held else None


def _linear_backward(args: Sequence, needs: Sequence[bool], grad: Tensor | None) -> tuple:
    x, theta, bias, code, *rest = args
    to_x = to_theta = to_bias = None
    if grad is None:
        pass
    elif rest and rest[0]:
        if needs[0]:
            to_x = _linear(grad, theta, None, code, False)
        if needs[1]:
            to_theta = _backward(grad, theta, x, code, False)[1]
    elif needs[1] or (bias is not None and needs[2]):
        to_x, to_theta, to_bias = _backward(x, theta, grad, code, bool(needs[0]))
    elif needs[0]:
        to_x = _linear(grad, theta, None, code, True)
    return (
        to_x if needs[0] else None,
        to_theta if needs[1] else None,
        to_bias if bias is not None and needs[2] else None,
        *[None] * (len(args) - 3),
    )


def _linear_jvp(
    args: Sequence, x: Tensor | None, theta: Tensor | None, bias: Tensor | None, *_: Any
) -> Tensor | None:
    at_x, at_theta, _, code, *rest = args
    if rest and rest[0]:
        return _sum(
            None if x is None else _linear(x, at_theta, None, code, True),
            None if theta is None else _linear(at_x, theta, None, code, True),
        )
    return _sum(
        None if x is None else _linear(x, at_theta, None, code, False),
        _layer(at_x, theta, bias, at_theta, code),
    )


def _by_lane(size: int, dim: int | None, value: Tensor) -> Tensor:
    """[V, N, ...] as [V * N, ...]."""
    return _op.moved_front(value, dim, size).flatten(0, 1)


def _linear_vmap(
    size: int,
    dims: Sequence,
    x: Tensor,
    theta: Tensor,
    bias: Tensor | None,
    code: Code,
    transpose: bool = False,
) -> tuple:
    if theta.shape[0] != 1 or any(d is not None for d in dims[1:3]):
        theta = _by_lane(size, dims[1], theta)
        bias = None if bias is None else _by_lane(size, dims[2], bias)
    y = _linear(_by_lane(size, dims[0], x), theta, bias, code, transpose)
    return y.unflatten(0, (size, y.shape[0] // size)), 0


_linear: Callable = _op.define(
    "equivariant_linear(Tensor x, Tensor theta, Tensor? bias, int[] plan, bool transpose=False)"
    " -> Tensor",
    reference=grouped.linear,
    fake=_linear_fake,
    check=_check_linear,
    vmap=_linear_vmap,
    backward=_linear_backward,
    jvp=_linear_jvp,
)


def _backward_backward(
    args: Sequence, needs: Sequence[bool], a: Tensor | None, t: Tensor | None, s: Tensor | None
) -> tuple:
    x, theta, grad, code, need_x = args
    a = a if need_x else None
    to_x = to_theta = to_grad = None
    if needs[0] and t is not None:
        to_x = _linear(grad, t, None, code, True)
    if needs[1] and a is not None:
        to_theta = _backward(a, theta, grad, code, False)[1]
    if needs[2]:
        to_grad = _sum(_layer(a, theta, None, theta, code), _layer(x, t, s, theta, code))
    return to_x, to_theta, to_grad, None, None


def _backward_jvp(
    args: Sequence, x: Tensor | None, theta: Tensor | None, grad: Tensor | None, *_: Any
) -> tuple:
    at_x, at_theta, at_grad, code, need_x = args
    to_x = to_theta = to_bias = None
    if grad is not None:
        to_x, to_theta, to_bias = _backward(at_x, at_theta, grad, code, need_x)
    if x is not None:
        to_theta = _sum(to_theta, _backward(x, at_theta, at_grad, code, False)[1])
    if theta is not None and need_x:
        to_x = _sum(to_x if grad is not None else None, _linear(at_grad, theta, None, code, True))
    return to_x, to_theta, to_bias


def _backward_vmap(
    size: int, dims: Sequence, x: Tensor, theta: Tensor, grad: Tensor, code: Code, need_x: bool
) -> tuple:
    # Gradients by theta are summed over a group, so every lane needs groups of its own.
    x, theta, grad = (_by_lane(size, d, v) for d, v in zip(dims[:3], (x, theta, grad), strict=True))
    to_x, to_theta, to_bias = _backward(x, theta, grad, code, need_x)
    if need_x:
        to_x = to_x.unflatten(0, (size, to_x.shape[0] // size))
    by_lane = (size, to_theta.shape[0] // size)
    return (
        (to_x, to_theta.unflatten(0, by_lane), to_bias.unflatten(0, by_lane)),
        (0 if need_x else None, 0, 0),
    )


_backward: Callable = _op.define(
    "equivariant_backward(Tensor x, Tensor theta, Tensor grad, int[] plan, bool need_x)"
    " -> (Tensor, Tensor, Tensor)",
    reference=grouped.backward,
    fake=_backward_fake,
    check=_check_backward,
    vmap=_backward_vmap,
    backward=_backward_backward,
    jvp=_backward_jvp,
)


def _check_stack(x: Tensor, theta: Sequence[Tensor], bias: Sequence[Tensor], code: Code) -> None:
    _require(len(theta) > 0, "a stack has layers")
    _require(len(bias) in (0, len(theta)), f"{len(bias)} biases for {len(theta)} layers")
    same = all(each.shape[0] == theta[0].shape[0] for each in theta)
    _require(same, "layers differ in their groups")
    if len(theta) > 1:
        plan = decode(code)
        _require(
            plan.inputs.parts == plan.outputs.parts, "a layer's output is no input of the next"
        )


def _relu_gradient(grad: Tensor, y: Tensor) -> Tensor:
    return torch.ops.aten.threshold_backward(grad, y, 0)


def _stack_by_layers(
    x: Tensor, theta: Sequence[Tensor], bias: Sequence[Tensor], code: Code, activate_last: bool
) -> Tensor:
    """Also what differentiates and what serves CUDA: the layers' own kernels."""
    _check_stack(x, theta, bias, code)
    for n, each in enumerate(theta):
        x = _linear(x, each, bias[n] if bias else None, code, False)
        if activate_last or n + 1 < len(theta):
            x = torch.relu_(x)
    return x


def _stack_fake(
    x: Tensor, theta: Sequence[Tensor], bias: Sequence[Tensor], code: Code, activate_last: bool
) -> Tensor:
    return x.new_empty(x.shape[0], code[1], theta[-1].shape[3])


def _stack_backward(args: Sequence, needs: Sequence, grad: Tensor) -> tuple:
    x, theta, bias, code, activate_last = args
    # What lies between was not kept: it is made again.
    features = [x]
    for n in range(len(theta) - (not activate_last)):
        features.append(
            _stack_by_layers(features[n], theta[n : n + 1], bias[n : n + 1], code, True)
        )
    to_x: Tensor | None = grad
    to_theta: list = [None] * len(theta)
    to_bias: list = [None] * len(bias)
    for n in reversed(range(len(theta))):
        if to_x is None:
            break
        if n + 1 < len(features):
            to_x = _relu_gradient(to_x, features[n + 1])
        below = needs[0] or any(needs[1][:n]) or any(needs[2][:n])
        held = bias[n] if bias else None
        wanted = (below, needs[1][n], bool(bias) and needs[2][n])
        found = _linear_backward((features[n], theta[n], held, code), wanted, to_x)
        to_x, to_theta[n] = found[:2]
        if bias:
            to_bias[n] = found[2]
    return to_x if needs[0] else None, to_theta, to_bias, None, None


def _stack_jvp(args: Sequence, x: Tensor | None, theta: Sequence, bias: Sequence, *_: Any) -> Any:
    y, at_theta, at_bias, code, activate_last = args
    for n, each in enumerate(at_theta):
        at = (y, each, at_bias[n] if bias else None, code)
        x = _linear_jvp(at, x, theta[n], bias[n] if bias else None)
        activate = activate_last or n + 1 < len(at_theta)
        if n + 1 < len(at_theta) or (activate and x is not None):
            y = _stack_by_layers(y, [each], at_bias[n : n + 1], code, activate)
        if activate and x is not None:
            x = _relu_gradient(x, y)
    return x


def _stack_vmap(
    size: int,
    dims: Sequence,
    x: Tensor,
    theta: Sequence[Tensor],
    bias: Sequence[Tensor],
    code: Code,
    activate_last: bool,
) -> tuple:
    if theta[0].shape[0] != 1 or any(d is not None for d in (*dims[1], *dims[2])):
        theta, bias = (
            [_by_lane(size, d, value) for d, value in zip(at, values, strict=True)]
            for at, values in ((dims[1], theta), (dims[2], bias))
        )
    y = _stack(_by_lane(size, dims[0], x), theta, bias, code, activate_last)
    return y.unflatten(0, (size, y.shape[0] // size)), 0


_stack: Callable = _op.define(
    "equivariant_stack(Tensor x, Tensor[] theta, Tensor[] bias, int[] plan, bool activate_last)"
    " -> Tensor",
    reference=_stack_by_layers,
    fake=_stack_fake,
    vmap=_stack_vmap,
    backward=_stack_backward,
    jvp=_stack_jvp,
)


def _in_triton(name: str, check: Callable) -> Callable:
    """A launcher of ``triton.py``, which is imported when it is first called: it takes a second."""

    def kernel(*args: Any) -> Any:
        from weightops.ops.equivariant import triton

        check(*args)
        return getattr(triton, name)(*args)

    return kernel


if torch.version.cuda and importlib.util.find_spec("triton"):
    _op.serve("equivariant_linear", "cuda", _in_triton("linear", _check_linear), "Triton")
    _op.serve("equivariant_backward", "cuda", _in_triton("backward", _check_backward), "Triton")
    _op.serve("equivariant_stack", "cuda", _stack_by_layers, "Triton, a layer at a time")
