"""The raw ops of the permute family: schemas, shapes, derivatives, batching."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from weightops import _check, _op
from weightops.ops.permute import reference


def _same_as_first(first: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(first, memory_format=torch.contiguous_format)


def _check_index(index: Tensor, lengths: Sequence[int]) -> None:
    for part in index.split(list(lengths), 1):
        if fault := _check.permutation_fault(part):
            raise RuntimeError(f"index holds a row that is no permutation: {fault}")


def _check_permute(flat: Tensor, index: Tensor, code: Sequence[int], inverse: bool = False) -> None:
    _check_index(index, reference.decode(code).label_sizes)


def _check_axes(x: Tensor, index: Tensor, axes: Sequence[int], inverse: bool = False) -> None:
    _check_index(index, [x.shape[axis] for axis in axes])


def _check_merge(flat: Tensor, weights: Tensor, index: Tensor | None, code: Sequence[int]) -> None:
    if index is not None:
        _check_permute(flat, index, code)


def _fold(size: int, dims: Sequence[int | None], x: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Networks and indices [V, N, ...] as [V * N, ...]; an index shared by all stays one row."""
    x = _op.moved_front(x, dims[0], size)
    if dims[1] is None and index.shape[0] == 1:
        return x.flatten(0, 1), index
    index = _op.moved_front(index, dims[1], size)
    return x.flatten(0, 1), index.expand(size, x.shape[1], -1).flatten(0, 1)


def _permute_vmap(size: int, dims: Sequence, flat: Tensor, index: Tensor, *rest: Any) -> tuple:
    folded = _permute(*_fold(size, dims, flat, index), *rest)
    return folded.unflatten(0, (size, -1)), 0


_permute: Callable = _op.define(
    "permute(Tensor flat, Tensor index, int[] plan, bool inverse=False) -> Tensor",
    reference=reference.permute,
    fake=_same_as_first,
    check=_check_permute,
    vmap=_permute_vmap,
    backward=lambda args, needs, grad: (
        _permute(grad, args[1], args[2], not args[3]),
        None,
        None,
        None,
    ),
    jvp=lambda args, flat, *_: _permute(flat, *args[1:]),
)
_permute_into = _op.define_into(
    "permute_into(Tensor flat, Tensor index, int[] plan, bool inverse, Tensor(a!) out) -> ()",
    of=_permute,
)


def _axes_vmap(size: int, dims: Sequence, x: Tensor, index: Tensor, *rest: Any) -> tuple:
    folded = _permute_axes(*_fold(size, dims, x, index), *rest)
    return folded.unflatten(0, (size, -1)), 0


_permute_axes: Callable = _op.define(
    "permute_axes(Tensor x, Tensor index, int[] axes, bool inverse=False) -> Tensor",
    reference=reference.permute_axes,
    fake=_same_as_first,
    check=_check_axes,
    vmap=_axes_vmap,
    backward=lambda args, needs, grad: (
        _permute_axes(grad, args[1], args[2], not args[3]),
        None,
        None,
        None,
    ),
    jvp=lambda args, x, *_: _permute_axes(x, *args[1:]),
)
_permute_axes_into = _op.define_into(
    "permute_axes_into(Tensor x, Tensor index, int[] axes, bool inverse, Tensor(a!) out) -> ()",
    of=_permute_axes,
)


def _merge_fake(flat: Tensor, weights: Tensor, *_: Any) -> Tensor:
    return flat.new_empty(weights.shape[0], flat.shape[1])


def _permuted(flat: Tensor, index: Tensor | None, code: Sequence[int]) -> Tensor:
    return flat if index is None else _permute(flat, index, code, False)


def _merge_backward(args: Sequence, needs: Sequence[bool], grad: Tensor) -> tuple:
    flat, weights, index, code = args
    to_flat = to_weights = None
    if needs[0]:
        to_flat = _merge(grad, weights.mT, None, code)
        if index is not None:
            to_flat = _permute(to_flat, index, code, True)
    if needs[1]:
        networks = _permuted(flat, index, code)
        to_weights = grad.to(weights.dtype) @ networks.to(weights.dtype).mT
    return to_flat, to_weights, None, None


def _merge_jvp(args: Sequence, flat: Tensor | None, weights: Tensor | None, *_: Any) -> Any:
    parts = []
    if flat is not None:
        parts.append(_merge(flat, *args[1:]))
    if weights is not None:
        parts.append(_merge(args[0], weights, *args[2:]))
    return sum(parts[1:], parts[0]) if parts else None


def _merge_vmap(
    size: int, dims: Sequence, flat: Tensor, weights: Tensor, index: Tensor | None, code: Sequence
) -> tuple:
    if dims[0] is None and dims[2] is None:
        weights = _op.moved_front(weights, dims[1], size)
        return _merge(flat, weights.flatten(0, 1), index, code).unflatten(0, (size, -1)), 0
    if index is not None:
        folded = _fold(size, (dims[0], dims[2]), flat, index)
        networks = _permute(*folded, code, False).unflatten(0, (size, -1))
    else:
        networks = _op.moved_front(flat, dims[0], size)
    weights = _op.moved_front(weights, dims[1], size)
    return (weights @ networks.to(weights.dtype)).to(flat.dtype), 0


_merge: Callable = _op.define(
    "merge(Tensor flat, Tensor weights, Tensor? index, int[] plan) -> Tensor",
    reference=reference.merge,
    fake=_merge_fake,
    check=_check_merge,
    vmap=_merge_vmap,
    backward=_merge_backward,
    jvp=_merge_jvp,
)
_merge_into = _op.define_into(
    "merge_into(Tensor flat, Tensor weights, Tensor? index, int[] plan, Tensor(a!) out) -> ()",
    of=_merge,
)
