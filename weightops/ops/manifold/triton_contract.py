"""The products of layers on a weight manifold as Triton kernels; ``triton.py`` launches them.

Rows are what a layer is applied to: R of each item, for a convolution its pixels. A convolution's products
are those of a linear layer with patches for inputs, which are found while they are loaded. Within an item and
within a basis offsets have 32 bits, beyond that 64.
"""

# What Triton compiles has no Python types.
# mypy: disable-error-code="no-untyped-def,assignment"
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _place(program, row_tiles, column_tiles):
    """The tile of a program: eight row tiles share their columns' weights in the second-level cache."""
    band = 8 * column_tiles
    first = program // band * 8
    height = tl.minimum(row_tiles - first, 8)
    return first + program % band % height, (program % band // height).to(tl.int32)


@triton.jit
def _items(first, number, per_item):
    """Items, and positions within them, of rows ``first + number``; with one division of 64 bits in all."""
    position = (first % per_item).to(tl.int32) + number
    return first // per_item + position // per_item, position % per_item


@triton.jit
def _corners(position, out_w, step_h, step_w, pad_h, pad_w, TRANSPOSED: tl.constexpr):
    """Where the patches of pixels begin; transposed, where what they gave begins, before strides."""
    h, w = position // out_w, position % out_w
    if TRANSPOSED:
        return h + pad_h, w + pad_w
    else:
        return h * step_h - pad_h, w * step_w - pad_w


@triton.jit
def _patches(
    h, w, entry, in_h, in_w, step_h, step_w, gap_h, gap_w,
    TAPS_H: tl.constexpr, TAPS_W: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """Offsets [entries, rows] of (channel, tap) entries within an image, and which lie in it."""
    channel, tap = entry // (TAPS_H * TAPS_W), entry % (TAPS_H * TAPS_W)
    across_h, across_w = tap // TAPS_W * gap_h, tap % TAPS_W * gap_w
    if TRANSPOSED:
        h, w = h[None, :] - across_h[:, None], w[None, :] - across_w[:, None]
        inside = (h >= 0) & (w >= 0) & (h % step_h == 0) & (w % step_w == 0)
        h, w = h // step_h, w // step_w
    else:
        h, w = h[None, :] + across_h[:, None], w[None, :] + across_w[:, None]
        inside = (h >= 0) & (w >= 0)
    return (channel * in_h * in_w)[:, None] + h * in_w + w, inside & (h < in_h) & (w < in_w)


@triton.jit
def _loaded(
    source, position, entry, depth, inside, row, in_h, in_w, out_w,
    step_h, step_w, pad_h, pad_w, gap_h, gap_w,
    TAPS_H: tl.constexpr, TAPS_W: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """What a product reads [rows, entries] of items that begin at ``source``; without taps a plain row."""
    if TAPS_H == 0:
        mask = inside[:, None] & (entry < depth)[None, :]
        return tl.load(source[:, None] + (position * row)[:, None] + entry[None, :], mask, 0)
    else:
        h, w = _corners(position, out_w, step_h, step_w, pad_h, pad_w, TRANSPOSED)
        offsets, held = _patches(
            h, w, entry, in_h, in_w, step_h, step_w, gap_h, gap_w, TAPS_H, TAPS_W, TRANSPOSED
        )
        held = held & (entry < depth)[:, None] & inside[None, :]
        # Pixels last, so that a warp reads neighbours.
        return tl.trans(tl.load(source[None, :] + offsets, held, 0))


@triton.jit
def _entries(
    entry, column, group, depth, columns, basis_row,
    TAPS_H: tl.constexpr, TAPS_W: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """Offsets [entries, columns] within a basis; transposed, inputs stand in the columns."""
    if TRANSPOSED:
        TAPS: tl.constexpr = TAPS_H * TAPS_W if TAPS_H > 0 else 1
        outputs = group * (depth // TAPS) + entry // TAPS
        return (outputs * basis_row + entry % TAPS)[:, None] + (column * TAPS)[None, :]
    else:
        return entry[:, None] + ((group * columns + column) * basis_row)[None, :]


@triton.jit
def _written(item, position, column, group, columns, y_item, y_row, y_column):
    """Offsets [rows, columns] of what is written."""
    begin = item * y_item + group * columns * y_column
    return begin[:, None] + ((position * y_row)[:, None] + (column * y_column)[None, :])


@triton.jit
def contract_rows(
    a, coeffs, index, weight, shift, x, y, partials,
    num_rows, per_item, depth, columns, groups, num_bases, basis, basis_row,
    a_item, a_row, y_item, y_row, y_column, in_h, in_w, out_w,
    step_h, step_w, pad_h, pad_w, gap_h, gap_w,
    TAPS_H: tl.constexpr, TAPS_W: tl.constexpr, TRANSPOSED: tl.constexpr, INDEXED: tl.constexpr,
    SHIFTED: tl.constexpr, WRITTEN: tl.constexpr, PARTIALS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Rows with coefficients of their own: a product for each basis, scaled as it is added to the others.

    So what the tensor cores read is what was given, and coefficients meet sums of full width. PARTIALS takes
    the inner products of each basis' product with a row of ``x`` along.
    """
    column_tiles = tl.cdiv(columns, COLUMNS)
    tile, across = _place(
        tl.program_id(0).to(tl.int64), tl.cdiv(num_rows, ROWS), column_tiles * groups
    )
    group = across // column_tiles
    column = across % column_tiles * COLUMNS + tl.arange(0, COLUMNS)
    row = tile * ROWS + tl.arange(0, ROWS)
    inside = row < num_rows
    item, position = _items(tile * ROWS, tl.arange(0, ROWS), per_item)
    context = item
    if INDEXED:
        context = tl.load(index + item, inside, 0)
    mask = inside[:, None] & (column < columns)[None, :]
    # Of a grouped convolution's depth each group reads its own channels.
    channels = 0
    if TAPS_H > 0:
        channels = group * (depth // (TAPS_H * TAPS_W)) * in_h * in_w
    source = a + item * a_item + channels
    if PARTIALS:
        place = _written(item, position, column, group, columns, y_item, y_row, y_column)
        beside = tl.load(x + place, mask, 0)
    total = tl.zeros([ROWS, COLUMNS], WIDE)
    bases = weight
    for k in range(num_bases):
        product = tl.zeros([ROWS, COLUMNS], WIDE)
        for begin in range(0, depth, DEPTH):
            entry = begin + tl.arange(0, DEPTH)
            left = _loaded(
                source, position, entry, depth, inside, a_row, in_h, in_w, out_w,
                step_h, step_w, pad_h, pad_w, gap_h, gap_w, TAPS_H, TAPS_W, TRANSPOSED,
            )  # fmt: skip
            offsets = _entries(
                entry, column, group, depth, columns, basis_row, TAPS_H, TAPS_W, TRANSPOSED
            )
            held = (entry < depth)[:, None] & (column < columns)[None, :]
            right = tl.load(bases + offsets, held, 0)
            product = tl.dot(left, right, product, input_precision=PRECISION, out_dtype=WIDE)
        if WRITTEN:
            total += tl.load(coeffs + context * num_bases + k, inside, 0)[:, None] * product
        if PARTIALS:
            inner = tl.sum(product * beside.to(WIDE), 1)
            to = partials + (across.to(tl.int64) * num_rows + row) * num_bases + k
            tl.store(to, inner, inside)
        bases += basis
    if WRITTEN:
        if SHIFTED:
            outputs = context[:, None] * (groups * columns) + (group * columns + column)[None, :]
            total += tl.load(shift + outputs, mask, 0)
        place = _written(item, position, column, group, columns, y_item, y_row, y_column)
        tl.store(y + place, total.to(y.dtype.element_ty), mask)


@triton.jit
def _synthesized(
    weight, coeffs, offsets, held, basis,
    BASES: tl.constexpr, UNROLLED: tl.constexpr, DEPTH: tl.constexpr, COLUMNS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A tile of a context's weights."""
    total = tl.zeros([DEPTH, COLUMNS], WIDE)
    if UNROLLED:
        # Unrolled, the loads of one basis do not wait for those of the last.
        for k in tl.static_range(BASES):
            total += tl.load(coeffs + k) * tl.load(weight + offsets, held, 0).to(WIDE)
            weight += basis
    else:
        for k in range(BASES):
            total += tl.load(coeffs + k) * tl.load(weight + offsets, held, 0).to(WIDE)
            weight += basis
    return total


@triton.jit
def contract_groups(
    a, coeffs, order, starts, tile_context, tile_offset, weight, shift, y,
    num_contexts, num_tiles, per_item, depth, columns, groups, basis, basis_row,
    a_item, a_row, y_item, y_row, y_column, in_h, in_w, out_w,
    step_h, step_w, pad_h, pad_w, gap_h, gap_w,
    BASES: tl.constexpr, UNROLLED: tl.constexpr,
    TAPS_H: tl.constexpr, TAPS_W: tl.constexpr, TRANSPOSED: tl.constexpr,
    ORDERED: tl.constexpr, SHIFTED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Rows that share a context, a tile of one context's: its weights are synthesised as they are loaded."""
    column_tiles = tl.cdiv(columns, COLUMNS)
    tile, across = _place(tl.program_id(0).to(tl.int64), num_tiles, column_tiles * groups)
    context = tl.load(tile_context + tile)
    # How many tiles there are is known on the device alone, so some are to spare.
    if context >= num_contexts:
        return
    group = across // column_tiles
    column = across % column_tiles * COLUMNS + tl.arange(0, COLUMNS)
    first = tile * ROWS + tl.load(tile_offset + context)
    inside = first + tl.arange(0, ROWS) < tl.load(starts + context + 1) * per_item
    item, position = _items(first, tl.arange(0, ROWS), per_item)
    if ORDERED:
        item = tl.load(order + item, inside, 0)
    channels = 0
    if TAPS_H > 0:
        channels = group * (depth // (TAPS_H * TAPS_W)) * in_h * in_w
    source = a + item * a_item + channels
    total = tl.zeros([ROWS, COLUMNS], WIDE)
    for begin in range(0, depth, DEPTH):
        entry = begin + tl.arange(0, DEPTH)
        left = _loaded(
            source, position, entry, depth, inside, a_row, in_h, in_w, out_w,
            step_h, step_w, pad_h, pad_w, gap_h, gap_w, TAPS_H, TAPS_W, TRANSPOSED,
        )  # fmt: skip
        offsets = _entries(
            entry, column, group, depth, columns, basis_row, TAPS_H, TAPS_W, TRANSPOSED
        )
        held = (entry < depth)[:, None] & (column < columns)[None, :]
        right = _synthesized(
            weight, coeffs + context * BASES, offsets, held, basis,
            BASES, UNROLLED, DEPTH, COLUMNS, WIDE,
        ).to(left.dtype)  # fmt: skip
        total = tl.dot(left, right, total, input_precision=PRECISION, out_dtype=WIDE)
    if SHIFTED:
        outputs = context * (groups * columns) + group * columns + column
        total += tl.load(shift + outputs, column < columns, 0)[None, :]
    place = _written(item, position, column, group, columns, y_item, y_row, y_column)
    mask = inside[:, None] & (column < columns)[None, :]
    tl.store(y + place, total.to(y.dtype.element_ty), mask)


@triton.jit
def outer(
    grad, x, coeffs, index, order, starts, to,
    num_rows, per_item, depth, columns, groups, num_bases, shares, size,
    x_item, x_row, grad_item, grad_row, grad_column, in_h, in_w, out_w,
    step_h, step_w, pad_h, pad_w, gap_h, gap_w,
    TAPS_H: tl.constexpr, TAPS_W: tl.constexpr, GROUPED: tl.constexpr, INDEXED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A share of rows' products of ``grad`` and ``x``: for each basis, scaled, or for each context.

    ``columns`` counts a group's outputs and ``depth`` what each of them reads. INDEXED says where a row's item
    is looked up: its context in ``index``, or GROUPED, itself in ``order``.
    """
    row_tiles, entry_tiles = tl.cdiv(columns, ROWS) * groups, tl.cdiv(depth, COLUMNS)
    program = tl.program_id(0).to(tl.int64)
    number = program // (row_tiles * entry_tiles)
    which = number // shares
    tile, across = _place(program % (row_tiles * entry_tiles), row_tiles, entry_tiles)
    group = (tile // (row_tiles // groups)).to(tl.int32)
    column = (tile % (row_tiles // groups)).to(tl.int32) * ROWS + tl.arange(0, ROWS)
    entry = across * COLUMNS + tl.arange(0, COLUMNS)
    first, last = which * 0, which * 0 + num_rows
    if GROUPED:
        first, last = tl.load(starts + which) * per_item, tl.load(starts + which + 1) * per_item
    share = tl.cdiv(tl.cdiv(last - first, shares), DEPTH) * DEPTH
    first += number % shares * share
    last = tl.minimum(last, first + share)
    channels = 0
    if TAPS_H > 0:
        channels = group * (depth // (TAPS_H * TAPS_W)) * in_h * in_w
    total = tl.zeros([ROWS, COLUMNS], WIDE)
    for begin in range(first, last, DEPTH):
        inside = begin + tl.arange(0, DEPTH) < last
        item, position = _items(begin, tl.arange(0, DEPTH), per_item)
        if GROUPED and INDEXED:
            item = tl.load(order + item, inside, 0)
        place = grad + item * grad_item + (group * columns) * grad_column
        offsets = (column * grad_column)[:, None] + (position * grad_row)[None, :]
        held = (column < columns)[:, None] & inside[None, :]
        left = tl.load(place[None, :] + offsets, held, 0)
        if not GROUPED:
            context = item
            if INDEXED:
                context = tl.load(index + item, inside, 0)
            scale = tl.load(coeffs + context * num_bases + which, inside, 0)
            left = (left.to(WIDE) * scale[None, :]).to(left.dtype)
        right = _loaded(
            x + item * x_item + channels, position, entry, depth, inside, x_row, in_h, in_w, out_w,
            step_h, step_w, pad_h, pad_w, gap_h, gap_w, TAPS_H, TAPS_W, False,
        )  # fmt: skip
        total = tl.dot(left, right, total, input_precision=PRECISION, out_dtype=WIDE)
    offsets = ((group * columns + column) * depth)[:, None] + entry[None, :]
    mask = (column < columns)[:, None] & (entry < depth)[None, :]
    tl.store(to + number * size + offsets, total.to(to.dtype.element_ty), mask)
