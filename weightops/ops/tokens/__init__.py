"""Networks as tokens, and moments of their tensors; :mod:`weightops.tokens` is the public face."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from weightops import _op
from weightops.ops.tokens import reference
from weightops.ops.tokens.plan import decode

__all__ = ["token_moments", "token_pack", "token_unpack"]


def _pack_fake(flat: Tensor, shift: Tensor | None, scale: Tensor | None, code: Sequence) -> Tensor:
    plan = decode(code)
    return flat.new_empty(flat.shape[0], plan.tokens, plan.size)


def _unpack_fake(
    tokens: Tensor, shift: Tensor | None, scale: Tensor | None, code: Sequence
) -> Tensor:
    return tokens.new_empty(tokens.shape[0], decode(code).numel)


def _vmap_of(op: Callable) -> Callable:
    def batched(size: int, dims: Sequence, x: Tensor, *rest: Any) -> tuple[Tensor, int]:
        if dims[1] is None and dims[2] is None:
            folded = op(_op.moved_front(x, dims[0], size).flatten(0, 1), *rest)
            return folded.unflatten(0, (size, -1)), 0
        return torch.vmap(op.reference, tuple(dims))(x, *rest), 0  # type: ignore[attr-defined]

    return batched


# Statistics are data: nothing is differentiated by them, and both ops are linear in the rest.
token_pack: Callable = _op.define(
    "token_pack(Tensor flat, Tensor? shift, Tensor? scale, int[] plan) -> Tensor",
    reference=reference.pack,
    fake=_pack_fake,
    vmap=lambda *args: _vmap_of(token_pack)(*args),
    backward=lambda args, needs, grad: (
        token_unpack(grad, None, args[2], args[3]),
        *(None, None, None),
    ),
    jvp=lambda args, flat, *_: None if flat is None else token_pack(flat, None, *args[2:]),
)
token_unpack: Callable = _op.define(
    "token_unpack(Tensor tokens, Tensor? shift, Tensor? scale, int[] plan) -> Tensor",
    reference=reference.unpack,
    fake=_unpack_fake,
    vmap=lambda *args: _vmap_of(token_unpack)(*args),
    backward=lambda args, needs, grad: (
        token_pack(grad, None, args[2], args[3]),
        *(None, None, None),
    ),
    jvp=lambda args, tokens, *_: None if tokens is None else token_unpack(tokens, None, *args[2:]),
)


def _moments_vmap(size: int, dims: Sequence, flat: Tensor, sizes: Sequence) -> tuple[Tensor, int]:
    folded = token_moments(_op.moved_front(flat, dims[0], size).flatten(0, 1), sizes)
    return folded.unflatten(0, (size, -1)), 0


token_moments: Callable = _op.define(
    "token_moments(Tensor flat, int[] sizes) -> Tensor",
    reference=reference.moments,
    fake=lambda flat, sizes: flat.new_empty(flat.shape[0], len(sizes), 2, dtype=torch.float64),
    vmap=_moments_vmap,
)
