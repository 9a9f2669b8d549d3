"""What a learned optimizer proposes for every weight of a network, as one call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from weightops import _op
from weightops.ops.functional import reference
from weightops.ops.functional.reference import features

__all__ = ["features", "functional", "functional_update"]


def _of(others: Sequence) -> Callable[..., Tensor]:
    return lambda *tensors: reference.functional(*tensors, *others)


def _backward(args: Sequence, needs: Sequence[bool], grad: Tensor) -> tuple:
    pull: Any = torch.func.vjp(_of(args[5:]), *args[:5])[1]
    found = pull(grad)
    return *(each if need else None for each, need in zip(found, needs, strict=False)), *[None] * 4


def _jvp(args: Sequence, *tangents: Tensor | None) -> Tensor:
    return _op.push(_of(args[5:]), args[:5], tangents)


#: ``[N, P]``, of flat and grads ``[N, P]``, momenta ``[R, N, P]``, what all weights of a network share
#: ``[1 or N, S]``, and theta ``[1 or N, D]``: the matrices of all layers, then their biases. The last layer is
#: ``plan``'s, those before see one weight each, with relu behind them; ``widths`` are 2 + R + S, then what
#: the layers lead to, 1 in the end.
functional: Callable = _op.define(
    "functional(Tensor flat, Tensor grads, Tensor momenta, Tensor shared, Tensor theta, int[] sizes,"
    " int[] widths, int[] plan, float eps) -> Tensor",
    reference=reference.functional,
    fake=lambda flat, *others: torch.empty_like(flat, memory_format=torch.contiguous_format),
    vmap=_op.lane_by_lane(lambda: functional),
    backward=_backward,
    jvp=_jvp,
)


def _update_vmap(*_: Any) -> tuple:
    raise RuntimeError("functional_update works in place and takes no batched tensors")


#: likewise, of momenta that are first moved towards the gradients, in place
functional_update: Callable = _op.define(
    "functional_update(Tensor(a!) momenta, Tensor flat, Tensor grads, Tensor shares, Tensor shared,"
    " Tensor theta, int[] sizes, int[] widths, int[] plan, float eps) -> Tensor",
    reference=reference.update,
    fake=lambda momenta, flat, *others: torch.empty_like(
        flat, memory_format=torch.contiguous_format
    ),
    vmap=_update_vmap,
)
