"""What this machine can do, measured in the run that quotes it: copies, reads, and matrix products."""

from __future__ import annotations

from functools import cache

import torch

from weightops.testing import best_time


@cache
def copy_bandwidth(bytes_moved: int, device: str = "cpu") -> float:
    """Bytes read plus written per second by ``copy_`` into an existing buffer of this size."""
    source = torch.ones(max(1, bytes_moved // 8), device=device)
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)
        if device != "cpu":
            torch.cuda.synchronize()

    return 8 * source.numel() / best_time(copy, 0.3)


@cache
def read_bandwidth(bytes_read: int, device: str = "cpu") -> float:
    """Bytes read per second by the fastest reduction at hand (a sum, or a maximum)."""
    source = torch.ones(max(1, bytes_read // 4), device=device)

    def read(f) -> float:
        def once() -> None:
            f(source)
            if device != "cpu":
                torch.cuda.synchronize()

        return best_time(once, 0.3)

    return 4 * source.numel() / min(read(torch.sum), read(torch.amax))
