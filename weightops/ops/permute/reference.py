"""The definition of permute, permute_axes and merge, in plain torch."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from weightops.ops.permute.plan import FIXED, decode


def permute_axes(x: Tensor, index: Tensor, axes: Sequence[int], inverse: bool = False) -> Tensor:
    """``x`` [B, ...], reordered along ``axes`` by ``index`` [B or 1, total length of those axes]."""
    # Contiguous like the kernels' result, and never an alias of x.
    x = x.clone(memory_format=torch.contiguous_format)
    lengths = [x.shape[axis] for axis in axes]
    for axis, source in zip(axes, index.split(lengths, 1), strict=True):
        x = _take(x, source, axis, inverse)
    return x


def _take(x: Tensor, source: Tensor, axis: int, inverse: bool) -> Tensor:
    if inverse:
        source = source.argsort(1)
    shape = [source.shape[0]] + [1] * (x.dim() - 1)
    shape[axis] = source.shape[1]
    return torch.take_along_dim(x, source.view(shape), axis)


def permute(flat: Tensor, index: Tensor, plan: Sequence[int], inverse: bool = False) -> Tensor:
    """``flat`` [N, P], every tensor of ``plan`` reordered along its permuted axes."""
    tensors = decode(plan).tensors
    sources = map_sources(index, plan)
    pieces, offset = [], 0
    for axes in tensors:
        shape = [size for size, _ in axes]
        piece = flat.narrow(1, offset, prod(shape)).reshape(flat.shape[0], *shape)
        offset += prod(shape)
        for axis, (_, which) in enumerate(axes, start=1):
            if which != FIXED:
                piece = _take(piece, sources[which], axis, inverse)
        pieces.append(piece.reshape(flat.shape[0], prod(shape)))
    return torch.cat(pieces, 1) if pieces else flat.clone()


def map_sources(index: Tensor, plan: Sequence[int]) -> list[Tensor]:
    """Per map of ``plan`` the source positions [N or 1, size] along such an axis."""
    label_sizes, maps, _ = decode(plan)
    labels = index.split(label_sizes, 1)
    sources = []
    for each in maps:
        source = index.new_zeros(1, 1)
        for label, size in each.factors:
            factor = (
                torch.arange(size, device=index.device)[None] if label == FIXED else labels[label]
            )
            source = (source[:, :, None] * size + factor[:, None, :]).flatten(1)
        sources.append(source)
    return sources


def merge(flat: Tensor, weights: Tensor, index: Tensor | None, plan: Sequence[int]) -> Tensor:
    """``weights`` [L, M] times the (permuted) networks ``flat`` [M, P]."""
    networks = flat if index is None else permute(flat, index, plan)
    return (weights @ networks.to(weights.dtype)).to(flat.dtype)
