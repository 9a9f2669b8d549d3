"""The definition of fourier_signal, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def transform(p: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Real and imaginary parts of the rows k = 1 .. (p - 1) // 2 of the transform of length p, ``[2, K, p]``."""
    k = torch.arange(1, (p - 1) // 2 + 1, device=device)
    # Whole turns are left out in integers, and float64 leaves one rounding to float32.
    turns = (k[:, None] * torch.arange(p, device=device) % p).double() / p
    angles = -2 * torch.pi * turns
    return torch.stack([angles.cos(), angles.sin()]).to(dtype)


def signal(embedding: Tensor, matrix: Tensor) -> Tensor:
    """``embedding`` [M, p, d], ``matrix`` [2, K, p] -> norms of the K rows of the transform, [M, K]."""
    return torch.linalg.vector_norm(matrix @ embedding[:, None], dim=(1, 3))
