"""The manifold ops on a GPU against the definition; skipped where there is none.

Most of the time goes by while Triton compiles, so ``make gpu-manifold`` runs this file by itself.
"""

import pytest
import torch
from torch import Tensor

import weightops
from weightops import info, testing

pytestmark = pytest.mark.gpu
#: parts of the largest value; synthesised weights are rounded to float16 and bfloat16
TOLERANCES = {
    torch.float16: 4e-3,
    torch.bfloat16: 3e-2,
    torch.float32: 1e-5,
    torch.float64: 1e-12,
}


def test_weight_manifolds_are_served_by_triton() -> None:
    for name in (
        "manifold_contract",
        "manifold_contract_backward",
        "synthesize",
        "synthesize_update",
    ):
        assert info.collect()["ops"][name]["cuda"].startswith("Triton")


def check(
    problem: testing.ManifoldLinear | testing.ManifoldConv, tolerance: float | None = None
) -> None:
    """A layer and its gradients on the GPU against the definition in float64."""
    tolerance = tolerance or TOLERANCES[problem.dtype]
    images = isinstance(problem, testing.ManifoldConv)

    def run(args: list[Tensor], index: Tensor | None, grad: Tensor | None) -> list[Tensor]:
        at = [value.clone().requires_grad_() for value in args]
        if images:
            y = weightops.manifold_conv2d(*at, index=index, padding=problem.padding)
        else:
            y = weightops.manifold_linear(*at, index=index)
        grad = torch.randn(y.shape).to(y.dtype).to(y.device) if grad is None else grad
        return [grad, y.detach(), *torch.autograd.grad(y, at, grad)]

    *args, index = problem.make()
    on_gpu = [value.cuda() for value in args]
    given = run(on_gpu, None if index is None else index.cuda(), None)
    expected = run([v.double() for v in args], index, given[0].cpu().double())
    for got, wanted in zip(given[1:], expected[1:], strict=True):
        error = (got.cpu().double() - wanted).abs().max()
        assert error <= tolerance * wanted.abs().max()


@pytest.mark.parametrize("regime", testing.REGIMES)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(
    "sizes", [(1, 5, 3), (7, 130, 97), (300, 64, 128), (2048, 257, 65)], ids=str
)
def test_layers_on_manifolds_equal_float64(
    regime: str, dtype: torch.dtype, sizes: tuple[int, int, int]
) -> None:
    check(testing.ManifoldLinear(regime, *sizes, dtype=dtype))


@pytest.mark.parametrize("regime", testing.REGIMES)
@pytest.mark.parametrize("bases", [1, 9, 12])
def test_layers_of_any_number_of_bases(regime: str, bases: int) -> None:
    check(testing.ManifoldLinear(regime, 300, 64, 128, bases=bases))


@pytest.mark.parametrize("regime", testing.REGIMES)
@pytest.mark.parametrize(("precision", "tolerance"), [("high", 1e-5), ("medium", 1e-2)])
def test_layers_on_manifolds_are_as_precise_as_was_asked(
    regime: str, precision: str, tolerance: float
) -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        # Of one context the products are torch's, which takes both to allow TF32.
        allowed = 1e-2 if regime == "shared" else tolerance
        check(testing.ManifoldLinear(regime, 1024, 256, 192), allowed)
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("regime", testing.REGIMES)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("sizes", [(6, 17, 33, 9, 5), (32, 64, 64, 16, 3)], ids=str)
def test_convolutions_on_manifolds_equal_float64(
    regime: str, dtype: torch.dtype, sizes: tuple[int, ...]
) -> None:
    # cuDNN may take TF32 unless told otherwise; products of "highest" precision may not.
    assert torch.backends.cudnn.conv.fp32_precision == "tf32"
    check(testing.ManifoldConv(regime, *sizes, dtype=dtype))


