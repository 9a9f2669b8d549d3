"""Rules of ops with weights: linear maps, convolutions, norms, attention, recurrent layers, lookups."""

from __future__ import annotations

import re
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
    elementwise,
    replace,
    rule,
)
from weightops.tracing.walk import Walk


@rule("linear")
def _linear(walk: Walk, node: fx.Node, args: SimpleNamespace) -> Value:
    x, weight = walk.axes(args.input), walk.axes(args.weight)
    walk.labels.unite(x[-1], weight[-1])
    out = (*x[:-1], *weight[:-1])
    return out if args.bias is None else broadcast(walk, len(out), [out, walk.axes(args.bias)])


def _product(walk: Walk, x: Axes, y: Axes) -> Axes:
    """A matrix product, with leading axes broadcast."""
    lead_x, lead_y = x[:-2], (y[:-2] if len(y) > 1 else ())
    walk.labels.unite(x[-1], y[-2] if len(y) > 1 else y[-1])
    lead = broadcast(walk, max(len(lead_x), len(lead_y)), [lead_x, lead_y])
    return (*lead, *x[-2:-1], *(y[-1:] if len(y) > 1 else ()))


@rule("mm", "bmm", "mv", "dot", "vdot", "matmul", "inner")
def _matmul(walk: Walk, node: fx.Node, args: SimpleNamespace) -> Value:
    x, y = map(walk.axes, walk.tensors(node))
    return _product(walk, x, y)


@rule("addmm", "baddbmm", "addmv", "addbmm")
def _addmm(walk: Walk, node: fx.Node, args: SimpleNamespace) -> Value:
    bias, x, y = map(walk.axes, walk.tensors(node))
    out = _product(walk, x, y)
    if walk.name(node) == "addbmm":
        out = out[1:]
    return broadcast(walk, len(out), [bias, out])


@rule("einsum")
def _einsum(walk: Walk, node: fx.Node, args: SimpleNamespace) -> Value:
    operands = [walk.axes(each) for each in args.tensors]
    inputs, _, output = args.equation.replace(" ", "").partition("->")
    written = inputs.split(",")
    if "->" not in args.equation:
        letters = inputs.replace(",", "").replace("...", "")
        output = "..." if "..." in inputs else ""
        output += "".join(each for each in sorted(set(letters)) if letters.count(each) == 1)
    known: dict[str, Axis] = {}
    widest = max(
        len(axes) - len(term.replace("...", "")) for term, axes in zip(written, operands, strict=True)
    )

    def names(term: str, rank: int) -> list[str]:
        # An ellipsis stands for axes that are counted from its end.
        count = rank - len(term.replace("...", ""))
        middle = [f"...{i}" for i in range(widest - count, widest)]
        head, dots, tail = term.partition("...")
        return [*head, *(middle if dots else []), *tail]

    for term, axes in zip(written, operands, strict=True):
        for name, axis in zip(names(term, len(axes)), axes, strict=True):
            if walk.labels.atoms(axis):
                known[name] = walk.labels.meet(known[name], axis) if known.get(name) else axis
    return tuple(known.get(name, ()) for name in names(output, len(walk.shape(node))))


@rule("bilinear")
def _bilinear(walk: Walk, node: fx.Node, args: SimpleNamespace) -> Value:
    x, y, weight = walk.axes(args.input1), walk.axes(args.input2), walk.axes(args.weight)
    walk.labels.unite(x[-1], weight[1])
    walk.labels.unite(y[-1], weight[2])
    out = (*broadcast(walk, len(x) - 1, [x[:-1], y[:-1]]), weight[0])
    return out if args.bias is None else broadcast(walk, len(out), [out, walk.axes(args.bias)])


def _ints(value: Any, count: int) -> list[int]:
    given = list(value) if isinstance(value, (list, tuple)) else [value]
    return given * count if len(given) == 1 else given


@rule("conv1d", "conv2d", "conv3d", "convolution", "conv_transpose1d", "conv_transpose2d",
      "conv_transpose3d")
