"""Rules of ops that put tensors side by side: concatenation, padding, writing into a slice."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

from torch import fx

from weightops.tracing.rules import Axes, Value, broadcast, replace, rule
from weightops.tracing.walk import Walk


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


@rule(
    "constant_pad_nd",
    "pad",
    "reflection_pad1d",
    "reflection_pad2d",
    "reflection_pad3d",
    "replication_pad1d",
    "replication_pad2d",
    "replication_pad3d",
)
def _pad(walk: Walk, node: fx.Node, args: SimpleNamespace) -> Value:
    labels, axes = walk.labels, list(walk.axes(args.self))
    pad = args.pad if hasattr(args, "pad") else args.padding
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