def test_convolutions_on_manifolds_of_every_geometry() -> None:
    generator = torch.Generator().manual_seed(0)
    for options in (
        {"stride": (2, 3), "padding": 1},
        {"dilation": (1, 2), "padding": (0, 3), "groups": 2},
        {"padding": "same", "groups": 4},
    ):
        channels = 4 // int(options.get("groups", 1))
        x = torch.randn(5, 4, 11, 13, generator=generator, dtype=torch.float64)
        weight = torch.randn(3, 8, channels, 3, 3, generator=generator, dtype=torch.float64)
        coeffs = torch.randn(5, 3, generator=generator, dtype=torch.float64)
        found = []
        for device in ("cpu", "cuda"):
            at = [
                v.to(device).requires_grad_() for v in (x.clone(), coeffs.clone(), weight.clone())
            ]
            y = weightops.manifold_conv2d(*at, **options)
            first = torch.autograd.grad(y.square().sum(), at, create_graph=True)
            second = torch.autograd.grad(sum(v.square().sum() for v in first), at)
            found.append([v.detach().cpu() for v in (y, *first, *second)])
        for expected, given in zip(*found, strict=True):
            torch.testing.assert_close(given, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("regime", testing.REGIMES)
def test_layers_on_manifolds_replay_and_repeat(regime: str) -> None:
    *args, _bias, index = testing.ManifoldLinear(regime, 1024, 96, 64).make("cuda")
    args = [value.requires_grad_() for value in args]
    grad = torch.randn(1024, 64, device="cuda")

    def run() -> list[Tensor]:
        # A bias' gradient is summed over contexts by torch's index_add, which need not repeat.
        y = weightops.manifold_linear(*args, index=index)
        return [y, *torch.autograd.grad(y, args, grad)]

    expected = [value.detach().clone() for value in run()]
    for got, wanted in zip(run(), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    for value in out:
        value.detach().zero_()
    graph.replay()
    for got, wanted in zip(out, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["none", "grad", "jvp", "vmap", "vmap(grad)", "hessian"])
def test_transforms_of_layers_on_manifolds(name: str) -> None:
    coeffs, weight = (
        torch.randn(s, device="cuda", dtype=torch.float64) for s in ((3, 2), (2, 4, 5))
    )
    index = torch.tensor([2, 0, 0, 1], device="cuda")
    testing.check_transform(
        name,
        "eager",
        lambda x: weightops.manifold_linear(x, coeffs, weight, index=index),
        lambda x: torch.einsum("nk,ni,koi->no", coeffs[index], x, weight),
        torch.randn(4, 5, device="cuda", dtype=torch.float64),
    )


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_synthesis_and_steps_equal_float64(dtype: torch.dtype) -> None:
    tolerance = TOLERANCES[dtype]
    for parameters in (1, 1000, 4099, 1 << 20):
        for bases, contexts in ((1, 1), (3, 1), (3, 8), (9, 4), (12, 20)):
            coeffs, at = testing.Synthesize(parameters, bases, contexts, dtype).make("cuda")
            out = torch.full((contexts, parameters), torch.nan, dtype=dtype, device="cuda")
            assert weightops.synthesize(coeffs, at, out=out) is out
            expected = coeffs.double() @ at.double()
            error = (out.double() - expected).abs().max()
            assert error <= tolerance * expected.abs().max()
            grad, wide = torch.randn_like(out), at.double()
            products = grad.double() @ wide.mT
            after = wide - 0.5 * coeffs.double().mT @ grad.double()
            given = weightops.synthesize_update_(at, grad, coeffs, lr=0.5)
            assert (given.double() - products).abs().max() <= 1e-4 * products.abs().max()
            assert (at.double() - after).abs().max() <= tolerance * after.abs().max()


def test_bases_of_whole_networks_beyond_32_bits() -> None:
    if torch.cuda.mem_get_info()[0] < 30 << 30:
        pytest.skip("needs 30 GiB")
    at = torch.randn(3, 2**30 + 5, device="cuda", dtype=torch.bfloat16)
    coeffs = torch.randn(3, 3, device="cuda")
    out = weightops.synthesize(coeffs, at)
    for begin in (0, 2**30 - 5):
        some = slice(begin, begin + 10)
        expected = coeffs @ at[:, some].float()
        torch.testing.assert_close(out[:, some].float(), expected, rtol=1e-2, atol=1e-2)


def test_items_beyond_32_bits() -> None:
    if torch.cuda.mem_get_info()[0] < 30 << 30:
        pytest.skip("needs 30 GiB")
    x = torch.randn(2**21 + 3, 1024, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(2, 64, 1024, device="cuda", dtype=torch.bfloat16) / 32
    coeffs = torch.randn(len(x), 2, device="cuda")
    y = weightops.manifold_linear(x, coeffs, weight)
    some = slice(2**21 - 4, None)
    expected = weightops.manifold_linear(x[some], coeffs[some], weight)
    torch.testing.assert_close(y[some], expected, rtol=1e-2, atol=1e-2)
