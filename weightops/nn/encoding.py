"""What features a weight has before the first layer: its embedded value, and where it stands."""

from __future__ import annotations

from itertools import pairwise
from math import log, pi, prod

import torch
from torch import Tensor, nn

from weightops import _check
from weightops.nn import _arguments
from weightops.spec import WeightSpec


class PositionalEncoding(nn.Module):
    """Adds to every weight an encoding of its position along the axes that are fixed.

    Layers with ``fixed="permute"`` take input pixels, classes and kernel taps as permutable; this tells
    them apart and still commutes with permuting neurons. ``[B, P, C]`` to ``[B, P, C]``.

    Args:
        spec: the weight space; axes (and factors of axes) that are ``None`` are encoded.
        channels: features per weight C.
        kind: ``"learned"``, a row per tensor, axis and position, normal with deviation 0.02 at first; or
            ``"sinusoidal"``, sines and cosines (arXiv 1706.03762) in a tensor's channels dealt out to its
            fixed axes.
        device, dtype: of the encoding.

    Attributes:
        table: ``[positions of all fixed axes, C]``, a parameter if learned.

    Raises:
        ValueError: ``kind`` is unknown, or sinusoids lack channels for a tensor's fixed axes.
        TypeError: an argument has the wrong type.
    """

    table: Tensor

    def __init__(
        self,
        spec: WeightSpec,
        channels: int,
        kind: str = "learned",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        where = "PositionalEncoding"
        _arguments.is_spec(where, "spec", spec)
        _arguments.count(where, "channels", channels)
        _check.choice(where, "kind", kind, ("learned", "sinusoidal"))
        self.spec, self.channels, self.kind = spec, channels, kind
        # Per tensor its shape with products taken apart, and (axis, first row) of the fixed ones.
        self._grids: list[tuple[list[int], list[tuple[int, int]]]] = []
        rows = 0
        for name, shape in spec.shapes.items():
            atoms = [atom for axis in range(len(shape)) for atom in spec.factors(name, axis)]
            fixed = []
            for axis, (label, size) in enumerate(atoms):
                if label is None:
                    fixed.append((axis, rows))
                    rows += size
            self._grids.append(([size for _, size in atoms], fixed))
            if kind == "sinusoidal" and len(fixed) > channels:
                raise ValueError(
                    f"{where}: channels must be at least {len(fixed)}, as {name} has {len(fixed)} "
                    f"fixed axes, not {channels}"
                )
        table = torch.zeros(rows, channels, device=device, dtype=dtype)
        if kind == "learned":
            self.table = nn.Parameter(table.normal_(0, 0.02))
        else:
            for sizes, fixed in self._grids:
                for share, (axis, row) in zip(_shares(channels, len(fixed)), fixed, strict=True):
                    waves = _sinusoids(sizes[axis], share.stop - share.start)
                    table[row : row + sizes[axis], share] = waves.to(table)
            self.register_buffer("table", table, persistent=False)

    def encoding(self) -> Tensor:
        """What is added: ``[P, C]``, zero where a tensor has no fixed axis."""
        pieces = []
        for sizes, fixed in self._grids:
            total = self.table.new_zeros([1] * len(sizes) + [self.channels])
            for axis, row in fixed:
                shape = [1] * len(sizes) + [self.channels]
                shape[axis] = sizes[axis]
                total = total + self.table[row : row + sizes[axis]].reshape(shape)
            whole = total.expand(*sizes, self.channels)
            pieces.append(whole.reshape(prod(sizes), self.channels))
        return torch.cat(pieces) if pieces else self.table.new_zeros(0, self.channels)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, P, C]`` to ``[B, P, C]``.

        Raises:
            ValueError: P or C is not the layer's.
            TypeError: ``x`` is no floating point tensor.
        """
        _arguments.features("PositionalEncoding", x, self.spec, self.channels)
        return x + self.encoding().to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.channels}, kind={self.kind!r}, positions={self.table.shape[0]}"


def _shares(channels: int, axes: int) -> list[slice]:
    """``channels`` dealt out to ``axes``, the first ones getting what is left over."""
    ends = [channels * n // axes for n in range(axes + 1)] if axes else []
    return [slice(begin, end) for begin, end in pairwise(ends)]


def _sinusoids(size: int, channels: int) -> Tensor:
    """``[size, channels]``: sine and cosine in turn, wave lengths from 2 pi to 10,000 * 2 pi."""
    position = torch.arange(size, dtype=torch.float64)[:, None]
    pair = torch.arange(channels, dtype=torch.float64) // 2
    phase = position * torch.exp(-log(10_000) * 2 * pair / channels)
    return torch.where(torch.arange(channels) % 2 == 0, phase.sin(), phase.cos())


class Featurize(nn.Module):
    """Input features from weights (and gradients, momenta, ...): scaled per tensor, then embedded.

    ``[B, P, C]`` to ``[B, P, out_channels]``: the scaled values first, then sines and cosines of them.
    Commutes with permuting neurons.

    Args:
        spec: the weight space.
        channels: features per weight C.
        normalize: ``"rms"`` divides by the root mean square over the tensor, per sample and channel (as
            learned optimizers do, arXiv 2402.05232); ``"none"`` does not.
        embedding: ``"gaussian"``: ``sin`` and ``cos`` of ``2 pi x B`` with ``B`` of shape ``[C, size]``
            normal with deviation ``scale``, not trained (random Fourier features, arXiv 2006.10739, by which
            NFN reads weights, arXiv 2302.14040); ``"sinusoidal"``: of ``scale 2^k pi x``, k < ``size``, for
            every channel; ``"none"``.
        size: number of frequencies.
        scale: of the frequencies.
        eps: added to the mean square, so that a tensor of zeros stays zero.
        device, dtype: of the frequencies.

    Attributes:
        out_channels: ``C``, plus ``2 size`` if gaussian, or ``2 size C`` if sinusoidal.

    Raises:
        ValueError: an option is unknown or a number out of range.
        TypeError: an argument has the wrong type.
    """

    frequencies: Tensor

    def __init__(
        self,
        spec: WeightSpec,
        channels: int = 1,
        *,
        normalize: str = "rms",
        embedding: str = "none",
        size: int = 16,
        scale: float = 1.0,
        eps: float = 1e-12,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        where = "Featurize"
        _arguments.is_spec(where, "spec", spec)
        _arguments.count(where, "channels", channels)
        _check.choice(where, "normalize", normalize, ("rms", "none"))
        _check.choice(where, "embedding", embedding, ("gaussian", "sinusoidal", "none"))
        _arguments.count(where, "size", size)
        _arguments.number(where, "scale", scale, 0, float("inf"))
        _arguments.number(where, "eps", eps, 0, 1)
        self.spec, self.channels, self.normalize = spec, channels, normalize
        self.embedding, self.eps = embedding, eps
        frequencies = torch.empty(0, device=device, dtype=dtype)
        self.out_channels = channels
        if embedding == "gaussian":
            frequencies = torch.randn(channels, size, device=device, dtype=dtype) * (2 * pi * scale)
            self.out_channels += 2 * size
        elif embedding == "sinusoidal":
            octaves = 2.0 ** torch.arange(size, device=device)
            frequencies = (octaves * (pi * scale)).to(frequencies.dtype)
            self.out_channels += 2 * size * channels
        self.register_buffer("frequencies", frequencies, persistent=embedding == "gaussian")

    def forward(self, x: Tensor) -> Tensor:
        """``[B, P, C]`` to ``[B, P, out_channels]``.

        Raises:
            ValueError: P or C is not the module's.
            TypeError: ``x`` is no floating point tensor.
        """
        _arguments.features("Featurize", x, self.spec, self.channels)
        if self.normalize == "rms":
            scaled = [
                (piece / _rms(piece, self.eps)) if piece.shape[1] else piece
                for piece in _arguments.pieces(x, self.spec)
            ]
            x = torch.cat(scaled, 1) if scaled else x
        if self.embedding == "none":
            return x
        if self.embedding == "gaussian":
            phase = x @ self.frequencies.to(x.dtype)
        else:
            phase = (x[..., None] * self.frequencies.to(x.dtype)).flatten(2)
        return torch.cat([x, phase.sin(), phase.cos()], -1)

    def extra_repr(self) -> str:
        return (
            f"{self.channels}, {self.out_channels}, normalize={self.normalize!r}, "
            f"embedding={self.embedding!r}"
        )


def _rms(x: Tensor, eps: float) -> Tensor:
    """``[B, 1, C]`` of ``x`` ``[B, n, C]``; squares of halves would overflow and underflow."""
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    return (wide.square().mean(1, keepdim=True) + eps).sqrt().to(x.dtype)
