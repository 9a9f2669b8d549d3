"""Rules of ops that only move, split, join or pick: views, permutations, slices, concatenation, indexing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from types import SimpleNamespace
from typing import Any

import torch
from torch import fx

from weightops.tracing.labels import Axis
from weightops.tracing.rules import (
    Axes,
    Stack,
    Value,
    dims_of,
    replace,
    rule,
)
from weightops.tracing.walk import Walk


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
                unlike = f"factors {[labels.size(a) for a in taken + atoms]} read as {list(shape)}"
                labels.fix(taken + atoms, unlike)
                rest = shape[len(result) :]
                return (*result, *(labels.fixed(n, unlike) for n in rest))
            atoms = factors + atoms[1:]
        result.append(taken)
    return tuple(result)


def source_of(old: Sequence[int], new: Sequence[int], dim: int) -> int | None:
    """The axis of shape ``old`` whose first factor is axis ``dim`` of its view in shape ``new``."""
    before = prod(new[:dim])
    for position, size in enumerate(old):
        if prod(old[:position]) == before and size > 1 and size % new[dim] == 0:
            return position
    return None


@rule(
    "view",
    "reshape",
    "_unsafe_view",
    "flatten",
    "unflatten",
    "view_as",
    "reshape_as",
    "_reshape_alias",
)
def _view(walk: Walk, node: fx.Node, args: SimpleNamespace) -> Value:
    labels, source = walk.labels, walk.tensors(node)[0]
    old, new, value = walk.shape(source), walk.shape(node), walk.values[source]
    if isinstance(value, Stack):
        for dim, size in enumerate(new):
            if size == old[value.dim] and source_of(old, new, dim) == value.dim:
                parts = []
                for part in value.parts:
                    length = labels.length(labels.atoms(part[value.dim]))
                    parts.append(regroup(walk, part, (*new[:dim], length, *new[dim + 1 :])))
                return Stack(dim, tuple(parts))
    axes = walk.tie(value)
    for dim in range(len(new)):
        lengths = walk.cuts(node, dim, new[dim])
        position = source_of(old, new, dim)
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
    order = order_of(walk, node)
    return _reorder(walk, walk.tensors(node)[0], lambda axes: [axes[dim] for dim in order])


def order_of(walk: Walk, node: fx.Node) -> list[int]:
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
