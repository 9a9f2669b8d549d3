"""Builds the kernels with sanitizers and runs them: the cores in C++, the library under Python."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "sanitize"
WARNINGS = ["-Wall", "-Wextra", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]

NATIVE_TESTS = [
    *(
        f"tests/ops/test_{name}.py"
        for name in (
            "assign",
            "equivariant",
            "fourier",
            "functional",
            "manifold",
            "match",
            "permute",
        )
    ),
    *(f"tests/population/test_{name}.py" for name in ("forward", "pairs", "training")),
    "tests/circles/test_training.py",
    "tests/ops/test_token_pair.py",
    *("tests/tokens/test_packing.py", "tests/tokens/test_statistics.py"),
]


def run(*command: str | Path, **environment: str) -> None:
    print("+", *command, flush=True)
    subprocess.run(
        [str(word) for word in command], check=True, cwd=ROOT, env=os.environ | environment
    )


def core(name: str, flags: list[str], source: Path) -> None:
    program = BUILD / f"{source.stem}-{name}"
    compiler = ["c++", "-std=c++17", "-O1", "-g", *WARNINGS, *flags]
    run(*compiler, source, "-o", program, "-pthread")
    for isa in ("avx512", "avx2", "generic"):
        run(program, WEIGHTOPS_ISA=isa)


def cores() -> None:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        started = [
            pool.submit(core, name, flags, source)
            for name, flags in (
                ("address", ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]),
                ("thread", ["-fsanitize=thread"]),
            )
            for source in sorted((ROOT / "csrc" / "tests").glob("*.cpp"))
            if name == "address" or "<thread>" in source.read_text()
        ]
        for each in started:
            each.result()


def library() -> None:
    run(
        "cmake", "-S", ROOT, "-B", BUILD, "-DWEIGHTOPS_SANITIZE=ON", "-DCMAKE_BUILD_TYPE=RelWithDebInfo",
        "-DCMAKE_CXX_FLAGS_RELWITHDEBINFO=-O1 -g1",
        f"-DWEIGHTOPS_TORCH_ROOT={Path(torch.__file__).parent}",
        "-DWEIGHTOPS_HOST=OFF",
    )  # fmt: skip
    run("cmake", "--build", BUILD, "--target", "_weightops_cpu", "--parallel", "2")
    runtime = [
        subprocess.check_output(["c++", f"-print-file-name={name}"], text=True).strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    run(
        *(sys.executable, "-m", "pytest", "-q", "-x", "-n", "2", "--dist", "worksteal", "-p", "no:cacheprovider"),
        *(*NATIVE_TESTS, "-m", "not slow", "-k", "not other_backends"),
        OMP_WAIT_POLICY="passive",
        LD_PRELOAD=" ".join(runtime),
        ASAN_OPTIONS="detect_leaks=0:verify_asan_link_order=0",
        UBSAN_OPTIONS="halt_on_error=1:print_stacktrace=1",
        WEIGHTOPS_LIBRARY_DIR=str(BUILD),
        WEIGHTOPS_REQUIRE_NATIVE="1",
    )  # fmt: skip


if __name__ == "__main__":
    BUILD.mkdir(parents=True, exist_ok=True)
    cores()
    library()
