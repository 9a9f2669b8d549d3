"""Parts: a spec's tensor may be a slice of a model's tensor, named like ``qkv.weight[0:64]``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeAlias

import numpy as np
import torch

#: the model's tensor, and which slice of it: one ``slice`` per axis, or ``None`` for all of it
Place: TypeAlias = tuple[str, tuple[slice, ...] | None]

_NUMBER = "(?:0|[1-9][0-9]*)"
_PART = re.compile(rf"(.+)\[((?:(?::|{_NUMBER}:{_NUMBER}), )*{_NUMBER}:{_NUMBER})\]", re.DOTALL)


def parse(name: str) -> Place:
    """``"w[:, 64:96]"`` as ``("w", (slice(None), slice(64, 96)))``; any other name is a whole tensor's."""
    match = _PART.fullmatch(name)
    if not match:
        return name, None
    bounds = [text.split(":") for text in match[2].split(", ")]
    return match[1], tuple(slice(int(a), int(b)) if a else slice(None) for a, b in bounds)


def read_places(
    shapes: Mapping[str, torch.Size],
) -> tuple[dict[str, Place], dict[str, torch.Size]]:
    """Where each of a spec's tensors lies in the model, and the shapes of the model's tensors.

    Raises:
        ValueError: a part's shape is not its slice's, or the parts of a tensor do not cover the
            smallest shape that holds them all exactly once.
    """
    places: dict[str, Place] = {}
    parts: dict[str, list[str]] = {}
    for name, shape in shapes.items():
        tensor, index = parse(name)
        if index is not None:
            _check_slices(name, index, shape)
            index += (slice(None),) * (len(shape) - len(index))
        places[name] = tensor, index
        parts.setdefault(tensor, []).append(name)
    wholes = {
        tensor: shapes[tensor] if names == [tensor] else _tile(tensor, names, shapes, places)
        for tensor, names in parts.items()
    }
    return places, wholes


def _check_slices(name: str, index: tuple[slice, ...], shape: torch.Size) -> None:
    lengths = list(shape)
    if len(index) > len(shape):
        raise ValueError(f"WeightSpec: {name} slices {len(index)} axes, but has shape {lengths}")
    for axis, each in enumerate(index):
        if each.stop is None:
            continue
        if each.start >= each.stop:
            raise ValueError(f"WeightSpec: {name} is empty along axis {axis}")
        if each.stop - each.start != shape[axis]:
            raise ValueError(
                f"WeightSpec: {name} has shape {lengths}, but its slice of axis {axis} has length "
                f"{each.stop - each.start}"
            )


def _tile(
    tensor: str,
    names: list[str],
    shapes: Mapping[str, torch.Size],
    places: Mapping[str, Place],
) -> torch.Size:
    """The shape that the parts ``names`` of ``tensor`` cover, each entry of it once."""
    if tensor in names:
        part = next(name for name in names if name != tensor)
        raise ValueError(f"WeightSpec: {tensor} is given whole and by its part {part}")
    ranks = {len(shapes[name]): name for name in names}
    if len(ranks) > 1:
        a, b = list(ranks.values())[:2]
        raise ValueError(
            f"WeightSpec: {a} has shape {list(shapes[a])}, but {b}, a part of the same tensor, "
            f"has {list(shapes[b])}"
        )
    corners = {}
    for name in names:
        index = places[name][1]
        assert index is not None
        corners[name] = [
            (each.start or 0, length if each.stop is None else each.stop)
            for each, length in zip(index, shapes[name], strict=True)
        ]
    # Entries between two cuts next to each other are covered alike, so one cell stands for them.
    cuts = [sorted({0, *sum(both, ())}) for both in zip(*corners.values(), strict=True)]
    cells = {
        name: tuple(slice(at.index(a), at.index(b)) for (a, b), at in zip(box, cuts, strict=True))
        for name, box in corners.items()
    }
    covered = np.zeros([len(at) - 1 for at in cuts], dtype=np.int64)
    for cell in cells.values():
        covered[cell] += 1
    whole = torch.Size(at[-1] for at in cuts)
    if (covered != 1).any():
        at = np.argwhere(covered != 1)[0]
        entry = [cut[i] for cut, i in zip(cuts, at, strict=True)]
        holding = [
            name
            for name, cell in cells.items()
            if all(each.start <= i < each.stop for each, i in zip(cell, at, strict=True))
        ]
        raise ValueError(
            f"WeightSpec: the parts of {tensor} must cover {list(whole)} exactly once, but entry "
            f"{entry} is in {' and '.join(holding) or f'none of {names}'}"
        )
    return whole
