"""Batched permutation apply: whole networks, single tensors, and permuted weighted sums."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from weightops import _check
from weightops.ops.permute.declaration import (
    _merge,
    _merge_into,
    _permute,
    _permute_axes,
    _permute_axes_into,
    _permute_into,
)
from weightops.ops.permute.plan import plan as plan_of
from weightops.spec import Permutations, WeightSpec


def _pack(where: str, perms: Permutations, spec: WeightSpec, flat: Tensor) -> Tensor:
    """Permutations of all labels side by side, [N or 1, total size], in the spec's order."""
    n, device = flat.shape[0], flat.device
    parts, rows, found = [], 1, 0
    for label, size in spec._labels.items():
        part = perms.get(label) if isinstance(perms, Mapping) else None
        if part is None:
            parts.append(torch.arange(size, device=device)[None])
            continue
        found += 1
        if (
            not isinstance(part, Tensor)
            or part.shape != (n, size)
            or part.dtype != torch.int64
            or part.layout is not torch.strided
        ):
            # Anything but the usual is looked at one by one, off the path that small networks feel.
            spec.check_permutations(where, {label: part}, values=False)
            if part.dim() == 1:
                part = part[None]
            elif part.shape[0] != n:
                raise ValueError(
                    f"{where}: perms[{label!r}] has {part.shape[0]} rows, but flat has {n} networks"
                )
            part = part.long()
        if part.device != device:
            _check.same_device(where, f"perms[{label!r}]", part, "flat", flat)
        rows = rows if part.shape[0] == 1 else n
        parts.append(part)
    if not isinstance(perms, Mapping) or found != len(perms):
        spec.check_permutations(where, perms, values=False)
    if not parts:
        return flat.new_empty(1, 0, dtype=torch.int64)
    if rows != 1:
        parts = [part.expand(rows, -1) for part in parts]
    return torch.cat(parts, 1)


def _run(where: str, op: Any, args: tuple, explain: Any) -> Any:
    """Call ``op``; where it refuses its index, let ``explain`` say which argument is at fault."""
    if torch.compiler.is_compiling():
        return op(*args)
    if args[0].is_cuda and not torch.cuda.is_current_stream_capturing():
        explain()
    try:
        return op(*args)
    except RuntimeError:
        explain()
        raise


def _check_networks(where: str, flat: Any, spec: Any) -> None:
    if not isinstance(spec, WeightSpec):
        raise TypeError(f"{where}: spec must be a WeightSpec, not {_check.describe(spec)}")
    spec.check_flat(where, flat, dims=2)


