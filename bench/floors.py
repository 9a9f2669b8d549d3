"""What this machine can do, measured in the run that quotes it: copying bytes, multiplying matrices."""

from __future__ import annotations

from functools import cache

import torch
from timing import matmul_precision, seconds


@cache
def copy_bandwidth(bytes_moved: int, device: str = "cpu") -> float:
    """Bytes read plus written per second by ``copy_`` into an existing buffer of this size."""
    source = torch.ones(max(1, bytes_moved // 8), device=device)
    target = torch.empty_like(source)
    return 8 * source.numel() / seconds(lambda: target.copy_(source), device)


@cache
def flop_rate(device: str = "cpu", dtype: torch.dtype = torch.float32) -> float:
    """Operations per second of ``torch.mm`` at its default precision, the best of three sizes."""

    def rate(n: int) -> float:
        a, b = torch.ones(2, n, n, device=device, dtype=dtype)
        out = torch.empty_like(a)
        return 2 * n**3 / seconds(lambda: torch.mm(a, b, out=out), device)

    with matmul_precision("highest"):
        return max(map(rate, (512, 1024, 2048)))
