"""How tests look at Triton kernels without a GPU: in the interpreter, and compiled for every architecture."""

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch

TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int32: "i32",
    torch.int64: "i64",
}
ARCHITECTURES = (80, 90, 100, 120)
#: what a product of tensor cores is, by architecture; Blackwell's consumer GPUs have no double ones
TENSOR_CORES = {80: "HMMA", 90: "HMMA|HGMMA", 100: "HMMA|UTCHMMA", 120: "HMMA"}
#: what a program may have on the smallest GPUs of these architectures
SHARED_MEMORY = 99 << 10


def run(*command: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, *command],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def interpret(path: Path) -> None:
    """Run a file of tests in Triton's interpreter, which is chosen as kernels are imported."""
    flags = ("-q", "-p", "no:cacheprovider", "-W", "ignore")
    # NumPy's products are tiny, and on a busy machine its threads wait for each other.
    threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    out = run("-m", "pytest", str(path), *flags, TRITON_INTERPRET="1", **threads)
    assert re.search(r"\b[1-9]\d* passed", out), out
    assert "skipped" not in out


class Launch(NamedTuple):
    kernel: Any
    args: tuple
    options: dict


def launches(call: Callable[[], object], kernels: Mapping[ModuleType, tuple]) -> list[Launch]:
    """What ``call`` launches of the ``kernels`` of some modules, launched by nobody."""
    found: list[Launch] = []

    class Recorder:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: object) -> Callable[..., None]:
            return lambda *args, **options: found.append(Launch(self.kernel, args, options))

    with pytest.MonkeyPatch.context() as patch:
        for module, names in kernels.items():
            for name in names:
                patch.setattr(module, name, Recorder(getattr(module, name)))
        call()
    return found


def source(launch: Launch) -> Any:
    """The kernel specialised as the launch would have it."""
    from triton.compiler import ASTSource

    signature, constants, attributes = {}, {}, {}
    for i, (parameter, value) in enumerate(zip(launch.kernel.params, launch.args, strict=True)):
        name = parameter.name
        signature[name] = "constexpr"
        if parameter.is_constexpr or (isinstance(value, int) and value == 1):
            constants[name] = value
        elif isinstance(value, torch.Tensor):
            signature[name] = f"*{TYPES[value.dtype]}"
            attributes[i,] = [["tt.divisibility", 16]]
        else:
            signature[name] = "i64" if value >= 2**31 else "i32"
            if value % 16 == 0:
                attributes[i,] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, signature, constants, attributes)


def tool(name: str, *args: str) -> str:
    spec = importlib.util.find_spec("triton")
    assert spec is not None
    assert spec.submodule_search_locations
    path = Path(spec.submodule_search_locations[0], "backends/nvidia/bin", name)
    return subprocess.check_output([path, *args], text=True, stderr=subprocess.DEVNULL)


def check_addresses(ttir: str, where: str) -> None:
    """The number of a program is never multiplied in 32 bits, where it would overflow, unless it was
    made to fit: what is narrowed on purpose is small."""
    tainted = set(re.findall(r"(%\S+) = tt\.get_program_id x", ttir))
    assert tainted, where
    for line in ttir.splitlines():
        if found := re.match(r"\s*(%\S+) = (arith\.\w+|tt\.splat|tt\.expand_dims) (.*)", line):
            result, operation, rest = found.groups()
            if operation != "arith.trunci" and tainted & set(re.findall(r"%[\w#]+", rest)):
                tainted.add(result)
                narrow = re.search(r": (tensor<[\dx]*x)?i32>?", rest)
                assert not (operation == "arith.muli" and narrow), f"{where}: {line}"


def check_launch(
    launch: Launch, architecture: int, *, on_tensor_cores: bool, spilled: int = 0
) -> None:
    import triton
    from triton.backends.compiler import GPUTarget

    name = launch.kernel.__name__
    chosen = [a for p, a in zip(launch.kernel.params, launch.args, strict=True) if p.is_constexpr]
    where = f"{name} {chosen} on sm_{architecture}"
    target = GPUTarget("cuda", architecture, 32)
    compiled = triton.compile(source(launch), target=target, options=launch.options)
    check_addresses(compiled.asm["ttir"], where)
    assert compiled.metadata.shared <= SHARED_MEMORY, f"{where}: {compiled.metadata.shared} bytes"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = tool("cuobjdump", "-res-usage", file.name)
        used = {k: int(v) for k, v in re.findall(r"([A-Z]+):(\d+)", usage)}
        assert used["STACK"] <= spilled, f"{where}: {used}"
        assert used["LOCAL"] == 0, f"{where}: {used}"
        # A multiprocessor has 65,536 and its blocks here 128 or 256 threads.
        assert used["REG"] * 32 * launch.options["num_warps"] <= 65536, f"{where}: {used}"
        if on_tensor_cores:
            assembly = tool("nvdisasm", file.name)
            assert re.search(rf"\s(?:{TENSOR_CORES[architecture]})[.\s]", assembly), where
