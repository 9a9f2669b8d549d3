"""The CUDA kernels against the reference; skipped where there is no GPU."""

import pytest
import torch
from torch import Tensor

import weightops
from weightops import EquivariantPlan, _load, info, testing
from weightops.ops.equivariant import grouped
from weightops.ops.equivariant.plan import code_of
from weightops.ops.permute import reference
from weightops.ops.permute.plan import plan

pytestmark = pytest.mark.gpu
DTYPES = [
    torch.bool,
    torch.int8,
    torch.int16,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.int64,
    torch.float64,
    torch.complex64,
    torch.complex128,
]


def cuda(perms: dict[str, Tensor]) -> dict[str, Tensor]:
    return {label: index.cuda() for label, index in perms.items()}


def poison(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype, device="cuda")


def test_the_kernels_are_loaded() -> None:
    assert _load.reasons["cuda"] is None
    assert all(_load.has_kernel(name, "cuda") for name in ("permute", "permute_axes", "merge"))


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_permute_equals_reference(dtype: torch.dtype, inverse: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        spec = testing.random_spec(generator)
        flat = (10 * torch.randn(3, spec.numel, generator=generator)).to(dtype)
        perms = spec.random_permutations(3, generator)
        index = testing.pack(perms, spec) if spec.labels else torch.zeros(1, 0, dtype=torch.int64)
        expected = reference.permute(flat, index, plan(spec), inverse)
        given = weightops.permute(flat.cuda(), cuda(perms), spec, inverse=inverse)
        torch.testing.assert_close(given.cpu(), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (3, 7, 5), (2, 33, 2049), (4, 64, 31, 9), (2, 5, 6, 7, 3)]
)
def test_permute_axes_writes_everything(shape: tuple[int, ...]) -> None:
    x, perms = testing.PermuteAxes(shape).make("cuda")
    out = poison(*shape)
    assert weightops.permute_axes(x, perms, out=out) is out
    x_cpu, perms_cpu = testing.PermuteAxes(shape).make()
    expected = weightops.permute_axes(x_cpu, perms_cpu)
    torch.testing.assert_close(out.cpu(), expected, rtol=0, atol=0)
    back = weightops.permute_axes(out, perms, inverse=True)
    torch.testing.assert_close(back, x, rtol=0, atol=0)
    transposed = weightops.permute_axes(x.mT.contiguous().mT, perms)
    torch.testing.assert_close(transposed.cpu(), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)
@pytest.mark.parametrize(("networks", "outputs"), [(1, 1), (3, 5), (40, 2)])
def test_merge_equals_float64(networks: int, outputs: int, dtype: torch.dtype) -> None:
    problem = testing.Networks("resnet20", testing.resnet20_spec(), networks, dtype)
    flat, perms = problem.make("cuda")
    weights = torch.randn(outputs, networks, device="cuda", dtype=torch.float64)
    given = weightops.merge(flat, weights, problem.spec, perms=perms)
    expected = weights @ weightops.permute(flat, perms, problem.spec).double()
    tolerance = {
        torch.float64: 1e-12,
        torch.float32: 1e-5,
        torch.float16: 2e-3,
        torch.bfloat16: 1e-2,
    }[dtype]
    torch.testing.assert_close(given.double(), expected, rtol=tolerance, atol=tolerance * networks)


def test_real_sizes_and_streams() -> None:
    problem = testing.Networks("vgg16", testing.vgg16_spec(), 2)
    flat, perms = problem.make()
    expected = weightops.permute(flat, perms, problem.spec)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        given = weightops.permute(flat.cuda(), cuda(perms), problem.spec)
    stream.synchronize()
    torch.testing.assert_close(given.cpu(), expected, rtol=0, atol=0)


def test_a_captured_graph_replays() -> None:
    problem = testing.Networks("resnet20", testing.resnet20_spec(), 2)
    flat, perms = problem.make("cuda")
    out = torch.empty_like(flat)
    weightops.permute(flat, perms, problem.spec, out=out)
    expected = out.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        weightops.permute(flat, perms, problem.spec, out=out)
    out.zero_()
    graph.replay()
    torch.testing.assert_close(out, expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["none", "grad", "jvp", "vmap", "vmap(grad)", "hessian"])
def test_transforms(name: str) -> None:
    spec = testing.mlp_spec(2, 3, 2)
    perms = cuda(spec.random_permutations(2, torch.Generator().manual_seed(0)))
    index = testing.pack(perms, spec)
    x = torch.randn(2, spec.numel, dtype=torch.float64, device="cuda")
    testing.check_transform(
        name,
        "eager",
        lambda x: weightops.permute(x, perms, spec),
        lambda x: reference.permute(x, index, plan(spec)),
        x,
    )


