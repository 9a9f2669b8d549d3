"""Rules of ops that read and write by index: embeddings, indexing, gather and scatter."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import fx

from weightops.tracing.labels import Axis
from weightops.tracing.rules import Axes, Value, broadcast, dims_of, replace, rule
from weightops.tracing.walk import Walk


@rule("embedding")
def _embedding(walk: Walk, node: fx.Node, args: SimpleNamespace) -> Value:
    weight = walk.axes(args.weight)
    walk.labels.fix(weight[0], "looked up by index")
    return (*walk.axes(args.indices), *weight[1:])


@rule("embedding_bag")
def _embedding_bag(walk: Walk, node: fx.Node, args: SimpleNamespace) -> Value:
    weight = walk.axes(args.weight)
    walk.labels.fix(weight[0], "looked up by index")
    bag, *others = node.meta["val"]
    fixed = [[walk.labels.fixed(n, "bags") for n in walk.shape_of(v)] for v in (bag, *others)]
    return [(fixed[0][0], weight[1]), *map(tuple, fixed[1:])]


@rule("index", "_unsafe_index")
def _index(walk: Walk, node: fx.Node, args: SimpleNamespace) -> Value:
    taken = _indexed(walk, args.self, args.indices)
    if taken is None:
        return tuple(walk.labels.fixed(n, "indexed with a mask") for n in walk.shape(node))
    return taken


def _indexed(walk: Walk, tensor: fx.Node, indices: Any) -> Axes | None:
    """Axes of ``tensor[indices]``, where what is indexed is fixed; ``None`` if a mask does it."""
    axes = walk.axes(tensor)
    dims = [dim for dim, index in enumerate(indices) if index is not None]
    if any(_is_mask(indices[dim]) for dim in dims):
        # A mask takes several axes at once, and how many entries are left depends on data.
        for axis in axes:
            walk.labels.fix(axis, "indexed with a mask")
        return None
    for dim in dims:
        walk.labels.fix(axes[dim], "indexed")
    places = [walk.axes(indices[dim]) for dim in dims]
    index = broadcast(walk, max(map(len, places), default=0), places)
    kept = [axis for dim, axis in enumerate(axes) if dim not in dims]
    at = dims[0] if dims == list(range(dims[0], dims[-1] + 1)) else 0
    return (*kept[:at], *index, *kept[at:])


def _is_mask(index: fx.Node) -> bool:
    return index.meta["val"].dtype in (torch.bool, torch.uint8)


@rule("index_put", "_unsafe_index_put")
def _index_put(walk: Walk, node: fx.Node, args: SimpleNamespace) -> Value:
    taken, written = _indexed(walk, args.self, args.indices), walk.axes(args.values)
    if taken is None:
        for axis in written:
            walk.labels.fix(axis, "written with a mask")
    else:
        broadcast(walk, len(taken), [taken, written])
    return walk.axes(args.self)


@rule("index_select", "index_add", "index_copy", "index_fill")
def _index_dim(walk: Walk, node: fx.Node, args: SimpleNamespace) -> Value:
    axes = walk.axes(args.self)
    walk.labels.fix(axes[args.dim], "indexed")
    source = getattr(args, "source", None)
    if isinstance(source, fx.Node):
        src = walk.axes(source)
        walk.labels.fix(src[args.dim], "indexed")
        axes = broadcast(walk, len(axes), [replace(axes, args.dim, ()), replace(src, args.dim, ())])
    return replace(axes, args.dim, walk.labels.fixed(walk.shape(node)[args.dim], "indexed"))


@rule("gather", "scatter", "scatter_add", "scatter_reduce")
def _gather(walk: Walk, node: fx.Node, args: SimpleNamespace) -> Value:
    """Indexed along one axis; elementwise along the others, where tensors are equally long."""
    tensors = walk.tensors(node)
    rank = max(len(walk.shape(tensor)) for tensor in tensors)
    [dim] = dims_of([args.dim], rank)
    result: list[Axis] = []
    for position in range(rank):
        sizes = {walk.shape(tensor)[position] for tensor in tensors}
        columns = [walk.axes(tensor)[position] for tensor in tensors]
        if position == dim:
            moved = columns if walk.name(node) != "gather" else columns[:1]
            for axis in moved:
                walk.labels.fix(axis, "indexed")
            result.append(walk.labels.fixed(walk.shape(node)[dim], "indexed"))
        elif len(sizes) > 1:
            for axis in columns:
                walk.labels.fix(axis, "indexed in part")
            result.append(walk.labels.fixed(walk.shape(node)[position], "indexed in part"))
        else:
            result += broadcast(walk, 1, [(axis,) for axis in columns])
    return tuple(result)
