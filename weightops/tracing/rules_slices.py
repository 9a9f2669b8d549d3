"""Rules of ops that pick along an axis: select, slice, split."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from types import SimpleNamespace

from torch import fx

from weightops.tracing.rules import RULES, Stack, Value, dims_of, identity, replace, rule
from weightops.tracing.rules_views import order_of, source_of
from weightops.tracing.walk import Walk, bind

#: longest axis that is taken apart into single indices
LONGEST_STACK = 64


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
        return Stack(
            value.dim,
            tuple(
                replace(part, dim, walk.labels.cut(part[dim], lengths)[1]) for part in value.parts
            ),
        )
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


@rule(
    "split",
    "split_with_sizes",
    "chunk",
    "tensor_split",
    "unsafe_split",
    "unsafe_chunk",
    "unsafe_split_with_sizes",
)
def _split(walk: Walk, node: fx.Node, args: SimpleNamespace) -> Value:
    dim = args.dim % len(walk.shape(args.self))
    bounds = accumulate((walk.shape_of(part)[dim] for part in node.meta["val"]), initial=0)
    return [_slice(walk, args.self, dim, *bound) for bound in pairwise(bounds)]


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
            position = source_of(old, walk.shape(node), dim)
            if position is None:
                return None
            if old[position] > size:
                fixed = walk.labels.is_fixed(walk.axes(source)[position])
                return None if fixed else (node, dim)
            node, dim = source, position
        elif rule_ is RULES["permute"]:
            node, dim = walk.tensors(node)[0], order_of(walk, node)[dim]
        elif rule_ is RULES["unsqueeze"]:
            at = bind(node).dim % len(walk.shape(node))
            node, dim = walk.tensors(node)[0], dim - (at < dim)
        elif rule_ is RULES["squeeze"]:
            source = walk.tensors(node)[0]
            shape = walk.shape(source)
            given = dims_of(getattr(bind(node), "dim", None), len(shape))
            kept = [d for d in range(len(shape)) if d not in given or shape[d] != 1]
            node, dim = source, kept[dim]
        elif rule_ is identity:
            node = walk.tensors(node)[0]
        else:
            return None
