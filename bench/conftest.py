"""Settings every benchmark shares: fixed threads, and what a row says of its floor."""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import count

import floors
import pytest
import torch
from timing import event_seconds

from weightops.testing import best_time

THREADS = 2


def pytest_configure() -> None:
    torch.set_num_threads(THREADS)


@pytest.fixture
def device() -> str:
    wanted = os.environ.get("WEIGHTOPS_BENCH_GPU") == "1"
    return "cuda" if wanted and torch.cuda.is_available() else "cpu"


@pytest.fixture
def measure(benchmark, device):
    """``measure(f, bytes, flops, dtype)`` times ``f`` and records the floor measured in this run.

    ``rate`` takes the place of ``torch.mm``'s FLOPs per second. It is asked between rounds of ``f``,
    since a clock that moves does so for both.
    """

    def run(
        f,
        bytes_moved: int | None = None,
        flops: int = 0,
        dtype: torch.dtype = torch.float32,
        rate: Callable[[], float] | None = None,
    ) -> None:
        if benchmark.disabled:
            benchmark.pedantic(f)
            return
        rounds = max(10 if rate else 5, min(300, int(1 / (best_time(f, 0.0) + 1e-7))))
        rates: list[float] = []
        since = count()

        def ask() -> None:
            if rate and next(since) % (rounds // 10) == 0:
                rates.append(rate())

        benchmark.pedantic(f, setup=ask, rounds=rounds, warmup_rounds=2)
        took = benchmark.stats.stats.min
        if device == "cuda":
            # What the clock saw above is the launch.
            took = event_seconds(f)
            benchmark.extra_info["gpu_seconds"] = took
        if bytes_moved:
            floor = bytes_moved / floors.copy_bandwidth(bytes_moved, device)
            if flops:
                floor = max(floor, flops / max(rates or [floors.flop_rate(device, dtype)]))
            benchmark.extra_info.update(
                bytes=bytes_moved,
                gb_per_s=round(bytes_moved / took / 1e9, 2),
                floor_ms=round(1e3 * floor, 4),
                over_floor=round(took / floor, 2),
            )
        benchmark.extra_info.update(threads=torch.get_num_threads(), device=device)

    return run
