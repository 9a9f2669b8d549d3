"""Rules of ops that only move, split, join or pick: views, permutations, slices, concatenation, indexing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from math import prod
from types import SimpleNamespace
from typing import Any

import torch
from torch import fx

from weightops.tracing.labels import Axis
from weightops.tracing.rules import (
    RULES,
    Axes,
    Stack,
    Value,
    broadcast,
    dims_of,
    identity,
    replace,
    rule,
)
from weightops.tracing.walk import Walk

#: longest axis that is taken apart into single indices
LONGEST_STACK = 64


def regroup(walk: Walk, axes: Sequence[Axis], shape: Sequence[int]) -> Axes:
    """The axes of a tensor read in another shape."""
    labels = walk.labels
    atoms: Axis = ()
    for atom in labels.atoms(atom for axis in axes for atom in axis):
        # Neighbours that are fixed, or constant, are one: a view may take them apart elsewhere.
        for alike in (labels.is_fixed, labels.is_free):
            if atoms and alike(atoms[-1:]) and alike((atom,)):
                size = labels.size(atoms[-1]) * labels.size(atom)
                reason = labels.reason((atom,))
                joined = labels.fixed(size, reason) if reason else labels.free(size)
                atoms = atoms[:-1] + joined
                break
        else:
            atoms += (atom,)
    result: list[Axis] = []
    for length in shape:
        taken: Axis = ()
        while length > 1:
            atoms = labels.atoms(atoms)
            size = labels.size(atoms[0])
            if length % size == 0:
                taken, atoms, length = (*taken, atoms[0]), atoms[1:], length // size
                continue
            factors = labels.factor(atoms[0], length) if size % length == 0 else None
            if factors is None:
                reason = f"factors {[labels.size(a) for a in taken + atoms]} read as {list(shape)}"
                labels.fix(taken + atoms, reason)
                rest = shape[len(result) :]
                return (*result, *(labels.fixed(n, reason) for n in rest))
            atoms = factors + atoms[1:]
        result.append(taken)
    return tuple(result)


def _source(old: Sequence[int], new: Sequence[int], dim: int) -> int | None:
    """The axis of shape ``old`` whose first factor is axis ``dim`` of its view in shape ``new``."""
    before = prod(new[:dim])
    for position, size in enumerate(old):
        if prod(old[:position]) == before and size > 1 and size % new[dim] == 0:
            return position
    return None


@rule("view", "reshape", "_unsafe_view", "flatten", "unflatten", "view_as", "reshape_as",
      "_reshape_alias")
def _view(walk: Walk, node: fx.Node, args: SimpleNamespace) -> Value:
    labels, source = walk.labels, walk.tensors(node)[0]
    old, new, value = walk.shape(source), walk.shape(node), walk.values[source]
    if isinstance(value, Stack):
        for dim, size in enumerate(new):
            if size == old[value.dim] and _source(old, new, dim) == value.dim:
                parts = []
                for part in value.parts:
                    length = labels.length(labels.atoms(part[value.dim]))
                    parts.append(regroup(walk, part, (*new[:dim], length, *new[dim + 1 :])))
                return Stack(dim, tuple(parts))
    axes = walk.tie(value)
    for dim in range(len(new)):
        lengths = walk.cuts(node, dim, new[dim])
        position = _source(old, new, dim)
        if lengths and position is not None:
            inner = old[position] // new[dim]
            pieces = labels.cut(axes[position], [length * inner for length in lengths])
            return Stack(
                dim,
                tuple(
                    regroup(
                        walk, replace(axes, position, piece), (*new[:dim], length, *new[dim + 1 :])
                    )
                    for piece, length in zip(pieces, lengths, strict=True)
                ),
            )
    return regroup(walk, axes, new)


def _reorder(
    walk: Walk, source: fx.Node, order: Callable[[list[Any]], Sequence[Any]]
) -> Axes | Stack:
    """Apply to axes what an op does to dimensions."""
    value = walk.values[source]
    if isinstance(value, Stack):
        where = list(order([dim == value.dim for dim in range(len(value.parts[0]))]))
        if sum(where) == 1:
            return Stack(where.index(True), tuple(tuple(order(list(p))) for p in value.parts))
    return tuple(order(list(walk.axes(source))))


@rule("permute", "transpose", "t", "numpy_T", "movedim", "swapaxes")
def _permute(walk: Walk, node: fx.Node, args: SimpleNamespace) -> Value:
    order = _order(walk, node)
    return _reorder(walk, walk.tensors(node)[0], lambda axes: [axes[dim] for dim in order])


def _order(walk: Walk, node: fx.Node) -> list[int]:
    """Which dimension of its input each dimension of a permuting op is: a tensor of distinct sizes tells."""
    probe = torch.empty(tuple(range(len(walk.shape(node)))), device="meta")
    assert callable(node.target)
    return list(node.target(probe, *node.args[1:], **node.kwargs).shape)


@rule("unsqueeze")
def _unsqueeze(walk: Walk, node: fx.Node, args: SimpleNamespace) -> Value:
    dim = args.dim % len(walk.shape(node))
    value = walk.values[args.self]
    if isinstance(value, Stack):
        parts = tuple((*part[:dim], (), *part[dim:]) for part in value.parts)
        return Stack(value.dim + (dim <= value.dim), parts)
    axes = walk.axes(args.self)
    return (*axes[:dim], (), *axes[dim:])


@rule("squeeze")
def _squeeze(walk: Walk, node: fx.Node, args: SimpleNamespace) -> Value:
    shape = walk.shape(args.self)
    dims = [d for d in dims_of(getattr(args, "dim", None), len(shape)) if shape[d] == 1]
    return _reorder(
        walk, args.self, lambda axes: [axis for d, axis in enumerate(axes) if d not in dims]
    )


@rule("expand", "expand_as")
def _expand(walk: Walk, node: fx.Node, args: SimpleNamespace) -> Value:
    shape, axes = walk.shape(node), walk.axes(args.self)
    old = (1,) * (len(shape) - len(axes)) + walk.shape(args.self)
    axes = ((),) * (len(shape) - len(axes)) + axes
    return tuple(
        axis if size == length else walk.labels.free(length)
        for axis, size, length in zip(axes, old, shape, strict=True)
    )


@rule("repeat", "tile")
def _repeat(walk: Walk, node: fx.Node, args: SimpleNamespace) -> Value:
    shape, axes = walk.shape(node), walk.axes(args.self)
    lead = len(shape) - len(axes)
    old = (1,) * lead + walk.shape(args.self)
    return tuple(
        walk.labels.free(length // size) + axis
        for axis, size, length in zip(((),) * lead + axes, old, shape, strict=True)
    )


@rule("repeat_interleave.self_int")
def _repeat_interleave(walk: Walk, node: fx.Node, args: SimpleNamespace) -> Value:
    axes = walk.axes(args.self)
    if args.dim is None:
        axes, dim = (tuple(atom for axis in axes for atom in axis),), 0
    else:
        dim = args.dim
    return replace(axes, dim, axes[dim] + walk.labels.free(args.repeats))


def _select(walk: Walk, source: fx.Node, dim: int, index: int) -> Value:
    value, shape = walk.values[source], walk.shape(source)
    dim %= len(shape)
    index %= shape[dim]
    if isinstance(value, Stack):
        if dim != value.dim:
            parts = tuple(replace(part, dim) for part in value.parts)
            for part in value.parts:
                walk.labels.fix(part[dim], "one index of it is read")
            return Stack(value.dim - (dim < value.dim), parts)
        starts = _bounds(walk, value)
        if index in starts and index + 1 in starts:
            return replace(value.parts[starts.index(index)], dim)
    _request(walk, source, dim, (index, index + 1), parameters=True)
    axes = walk.axes(source)
    walk.labels.fix(axes[dim], "one index of it is read")
    return replace(axes, dim)


def _bounds(walk: Walk, stack: Stack) -> list[int]:
    """Where segments begin, and where the last one ends."""
    lengths = [walk.labels.length(walk.labels.atoms(part[stack.dim])) for part in stack.parts]
    return list(accumulate(lengths, initial=0))


def _slice(walk: Walk, source: fx.Node, dim: int, start: int, stop: int) -> Value:
    value, size = walk.values[source], walk.shape(source)[dim]
    if (start, stop) == (0, size):
        return value
    if isinstance(value, Stack) and dim != value.dim:
        lengths = [start, stop - start, size - stop]
        parts = []
        for part in value.parts:
            parts.append(replace(part, dim, walk.labels.cut(part[dim], lengths)[1]))
        return Stack(value.dim, tuple(parts))
    if isinstance(value, Stack):
        bounds = _bounds(walk, value)
        if start in bounds and stop in bounds:
            picked = value.parts[bounds.index(start) : bounds.index(stop)]
            return picked[0] if len(picked) == 1 else Stack(dim, picked)
    _request(walk, source, dim, (start, stop))
    axes = walk.axes(source)
    return replace(axes, dim, walk.labels.cut(axes[dim], [start, stop - start, size - stop])[1])


@rule("select")
def _select_rule(walk: Walk, node: fx.Node, args: SimpleNamespace) -> Value:
    if not isinstance(args.index, int):
        axes = walk.axes(args.self)
        walk.labels.fix(axes[args.dim], "one index of it is read")
        return replace(axes, args.dim)
    return _select(walk, args.self, args.dim, args.index)


@rule("unbind")
def _unbind(walk: Walk, node: fx.Node, args: SimpleNamespace) -> Value:
    size = walk.shape(args.self)[args.dim]
    return [_select(walk, args.self, args.dim, index) for index in range(size)]


@rule("slice", "narrow")
def _slice_rule(walk: Walk, node: fx.Node, args: SimpleNamespace) -> Value:
    shape = walk.shape(args.self)
    dim, length = args.dim % len(shape), walk.shape(node)[args.dim]
    start = 0 if args.start is None else args.start
    if getattr(args, "step", 1) != 1 or not isinstance(start, int):
        axes = walk.axes(args.self)
        walk.labels.fix(axes[dim], "sliced with a step")
        return replace(axes, dim, walk.labels.fixed(length, "sliced with a step"))
    start = min(max(start + shape[dim] if start < 0 else start, 0), shape[dim])
    return _slice(walk, args.self, dim, start, start + length)


@rule("split", "split_with_sizes", "chunk", "tensor_split", "unsafe_split", "unsafe_chunk",
      "unsafe_split_with_sizes")
def _split(walk: Walk, node: fx.Node, args: SimpleNamespace) -> Value:
    dim = args.dim % len(walk.shape(args.self))
    bounds = accumulate((walk.shape_of(part)[dim] for part in node.meta["val"]), initial=0)
    return [_slice(walk, args.self, dim, *bound) for bound in pairwise(bounds)]


@rule("cat", "concat", "concatenate")
def _cat(walk: Walk, node: fx.Node, args: SimpleNamespace) -> Value:
    tensors = [each for each in args.tensors if walk.shape(each) != (0,)]
    rank = len(walk.shape(node))
    return _join(walk, [walk.axes(each) for each in tensors], args.dim % rank)


def _join(walk: Walk, parts: Sequence[Axes], dim: int) -> Axes:
    others = broadcast(walk, len(parts[0]), [replace(axes, dim, ()) for axes in parts])
    return replace(others, dim, walk.labels.join([axes[dim] for axes in parts]))


@rule("stack")
def _stack(walk: Walk, node: fx.Node, args: SimpleNamespace) -> Value:
    dim = args.dim % len(walk.shape(node))
    axes = [walk.axes(each) for each in args.tensors]
    return _join(walk, [(*each[:dim], (), *each[dim:]) for each in axes], dim)


@rule("constant_pad_nd", "pad", "reflection_pad1d", "reflection_pad2d", "reflection_pad3d",
      "replication_pad1d", "replication_pad2d", "replication_pad3d")
def _pad(walk: Walk, node: fx.Node, args: SimpleNamespace) -> Value:
    labels, axes = walk.labels, list(walk.axes(args.self))
    pad = getattr(args, "pad", getattr(args, "padding", None))
    constant = walk.name(node) == "constant_pad_nd" or getattr(args, "mode", "") == "constant"
    for position in range(len(pad) // 2):
        dim = len(axes) - 1 - position
        before, after = pad[2 * position : 2 * position + 2]
        if before == after == 0:
            continue
        if not constant:
            labels.fix(axes[dim], "padded with its own entries")
            axes[dim] = labels.fixed(walk.shape(node)[dim], "padded with its own entries")
            continue
        size = walk.shape(args.self)[dim]
        lengths = [max(-before, 0), size + min(before, 0) + min(after, 0), max(-after, 0)]
        kept = labels.cut(axes[dim], lengths)[1] if min(before, after) < 0 else axes[dim]
        added = [labels.free(n) if n != 1 else labels.fixed(1, "") for n in (before, after)]
        ends = [[end] if n > 0 else [] for end, n in zip(added, (before, after), strict=True)]
        axes[dim] = labels.join([*ends[0], kept, *ends[1]])
    return tuple(axes)


@rule("slice_scatter", "select_scatter")
def _slice_scatter(walk: Walk, node: fx.Node, args: SimpleNamespace) -> Value:
    axes, src = walk.axes(args.self), walk.axes(args.src)
    dim = args.dim % len(axes)
    if walk.name(node) == "select_scatter" or args.step != 1:
        walk.labels.fix(axes[dim], "written to in places")
        src = (*src[:dim], (), *src[dim + (walk.name(node) == "slice_scatter") :])
        return broadcast(walk, len(axes), [axes, src])
    size, length = walk.shape(args.self)[dim], walk.shape(args.src)[dim]
    start = min(max((args.start or 0) + (size if (args.start or 0) < 0 else 0), 0), size)
    pieces = walk.labels.cut(axes[dim], [start, length, size - start - length])
    parts = [replace(axes, dim, pieces[0]), src, replace(axes, dim, pieces[2])]
    lengths = [start, length, size - start - length]
    return _join(walk, [part for part, n in zip(parts, lengths, strict=True) if n], dim)


@rule("pixel_shuffle", "pixel_unshuffle")
def _pixel_shuffle(walk: Walk, node: fx.Node, args: SimpleNamespace) -> Value:
    axes, shape = walk.axes(args.self), walk.shape(args.self)
    lead, (c, h, w) = shape[:-3], shape[-3:]
    if walk.name(node) == "pixel_shuffle":
        r = args.upscale_factor
        split, order = (c // r**2, r, r, h, w), (0, 3, 1, 4, 2)
    else:
        r = args.downscale_factor
        split, order = (c, h // r, r, w // r, r), (0, 2, 4, 1, 3)
    taken = regroup(walk, axes, lead + split)
    moved = taken[: len(lead)] + tuple(taken[len(lead) + dim] for dim in order)
    return regroup(walk, moved, walk.shape(node))


@rule("channel_shuffle", "native_channel_shuffle")
def _channel_shuffle(walk: Walk, node: fx.Node, args: SimpleNamespace) -> Value:
    shape = walk.shape(args.self)
    split = (shape[0], args.groups, shape[1] // args.groups, *shape[2:])
    taken = regroup(walk, walk.axes(args.self), split)
    return regroup(walk, (taken[0], taken[2], taken[1], *taken[3:]), shape)


@rule("view_as_complex", "view_as_real")
def _complex(walk: Walk, node: fx.Node, args: SimpleNamespace) -> Value:
    axes, reason = walk.axes(args.self), "real and imaginary parts"
    if walk.name(node) == "view_as_real":
        return (*axes, walk.labels.fixed(2, reason))
    walk.labels.fix(axes[-1], reason)
    return axes[:-1]


def _request(
    walk: Walk, node: fx.Node, dim: int, bounds: Sequence[int], parameters: bool = False
) -> None:
    """Ask for the next walk to see an axis as a stack, cut at ``bounds``, where a view made it."""
    made = _trace_back(walk, node, dim)
    if made and (parameters or made[0].op != "placeholder"):
        walk.decisions.setdefault(made, set()).update(bounds)


def _trace_back(walk: Walk, node: fx.Node, dim: int) -> tuple[fx.Node, int] | None:
    """The view, or the parameter, that made an axis of ``node``, with its position there."""
    while True:
        size = walk.shape(node)[dim]
        if size > LONGEST_STACK:
            return None
        if node.op == "placeholder":
            return (node, dim) if walk.is_parameter(node) else None
        rule_ = walk.rule(node)
        if rule_ is RULES["view"]:
            source = walk.tensors(node)[0]
            old = walk.shape(source)
            position = _source(old, walk.shape(node), dim)
            if position is None:
                return None
            if old[position] > size:
                fixed = walk.labels.is_fixed(walk.axes(source)[position])
                return None if fixed else (node, dim)
            node, dim = source, position
        elif rule_ is RULES["permute"]:
            node, dim = walk.tensors(node)[0], _order(walk, node)[dim]
        elif rule_ is RULES["unsqueeze"]:
            at = node.args[1] % len(walk.shape(node))  # type: ignore[operator]
            node, dim = walk.tensors(node)[0], dim - (at < dim)
        elif rule_ is RULES["squeeze"]:
            source = walk.tensors(node)[0]
            shape = walk.shape(source)
            given = node.args[1] if len(node.args) > 1 else None
            dims = [d for d in dims_of(given, len(shape)) if shape[d] == 1]
            node, dim = source, [d for d in range(len(shape)) if d not in dims][dim]
        elif rule_ is identity:
            node = walk.tensors(node)[0]
        else:
            return None
