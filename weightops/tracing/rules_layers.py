"""Rules of ops with weights: linear maps, convolutions, norms, attention, recurrent layers, lookups."""

from __future__ import annotations

import re
from math import prod
from types import SimpleNamespace
from typing import Any

from torch import fx

from weightops.tracing.labels import Axis
from weightops.tracing.rules import (
    RULES,
    Axes,
    Value,
    broadcast,
    elementwise,
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
        len(axes) - len(term.replace("...", ""))
        for term, axes in zip(written, operands, strict=True)
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


@rule(
    "conv1d",
    "conv2d",
    "conv3d",
    "convolution",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
)
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
    return set(kernel) | set(_ints(args.stride, 1)) == {1} and set(_ints(padding, 1)) | set(
        _ints(getattr(args, "output_padding", 0), 1)
    ) == {0}


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


for _kind in (
    "max_pool",
    "avg_pool",
    "adaptive_max_pool",
    "adaptive_avg_pool",
    "_adaptive_avg_pool",
    "fractional_max_pool",
    "upsample_nearest",
    "_upsample_nearest_exact",
    "upsample_linear",
    "upsample_bilinear",
    "upsample_bicubic",
    "upsample_trilinear",
):
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
    return [
        x,
        *(tuple(walk.labels.fixed(n, "statistics") for n in walk.shape_of(v)) for v in value[1:]),
    ]


@rule(
    "batch_norm",
    "instance_norm",
    "_native_batch_norm_legit_no_training",
    "native_batch_norm",
    "_batch_norm_no_update",
    "_native_batch_norm_legit",
    "cudnn_batch_norm",
)
def _batch_norm(walk: Walk, node: fx.Node, args: SimpleNamespace) -> Value:
    vectors = (
        getattr(args, each, None) for each in ("weight", "bias", "running_mean", "running_var")
    )
    return _normalize(walk, node, walk.axes(args.input), 1, *vectors)


@rule("group_norm", "native_group_norm")
def _group_norm(walk: Walk, node: fx.Node, args: SimpleNamespace) -> Value:
    x, channels = walk.axes(args.input), walk.shape(args.input)[1]
    groups = args.num_groups if hasattr(args, "num_groups") else args.group
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


@rule("add", "mul", "sub", "div")
def _arithmetic(walk: Walk, node: fx.Node, args: SimpleNamespace) -> Value:
    return elementwise(walk, node, args)
