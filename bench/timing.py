"""How a call is timed: the clock on a CPU; events behind a flushed second-level cache on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

from weightops.testing import best_time


@cache
def _flushed() -> torch.Tensor:
    return torch.empty(2**28, dtype=torch.uint8, device="cuda")


def event_seconds(f: Callable[[], Any], rounds: int = 50) -> float:
    """The median seconds a call takes on the GPU, each after a flush of its cache."""
    f()
    times = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        _flushed().zero_()
        start.record()
        f()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return sorted(times)[rounds // 2]


def seconds(f: Callable[[], Any], device: str) -> float:
    return event_seconds(f) if device == "cuda" else best_time(f, 0.3)


@contextmanager
def matmul_precision(setting: str) -> Iterator[None]:
    """torch's precision of float32 products, for a while."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(setting)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
