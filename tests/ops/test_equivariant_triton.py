"""Triton kernels of equivariant layers without a GPU: right in the interpreter, and within a GPU's means."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from triton_checks import ARCHITECTURES, Launch, check_launch, interpret, run
from triton_checks import launches as launched

from weightops import EquivariantPlan
from weightops.ops.equivariant.plan import code_of
from weightops.testing import specs

pytest.importorskip("triton")

PRODUCTS = {"mix", "outer"}


def test_in_the_interpreter() -> None:
    interpret(Path(__file__).parent / "equivariant_interpreted.py")


def test_the_kernels_serve_where_torch_has_cuda_and_are_imported_when_called() -> None:
    code = (
        "import sys, torch; torch.version.cuda = '13.0'; import weightops; from weightops import info; "
        "assert 'triton' not in sys.modules; ops = info.collect()['ops']; "
        "print({ops[f'equivariant_{n}']['cuda'] for n in ('linear', 'backward')})"
    )
    out = run("-c", code, WEIGHTOPS_DISABLE_NATIVE="1")
    assert out.strip() == "{'Triton'}"


def launches(call: Callable[[], object]) -> list[Launch]:
    from weightops.ops.equivariant import triton as module

    return launched(call, {module: ("pool", "mix", "outer", "gather")})


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
            multiplies = launch.kernel.__name__ in PRODUCTS and not precise
            check_launch(launch, architecture, on_tensor_cores=multiplies, spilled=spilled)


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
