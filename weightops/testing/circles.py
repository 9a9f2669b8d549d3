"""What tests and benchmarks compute on networks that read pairs of tokens; by default at the size of Ding et al. 2024."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenPairs:
    """``token_pair_linear`` of ``count`` pairs in each network, and the training of whole networks on them."""

    networks: int
    tokens: int = 59
    size: int = 128
    width: int = 100
    count: int = 2784
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        return f"{self.networks} networks"

    @property
    def bytes(self) -> int:
        """Of a forward pass: parameters and pairs read once, rows written once."""
        return self._parameters + self._pairs + self._rows

    @property
    def backward_bytes(self) -> int:
        """The rows' gradient, pairs and parameters read once, the parameters' gradients written once."""
        return self._rows + self._pairs + 2 * self._parameters

    @property
    def table_bytes(self) -> int:
        """Of ``token_pair_add`` and of ``token_pair_sum``: tables, pairs and rows each once."""
        tables = self.networks * 2 * self.tokens * self.width * self.dtype.itemsize
        return tables + self._pairs + self._rows

    @property
    def flops(self) -> int:
        """Two for each multiplication of the tables' products."""
        return 4 * self.networks * self.tokens * self.size * self.width

    @property
    def training_flops(self) -> int:
        """Of a step: the tables' and the later layers' products, each forward and twice back."""
        later = 2 * self.networks * self.count * self.width * (self.width + self.tokens)
        return 3 * (self.flops + later)

    def make(self, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """pairs, embedding, weight and bias."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            made = torch.randn(self.networks, *shape, generator=generator, dtype=torch.float64)
            return made.to(self.dtype)

        pairs = torch.randint(self.tokens, (self.networks, self.count, 2), generator=generator)
        weight = normal(self.width, 2 * self.size)
        return pairs, normal(self.tokens, self.size), weight, normal(self.width)

    @property
    def _rows(self) -> int:
        return self.networks * self.count * self.width * self.dtype.itemsize

    @property
    def _pairs(self) -> int:
        return 16 * self.networks * self.count

    @property
    def _parameters(self) -> int:
        each = self.tokens * self.size + self.width * (2 * self.size + 1)
        return self.networks * each * self.dtype.itemsize


@dataclass(frozen=True)
class FourierSignal:
    """``fourier_signal`` of the embeddings ``[networks, tokens, size]``."""

    networks: int
    tokens: int = 59
    size: int = 128
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        return f"{self.networks} networks"

    @property
    def frequencies(self) -> int:
        return (self.tokens - 1) // 2

    @property
    def bytes(self) -> int:
        """Embeddings and the transform read once, signals written once."""
        read = self.networks * self.tokens * self.size + 2 * self.frequencies * self.tokens
        return (read + self.networks * self.frequencies) * self.dtype.itemsize

    @property
    def flops(self) -> int:
        """Two for each multiplication of both parts of the transform."""
        return 4 * self.networks * self.frequencies * self.tokens * self.size

    def make(self, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        shape = (self.networks, self.tokens, self.size)
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(self.dtype)
