"""Settings every benchmark shares: fixed threads, a warm machine, and what a row says of its floor."""

from __future__ import annotations

import os

import floors
import pytest
import torch

THREADS = 2


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(THREADS)
    # A fresh output of 100 MB costs more in page faults than in arithmetic; under `make bench` glibc
    # keeps freed pages, for every implementation alike.
    config.stash[_ALLOCATOR] = os.environ.get("MALLOC_TOP_PAD_", "default")


_ALLOCATOR = pytest.StashKey[str]()


@pytest.fixture
def device() -> str:
    return (
        "cuda"
        if torch.cuda.is_available() and os.environ.get("WEIGHTOPS_BENCH_GPU") == "1"
        else "cpu"
    )


@pytest.fixture
def measure(benchmark, device):
    """``measure(f, bytes)`` times ``f`` and records the floor measured in this run."""

    def run(f, bytes_moved: int | None = None) -> None:
        def call() -> None:
            f()
            if device == "cuda":
                torch.cuda.synchronize()

        call()
        benchmark.pedantic(call, rounds=_rounds(call), warmup_rounds=2)
        if bytes_moved:
            seconds = benchmark.stats.stats.min
            floor = bytes_moved / floors.copy_bandwidth(bytes_moved, device)
            benchmark.extra_info.update(
                bytes=bytes_moved,
                gb_per_s=round(bytes_moved / seconds / 1e9, 2),
                floor_ms=round(1e3 * floor, 4),
                over_floor=round(seconds / floor, 2),
            )
        benchmark.extra_info.update(threads=torch.get_num_threads(), device=device)

    return run


def _rounds(call, budget: float = 1.0) -> int:
    import time

    began = time.perf_counter()
    call()
    return max(5, min(300, int(budget / (time.perf_counter() - began + 1e-7))))
