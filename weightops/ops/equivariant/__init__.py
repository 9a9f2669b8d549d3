"""Equivariant linear layers on weight space."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from weightops import _check
from weightops.ops.equivariant.declaration import _backward, _linear, _stack
from weightops.ops.equivariant.plan import EquivariantPlan, code_of

__all__ = [
    "EquivariantPlan",
    "_backward",
    "_linear",
    "_stack",
    "equivariant_linear",
    "equivariant_stack",
]


def equivariant_linear(
    x: Tensor,
    theta: Tensor,
    bias: Tensor | None,
    plan: EquivariantPlan,
    *,
    check_finite: bool = False,
) -> Tensor:
    """Apply every linear map between two weight spaces that commutes with permuting neurons.

    ``y[o] = bias[o] + sum_t write_t(read_t(x) @ theta[t])`` over ``plan.terms`` (Zhou, Finn and
    Harrison, arXiv 2402.05232, equation 6).

    Args:
        x: features ``[B, P_in, C_in]``, channels last, laid out by ``plan.spec``; any strides. float16
            and bfloat16 are summed in float32.
        theta: ``[T, C_in, C_out]`` of ``x``'s dtype, or ``[B, T, C_in, C_out]`` where every sample has
            parameters of its own; ``theta[t]`` belongs to ``plan.terms[t]``.
        bias: ``[num_biases, C_out]``, ``[B, num_biases, C_out]`` or ``None``.
        plan: the maps.
        check_finite: look for values that are not finite, which costs a pass over every argument.

    Returns:
        ``[B, P_out, C_out]``, contiguous. Gradients flow to ``x``, ``theta`` and ``bias``.

    Raises:
        ValueError: shapes or devices do not fit each other or ``plan``; a value is not finite and
            ``check_finite`` is set.
        TypeError: an argument has the wrong type or dtype.
    """
    own = _check_arguments(x, theta, bias, plan)
    if check_finite:
        _check.flag("equivariant_linear", "check_finite", check_finite)
        for name, value in (("x", x), ("theta", theta), ("bias", bias)):
            if value is not None:
                _check.finite("equivariant_linear", name, value)
    theta, bias = _grouped(theta, bias, x.shape[0] if own else None)
    return _linear(x, theta, bias, code_of(plan), False)


def equivariant_stack(
    x: Tensor,
    theta: Sequence[Tensor],
    bias: Sequence[Tensor | None],
    plan: EquivariantPlan,
    *,
    activate_last: bool = False,
) -> Tensor:
    """:func:`equivariant_linear` layer after layer, relu between them and on request behind the last.

    On the CPU a network goes through all layers before the next, so what lies between is never held for
    the whole batch. It is made again for gradients, which costs a forward pass more than they do otherwise.

    Args:
        x: features ``[B, P, C_0]``.
        theta: per layer ``[T, C_n, C_(n+1)]`` or ``[B, T, C_n, C_(n+1)]``.
        bias: per layer as for ``equivariant_linear``; a bias for each or for none.
        plan: of every layer; with more than one, from a weight space to itself.

    Raises:
        ValueError, TypeError: as ``equivariant_linear`` for the layer that does not fit.
    """
    where = "equivariant_stack"
    if not theta or len(bias) != len(theta):
        raise ValueError(
            f"{where}: theta and bias must have an entry for each of one or more layers, "
            f"not {len(theta)} and {len(bias)}"
        )
    if len({each is None for each in bias}) > 1:
        raise ValueError(f"{where}: bias must be given for every layer or be None for every layer")
    own, like = False, x
    for n, each in enumerate(theta):
        own = _check_arguments(like, each, bias[n], plan) or own
        like = x.new_empty(()).expand(*x.shape[:2], each.shape[-1])
    if len(theta) > 1 and plan.spec != plan.spec_out:
        raise ValueError(
            f"{where}: plan must lead from a weight space to itself for several layers"
        )
    lead = x.shape[0] if own else None
    grouped = [_grouped(*each, lead) for each in zip(theta, bias, strict=True)]
    biases = [each for _, each in grouped if each is not None]
    return _stack(x, [each for each, _ in grouped], biases, code_of(plan), activate_last)


def _check_arguments(x: Tensor, theta: Tensor, bias: Tensor | None, plan: EquivariantPlan) -> bool:
    """Whether ``theta`` or ``bias`` is of each sample's own; raises what ``equivariant_linear`` does."""
    if not (
        isinstance(plan, EquivariantPlan)
        and isinstance(x, Tensor)
        and isinstance(theta, Tensor)
        and x.is_floating_point()
        and x.layout is theta.layout is torch.strided
        and x.dtype == theta.dtype
        and x.device == theta.device
        and x.dim() == 3
        and (bias is None or (isinstance(bias, Tensor) and _alike(bias, x)))
    ):
        _explain_types(x, theta, bias, plan)
    batch, positions, c_in = x.shape
    shape = theta.shape
    own = len(shape) == 4
    if not (
        positions == plan.spec.numel
        and shape[-3:-1] == (plan.num_terms, c_in)
        and ((own and shape[0] == batch) or len(shape) == 3)
        and c_in > 0
        and shape[-1] > 0
    ):
        _explain_shapes(x, theta, plan)
    own_bias = False
    if bias is not None:
        own_bias = bias.dim() == 3
        if not (
            bias.shape[-2:] == (plan.num_biases, shape[-1])
            and ((own_bias and bias.shape[0] == batch) or bias.dim() == 2)
        ):
            _explain_bias(batch, shape[-1], bias, plan)
    return own or own_bias


