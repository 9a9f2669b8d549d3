"""Populations of small networks: N networks of one architecture on the same, or their own, samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from weightops import _op
from weightops.ops.population import grouped, reference
from weightops.ops.population.program import Layer, Program
from weightops.ops.population.reference import reduce

__all__ = ["Layer", "Program", "population_eval", "population_logits", "reduce"]


def _outputs(code: Sequence[int]) -> int:
    """Numbers of one sample's output."""
    made = reference.decode(code)[1][-1]["made"]
    return made[0] * made[1] * made[2]


def _rows(flat: Tensor, x: Tensor, shared: bool) -> int:
    return x.shape[0] if shared else x.shape[1]


def _fake_logits(flat: Tensor, x: Tensor, code: Sequence[int], shared: bool) -> Tensor:
    return flat.new_empty(len(flat), _rows(flat, x, shared), _outputs(code))


def _of_weights_and_samples(code: Sequence[int], shared: bool) -> Any:
    return lambda flat, x: grouped.population_logits(flat, x, code, shared)


def _backward(args: Sequence, needs: Sequence[bool], grad: Tensor) -> tuple:
    flat, x, code, shared = args
    pull: Any = torch.func.vjp(_of_weights_and_samples(code, shared), flat, x)[1]
    grads = pull(grad)
    return *(each if need else None for each, need in zip(grads, needs, strict=False)), None, None


def _jvp(args: Sequence, *tangents: Tensor | None) -> Tensor:
    flat, x, code, shared = args
    return _op.push(_of_weights_and_samples(code, shared), (flat, x), tangents)


population_logits: Callable = _op.define(
    "population_logits(Tensor flat, Tensor x, int[] code, bool shared) -> Tensor",
    reference=grouped.population_logits,
    fake=_fake_logits,
    vmap=_op.lane_by_lane(lambda: population_logits),
    backward=_backward,
    jvp=_jvp,
)


def _fake_eval(
    flat: Tensor, x: Tensor, targets: Tensor, code: Sequence[int], shared: bool, reduce: str
) -> Tensor:
    if reduce == "errors":
        return flat.new_empty(len(flat), _rows(flat, x, shared), dtype=torch.bool)
    return flat.new_empty(len(flat), 2) if reduce == "scores" else flat.new_empty(len(flat))


def _eval(
    flat: Tensor, x: Tensor, targets: Tensor, code: Sequence[int], shared: bool, reduce: str
) -> Tensor:
    logits = grouped.population_logits(flat, x, code, shared)
    return reference.reduce(logits, reference.for_each(targets, len(flat)), reduce)


def _refuse_classes(
    flat: Tensor, x: Tensor, targets: Tensor, code: Sequence[int], shared: bool, reduce: str
) -> None:
    if not targets.is_floating_point() and targets.numel():
        low, high = targets.aminmax()
        if low < 0 or high >= _outputs(code):
            raise RuntimeError(f"population_eval: targets must lie in [0, {_outputs(code)})")


#: Reduced inside, so that no ``[N, B, K]`` is written; not differentiable (:func:`population_logits` is).
population_eval: Callable = _op.define(
    "population_eval(Tensor flat, Tensor x, Tensor targets, int[] code, bool shared, str reduce) -> Tensor",
    reference=_eval,
    fake=_fake_eval,
    vmap=_op.lane_by_lane(lambda: population_eval),
    check=_refuse_classes,
)
