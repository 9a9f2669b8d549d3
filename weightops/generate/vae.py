"""A variational autoencoder of weights."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from weightops import _check
from weightops.generate._arguments import check_generator, check_like

FORMS = ("mlp", "convolution")


class WeightVAE(nn.Module):
    """Weights, standardised and as vectors, to short latent vectors and back.

    ``"mlp"`` is a perceptron each way. ``"convolution"`` is the paper's: a linear layer lays a vector
    out as a square image, convolutions halve its side once for each of ``channels``, and the decoder
    goes the same way back.

    With ``chunks`` the vectors are a larger network's chunks, each a sample of its own: the encoder
    and the decoder are told which chunk it is by a learned embedding.

    Source: Soro et al. 2024, "Diffusion-based Neural Network Weights Generation", arXiv 2402.18153,
    section 3.2.

    Args:
        width: D, entries of a vector.
        latent: L, entries of its latent; for ``"convolution"`` a multiple of the smallest image's
            pixels, ``(side / 2^len(channels))^2``.
        form: ``"mlp"`` or ``"convolution"``.
        hidden: widths of the perceptron's layers, from the weights on.
        side: of the square image, a multiple of ``2^len(channels)``.
        channels: of the convolutions, from the weights on.
        chunks: T, chunks that make up a network; ``None`` if a vector is a whole network.

    Raises:
        ValueError: a size is not positive, or sizes do not fit as above; ``form`` is unknown.
        TypeError: a size is no integer, ``form`` no string.
    """

    def __init__(
        self,
        width: int,
        latent: int,
        *,
        form: str = "mlp",
        hidden: Sequence[int] = (512, 256),
        side: int = 32,
        channels: Sequence[int] = (32, 64, 64),
        chunks: int | None = None,
    ) -> None:
        super().__init__()
        where = "WeightVAE"
        _check.count(where, "width", width)
        _check.count(where, "latent", latent)
        _check.choice(where, "form", form, FORMS)
        for name, sizes in (("hidden", hidden), ("channels", channels)):
            if not isinstance(sizes, (list, tuple)) or not sizes:
                raise TypeError(
                    f"{where}: {name} must be a non-empty list of integers, "
                    f"not {_check.describe(sizes)}"
                )
            for n, size in enumerate(sizes):
                _check.count(where, f"{name}[{n}]", size)
        _check.count(where, "side", side)
        if chunks is not None:
            _check.count(where, "chunks", chunks)
        self.width, self.latent, self.chunks = width, latent, chunks
        if form == "mlp":
            # A chunk's embedding is added to a first layer's output: as good as more inputs, and shorter.
            self.enter, self.leave = nn.Linear(width, hidden[0]), nn.Linear(hidden[0], width)
            self.encoder = perceptron([*hidden, 2 * latent])
            self.decoder = nn.Sequential(
                nn.Linear(latent, hidden[-1]), *perceptron(hidden[::-1]), nn.SiLU()
            )
            embedded = hidden[0]
        else:
            self._build_convolutions(side, channels)
            embedded = side * side
        self.to_chunk = nn.Embedding(chunks, embedded) if chunks else None
        self.of_chunk = nn.Embedding(chunks, latent) if chunks else None
        #: logarithm of the scale of the reconstruction's error, which is learned
        self.log_scale = nn.Parameter(torch.zeros(()))

    def _build_convolutions(self, side: int, channels: Sequence[int]) -> None:
        small = side >> len(channels)
        if small << len(channels) != side or not small:
            raise ValueError(
                f"WeightVAE: side must be a multiple of {2 ** len(channels)}, as each of the "
                f"{len(channels)} channels halves it, not {side}"
            )
        if self.latent % small**2:
            raise ValueError(
                f"WeightVAE: latent must be a multiple of {small**2}, the pixels of the smallest "
                f"image, not {self.latent}"
            )
        self.enter, self.leave = (
            nn.Linear(self.width, side * side),
            nn.Linear(side * side, self.width),
        )
        deep = self.latent // small**2
        down: list[nn.Module] = [nn.Unflatten(-1, (1, side, side))]
        up: list[nn.Module] = [nn.Unflatten(-1, (deep, small, small))]
        for before, after in pairwise([1, *channels]):
            down += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.SiLU()]
        up += [nn.Conv2d(deep, channels[-1], 3, padding=1), nn.SiLU()]
        for before, after in pairwise([*channels[::-1], channels[0]]):
            up += [nn.Upsample(scale_factor=2), nn.Conv2d(before, after, 3, padding=1), nn.SiLU()]
        down += [nn.Conv2d(channels[-1], 2 * deep, 3, padding=1), nn.Flatten()]
        up += [nn.Conv2d(channels[0], 1, 3, padding=1), nn.Flatten()]
        self.encoder, self.decoder = nn.Sequential(*down), nn.Sequential(*up)

    def encode(self, x: Tensor, chunk: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mean and logarithm of the variance of latents, both ``[..., L]``.

        Args:
            x: ``[..., D]``; ``[..., T, D]`` for all chunks of networks.
            chunk: which chunks ``x`` holds, int64 ``[...]`` as ``x`` without its last axis; by default
                all T of a network. Only with ``chunks``.

        Raises:
            ValueError: ``x`` or ``chunk`` has another shape or device, or ``chunk`` is out of range.
            TypeError: ``x`` or ``chunk`` is no tensor, or has another dtype.
        """
        self._check_input("WeightVAE.encode", "x", x, self.width, chunk)
        return self._encode(x, chunk)

    def _encode(self, x: Tensor, chunk: Tensor | None) -> tuple[Tensor, Tensor]:
        h = self.enter(x)
        if self.to_chunk is not None:
            h = h + self._embedding(self.to_chunk, chunk)
        # Rows of 2 L: of an image's channels the first half are means.
        both = self.encoder(h.flatten(0, -2)).unflatten(0, x.shape[:-1])
        mean, log_variance = both.chunk(2, -1)
        return mean, log_variance.clamp(-30, 20)

    def decode(self, z: Tensor, chunk: Tensor | None = None) -> Tensor:
        """``[..., D]`` from latents ``[..., L]``; ``chunk`` and errors as for :meth:`encode`."""
        self._check_input("WeightVAE.decode", "z", z, self.latent, chunk)
        return self._decode(z, chunk)

    def _decode(self, z: Tensor, chunk: Tensor | None) -> Tensor:
        h = z if self.of_chunk is None else z + self._embedding(self.of_chunk, chunk)
        return self.leave(self.decoder(h.flatten(0, -2)).unflatten(0, z.shape[:-1]))

    def loss(
        self,
        x: Tensor,
        chunk: Tensor | None = None,
        *,
        kl: float = 1e-4,
        noise: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """What training minimises, a scalar: ``mean(|x - decoded| / s + log s) + kl KL``.

        ``s`` is the learned scale of errors, KL the divergence of latents from a standard normal
        distribution, summed over a latent's entries.

        Args:
            x: as for :meth:`encode`.
            chunk: as for :meth:`encode`.
            kl: weight of the divergence.
            noise: standard deviation of noise on the encoder's input, which keeps a large encoder from
                learning a small zoo by heart.
            generator: of noise and latents.

        Raises:
            ValueError: as :meth:`encode`, or a number is out of range.
            TypeError: as :meth:`encode`, or an argument has the wrong type.
        """
        where = "WeightVAE.loss"
        self._check_input(where, "x", x, self.width, chunk)
        for name, value in (("kl", kl), ("noise", noise)):
            _check.number(where, name, value, 0, 1e9)
        check_generator(where, generator, x.device, optional=True)
        noisy = x + noise * _normal(x, generator) if noise else x
        mean, log_variance = self._encode(noisy, chunk)
        z = mean + (0.5 * log_variance).exp() * _normal(mean, generator)
        error = (self._decode(z, chunk) - x).abs().mean()
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(-1).mean()
        return error * (-self.log_scale).exp() + self.log_scale + kl * divergence

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Decode ``n`` draws of a standard normal distribution: ``[n, D]``, or ``[n, T, D]``.

        Raises:
            ValueError: ``n`` is negative.
            TypeError: an argument has the wrong type.
        """
        _check.count("WeightVAE.sample", "n", n, 0)
        check_generator("WeightVAE.sample", generator, optional=True)
        shape = (n, self.latent) if self.chunks is None else (n, self.chunks, self.latent)
        z = torch.randn(shape, generator=generator, device=generator.device if generator else None)
        return self._decode(z.to(self.log_scale.device), None)

    def _embedding(self, table: nn.Embedding, chunk: Tensor | None) -> Tensor:
        return table.weight if chunk is None else table(chunk)

    def _check_input(
        self, where: str, name: str, value: Any, length: int, chunk: Tensor | None
    ) -> None:
        check_like(where, name, value, f"[..., {length}]", self.log_scale)
        given = list(value.shape)
        if self.chunks is None or chunk is not None:
            if value.dim() < 2 or value.shape[-1] != length:
                raise ValueError(f"{where}: {name} must have shape [..., {length}], not {given}")
        elif value.dim() < 2 or given[-2:] != [self.chunks, length]:
            raise ValueError(
                f"{where}: {name} must have shape [..., {self.chunks}, {length}] without chunk, "
                f"not {given}"
            )
        if chunk is None:
            return
        if self.chunks is None:
            raise ValueError(f"{where}: chunk is given, but this autoencoder has no chunks")
        _check.tensor(where, "chunk", chunk, "[...]")
        _check.index_dtype(where, "chunk", chunk)
        _check.same_device(where, "chunk", chunk, name, value)
        if list(chunk.shape) != given[:-1]:
            raise ValueError(
                f"{where}: chunk must have shape {given[:-1]} as {name} {given}, "
                f"not {list(chunk.shape)}"
            )
        fault = _check.index_fault(chunk, self.chunks)
        if fault is not None:
            raise ValueError(f"{where}: chunk{fault}")


def perceptron(widths: Sequence[int]) -> nn.Sequential:
    """Linear layers through ``widths``, a SiLU before each."""
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.SiLU(), nn.Linear(before, after)]
    return nn.Sequential(*layers)


def _normal(like: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.randn(like.shape, generator=generator, device=like.device, dtype=like.dtype)