def _grouped(theta: Tensor, bias: Tensor | None, batch: int | None) -> tuple[Tensor, Tensor | None]:
    """Both with a group per sample of ``batch``, or one group where that is ``None`` or no sample."""
    if theta.dim() == 3:
        theta = theta[None]
    if bias is not None and bias.dim() == 2:
        bias = bias[None]
    if batch is None:
        return theta, bias
    if batch == 0:
        return theta.sum(0, keepdim=True), None if bias is None else bias.sum(0, keepdim=True)
    theta = theta.expand(batch, -1, -1, -1)
    return theta, None if bias is None else bias.expand(batch, -1, -1)


def _alike(value: Tensor, x: Tensor) -> bool:
    return value.dtype == x.dtype and value.device == x.device and value.layout is x.layout


def _explain_types(x: Any, theta: Any, bias: Any, plan: Any) -> None:
    where = "equivariant_linear"
    if not isinstance(plan, EquivariantPlan):
        raise TypeError(f"{where}: plan must be an EquivariantPlan, not {_check.describe(plan)}")
    _check.tensor(where, "x", x, "[B, P_in, C_in]", 3)
    _check.floating(where, "x", x)
    _check.tensor(where, "theta", theta, "[T, C_in, C_out] or [B, T, C_in, C_out]")
    named = [("theta", theta)]
    if bias is not None:
        _check.tensor(where, "bias", bias, "[num_biases, C_out] or [B, num_biases, C_out], or None")
        named.append(("bias", bias))
    for name, value in named:
        if value.dtype != x.dtype:
            raise TypeError(f"{where}: {name} is {value.dtype}, but x is {x.dtype}")
        _check.same_device(where, name, value, "x", x)


def _explain_shapes(x: Tensor, theta: Tensor, plan: EquivariantPlan) -> None:
    where = "equivariant_linear"
    batch, positions, c_in = x.shape
    if positions != plan.spec.numel:
        raise ValueError(
            f"{where}: x has shape {list(x.shape)}, but the plan's networks have "
            f"{plan.spec.numel} weights: expected [B, {plan.spec.numel}, C_in]"
        )
    terms, given = plan.num_terms, list(theta.shape)
    expected = f"[{terms}, {c_in}, C_out] or [{batch}, {terms}, {c_in}, C_out]"
    if theta.dim() not in (3, 4):
        raise ValueError(f"{where}: theta must have shape {expected}, not {given}")
    if given[-3] != terms:
        raise ValueError(
            f"{where}: theta has {given[-3]} terms (shape {given}), but the plan has {terms}; "
            "is it of another plan?"
        )
    if given[-2] != c_in:
        raise ValueError(f"{where}: theta has {given[-2]} input channels, but x has {c_in}")
    if c_in == 0 or given[-1] == 0:
        raise ValueError(f"{where}: x and theta must have channels, not {c_in} and {given[-1]}")
    raise ValueError(f"{where}: theta must have shape {expected}, not {given}")


def _explain_bias(batch: int, c_out: int, bias: Tensor, plan: EquivariantPlan) -> None:
    shape = f"{plan.num_biases}, {c_out}"
    raise ValueError(
        f"equivariant_linear: bias must have shape [{shape}] or [{batch}, {shape}] for the plan's "
        f"{plan.num_biases} biases and theta's {c_out} output channels, not {list(bias.shape)}"
    )
