"""Reads the axes, shapes and label sizes that a WeightSpec is given, and refuses what can't be one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, TypeAlias

import torch

from weightops import _check

#: a label, a product of labels and fixed factors, or ``None`` for a fixed axis
Axis: TypeAlias = str | tuple[str | None, ...] | None


def read_tensors(
    axes: Any, shapes: Any
) -> tuple[dict[str, tuple[Axis, ...]], dict[str, torch.Size]]:
    for name, value in (("axes", axes), ("shapes", shapes)):
        if not isinstance(value, Mapping):
            raise TypeError(
                f"WeightSpec: {name} must map tensor names, not {_check.describe(value)}"
            )
        for key in value:
            if not isinstance(key, str):
                raise TypeError(
                    f"WeightSpec: {name} must map tensor names, but has {_check.describe(key)}"
                )
    for name in axes.keys() ^ shapes.keys():
        has, lacks = ("axes", "shapes") if name in axes else ("shapes", "axes")
        raise ValueError(f"WeightSpec: {name!r} is in {has}, but not in {lacks}")
    checked_axes = {name: read_axes(name, axes[name]) for name in axes}
    checked_shapes = {name: read_shape(name, shapes[name]) for name in axes}
    for name, shape in checked_shapes.items():
        if len(shape) != len(checked_axes[name]):
            raise ValueError(
                f"WeightSpec: {name} has shape {list(shape)}, but axes gives it "
                f"{len(checked_axes[name])} entries {checked_axes[name]}"
            )
    return checked_axes, checked_shapes


def read_axes(name: str, entries: Any) -> tuple[Axis, ...]:
    if isinstance(entries, str) or not isinstance(entries, Sequence):
        raise TypeError(
            f"WeightSpec: axes[{name!r}] must be a tuple with one entry per axis, "
            f"not {_check.describe(entries)}"
        )
    for axis, entry in enumerate(entries):
        product = isinstance(entry, tuple) and all(f is None or isinstance(f, str) for f in entry)
        if not (entry is None or isinstance(entry, str) or product):
            raise TypeError(
                f"WeightSpec: axes[{name!r}][{axis}] must be a label, a tuple of labels or None, "
                f"not {_check.describe(entry)}"
            )
        if isinstance(entry, tuple) and (len(entry) < 2 or entry.count(None) > 1):
            raise ValueError(
                f"WeightSpec: axes[{name!r}][{axis}] is {entry}: a product has two factors or more, "
                "at most one of them None"
            )
    return tuple(entries)


def read_shape(name: str, shape: Any) -> torch.Size:
    if isinstance(shape, str) or not isinstance(shape, Sequence):
        raise TypeError(
            f"WeightSpec: shapes[{name!r}] must be a shape, not {_check.describe(shape)}"
        )
    for axis, length in enumerate(shape):
        if isinstance(length, bool) or not isinstance(length, int):
            raise TypeError(
                f"WeightSpec: shapes[{name!r}][{axis}] must be an integer, "
                f"not {_check.describe(length)}"
            )
        if length < 0:
            raise ValueError(
                f"WeightSpec: shapes[{name!r}][{axis}] must be at least 0, not {length}"
            )
        if length >= 2**63:
            raise ValueError(
                f"WeightSpec: shapes[{name!r}][{axis}] must be below 2^63, not {length}"
            )
    return torch.Size(shape)


def read_labels(
    axes: Mapping[str, tuple[Axis, ...]],
    shapes: Mapping[str, torch.Size],
    given: Mapping[str, int],
) -> dict[str, int]:
    order: dict[str, None] = {}
    where: dict[str, str] = {}
    sizes: dict[str, int] = {}

    def settle(label: str, size: int, place: str) -> None:
        if sizes.setdefault(label, size) != size:
            raise ValueError(
                f"WeightSpec: label {label!r} has size {sizes[label]} at {where[label]}, "
                f"but {size} at {place}"
            )
        where.setdefault(label, place)

    products: list[tuple[tuple[str | None, ...], int, str]] = []
    for name, entries in axes.items():
        for axis, entry in enumerate(entries):
            place, length = f"{name} axis {axis}", shapes[name][axis]
            if isinstance(entry, str):
                order[entry] = None
                settle(entry, length, place)
            elif entry is not None:
                order |= dict.fromkeys(label for label in entry if label is not None)
                products.append((entry, length, place))
    if not isinstance(given, Mapping):
        raise TypeError(f"WeightSpec: sizes must map labels, not {_check.describe(given)}")
    for label, size in given.items():
        if label not in order:
            raise ValueError(f"WeightSpec: sizes has label {label!r}, axes has {list(order)}")
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(
                f"WeightSpec: sizes[{label!r}] must be an integer, not {_check.describe(size)}"
            )
        if size < 0:
            raise ValueError(f"WeightSpec: sizes[{label!r}] must be at least 0, not {size}")
        settle(label, size, "sizes")

    # A product with a single unknown factor tells that factor; repeat until none does.
    waiting = products
    while waiting:
        later = []
        for entry, length, place in waiting:
            missing = [label for label in entry if label not in sizes]
            if len(missing) > 1:
                later.append((entry, length, place))
                continue
            known = prod(sizes[label] for label in entry if label in sizes and label is not None)
            if (known == 0 or length % known) if missing else length != known:
                raise ValueError(
                    f"WeightSpec: {place} has length {length}, but its factors {entry} make "
                    f"{known}{' times something' if missing else ''}"
                )
            if missing and missing[0] is not None:
                settle(missing[0], length // known, place)
        if len(later) == len(waiting):
            entry, length, place = later[0]
            labels = [
                label for label in dict.fromkeys(entry) if label is not None and label not in sizes
            ]
            raise ValueError(
                f"WeightSpec: the sizes of {labels} can't be told from {place}, a product "
                f"{entry} of length {length}; pass them as sizes={{...}}"
            )
        waiting = later
    return {label: sizes[label] for label in order}
