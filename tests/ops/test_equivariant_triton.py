"""Triton kernels of equivariant layers without a GPU: right in the interpreter, and within a GPU's means."""

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from weightops import EquivariantPlan
from weightops.ops.equivariant.plan import code_of
from weightops.testing import specs

pytest.importorskip("triton")

TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int32: "i32",
}
ARCHITECTURES = (80, 90, 100, 120)
PRODUCTS = {"mix", "outer"}
#: what a product in TF32 is, by architecture; Blackwell's consumer GPUs have no double ones
TENSOR_CORES = {80: "HMMA", 90: "HMMA|HGMMA", 100: "HMMA|UTCHMMA", 120: "HMMA"}


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


def test_in_the_interpreter() -> None:
    path = Path(__file__).parent / "equivariant_interpreted.py"
    flags = ("-q", "-p", "no:cacheprovider", "-W", "ignore")
    # NumPy's products are tiny, and on a busy machine its threads wait for each other.
    threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    out = run("-m", "pytest", str(path), *flags, TRITON_INTERPRET="1", **threads)
    assert re.search(r"\b[1-9]\d* passed", out), out
    assert "skipped" not in out


def test_the_kernels_serve_where_torch_has_cuda_and_are_imported_when_called() -> None:
    code = (
        "import sys, torch; torch.version.cuda = '13.0'; import weightops; from weightops import info; "
        "assert 'triton' not in sys.modules; ops = info.collect()['ops']; "
        "print({ops[f'equivariant_{n}']['cuda'] for n in ('linear', 'backward')})"
    )
    out = run("-c", code, WEIGHTOPS_DISABLE_NATIVE="1")
    assert out.strip() == "{'Triton'}"


class Launch(NamedTuple):
    kernel: Any
    args: tuple
    options: dict


def launches(call: Callable[[], object]) -> list[Launch]:
    """What ``call`` launches, launched by nobody."""
    from weightops.ops.equivariant import triton as module

    found: list[Launch] = []

    class Recorder:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: object) -> Callable[..., None]:
            return lambda *args, **options: found.append(Launch(self.kernel, args, options))

    with pytest.MonkeyPatch.context() as patch:
        for name in ("pool", "mix", "outer", "gather"):
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
    """The number of a program is never multiplied in 32 bits, where it would overflow."""
    tainted = set(re.findall(r"(%\S+) = tt\.get_program_id x", ttir))
    assert tainted, where
    for line in ttir.splitlines():
        if found := re.match(r"\s*(%\S+) = (arith\.\w+|tt\.splat|tt\.expand_dims) (.*)", line):
            result, operation, rest = found.groups()
            if tainted & set(re.findall(r"%[\w#]+", rest)):
                tainted.add(result)
                narrow = re.search(r": (tensor<[\dx]*x)?i32>?", rest)
                assert not (operation == "arith.muli" and narrow), f"{where}: {line}"


def check_launch(launch: Launch, architecture: int, precise: bool, spilled: int) -> None:
    import triton
    from triton.backends.compiler import GPUTarget

    name = launch.kernel.__name__
    chosen = [a for p, a in zip(launch.kernel.params, launch.args, strict=True) if p.is_constexpr]
    where = f"{name} {chosen} on sm_{architecture}"
    target = GPUTarget("cuda", architecture, 32)
    compiled = triton.compile(source(launch), target=target, options=launch.options)
    check_addresses(compiled.asm["ttir"], where)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = tool("cuobjdump", "-res-usage", file.name)
        used = {k: int(v) for k, v in re.findall(r"([A-Z]+):(\d+)", usage)}
        assert used["STACK"] <= spilled, f"{where}: {used}"
        assert used["LOCAL"] == 0, f"{where}: {used}"
        # A multiprocessor has 65,536 and its blocks here 128 or 256 threads.
        assert used["REG"] * 32 * launch.options["num_warps"] <= 65536, f"{where}: {used}"
        if name in PRODUCTS and not precise:
            assembly = tool("nvdisasm", file.name)
            assert re.search(rf"\s(?:{TENSOR_CORES[architecture]})[.\s]", assembly), where


def check_compiled(
    space: str,
    channels: tuple[int, int],
    dtype: torch.dtype,
    precision: str,
    spilled: int = 0,
) -> None:
    plan = EquivariantPlan(specs.WEIGHT_SPACES[space]())
    code, (c_in, c_out) = code_of(plan), channels
    x, grad = (torch.empty(8, plan.spec.numel, c, dtype=dtype) for c in channels)
    theta = torch.empty(1, plan.num_terms, c_in, c_out, dtype=dtype)
    bias = torch.empty(1, plan.num_biases, c_out, dtype=dtype)
    from weightops.ops.equivariant import triton as kernels

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        found = launches(lambda: kernels.linear(x, theta, bias, code))
        found += launches(lambda: kernels.backward(x, theta, grad, code, True))
    finally:
        torch.set_float32_matmul_precision(before)
    assert {launch.kernel.__name__ for launch in found} == {"pool", "mix", "outer", "gather"}
    precise = dtype == torch.float64 or (dtype == torch.float32 and precision == "highest")
    for launch in found:
        for architecture in ARCHITECTURES:
            check_launch(launch, architecture, precise, spilled)


def test_a_layer_is_four_launches() -> None:
    plan = EquivariantPlan(specs.WEIGHT_SPACES["gru"]())
    x, theta = torch.empty(8, plan.spec.numel, 16), torch.empty(1, plan.num_terms, 16, 16)
    from weightops.ops.equivariant import triton as kernels

    found = launches(lambda: kernels.linear(x, theta, None, code_of(plan)))
    assert [launch.kernel.__name__ for launch in found] == ["pool", "pool", "mix", "mix"]


@pytest.mark.parametrize(
    ("space", "channels", "dtype", "precision"),
    [
        ("gru", (16, 16), torch.float32, "highest"),
        ("cnn", (32, 32), torch.bfloat16, "highest"),
    ],
    ids=str,
)
def test_kernels_fit_and_use_tensor_cores(
    space: str, channels: tuple[int, int], dtype: torch.dtype, precision: str
) -> None:
    check_compiled(space, channels, dtype, precision)


@pytest.mark.slow
@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)
@pytest.mark.parametrize("precision", ["highest", "high"])
@pytest.mark.parametrize("channels", [(1, 16), (16, 16), (32, 1), (64, 64)], ids=str)
@pytest.mark.parametrize("space", ["mlp", "cnn", "gru"])
def test_kernels_fit_and_use_tensor_cores_everywhere(
    space: str, channels: tuple[int, int], dtype: torch.dtype, precision: str
) -> None:
    if precision == "high" and dtype != torch.float32:
        pytest.skip("TF32 is for float32")
    # ptxas may lay a word or two aside so that one more block fits a multiprocessor.
    check_compiled(space, channels, dtype, precision, spilled=16)
