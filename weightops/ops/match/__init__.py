"""Weight matching of whole networks; :func:`weightops.align.match` is its public face."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from weightops import _op
from weightops.ops.match import reference
from weightops.ops.match.plan import plan

__all__ = ["match_weights", "plan"]


def _fake(
    reference: Tensor, flat: Tensor, code: Sequence[int], order: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    networks, sizes = flat.shape[0], code[1 : 1 + code[0]]
    return (
        flat.new_empty(networks, sum(sizes), dtype=torch.int64),
        flat.new_empty(order.shape[0] + 1, networks, dtype=torch.float64),
        flat.new_empty(networks, dtype=torch.int64),
    )


def _refuse_infinite(reference: Tensor, flat: Tensor, code: Sequence[int], order: Tensor) -> None:
    if not (torch.isfinite(reference).all() and torch.isfinite(flat).all()):
        raise RuntimeError("match_weights: weights must be finite")


match_weights: Callable = _op.define(
    "match_weights(Tensor reference, Tensor flat, int[] code, Tensor order)"
    " -> (Tensor, Tensor, Tensor)",
    reference=reference.match_weights,
    fake=_fake,
    check=_refuse_infinite,
    vmap=_op.lane_by_lane(lambda: match_weights),
)
