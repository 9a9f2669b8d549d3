"""Networks to tokens and back."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from weightops import _check
from weightops.ops.tokens import token_pack, token_unpack
from weightops.tokens._arguments import check_networks, check_numbers, check_spec
from weightops.tokens.plan import TokenPlan, code_of
from weightops.tokens.statistics import Statistics


def pack(flat: Tensor, plan: TokenPlan, *, statistics: Statistics | None = None) -> Tensor:
    """Cut networks into tokens, and standardise them on the way.

    Args:
        flat: networks ``[N, P]`` or one ``[P]``; float16, bfloat16, float32 or float64, of any strides.
        plan: how ``plan.spec``'s networks are cut.
        statistics: means and deviations: a token holds ``(w - mean) / std``, computed in float32
            (float64 for float64). Of a constant tensor ``std`` counts as 1.

    Returns:
        ``[N, T, D]`` or ``[T, D]``, contiguous, of ``flat``'s dtype, zero in the padding. Gradients flow
        to ``flat``.

    Raises:
        ValueError: shapes do not fit, or ``statistics`` are of another spec or of no network.
        TypeError: an argument has the wrong type or dtype.
    """
    _check_plan("pack", plan, statistics)
    check_networks("pack", flat, plan.spec)
    shift, scale = (None, None) if statistics is None else statistics._factors(flat, inverse=True)
    one = flat.dim() == 1
    packed = token_pack(flat[None] if one else flat, shift, scale, code_of(plan))
    return packed[0] if one else packed


def unpack(tokens: Tensor, plan: TokenPlan, *, statistics: Statistics | None = None) -> Tensor:
    """Put networks together from their tokens: the inverse of :func:`pack`, to the bit without statistics.

    Args:
        tokens: ``[N, T, D]``, or ``[T, D]`` of one network; float16, bfloat16, float32 or float64. The
            padding is not looked at.
        plan: how ``plan.spec``'s networks are cut.
        statistics: means and deviations: a weight is ``token * std + mean``.

    Returns:
        ``[N, P]`` or ``[P]``, contiguous, of ``tokens``' dtype. Gradients flow to ``tokens``, zero to the
        padding.

    Raises:
        ValueError: shapes do not fit, or ``statistics`` are of another spec or of no network.
        TypeError: an argument has the wrong type or dtype.
    """
    _check_plan("unpack", plan, statistics)
    check_numbers("unpack", "tokens", tokens, "[N, T, D] or [T, D]")
    if tokens.dim() not in (2, 3):
        raise ValueError(
            f"unpack: tokens must have shape [N, T, D] or [T, D], not {list(tokens.shape)}"
        )
    if tokens.shape[-2:] != (plan.num_tokens, plan.size):
        raise ValueError(
            f"unpack: tokens has shape {list(tokens.shape)}, but the plan's networks have "
            f"{plan.num_tokens} tokens of {plan.size}"
        )
    shift, scale = (None, None) if statistics is None else statistics._factors(tokens)
    one = tokens.dim() == 2
    flat = token_unpack(tokens[None] if one else tokens, shift, scale, code_of(plan))
    return flat[0] if one else flat


def _check_plan(where: str, plan: Any, statistics: Any) -> None:
    if not isinstance(plan, TokenPlan):
        raise TypeError(f"{where}: plan must be a TokenPlan, not {_check.describe(plan)}")
    if statistics is None:
        return
    if not isinstance(statistics, Statistics):
        raise TypeError(
            f"{where}: statistics must be Statistics or None, not {_check.describe(statistics)}"
        )
    check_spec(where, "statistics are", statistics.spec, plan.spec)
    if not statistics.count:
        raise ValueError(f"{where}: statistics are of no network")