def _convolution(walk: Walk, node: fx.Node, args: SimpleNamespace) -> Value:
    labels = walk.labels
    x, weight = walk.axes(args.input), walk.axes(args.weight)
    kernel = walk.shape(args.weight)[2:]
    lead = len(x) - len(kernel) - 1
    transposed = "transpose" in walk.name(node) or getattr(args, "transposed", False)
    for axis in weight[2:]:
        labels.fix(axis, "a kernel")
    into, groups = x[lead], args.groups
    channels = walk.shape(args.input)[lead]
    if transposed:
        labels.unite(into, weight[0])
        out = weight[1]
        if groups > 1:
            group = labels.new(groups)
            labels.unite(weight[0], group + labels.new(channels // groups))
            out = group + out
    elif groups == 1:
        labels.unite(into, weight[1])
        out = weight[0]
    else:
        # Groups permute as wholes; channels within one as in every other.
        group, outputs = labels.new(groups), walk.shape(args.weight)[0] // groups
        labels.unite(into, group + weight[1])
        labels.unite(weight[0], group + labels.new(outputs))
        out = weight[0]
    if args.bias is not None:
        labels.unite(out, walk.axes(args.bias)[0])
    if _is_pointwise(args, kernel):
        return (*x[:lead], out, *x[lead + 1 :])
    return (*x[:lead], out, *_slide(walk, node, x[lead + 1 :], "a convolution slides over it"))


def _is_pointwise(args: SimpleNamespace, kernel: tuple[int, ...]) -> bool:
    padding = 0 if isinstance(args.padding, str) else args.padding
    return (
        set(kernel) | set(_ints(args.stride, 1)) == {1}
        and set(_ints(padding, 1)) | set(_ints(getattr(args, "output_padding", 0), 1)) == {0}
    )


def _slide(walk: Walk, node: fx.Node, spatial: Axes, reason: str) -> Axes:
    for axis in spatial:
        walk.labels.fix(axis, reason)
    value = node.meta["val"]
    shape = walk.shape_of(value[0] if isinstance(value, (tuple, list)) else value)
    return tuple(walk.labels.fixed(n, reason) for n in shape[len(shape) - len(spatial) :])


def _pool(walk: Walk, node: fx.Node, args: SimpleNamespace) -> Value:
    match = re.search(r"([123])d", walk.name(node))
    assert match
    axes, count = walk.axes(walk.tensors(node)[0]), int(match[1])
    out = (*axes[:-count], *_slide(walk, node, axes[-count:], "pooled or resized"))
    value = node.meta["val"]
    return [out for _ in value] if isinstance(value, (tuple, list)) else out


for _kind in ("max_pool", "avg_pool", "adaptive_max_pool", "adaptive_avg_pool",
              "_adaptive_avg_pool", "fractional_max_pool", "upsample_nearest", "_upsample_nearest_exact",
              "upsample_linear", "upsample_bilinear", "upsample_bicubic", "upsample_trilinear"):
    for _count in "123":
        for _suffix in ("", "_with_indices", "_aa"):
            RULES[f"{'_' if _suffix == '_aa' else ''}{_kind}{_count}d{_suffix}"] = _pool


@rule("im2col")
def _im2col(walk: Walk, node: fx.Node, args: SimpleNamespace) -> Value:
    x, reason = walk.axes(args.self), "patches are taken from it"
    for axis in x[-2:]:
        walk.labels.fix(axis, reason)
    taps = walk.labels.fixed(prod(_ints(args.kernel_size, 2)), reason)
    return (*x[:-3], x[-3] + taps, walk.labels.fixed(walk.shape(node)[-1], reason))


def _normalize(walk: Walk, node: fx.Node, x: Axes, channel: int, *vectors: Any) -> Value:
    for vector in vectors:
        if vector is not None:
            walk.labels.unite(x[channel], walk.axes(vector)[0])
    value = node.meta["val"]
    if not isinstance(value, (tuple, list)):
        return x
    return [x, *(tuple(walk.labels.fixed(n, "statistics") for n in walk.shape_of(v)) for v in value[1:])]


@rule("batch_norm", "instance_norm", "_native_batch_norm_legit_no_training", "native_batch_norm",
      "_batch_norm_no_update", "_native_batch_norm_legit", "cudnn_batch_norm")
def _batch_norm(walk: Walk, node: fx.Node, args: SimpleNamespace) -> Value:
    vectors = (getattr(args, each, None) for each in ("weight", "bias", "running_mean", "running_var"))
    return _normalize(walk, node, walk.axes(args.input), 1, *vectors)


@rule("group_norm", "native_group_norm")
def _group_norm(walk: Walk, node: fx.Node, args: SimpleNamespace) -> Value:
    x, channels = walk.axes(args.input), walk.shape(args.input)[1]
    groups = getattr(args, "num_groups", getattr(args, "group", None))
    walk.labels.unite(x[1], walk.labels.new(groups) + walk.labels.new(channels // groups))
    return _normalize(walk, node, x, 1, args.weight, args.bias)


@rule("layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm")
def _layer_norm(walk: Walk, node: fx.Node, args: SimpleNamespace) -> Value:
    x = walk.axes(args.input)
    vectors = [args.weight, getattr(args, "bias", None)]
    given = [walk.axes(each) for each in vectors if each is not None]
    x = broadcast(walk, len(x), [x, *given])
    value = node.meta["val"]
    if not isinstance(value, (tuple, list)):
        return x
    lead = x[: len(x) - len(args.normalized_shape)]
    statistics = (*lead, *[()] * len(args.normalized_shape))
    return [x, *[statistics] * (len(value) - 1)]


@rule("_weight_norm", "_weight_norm_interface")
def _weight_norm(walk: Walk, node: fx.Node, args: SimpleNamespace) -> Value:
    direction = walk.axes(args.v)
    weight = broadcast(walk, len(direction), [direction, walk.axes(args.g)])
    several = isinstance(node.meta["val"], (tuple, list))
    return [weight, walk.axes(args.g)] if several else weight


@rule("scaled_dot_product_attention")
def _attention(walk: Walk, node: fx.Node, args: SimpleNamespace) -> Value:
    """Scores over queries and keys, which permute too unless a mask tells positions apart."""
    labels = walk.labels
    query, key, value = map(walk.axes, (args.query, args.key, args.value))
    if args.enable_gqa:
        heads, shared = walk.shape(args.query)[-3], walk.shape(args.key)[-3]
        repeat = labels.free(heads // shared)
        key, value = replace(key, -3, key[-3] + repeat), replace(value, -3, value[-3] + repeat)
    labels.unite(query[-1], key[-1])
    labels.unite(key[-2], value[-2])
    lead = broadcast(walk, len(query) - 2, [query[:-2], key[:-2], value[:-2]])
    scores = (*lead, query[-2], key[-2])
    if args.is_causal:
        for axis in scores[-2:]:
            labels.fix(axis, "a causal mask")
    if args.attn_mask is not None:
        scores = broadcast(walk, len(scores), [scores, walk.axes(args.attn_mask)])
    return (*scores[:-1], value[-1])


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


@rule("lstm.input", "gru.input", "rnn_tanh.input", "rnn_relu.input")
def _recurrent(walk: Walk, node: fx.Node, args: SimpleNamespace) -> Value:
    """Gates are a product ``(None, h)``; what is fed back carries the hidden label again."""
    labels, name = walk.labels, walk.name(node)
    states = args.hx if name == "lstm" else [args.hx]
    directions = 2 if args.bidirectional else 1
    cells = args.num_layers * directions
    per_cell = len(args.params) // cells
    gates = {"lstm": 4, "gru": 3}.get(name, 1)
    x = walk.axes(args.input)
    initial = [walk.axes(state) for state in states]
    feature, hidden, memory = x[-1], [], []
    for layer in range(args.num_layers):
        outputs = []
        for cell in range(layer * directions, (layer + 1) * directions):
            params = args.params[cell * per_cell : (cell + 1) * per_cell]
            w_in, w_hidden = walk.axes(params[0]), walk.axes(params[1])
            unit = labels.new(walk.shape(params[0])[0] // gates)
            out = unit
            projected = per_cell in (3, 5)
            biases = params[2 : 2 + 2 * args.has_biases]
            for each in (params[0], params[1], *biases):
                gate = labels.fixed(gates, "gates")
                labels.unite(walk.axes(each)[0], gate + unit)
            if projected:
                projection = walk.axes(params[-1])
                labels.unite(projection[1], unit)
                out = projection[0]
            labels.unite(w_in[1], feature)
            labels.unite(w_hidden[1], out)
            labels.unite(initial[0][-1], out)
            if len(initial) > 1:
                labels.unite(initial[1][-1], unit)
            outputs.append(out)
            hidden.append(out)
            memory.append(unit)
        feature = labels.join(outputs)
    batch = x[0 if args.batch_first else 1]
    time = x[1 if args.batch_first else 0]
    labels.fix(time, "time")

    def stacked(units: list[Axis]) -> Axes | Stack:
        parts = tuple(((), batch, unit) for unit in units)
        return parts[0] if len(parts) == 1 else Stack(0, parts)

    states_out = [stacked(hidden), *([stacked(memory)] if name == "lstm" else [])]
    return [(*x[:-1], feature), *states_out]


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
    return replace(
        axes, args.dim, walk.labels.fixed(walk.shape(node)[args.dim], "indexed")
    )


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


@rule("add", "mul", "sub", "div")
def _arithmetic(walk: Walk, node: fx.Node, args: SimpleNamespace) -> Value:
    return elementwise(walk, node, args)
