"""Synthesis of whole networks, and steps on their bases, as streams over weights in Triton.

A program does a block of weights, for which every basis is read from memory once and every result written
once; sums are taken in float32 (float64 for float64), and there are no atomics.
"""

# What Triton compiles has no Python types.
# mypy: disable-error-code="no-untyped-def,assignment"
from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from weightops.ops.manifold import reference
from weightops.ops.manifold.triton_plan import Contexts

DTYPES = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
TYPES = {torch.float32: tl.float32, torch.float64: tl.float64}
# As many bases stay in registers while contexts go by; more are read again, from the caches.
_HELD = 8
_BLOCK = 1024
# Enough programs for any GPU to be busy; fewer blocks of weights than that share out the contexts.
_PROGRAMS = 1024
# For more contexts than that a step is a product of matrices.
_FEW = 16
# Fusion is Triton's default until 3.10 and is to stay.
OPTIONS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}


@triton.jit
def combine(
    coeffs, bases, out, num_contexts, num_bases, share, size,
    coeffs_context, coeffs_basis, basis, basis_step, out_context, out_step,
    HELD: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """``coeffs`` times ``bases``, HELD of them: a block of weights of a share of the contexts."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    begin = bases + place * basis_step
    tiles = ()
    for _ in tl.static_range(HELD):
        tiles = tiles + (tl.load(begin, inside, 0).to(WIDE),)  # noqa: RUF005 -- Triton has no starred expressions
        begin += basis
    first = tl.program_id(1) * share
    c = coeffs + tl.cast(first, tl.int64) * coeffs_context
    to = out + tl.cast(first, tl.int64) * out_context
    for _ in range(first, tl.minimum(first + share, num_contexts)):
        total = tl.zeros([BLOCK], WIDE)
        if HELD > 0:
            for k in tl.static_range(HELD):
                total += tl.load(c + k * coeffs_basis) * tiles[k]
        else:
            source = begin
            for k in range(num_bases):
                total += tl.load(c + k * coeffs_basis) * tl.load(source, inside, 0).to(WIDE)
                source += basis
        tl.store(to + place * out_step, total.to(out.dtype.element_ty), inside)
        c += coeffs_context
        to += out_context


@triton.jit
def descend(
    bases, grad, step, out, partials, num_contexts, num_bases, size,
    basis, basis_step, grad_context, grad_step, step_context, step_basis, out_basis, out_step,
    ADDED: tl.constexpr, WRITTEN: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A block's share of ``grad @ bases.T``, and ``step.T @ grad``; ADDED to the bases, which may be ``out``."""
    block = tl.program_id(0).to(tl.int64)
    place = block * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    to = partials + block * num_contexts * num_bases
    for k in range(num_bases):
        tile = tl.load(bases + place * basis_step, inside, 0).to(WIDE)
        total = tile if ADDED else tl.zeros([BLOCK], WIDE)
        source, scale = grad, step + k * step_basis
        # After the first basis the caches have the gradients.
        for g in range(num_contexts):
            each = tl.load(source + place * grad_step, inside, 0).to(WIDE)
            tl.store(to + g * num_bases + k, tl.sum(each * tile))
            if WRITTEN:
                total += tl.load(scale) * each
            source += grad_context
            scale += step_context
        if WRITTEN:
            tl.store(out + place * out_step, total.to(out.dtype.element_ty), inside)
        bases += basis
        out += out_basis


@triton.jit
def gather(
    values, order, starts, to, size,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Sum what belongs to items over those of a context."""
    context = tl.program_id(0).to(tl.int64)
    entry = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    total = tl.zeros([ROWS, WIDTH], WIDE)
    last = tl.load(starts + context + 1)
    for begin in range(tl.load(starts + context), last, ROWS):
        place = begin + tl.arange(0, ROWS)
        item = tl.load(order + place, place < last, 0)
        mask = (place < last)[:, None] & (entry < size)[None, :]
        total += tl.load(values + (item * size)[:, None] + entry[None, :], mask, 0)
    tl.store(to + context * size + entry, tl.sum(total, 0), entry < size)


def on(x: Tensor) -> Any:
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def serves(bases: Tensor, coeffs: Tensor, *others: Tensor) -> bool:
    wide = torch.float64 if bases.dtype == torch.float64 else torch.float32
    return (
        bases.dtype in DTYPES
        and bases.numel() > 0
        and coeffs.numel() > 0
        and coeffs.dtype == wide
        and all(other.dtype == bases.dtype for other in others)
    )


def _streams(bases: Tensor, coeffs: Tensor) -> bool:
    """Whether memory is the bound; for many bases and contexts it is a product of matrices."""
    return serves(bases, coeffs) and min(coeffs.shape) <= _HELD


def synthesize(coeffs: Tensor, bases: Tensor) -> Tensor:
    """As :func:`reference.synthesize`, which also serves what these kernels do not."""
    if not _streams(bases, coeffs):
        return reference.synthesize(coeffs, bases)
    out = bases.new_empty(coeffs.shape[0], bases.shape[1])
    _combine(coeffs, bases, out)
    return out


def synthesize_into(coeffs: Tensor, bases: Tensor, out: Tensor) -> None:
    """:func:`synthesize` into a buffer of any strides."""
    if _streams(bases, coeffs) and out.dtype == bases.dtype:
        _combine(coeffs, bases, out)
    else:
        out.copy_(reference.synthesize(coeffs, bases))


def synthesize_update(bases: Tensor, grad: Tensor, coeffs: Tensor, step: Tensor) -> Tensor:
    """As :func:`reference.synthesize_update`, which also serves what these kernels do not."""
    few = coeffs.shape[0] <= _FEW and step.dtype == coeffs.dtype
    if not (few and serves(bases, coeffs, grad)):
        return reference.synthesize_update(bases, grad, coeffs, step)
    return _descend(bases, grad, -step, bases)


def gradients(
    coeffs: Tensor,
    products: Tensor,
    weight: Tensor,
    need_coeffs: bool,
    need_weight: bool,
    dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients by coeffs [G, K] and bases ``weight`` [K, ...] from those by contexts' weights [G, ...]."""
    given = products.flatten(1)
    if len(given) > _FEW:
        wide = given.to(coeffs.dtype)
        flat = weight.flatten(1).to(coeffs.dtype)
        return (
            wide @ flat.mT if need_coeffs else None,
            (coeffs.mT @ wide).to(dtype).view(weight.shape) if need_weight else None,
        )
    to_weight = weight.new_empty(weight.shape, dtype=dtype) if need_weight else None
    out = None if to_weight is None else to_weight.flatten(1)
    if need_coeffs:
        return _descend(weight.flatten(1), given, coeffs, out), to_weight
    if out is not None:
        _combine(coeffs.mT, given, out)
    return None, to_weight


def gathered(values: Tensor, contexts: Contexts) -> Tensor:
    """The sums [G, ...] of what belongs to items [N, ...], in the items' order."""
    count, size = contexts.starts.shape[0] - 1, values[0].numel()
    to = values.new_empty(count, *values.shape[1:])
    width = min(64, 1 << (size - 1).bit_length())
    with on(values):
        gather[count, -(-size // width)](
            values, contexts.order, contexts.starts, to, size, 2048 // width, width,
            TYPES[values.dtype], **OPTIONS,
        )  # fmt: skip
    return to


def _combine(coeffs: Tensor, bases: Tensor, out: Tensor) -> None:
    contexts, (num_bases, size) = coeffs.shape[0], bases.shape
    blocks = -(-size // _BLOCK)
    share = -(-contexts // min(contexts, max(1, _PROGRAMS // blocks)))
    with on(bases):
        combine[blocks, -(-contexts // share)](
            coeffs, bases, out, contexts, num_bases, share, size,
            *coeffs.stride(), *bases.stride(), *out.stride(),
            num_bases if num_bases <= _HELD else 0, _BLOCK, TYPES[coeffs.dtype], **OPTIONS,
        )  # fmt: skip


def _descend(bases: Tensor, grad: Tensor, step: Tensor, out: Tensor | None) -> Tensor:
    """``grad @ bases.T``; ``out``, where given, takes ``step.T @ grad``, and adds it to bases that it is."""
    contexts, (num_bases, size) = grad.shape[0], bases.shape
    blocks = -(-size // _BLOCK)
    partials = step.new_empty(blocks, contexts, num_bases)
    written = bases if out is None else out
    with on(bases):
        descend[(blocks,)](
            bases, grad, step, written, partials, contexts, num_bases, size,
            *bases.stride(), *grad.stride(), *step.stride(), *written.stride(),
            out is bases, out is not None, _BLOCK, TYPES[step.dtype], **OPTIONS,
        )  # fmt: skip
    return partials.sum(0)