def permute(
    flat: Tensor,
    perms: Permutations,
    spec: WeightSpec,
    *,
    inverse: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """Permute whole networks in one pass: ``out[n].W[i, j] = W[p[n, i], q[n, j]]``.

    Args:
        flat: networks ``[N, P]`` of any dtype, laid out by ``spec``; rows may have any strides.
        perms: label -> int64 or int32 ``[N, size]``, or ``[size]`` for all networks; a label that is
            absent stays as it is.
        spec: axes and layout of one network.
        inverse: apply the inverse permutations: ``out[n].W[p[n, i], q[n, j]] = W[i, j]``.
        out: buffer ``[N, P]`` to write into and return; not differentiable.

    Returns:
        ``[N, P]``, contiguous. Gradients flow to ``flat``.

    Raises:
        ValueError: shapes, labels, devices or rows do not fit, or an entry of ``perms`` is no
            permutation. Under ``torch.compile`` and while a CUDA graph is captured the values of
            ``perms`` on a GPU are not looked at.
        TypeError: an argument has the wrong type or dtype.
    """
    _check_networks("permute", flat, spec)
    _check.flag("permute", "inverse", inverse)
    args: tuple = (flat, _pack("permute", perms, spec, flat), plan_of(spec), inverse)
    op = _permute
    if out is not None:
        _check.out_buffer("permute", out, flat.shape, flat, (flat,))
        op, args = _permute_into, (*args, out)
    result = _run("permute", op, args, lambda: _explain(spec, "permute", perms))
    return result if out is None else out


def _explain(spec: WeightSpec, where: str, perms: Permutations) -> None:
    spec.check_permutations(where, perms)


def permute_axes(
    x: Tensor,
    perms: Sequence[Tensor | None],
    *,
    inverse: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """Permute the axes of a batch of tensors: ``out[b, i, j] = x[b, p[b, i], q[b, j]]``.

    Args:
        x: ``[B, ...]`` of any dtype and strides.
        perms: one entry per axis behind the first: int64 or int32 ``[B, n]``, ``[n]`` for the whole
            batch, or ``None`` where the axis stays.
        inverse: apply the inverse permutations: ``out[b, p[b, i], q[b, j]] = x[b, i, j]``.
        out: buffer of ``x``'s shape to write into and return; not differentiable.

    Returns:
        A contiguous tensor of ``x``'s shape. Gradients flow to ``x``.

    Raises:
        ValueError: lengths, shapes or devices do not fit, or an entry is no permutation.
        TypeError: an argument has the wrong type or dtype.
    """
    where = "permute_axes"
    _check.tensor(where, "x", x, "[B, ...]")
    _check.flag(where, "inverse", inverse)
    if isinstance(perms, Tensor) or not isinstance(perms, Sequence):
        raise TypeError(
            f"{where}: perms must be a list with an entry per axis of x behind the first, "
            f"not {_check.describe(perms)}"
        )
    if x.dim() == 0 or len(perms) != x.dim() - 1:
        raise ValueError(
            f"{where}: perms has {len(perms)} entries, but x {list(x.shape)} "
            f"has {max(x.dim() - 1, 0)} axes behind the first"
        )
    axes, parts, rows = [], [], 1
    for axis, part in enumerate(perms, start=1):
        if part is None:
            continue
        name, n = f"perms[{axis - 1}]", x.shape[axis]
        _check.tensor(where, name, part, "[B, n] or [n]")
        if part.dim() not in (1, 2) or (part.dim() == 2 and part.shape[0] != x.shape[0]):
            raise ValueError(
                f"{where}: {name} must have shape [{x.shape[0]}, {n}] or [{n}], "
                f"not {list(part.shape)}"
            )
        _check.index_dtype(where, name, part)
        _check.size(where, name, part.shape[-1], n, f"axis {axis} of x")
        _check.same_device(where, name, part, "x", x)
        rows = x.shape[0] if part.dim() == 2 else rows
        axes.append(axis)
        parts.append(part if part.dim() == 2 else part[None])
    if rows != 1:
        parts = [part.expand(rows, -1) for part in parts]
    index = torch.cat(parts, 1).long() if parts else x.new_empty(1, 0, dtype=torch.int64)
    args: tuple = (x, index, axes, inverse)
    op = _permute_axes
    if out is not None:
        _check.out_buffer(where, out, x.shape, x, (x,))
        op, args = _permute_axes_into, (*args, out)

    def explain() -> None:
        for axis, part in zip(axes, parts, strict=True):
            if fault := _check.permutation_fault(part):
                raise ValueError(
                    f"{where}: perms[{axis - 1}] is no permutation of 0..{x.shape[axis] - 1}: {fault}"
                )

    result = _run(where, op, args, explain)
    return result if out is None else out


_MERGED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _numbers(where: str, weights: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    try:
        if _real(weights):
            return torch.tensor(_listed(weights), dtype=dtype, device=device)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        pass
    raise TypeError(
        f"{where}: weights must be numbers [M] or [L, M], or one tensor of them, "
        f"not {_check.describe(weights)}"
    )


def _listed(value: Any) -> Any:
    """Arrays inside lists as lists, since of them torch warns that it is slow."""
    if isinstance(value, (list, tuple)):
        return [each.tolist() if isinstance(each, np.ndarray) else _listed(each) for each in value]
    return value


def _real(value: Any) -> bool:
    """Whether ``torch.tensor`` keeps all of ``value``: it drops imaginary parts and gradients."""
    if isinstance(value, (list, tuple)):
        return all(_real(each) for each in value)
    if isinstance(value, np.ndarray):
        return value.dtype.kind in "iuf"
    if isinstance(value, Tensor):
        return value.dim() == 0 and not value.requires_grad and not value.is_complex()
    return isinstance(value, (int, float, np.integer, np.floating))


def merge(
    flat: Tensor,
    weights: Tensor | Sequence,
    spec: WeightSpec,
    *,
    perms: Permutations | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Weighted sums of permuted networks in one pass: ``sum_m weights[..., m] P_m(flat[m])``.

    Args:
        flat: networks ``[M, P]``, floating point; float16 and bfloat16 are summed in float32.
        weights: ``[M]``, or ``[L, M]`` for L sums at once (points of a path); numbers or a tensor.
        spec: axes and layout of one network.
        perms: as for :func:`permute`; ``None`` takes the networks as they are.
        out: buffer of the result's shape to write into and return; not differentiable.

    Returns:
        ``[P]`` or ``[L, P]`` of ``flat``'s dtype. Gradients flow to ``flat`` and ``weights``.

    Raises:
        ValueError: shapes, labels or devices do not fit, or an entry of ``perms`` is no permutation.
        TypeError: an argument has the wrong type or dtype.
    """
    where = "merge"
    _check_networks(where, flat, spec)
    if flat.dtype not in _MERGED:
        raise TypeError(
            f"{where}: flat must be float16, bfloat16, float32 or float64, not {flat.dtype}"
        )
    accumulate = torch.float64 if flat.dtype == torch.float64 else torch.float32
    if not isinstance(weights, Tensor):
        weights = _numbers(where, weights, accumulate, flat.device)
    _check.dense(where, "weights", weights)
    _check.same_device(where, "weights", weights, "flat", flat)
    if weights.is_complex() or weights.dtype == torch.bool:
        raise TypeError(f"{where}: weights must be real numbers, not {weights.dtype}")
    m = flat.shape[0]
    if weights.dim() not in (1, 2) or weights.shape[-1] != m:
        raise ValueError(
            f"{where}: weights must have shape [{m}] or [L, {m}] for {m} networks, "
            f"not {list(weights.shape)}"
        )
    if m == 0:
        raise ValueError(f"{where}: flat holds no network")
    index = None if perms is None else _pack(where, perms, spec, flat)
    rows = weights.to(accumulate).reshape(-1, m)
    shape = (*weights.shape[:-1], flat.shape[1])
    args: tuple = (flat, rows, index, plan_of(spec))
    op = _merge
    if out is not None:
        _check.out_buffer(where, out, shape, flat, (flat, weights))
        op, args = _merge_into, (*args, out if weights.dim() == 2 else out[None])
    result = _run(where, op, args, lambda: _explain(spec, where, perms or {}))
    return result.view(shape) if out is None else out
