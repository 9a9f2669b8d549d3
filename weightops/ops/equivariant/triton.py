"""Equivariant layers on GPUs, in Triton: sums, then mixed parts, then whole tensors (``tables.py``).

A program does a tile of rows by channels, told by the tables which; there are no atomics, so results
are the same every time. Sums and products are taken in float32 (float64 for float64); with float16 and
bfloat16 features the products are TF32's, exact on what is read, with float32 features IEEE's unless
``torch.set_float32_matmul_precision`` allows less.
"""

# What Triton compiles has no Python types.
# mypy: disable-error-code="no-untyped-def,assignment"
from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from weightops.ops.equivariant import grouped, tables

# Offsets within a sample have 32 bits, those between samples 64.
_MOST = 2**31 - 2**16
_DTYPES = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
_TYPES = {torch.float32: tl.float32, torch.float64: tl.float64}


@triton.jit
def _coordinates(position, sizes, RANK: tl.constexpr):
    found = ()
    for d in tl.static_range(RANK):
        size = tl.load(sizes + RANK - 1 - d)
        found = (position % size,) + found  # noqa: RUF005 -- Triton has no starred expressions
        position = position // size
    return found


@triton.jit
def _rows_of(at, strides, RANK: tl.constexpr):
    """Rows of one operand."""
    rows = tl.load(strides - 1)
    for d in tl.static_range(RANK):
        rows += at[d] * tl.load(strides + d)
    return rows


@triton.jit
def _rows_across(at, offsets, begin, step, operand, RANK: tl.constexpr):
    """Rows of one operand a column."""
    rows = tl.load(offsets + operand)[None, :]
    for d in tl.static_range(RANK):
        rows += at[d][:, None] * tl.load(begin + d * step + operand)[None, :]
    return rows


