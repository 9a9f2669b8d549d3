"""What this machine can do, measured in the run that quotes it: copying bytes."""

from __future__ import annotations

from functools import cache

import torch
from timing import seconds


@cache
def copy_bandwidth(bytes_moved: int, device: str = "cpu") -> float:
    """Bytes read plus written per second by ``copy_`` into an existing buffer of this size."""
    source = torch.ones(max(1, bytes_moved // 8), device=device)
    target = torch.empty_like(source)
    return 8 * source.numel() / seconds(lambda: target.copy_(source), device)
