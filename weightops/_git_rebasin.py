"""Reads the dictionaries that Git Re-Basin (Ainsworth et al., arXiv 2209.04836) gives permutations by."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from weightops import _check
from weightops._axes import Axis, read_shape
from weightops._state import storage

WHERE = "from_git_rebasin"


def read_dictionary(
    permutations: Any, shapes: Any
) -> tuple[dict[str, tuple[Axis, ...]], dict[str, torch.Size]]:
    """The axes and shapes of the spec; arguments and errors as ``WeightSpec.from_git_rebasin`` tells."""
    labels = _read_labels(getattr(permutations, "axes_to_perm", permutations))
    tensors = shapes.state_dict() if isinstance(shapes, nn.Module) else shapes
    lengths = _read_shapes(tensors)
    missing = [name for name, of in labels.items() if name not in lengths and any(of.values())]
    if missing:
        raise ValueError(f"{WHERE}: permutations has {missing}, which shapes lacks")
    given = {name: labels.get(name, {}) for name in lengths}
    first: dict[tuple, str] = {}
    for name, of in list(given.items()):
        tensor = tensors[name]
        if isinstance(tensor, Tensor) and tensor.numel() and not tensor.is_meta:
            one = first.setdefault(storage(tensor), name)
            if one != name and name in labels and of != given[one]:
                raise ValueError(
                    f"{WHERE}: {one} and {name} are one tensor, but permutations gives them "
                    f"different entries"
                )
            if one != name:
                del given[name]
    sizes = _sizes(given, lengths)
    axes: dict[str, tuple[Axis, ...]] = {}
    for name, of in given.items():
        axes[name] = tuple(
            (label, None) if label is not None and length != sizes[label] else label
            for label, length in ((of.get(i), n) for i, n in enumerate(lengths[name]))
        )
    return axes, {name: lengths[name] for name in axes}


def _read_labels(permutations: Any) -> dict[str, dict[int, str]]:
    """Tensor -> axis -> label, from either of the two directions."""
    if not isinstance(permutations, Mapping):
        raise TypeError(
            f"{WHERE}: permutations must map tensors to permutations, or permutations to axes, "
            f"not {_check.describe(permutations)}"
        )
    labels: dict[str, dict[int, str]] = {}
    for key, entries in permutations.items():
        if isinstance(entries, str) or not isinstance(entries, Sequence):
            raise TypeError(
                f"{WHERE}: permutations[{key!r}] must be a list, not {_check.describe(entries)}"
            )
        if all(each is None or isinstance(each, str) for each in entries):
            of = labels.setdefault(key, {})
            of |= {axis: label for axis, label in enumerate(entries) if label is not None}
            continue
        for each in entries:
            pair = tuple(each) if isinstance(each, (tuple, list)) else ()
            if list(map(type, pair)) != [str, int]:
                raise TypeError(
                    f"{WHERE}: permutations[{key!r}] must hold labels and None, or (tensor, axis) "
                    f"pairs, not {_check.describe(each)}"
                )
            if labels.setdefault(pair[0], {}).setdefault(pair[1], key) != key:
                raise ValueError(
                    f"{WHERE}: {pair[0]} axis {pair[1]} has permutations "
                    f"{labels[pair[0]][pair[1]]!r} and {key!r}"
                )
    return labels


def _read_shapes(tensors: Any) -> dict[str, torch.Size]:
    """Tensor -> shape, without integer tensors."""
    if not isinstance(tensors, Mapping):
        raise TypeError(
            f"{WHERE}: shapes must be a module, a state dict or map names to shapes, "
            f"not {_check.describe(tensors)}"
        )
    return {
        name: read_shape(name, getattr(each, "shape", each))
        for name, each in tensors.items()
        if not isinstance(each, Tensor) or each.is_floating_point()
    }


def _sizes(
    labels: Mapping[str, Mapping[int, str]], lengths: Mapping[str, torch.Size]
) -> dict[str, int]:
    """Label -> the length that most of its axes have; matrices may read multiples of it."""
    found: dict[str, list[tuple[str, int, int]]] = {}
    for name, of in labels.items():
        for axis, label in of.items():
            if not 0 <= axis < len(lengths[name]):
                raise ValueError(
                    f"{WHERE}: permutations has {label!r} on axis {axis} of {name}, whose shape is "
                    f"{list(lengths[name])}"
                )
            found.setdefault(label, []).append((name, axis, lengths[name][axis]))
    sizes = {}
    for label, places in found.items():
        size = sizes[label] = _commonest(length for *_, length in places)
        at = next(f"{name} axis {axis}" for name, axis, length in places if length == size)
        for name, axis, length in places:
            flattened = len(lengths[name]) == 2 and size and length % size == 0
            if length != size and not flattened:
                raise ValueError(
                    f"{WHERE}: permutation {label!r} has length {length} at {name} axis {axis}, "
                    f"but {size} at {at}"
                )
    return sizes


def _commonest(lengths: Iterable[int]) -> int:
    counts = Counter(lengths)
    return min(counts, key=lambda length: (-counts[length], length))