def test_assign_and_bad_input() -> None:
    score = torch.randn(5, 20, 30, device="cuda")
    torch.testing.assert_close(weightops.assign(score).cpu(), weightops.assign(score.cpu()))
    x = torch.zeros(1, 4, device="cuda")
    for bad in ([0, 1, 1, 2], [0, 1, 2, 4], [-1, 0, 1, 2]):
        index = torch.tensor(bad, device="cuda")
        with pytest.raises(ValueError, match=r"perms\[0\] is no permutation"):
            weightops.permute_axes(x, [index])
    index = torch.arange(4, device="cuda")
    weightops.permute_axes(x, [index])
    index[0] = 3
    with pytest.raises(ValueError, match="3 stands 2 times"):
        weightops.permute_axes(x, [index])
    with pytest.raises(ValueError, match=r"perms\[0\] is on cpu, but x is on cuda"):
        weightops.permute_axes(x, [index.cpu()])


def test_equivariant_layers_are_served_by_triton() -> None:
    for name in ("equivariant_linear", "equivariant_backward"):
        assert info.collect()["ops"][name]["cuda"] == "Triton"


@pytest.mark.parametrize("space", ["mlp", "cnn", "rnn", "transformer", "gru"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.bfloat16, 2e-2), (torch.float32, 1e-5), (torch.float64, 1e-12)],
    ids=str,
)
def test_equivariant_layers_equal_float64(space: str, dtype: torch.dtype, tolerance: float) -> None:
    plan = EquivariantPlan(testing.WEIGHT_SPACES[space]())
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        made = torch.randn(*shape, generator=generator, device="cuda", dtype=torch.float64) * scale
        return made.to(dtype).requires_grad_()

    x, theta = normal(4, plan.spec.numel, 16), normal(plan.num_terms, 16, 16, scale=0.05)
    bias, grad = normal(plan.num_biases, 16), normal(4, plan.spec.numel, 16).detach()
    y = weightops.equivariant_linear(x, theta, bias, plan)
    given = [y, *torch.autograd.grad(y, (x, theta, bias), grad)]
    arguments = [each.detach().double() for each in (x, theta[None], bias[None])]
    code = code_of(plan)
    expected = [grouped.linear(*arguments, code)]
    expected += grouped.backward(arguments[0], arguments[1], grad.double(), code, True)
    for got, wanted in zip(given, expected, strict=True):
        error = (got.double() - wanted.reshape(got.shape)).abs().max()
        assert error <= tolerance * wanted.abs().max()


@pytest.mark.parametrize("channels", [(1, 16), (32, 1), (70, 3), (64, 64)], ids=str)
def test_equivariant_layers_of_any_channels_and_own_parameters(channels: tuple[int, int]) -> None:
    plan = EquivariantPlan(testing.rnn_spec(4, 20, 3))
    c_in, c_out = channels
    x = torch.randn(6, plan.spec.numel, c_in, device="cuda", dtype=torch.float64)
    grad = torch.randn(6, plan.spec.numel, c_out, device="cuda", dtype=torch.float64)
    theta = torch.randn(3, plan.num_terms, c_in, c_out, device="cuda", dtype=torch.float64)
    code = code_of(plan)
    raw = torch.ops.weightops
    given = [
        raw.equivariant_linear(x, theta, None, code),
        *raw.equivariant_backward(x, theta, grad, code, True),
    ]
    expected = [grouped.linear(x, theta, None, code), *grouped.backward(x, theta, grad, code, True)]
    for got, wanted in zip(given, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


def test_equivariant_layers_replay_and_repeat() -> None:
    plan = EquivariantPlan(testing.rnn_spec())
    x = torch.randn(3, plan.spec.numel, 16, device="cuda")
    theta = torch.randn(plan.num_terms, 16, 16, device="cuda")
    expected = weightops.equivariant_linear(x, theta, None, plan)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = weightops.equivariant_linear(x, theta, None, plan)
    out.zero_()
    graph.replay()
    torch.testing.assert_close(out, expected, rtol=0, atol=0)


def test_features_of_a_whole_population_beyond_32_bits() -> None:
    if torch.cuda.mem_get_info()[0] < 60 << 30:
        pytest.skip("needs 60 GiB")
    plan = EquivariantPlan(testing.labelled_mlp_spec(784, 128, 128, 10))
    batch = 2**31 // (plan.spec.numel * 16) + 2
    x = torch.randn(batch, plan.spec.numel, 16, device="cuda")
    theta = torch.randn(plan.num_terms, 16, 16, device="cuda")
    y = weightops.equivariant_linear(x, theta, None, plan)
    for b in (0, batch // 2, batch - 1):
        one = weightops.equivariant_linear(x[b : b + 1], theta, None, plan)
        torch.testing.assert_close(y[b : b + 1], one, rtol=1e-5, atol=1e-4)
