"""What this machine can do, measured in the run that quotes it: copying bytes, multiplying matrices, multiply-adds."""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

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


@cache
def _multiply_add() -> Callable[[int, Any], float]:
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "peak.so")
        source = Path(__file__).with_name("peak.cpp")
        subprocess.run(
            ["c++", "-std=c++17", "-O3", "-shared", "-fPIC", source, "-o", library], check=True
        )
        # ctypes lets go of the GIL meanwhile.
        multiply_add = ctypes.CDLL(str(library)).multiply_add
    multiply_add.restype = ctypes.c_double
    multiply_add.argtypes = [ctypes.c_int64, ctypes.c_void_p]
    return multiply_add


def peak_rate() -> float:
    """Operations per second, now, of float32 multiply-adds in the registers of as many cores as torch has threads.

    ``torch.mm`` comes to well under half of it on some machines.
    """
    threads, rounds = torch.get_num_threads(), 8_000_000
    multiply_add = _multiply_add()
    began = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        started = [
            pool.submit(multiply_add, rounds, (ctypes.c_float * 2)(0.5, 1e-3))
            for _ in range(threads)
        ]
        return sum(each.result() for each in started) / (time.perf_counter() - began)
