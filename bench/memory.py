"""What a convolution on a manifold takes of memory beyond its arguments and results, at its peak.

``python memory.py IMPLEMENTATION PASSES THREADS`` prints it in bytes: a process of its own, of which
Linux tells the peak.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from manifold_peers import CONVOLUTIONS, prepared, with_gradients
from torch import Tensor

from weightops.testing import ManifoldConv

PROBLEM = ManifoldConv("per-sample", 64, 64, 64, 32, bases=4)
RESET_PEAK = Path("/proc/self/clear_refs")


def extra_bytes(implementation: str, passes: str) -> int | None:
    """Of :data:`PROBLEM`, in a fresh process; ``None`` where nothing tells."""
    if not RESET_PEAK.exists():
        return None
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "THP_"))}
    # What is freed goes back at once: what earlier calls left behind would hide what this one takes.
    environment["MALLOC_MMAP_THRESHOLD_"] = "65536"
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, __file__, implementation, passes, str(torch.get_num_threads())]
    return int(subprocess.check_output(command, env=environment))


def _status(what: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(what))


def main(implementation: str, passes: str, threads: str) -> None:
    torch.set_num_threads(int(threads))

    def call_of(problem: ManifoldConv) -> Callable[[], tuple[Tensor, ...]]:
        f = CONVOLUTIONS[implementation](problem)
        x, coeffs, weight, *_ = problem.make()
        leaves = [x, coeffs, prepared(implementation, weight)]
        if passes == "forward":
            return lambda: (f(*leaves),)
        return with_gradients(f, leaves, problem.outputs)

    with torch.set_grad_enabled(passes != "forward"):
        # Threads and libraries that a first call brings are nobody's memory; room that it keeps is.
        call_of(replace(PROBLEM, batch=2, inputs=4, outputs=4, pixels=8))()
        call = call_of(PROBLEM)
        RESET_PEAK.write_text("5")
        before = _status("VmRSS")
        results = call()
        peak = _status("VmHWM")
    print(peak - before - sum(each.nbytes for each in results))


if __name__ == "__main__":
    main(*sys.argv[1:])