@triton.jit
def pool(
    source, to, table, items, num_samples, source_rows, to_rows,
    CHANNELS: tl.constexpr, SUMS: tl.constexpr, EACH: tl.constexpr, WIDTH: tl.constexpr,
    RANK: tl.constexpr, OVER: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Sum ``source`` over some dimensions into rows of ``to``; OVER of them at most."""
    item = items + tl.program_id(0).to(tl.int64) * 3
    record = table + tl.load(item).to(tl.int64) * (5 + 2 * RANK + 2 * OVER)
    length = tl.load(record)
    over = tl.load(record + 2)
    position = tl.load(item + 2) + tl.arange(0, SUMS)
    sample = tl.load(item + 1) + position // length
    position = position % length
    inside = sample < num_samples
    at = _coordinates(position, record + 5, RANK)
    rows = tl.load(record + 4) + position * 0
    for d in tl.static_range(RANK):
        rows += at[d] * tl.load(record + 5 + RANK + d)
    lane = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    held = lane < CHANNELS
    begin = source + (sample.to(tl.int64) * source_rows + rows) * CHANNELS
    begin = begin[:, None, None] + lane[None, None, :]
    total = tl.zeros([SUMS, EACH, WIDTH], WIDE)
    for i in range(0, over, EACH):
        index = i + tl.arange(0, EACH)
        along = _coordinates(index, record + 5 + 2 * RANK, OVER)
        step = index * 0
        for d in tl.static_range(OVER):
            step += along[d] * tl.load(record + 5 + 2 * RANK + OVER + d)
        mask = inside[:, None, None] & (index < over)[None, :, None] & held[None, None, :]
        total += tl.load(begin + step[None, :, None] * CHANNELS, mask=mask, other=0).to(WIDE)
    mean = tl.sum(total, 1) / tl.load(record + 3).to(WIDE)
    out = to + (sample.to(tl.int64) * to_rows + tl.load(record + 1) + position) * CHANNELS
    tl.store(out[:, None] + lane[None, :], mean, mask=inside[:, None] & held[None, :])


@triton.jit
def _multiply(
    total, values, rows, batch, at, inside, readers, terms, first, last, num_writers,
    theta, writer, lane, live,
    READ: tl.constexpr, WRITTEN: tl.constexpr, DEPTH: tl.constexpr, RANK: tl.constexpr,
    TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Add the products of the readers ``first`` to ``last``, which lie in ``values``."""
    for r in range(first, last):
        row = batch * rows + _rows_of(at, readers + r * (1 + RANK) + 1, RANK)
        row = values + row * READ
        term = tl.load(terms + r * num_writers + writer, mask=writer < num_writers, other=-1)
        block = theta + tl.maximum(term, 0).to(tl.int64) * (READ * WRITTEN)
        used = live & (term >= 0)
        for begin in tl.static_range(0, READ, DEPTH):
            k = begin + tl.arange(0, DEPTH)
            mask = inside[:, None] & (k < READ)[None, :]
            a = tl.load(row[:, None] + k[None, :], mask=mask, other=0).to(WIDE)
            mask = used[None, :] & (k < READ)[:, None]
            if TRANSPOSED:
                entry = (block + lane * READ)[None, :] + k[:, None]
            else:
                entry = (block + lane)[None, :] + k[:, None] * WRITTEN
            b = tl.load(entry, mask=mask, other=0).to(WIDE)
            total = tl.dot(a, b, total, input_precision=PRECISION, out_dtype=WIDE)
    return total


@triton.jit
def mix(
    x, sums, mixed, theta, bias, out, table, items, num_items, num_samples,
    x_rows, sums_rows, mixed_rows, out_rows, theta_step, bias_step,
    READ: tl.constexpr, WRITTEN: tl.constexpr, DEPTH: tl.constexpr, LANES: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, HEAD: tl.constexpr, RANK: tl.constexpr,
    WHOLE: tl.constexpr, BIAS: tl.constexpr, DIAGONALS: tl.constexpr, TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A tile of what some writers of a type take; to WHOLE tensors adds what is broadcast to them."""
    program = tl.program_id(0)
    group = (program // num_items).to(tl.int64)
    item = items + (program % num_items).to(tl.int64) * 4
    head = table + tl.load(item)
    length = tl.load(head)
    position = tl.load(item + 2) + tl.arange(0, ROWS)
    sample = tl.load(item + 1) + position // length
    position = position % length
    inside = sample < num_samples
    batch = group * num_samples + sample
    at = _coordinates(position, head + HEAD, RANK)

    columns = tl.arange(0, COLUMNS)
    num_writers = tl.load(head + 5)
    # One writer for all columns lets the compiler see that a row's channels lie side by side.
    if LANES >= COLUMNS:
        writer = tl.load(item + 3) + tl.zeros([1], tl.int32)
        lane = tl.program_id(1) * COLUMNS + columns
    else:
        writer = tl.load(item + 3) + columns // LANES
        lane = columns % LANES
    exists = writer < num_writers
    live = exists & (lane < WRITTEN)
    writer = tl.minimum(writer, num_writers - 1)

    total = tl.zeros([ROWS, COLUMNS], WIDE)
    readers, terms = table + tl.load(head + 1), table + tl.load(head + 4)
    num_wholes, num_readers = tl.load(head + 2), tl.load(head + 3)
    own = theta + group * theta_step
    total = _multiply(
        total, x, x_rows, batch, at, inside, readers, terms, 0, num_wholes, num_writers,
        own, writer, lane, live, READ, WRITTEN, DEPTH, RANK, TRANSPOSED, PRECISION, WIDE,
    )  # fmt: skip
    total = _multiply(
        total, sums, sums_rows, batch, at, inside, readers, terms, num_wholes, num_readers,
        num_writers, own, writer, lane, live,
        READ, WRITTEN, DEPTH, RANK, TRANSPOSED, PRECISION, WIDE,
    )  # fmt: skip

    writers = table + tl.load(head + 6)
    mask = inside[:, None] & live[None, :]
    if WHOLE:
        if BIAS:
            entry = tl.load(writers + num_writers + writer) * WRITTEN + lane
            total += tl.load(bias + group * bias_step + entry, mask=live, other=0).to(WIDE)[None, :]
        addends = table + tl.load(head + 7)
        num_plain, num_addends = tl.load(head + 8), tl.load(head + 9)
        base = mixed + batch * mixed_rows * WRITTEN
        for a in range(0, num_addends if DIAGONALS else num_plain):
            addend = addends + a * (3 + RANK) * num_writers
            given = tl.load(addend + writer) >= 0
            rows = _rows_across(at, addend, addend + 3 * num_writers, num_writers, writer, RANK)
            wanted = mask & given[None, :]
            if DIAGONALS:
                pairs = tl.load(addend + 2 * num_writers + writer)[None, :]
                number = 0
                for d in tl.static_range(RANK):
                    for e in tl.static_range(d + 1, RANK):
                        agree = (at[d] == at[e])[:, None]
                        wanted = wanted & (((pairs >> number) & 1 == 0) | agree)
                        number += 1
            value = tl.load(base[:, None] + (rows * WRITTEN + lane[None, :]), mask=wanted, other=0)
            total += value / tl.load(addend + num_writers + writer).to(WIDE)[None, :]
    rows = _rows_across(at, writers, writers + 2 * num_writers, num_writers, writer, RANK)
    begin = out + batch * out_rows * WRITTEN
    entry = begin[:, None] + (rows * WRITTEN + lane[None, :])
    tl.store(entry, total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def outer(
    x, x_sums, grad, grad_sums, to, table, items, num_items, num_samples, num_blocks,
    x_rows, x_sums_rows, grad_rows, grad_sums_rows,
    READ: tl.constexpr, WRITTEN: tl.constexpr, DEPTH: tl.constexpr, LANES: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, HEAD: tl.constexpr, RANK: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """What some rows give to the gradients of the terms between one reader and some writers."""
    program = tl.program_id(0)
    group = (program // num_items).to(tl.int64)
    item = items + (program % num_items).to(tl.int64) * 7
    head = table + tl.load(item)
    length, num_writers = tl.load(head), tl.load(head + 2)
    reader = table + tl.load(head + 1) + tl.load(item + 1) * (2 + RANK)
    writers = table + tl.load(head + 3)
    first_sample, first_position, count = tl.load(item + 3), tl.load(item + 4), tl.load(item + 5)
    k = tl.program_id(1) * DEPTH + tl.arange(0, DEPTH)
    columns = tl.arange(0, COLUMNS)
    if LANES >= COLUMNS:
        writer = tl.load(item + 2) + tl.zeros([1], tl.int32)
        lane = tl.program_id(2) * COLUMNS + columns
    else:
        writer = tl.load(item + 2) + columns // LANES
        lane = columns % LANES
    live = (writer < num_writers) & (lane < WRITTEN)
    number = writer
    writer = tl.minimum(writer, num_writers - 1)
    reads_whole = tl.load(reader + tl.zeros([1, 1], tl.int32))
    writes_whole = tl.load(writers + writer)[None, :]
    total = tl.zeros([DEPTH, COLUMNS], WIDE)
    for i in range(0, count, ROWS):
        index = i + tl.arange(0, ROWS)
        position = first_position + index
        batch = group * num_samples + first_sample + position // length
        at = _coordinates(position % length, head + HEAD, RANK)
        inside = index < count
        offset = _rows_of(at, reader + 2, RANK) * READ
        mask = (k < READ)[:, None] & inside[None, :]
        # Only one of the two is read: which, the whole program agrees on, or at least a column.
        entry = (batch * x_rows * READ + offset)[None, :] + k[:, None]
        a = tl.load(x + entry, mask=mask & (reads_whole != 0), other=0).to(WIDE)
        entry = (batch * x_sums_rows * READ + offset)[None, :] + k[:, None]
        a += tl.load(x_sums + entry, mask=mask & (reads_whole == 0), other=0)
        rows = _rows_across(
            at, writers + num_writers, writers + 2 * num_writers, num_writers, writer, RANK
        )
        offsets = rows * WRITTEN + lane[None, :]
        mask = inside[:, None] & live[None, :]
        entry = (batch * grad_rows * WRITTEN)[:, None] + offsets
        b = tl.load(grad + entry, mask=mask & (writes_whole != 0), other=0).to(WIDE)
        entry = (batch * grad_sums_rows * WRITTEN)[:, None] + offsets
        b += tl.load(grad_sums + entry, mask=mask & (writes_whole == 0), other=0)
        total = tl.dot(a, b, total, input_precision=PRECISION, out_dtype=WIDE)
    block = group * num_blocks + tl.load(item + 6) + number
    entry = (block * (READ * WRITTEN) + lane)[None, :] + k[:, None] * WRITTEN
    tl.store(to + entry, total, mask=live[None, :] & (k < READ)[:, None])


@triton.jit
def gather(
    blocks, to, terms, num_terms, num_blocks, SIZE: tl.constexpr, WIDTH: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Add up what the programs of ``outer`` found for a term."""
    program = tl.program_id(0)
    group = (program // num_terms).to(tl.int64)
    record = terms + (program % num_terms).to(tl.int64) * 3
    entry = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    begin = blocks + (group * num_blocks + tl.load(record)) * SIZE + entry
    step = tl.load(record + 1).to(tl.int64) * SIZE
    total = tl.zeros([WIDTH], WIDE)
    for i in range(0, tl.load(record + 2)):
        total += tl.load(begin + i * step, mask=entry < SIZE, other=0)
    out = to + program.to(tl.int64) * SIZE + entry
    tl.store(out, total.to(to.dtype.element_ty), mask=entry < SIZE)


def linear(
    x: Tensor, theta: Tensor, bias: Tensor | None, code: Sequence[int], transpose: bool = False
) -> Tensor:
    """As :func:`grouped.linear`, which also serves what these kernels do not."""
    key = tuple(code)
    facts = tables.facts(key)
    if not _serves(facts, x, theta):
        return grouped.linear(x, theta, bias, code, transpose)
    with _on(x):
        return _layer(facts, x.contiguous(), theta, bias, key, transpose, None)


def backward(
    x: Tensor, theta: Tensor, grad: Tensor, code: Sequence[int], need_x: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`grouped.backward`, which also serves what these kernels do not."""
    key = tuple(code)
    facts = tables.facts(key)
    if not _serves(facts, x, theta):
        return grouped.backward(x, theta, grad, code, need_x)
    with _on(x):
        x, grad = x.contiguous(), grad.contiguous()
        groups, num_terms, c_in, c_out = theta.shape
        batch, wide = x.shape[0], _wide(x)
        told = tables.gradient(key, c_in, c_out, batch, groups, x.device)
        x_sums, grad_sums = _sum(x, told.reads, wide), _sum(grad, told.writes, wide)
        blocks = x.new_empty(groups, told.blocks, c_in, c_out, dtype=wide)
        depth, columns = _depth(c_in), told.columns
        if len(told.outer.items):
            grid = (groups * len(told.outer.items), -(-c_in // depth), _lane_blocks(c_out, columns))
            outer[grid](
                x, x_sums, grad, grad_sums, blocks, told.outer.table, told.outer.items,
                len(told.outer.items), batch // groups, told.blocks,
                x.shape[1], told.reads.rows, grad.shape[1], told.writes.rows,
                c_in, c_out, depth, tables.lanes(c_out), tables.ROWS, columns, tables.OUTER_HEAD,
                told.outer.rank, _precision(x), _TYPES[wide], **_options(wide, columns, told.outer.rank, min(c_in, c_out)),
            )  # fmt: skip
        to_theta = theta.new_empty(theta.shape)
        if num_terms:
            size = c_in * c_out
            width = min(1024, tables.lanes(size))
            gather[groups * num_terms, -(-size // width)](
                blocks, to_theta, told.terms, num_terms, told.blocks, size, width, _TYPES[wide],
                **_options(wide),
            )  # fmt: skip
        means = grad_sums[:, : facts.num_biases]
        to_bias = means.unflatten(0, (groups, batch // groups)).sum(1).to(theta.dtype)
        to_x = x.new_empty(0)
        if need_x:
            to_x = _layer(facts, grad, theta, None, key, True, grad_sums)
    return to_x, to_theta, to_bias


def _options(
    wide: torch.dtype, columns: int = 0, rank: int = 0, channels: int = 16
) -> dict[str, Any]:
    """How a kernel is compiled: with more threads where the registers of fewer would not do."""
    scattered = rank > 2 and channels < 16
    warps = 8 if columns == 64 or scattered or wide is torch.float64 else 4
    # Loops are short, so pipelining them gains nothing and costs registers. Fusion is Triton's default
    # until 3.10 and is to stay.
    return {"num_warps": warps, "num_stages": 1, "enable_fp_fusion": True}


def _serves(facts: tables.Facts, x: Tensor, theta: Tensor) -> bool:
    return (
        x.shape[0] > 0
        and x.dtype in _DTYPES
        and theta.dtype == x.dtype
        and facts.rank <= tables.MOST_DIMENSIONS
        and facts.rows * max(theta.shape[2:]) < _MOST
    )


def _on(x: Tensor) -> Any:
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _precision(x: Tensor) -> str:
    if x.dtype in (torch.float16, torch.bfloat16):
        return "tf32"
    highest = x.dtype == torch.float64 or torch.get_float32_matmul_precision() == "highest"
    return "ieee" if highest else "tf32"


def _depth(channels: int) -> int:
    return max(16, min(32, tables.lanes(channels)))


def _lane_blocks(channels: int, columns: int) -> int:
    return -(-channels // columns) if tables.lanes(channels) >= columns else 1


def _sum(x: Tensor, told: tables.Sums, wide: torch.dtype) -> Tensor:
    """What is summed from ``x`` [B, P, C], [B, rows, C]."""
    channels = x.shape[2]
    sums = x.new_empty(x.shape[0], told.rows, channels, dtype=wide)
    block = tables.pool_block(channels)
    for launch, source in zip(told.launches, (x, sums), strict=True):
        if len(launch.items):
            pool[len(launch.items), -(-channels // block[2])](
                source, sums, launch.table, launch.items, x.shape[0], source.shape[1], told.rows,
                channels, *block, launch.rank, launch.extra, _TYPES[wide],
                **_options(wide),
            )  # fmt: skip
    return sums


def _layer(
    facts: tables.Facts,
    x: Tensor,
    theta: Tensor,
    bias: Tensor | None,
    key: tuple[int, ...],
    transpose: bool,
    sums: Tensor | None,
) -> Tensor:
    """A layer; ``sums`` where they are at hand."""
    groups, _, c_in, c_out = theta.shape
    reads, writes = (c_out, c_in) if transpose else (c_in, c_out)
    batch, wide = x.shape[0], _wide(x)
    told = tables.layer(key, transpose, reads, writes, batch, groups, x.device)
    if not (theta.stride()[1:] == (c_in * c_out, c_out, 1) or theta.numel() == 0):
        theta = theta.contiguous()
    if bias is not None:
        bias = bias if bias.stride()[1:] == (c_out, 1) else bias.contiguous()
    if sums is None:
        sums = _sum(x, told.sums, wide)
    mixed = x.new_empty(batch, told.mixed_rows, writes, dtype=wide)
    y = x.new_empty(batch, facts.numel_in if transpose else facts.numel_out, writes)
    for whole, out in ((False, mixed), (True, y)):
        launch, columns = (told.parts, told.wholes)[whole], told.columns[whole]
        if not len(launch.items):
            continue
        mix[groups * len(launch.items), _lane_blocks(writes, columns)](
            x, sums, mixed, theta, x if bias is None else bias, out, launch.table, launch.items,
            len(launch.items), batch // groups,
            x.shape[1], sums.shape[1], told.mixed_rows, out.shape[1],
            theta.stride(0), 0 if bias is None else bias.stride(0),
            reads, writes, _depth(reads), tables.lanes(writes),
            tables.ROWS if whole else tables.PART_ROWS, columns, tables.HEAD, launch.rank,
            whole, bias is not None, bool(launch.extra), transpose, _precision(x), _TYPES[wide],
            **_options(wide, columns, launch.rank, min(reads, writes)),
        )  # fmt: skip
    return y
