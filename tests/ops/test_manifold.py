"""Layers on weight manifolds and synthesis against loops over samples in float64."""

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import weightops.info
from weightops import (
    manifold_conv1d,
    manifold_conv2d,
    manifold_linear,
    synthesize,
    synthesize_update_,
    testing,
)
from weightops.ops.manifold import choice
from weightops.ops.manifold.choice import by_torch
from weightops.testing import REGIMES, ManifoldConv, ManifoldLinear, Synthesize

HALVES = [torch.bfloat16, torch.float16]
DTYPES = [torch.float32, torch.float64, *HALVES]
# Around the edges of vectors and tiles.
EDGES = [1, 2, 15, 16, 17, 31, 32, 33, 63, 97, 130, 257]
SIZES = [
    *(size for e in EDGES for size in ((e, 17, 33), (33, e, 17), (17, 33, e))),
    # Depths of the product, of its gradient by x and of that by weight.
    *((33, 1100, 63), (33, 63, 1100), (1100, 17, 33)),
]

Layer = Callable[[Tensor, Tensor, Tensor | None], Tensor]


@pytest.fixture(params=["highest", "high", "medium"])
def precision(request: pytest.FixtureRequest) -> Any:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield request.param
    torch.set_float32_matmul_precision(before)


#: how far from exact a result may be, as a part of the sum of its terms' magnitudes
BOUNDS: dict[Any, float] = {
    torch.float64: 2**-44,
    torch.float32: 2**-20,
    # A coefficient times a number is rounded too, as eager code does, where it is multiplied.
    torch.bfloat16: 2**-7,
    torch.float16: 2**-11 + 2**-16,
    "high": 2**-14,
    "medium": 2**-6,
}


class Exact(NamedTuple):
    """Values and gradients (by x, coeffs, weight, bias), and the sums of magnitudes they come from."""

    value: Tensor
    gradients: Sequence[Tensor]
    magnitudes: Sequence[Tensor]


def by_samples(
    layer: Layer, x: Tensor, coeffs: Tensor, weight: Tensor, bias: Tensor | None, index: Any
) -> Tensor:
    """The definition: every sample has weights of its own."""
    found = []
    for n, sample in enumerate(x):
        c = coeffs if coeffs.dim() == 1 else coeffs[n if index is None else index[n]]
        w = torch.tensordot(c, weight, 1)
        found.append(layer(sample, w, None if bias is None else c @ bias))
    return torch.stack(found)


def of_items(coeffs: Tensor, index: Tensor | None, items: int) -> Tensor:
    return coeffs.expand(items, -1) if index is None else coeffs[index]


def leaves(args: Sequence[Tensor | None], dtype: torch.dtype | None = None) -> list:
    return [None if a is None else a.detach().to(dtype or a.dtype).requires_grad_() for a in args]


def cotangent(like: Tensor, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(like.shape, generator=generator).to(dtype)


def solve(layer: Layer, args: Sequence[Tensor | None], index: Tensor | None) -> Exact:
    dtype = args[0].dtype
    both = []
    for make in (lambda v: v, torch.abs):
        at = leaves([None if a is None else make(a.double()) for a in args])
        value = by_samples(layer, *at, index)
        value.backward(make(cotangent(value, dtype).double()))
        both.append((value.detach(), [a.grad for a in at if a is not None]))
    (value, gradients), (size, sizes) = both
    return Exact(value, gradients, [size, *sizes])


def check(
    op: Callable,
    layer: Layer,
    args: Sequence[Tensor | None],
    index: Tensor | None = None,
    bound: float | None = None,
    exact: Exact | None = None,
) -> None:
    """``op`` and its gradients, as close to exact as ``bound`` allows."""
    exact = exact or solve(layer, args, index)
    at = leaves(args)
    dtype = at[0].dtype
    y = op(*at, index=index)
    assert y.dtype == dtype
    assert y.shape == exact.value.shape
    y.backward(cotangent(y, dtype))
    given = [y, *(a.grad for a in at if a is not None)]
    bound = bound or BOUNDS[dtype]
    expected = [exact.value, *exact.gradients]
    for name, g, e, m in zip(("y", "x", "coeffs", "weight", "bias"), given, expected, exact[2]):
        error = (g.detach().double() - e).abs() - bound * m
        assert not g.isnan().any(), name
        # Half precision has no smaller numbers than this.
        assert (error <= 1e-7 * (dtype in HALVES)).all(), f"{name}: {error.max()} too much"


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = x @ weight.mT
    return y if bias is None else y + bias


@cache
def solved(problem: ManifoldLinear) -> tuple[Sequence[Tensor], Tensor | None, Exact]:
    *args, index = problem.make()
    return args, index, solve(linear, args, index)


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_size(regime: str, size: tuple[int, int, int], precision: str) -> None:
    bases = 1 + SIZES.index(size) % 9
    args, index, exact = solved(ManifoldLinear(regime, *size, bases=bases, groups=5))
    check(manifold_linear, linear, args, index, BOUNDS.get(precision), exact)


@pytest.mark.parametrize("regime", REGIMES)
def test_every_batch(regime: str, precision: str) -> None:
    for batch in (*range(1, 71), 300):
        problem = ManifoldLinear(regime, batch, 24, 20, bases=1 + batch % 9, groups=1 + batch % 7)
        args, index, exact = solved(problem)
        check(manifold_linear, linear, args, index, BOUNDS.get(precision), exact)


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype(regime: str, dtype: torch.dtype) -> None:
    for bases, (batch, inputs, outputs) in enumerate([(1, 1, 1), (2, 97, 31), (37, 67, 130)], 1):
        problem = ManifoldLinear(regime, batch, inputs, outputs, bases, dtype=dtype)
        *args, index = problem.make()
        check(manifold_linear, linear, args, index)
        args[1] = args[1].to(torch.promote_types(dtype, torch.float32))
        check(manifold_linear, linear, args, index)
        check(manifold_linear, linear, [*args[:3], None], index)


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("size", [(8, 257, 31), (65, 130, 97), (130, 1100, 33)], ids=str)
def test_errors_are_at_most_twice_those_of_eager(
    regime: str, dtype: torch.dtype, size: tuple[int, int, int]
) -> None:
    *args, index = ManifoldLinear(regime, *size, bases=4, dtype=dtype).make()
    exact = solve(linear, args, index)

    def eager(
        x: Tensor, coeffs: Tensor, weight: Tensor, bias: Tensor, index: Tensor | None
    ) -> Tensor:
        c = of_items(coeffs, index, x.shape[0])
        return torch.einsum("nk,ni,koi->no", c, x, weight) + c @ bias

    errors = []
    for op in (manifold_linear, eager):
        at = leaves(args)
        y = op(*at, index=index)
        y.backward(cotangent(y, dtype))
        given = [y.detach(), *(a.grad for a in at)]
        expected = [exact.value, *exact.gradients]
        errors.append([float((g - e).norm() / e.norm()) for g, e in zip(given, expected)])
    # Where a sum happens to come out right to the last bit there is still one rounding.
    rounding = torch.finfo(dtype).eps
    for name, ours, theirs in zip(("y", "x", "coeffs", "weight", "bias"), *errors):
        assert ours <= 2 * theirs + rounding, name


INDICES = {
    "sorted": torch.arange(40) // 6,
    "reversed": torch.arange(40).flip(0) // 6,
    "shuffled": torch.randint(7, (40,), generator=torch.Generator().manual_seed(2)),
    "int32": torch.randint(7, (40,), generator=torch.Generator().manual_seed(3)).int(),
    "of two": torch.arange(40) % 2 * 4 + 1,
    "of one": torch.full((40,), 3),
    "expanded": torch.tensor([6]).expand(40),
    "strided": torch.randint(7, (80,), generator=torch.Generator().manual_seed(4))[::2],
}


@pytest.mark.parametrize("kind", INDICES)
@pytest.mark.parametrize("groups", [9, 64])
def test_groups_in_any_order_some_empty(kind: str, groups: int) -> None:
    index = INDICES[kind]
    *args, _ = ManifoldLinear("grouped", 40, 19, 35, groups=groups).make()
    check(manifold_linear, linear, args, index)
    x, coeffs, weight, bias = leaves(args)
    manifold_linear(x, coeffs, weight, bias, index=index).square().sum().backward()
    unused = torch.ones(groups, dtype=torch.bool).index_fill(0, index.long(), False)
    assert unused.any()
    assert (coeffs.grad[unused] == 0).all()
    assert (coeffs.grad[~unused] != 0).all()


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("lead", [(4, 5), (1, 17), (17, 1), (3, 2, 5), (2, 33)], ids=str)
def test_axes_between_batch_and_inputs(regime: str, lead: tuple[int, ...]) -> None:
    _, *args, index = ManifoldLinear(regime, lead[0], 13, 18).make()
    x = torch.randn(*lead, 13, generator=torch.Generator().manual_seed(0))
    check(manifold_linear, linear, [x, *args], index)


def test_a_vector_has_the_one_context() -> None:
    x, coeffs, weight, bias, _ = ManifoldLinear("shared", 1, 5, 7).make()
    y = manifold_linear(x[0], coeffs, weight, bias)
    torch.testing.assert_close(y, manifold_linear(x, coeffs, weight, bias)[0])


def with_strides(value: Tensor, kind: str) -> Tensor:
    """``value``, or for ``expanded`` its first entry repeated, laid out in another way."""
    if kind == "transposed":
        return value.mT.contiguous().mT if value.dim() > 1 else value
    if kind == "sliced":
        wide = torch.full([2 * n + 1 for n in value.shape], torch.nan, dtype=value.dtype)
        inner = wide[tuple(slice(1, None, 2) for _ in value.shape)]
        return inner.copy_(value)
    return value[:1].expand(value.shape)


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("kind", ["transposed", "sliced", "expanded"])
def test_any_strides(regime: str, kind: str) -> None:
    *args, index = ManifoldLinear(regime, 21, 18, 34, dtype=torch.float64).make()
    for n in range(4):
        changed = [*args[:n], with_strides(args[n], kind), *args[n + 1 :]]
        expected = manifold_linear(*(a.contiguous() for a in changed), index=index)
        torch.testing.assert_close(manifold_linear(*changed, index=index), expected)
    changed = [with_strides(a, kind) for a in args]
    check(manifold_linear, linear, changed, index)
    exact = solve(linear, args, index)
    at = leaves(args)
    y = manifold_linear(*at, index=index)
    y.backward(with_strides(cotangent(y, y.dtype), kind))
    if kind != "expanded":
        for value, gradient in zip(at, exact.gradients):
            torch.testing.assert_close(value.grad, gradient)


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("empty", ["batch", "inputs", "outputs", "between"])
def test_nothing_to_do(regime: str, empty: str) -> None:
    sizes = {"batch": 3, "inputs": 4, "outputs": 5} | {empty: 0}
    between = sizes.pop("between", 2)
    problem = ManifoldLinear(regime, **sizes)
    x, *args, index = problem.make()
    at = leaves([x[:, None].expand(-1, between, -1), *args])
    y = manifold_linear(*at, index=index)
    y.sum().backward()
    assert y.shape == (problem.batch, between, problem.outputs)
    assert all(a.grad.shape == a.shape for a in at)
    if empty == "inputs":
        bias = of_items(at[1], index, 3) @ at[3]
        torch.testing.assert_close(y, bias[:, None].expand(3, 2, 5))
    else:
        assert all((a.grad == 0).all() for a in at)


def test_a_batch_and_contexts_that_are_empty() -> None:
    weight, index = torch.randn(3, 5, 4), torch.zeros(0, dtype=torch.int64)
    for coeffs, given in ((torch.zeros(0, 3), None), (torch.zeros(0, 3), index)):
        assert manifold_linear(torch.zeros(0, 4), coeffs, weight, index=given).shape == (0, 5)


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_stays_where_it_belongs(regime: str, dtype: torch.dtype) -> None:
    x, coeffs, weight, bias, index = ManifoldLinear(regime, 37, 33, 35, dtype=dtype).make()
    at_x, at_weight = x.clone(), weight.clone()
    at_x[5, 17] = torch.nan
    at_weight[1, 20, 3] = torch.nan
    in_rows = manifold_linear(at_x, coeffs, weight, bias, index=index).isnan()
    assert in_rows[5].all()
    assert in_rows.sum() == 35
    in_columns = manifold_linear(x, coeffs, at_weight, bias, index=index).isnan()
    assert in_columns[:, 20].all()
    assert in_columns.sum() == 37
    if regime != "shared":
        at_coeffs = coeffs.clone()
        at_coeffs[3, 1] = torch.nan
        rows = manifold_linear(x, at_coeffs, weight, bias, index=index).isnan()
        hit = torch.arange(37) == 3 if index is None else index == 3
        assert torch.equal(rows, hit[:, None].expand(37, 35))


def test_results_do_not_depend_on_the_rest_of_the_batch() -> None:
    x, coeffs, weight, bias, index = ManifoldLinear("grouped", 65, 33, 47).make()
    assert index is not None
    whole = manifold_linear(x, coeffs, weight, bias, index=index)
    order = torch.randperm(65, generator=torch.Generator().manual_seed(0))
    shuffled = manifold_linear(x[order], coeffs, weight, bias, index=index[order])
    torch.testing.assert_close(shuffled, whole[order])
    each = manifold_linear(x, coeffs[index], weight, bias)
    torch.testing.assert_close(each, whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_small_calls_by_torch(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "by_torch", by_torch)
    for rows, inputs, outputs in [(1, 17, 33), (31, 5, 2), (128, 33, 17)]:
        problem = ManifoldLinear("per-sample", rows, inputs, outputs, 3, dtype=dtype)
        x, coeffs, weight, bias, index = problem.make()
        assert by_torch(x.requires_grad_(), coeffs, weight, index)
        assert "torch" in weightops.info.manifold(x, coeffs, weight)
        for bias_or_none in (bias, None):
            check(manifold_linear, F.linear, [x.detach(), coeffs, weight, bias_or_none], index)


def test_where_torch_serves() -> None:
    def asks(rows: int, size: int, dtype: torch.dtype = torch.float32, **options: Any) -> bool:
        x, weight = torch.zeros(rows, size, dtype=dtype), torch.zeros(3, size, size, dtype=dtype)
        gradients = options.pop("gradients", True)
        return by_torch(
            x.requires_grad_(gradients), torch.zeros(rows, 3), weight, options.get("index")
        )

    assert asks(128, 64)
    assert not asks(129, 64)
    assert asks(64, 64, gradients=False)
    assert not asks(65, 64, gradients=False)
    assert asks(32, 1024)
    assert not asks(33, 1024)
    assert not asks(8, 1024, gradients=False)
    assert not asks(8, 64, torch.bfloat16)
    assert not asks(8, 64, index=torch.zeros(8, dtype=torch.int64))
    with torch.no_grad():
        assert not asks(100, 64)


# channels, outputs, groups, kernel, options
CONVS: list[tuple[int, int, int, tuple[int, ...], dict[str, Any]]] = [
    (1, 1, 1, (1, 1), {}),
    (3, 5, 1, (3, 3), {"padding": 1}),
    (4, 6, 2, (3, 2), {"stride": (2, 1), "padding": (1, 0)}),
    (6, 6, 6, (3, 3), {"padding": 2, "dilation": 2}),
    (2, 17, 1, (5, 5), {"stride": 3, "padding": 4, "dilation": (1, 2)}),
    (17, 3, 1, (1, 1), {"stride": 2}),
    (5, 7, 1, (7, 5), {"padding": "valid"}),
    (4, 8, 4, (3, 5), {"padding": "same", "dilation": (2, 1)}),
    (3, 4, 1, (2, 4), {"padding": "same"}),
    (33, 31, 1, (3, 3), {"padding": 1}),
    (63, 130, 1, (3, 3), {"stride": 2}),
    (64, 64, 2, (1, 3), {"padding": (0, 1)}),
    (2, 3, 1, (3,), {}),
    (4, 6, 2, (4,), {"stride": 2, "padding": 3}),
    (5, 5, 5, (3,), {"dilation": 3}),
    (16, 33, 1, (2,), {"padding": "same"}),
    # Channels that fill bfloat16 tiles.
    (24, 32, 1, (3, 3), {"padding": 1}),
    (48, 62, 2, (3, 2), {"padding": (3, 0), "dilation": (2, 1)}),
    (32, 27, 1, (1, 1), {"padding": 1}),
    (96, 64, 2, (3,), {"stride": 2, "padding": 1}),
]


def convolution(case: Any, regime: str, dtype: torch.dtype = torch.float32) -> tuple:
    """The op, what it does to one sample, its arguments and index."""
    channels, outputs, groups, kernel, options = case
    bases = 1 + CONVS.index(case) % 9
    problem = ManifoldConv(regime, 6, channels, outputs, 1, 3, bases, groups=4, dtype=dtype)
    _, coeffs, _, bias, index = problem.make()
    generator = torch.Generator().manual_seed(0)
    image = (9, 11) if len(kernel) == 2 else (23,)
    x = torch.randn(6, channels, *image, generator=generator).to(dtype)
    shape = (bases, outputs, channels // groups, *kernel)
    weight = torch.randn(shape, generator=generator).to(dtype)
    ours, torchs = (manifold_conv2d, F.conv2d) if len(kernel) == 2 else (manifold_conv1d, F.conv1d)
    options = options | {"groups": groups}

    def layer(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return torchs(x[None], weight, bias, **options)[0]

    return partial(ours, **options), layer, [x, coeffs, weight, bias], index


EVEN = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


@EVEN
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("case", CONVS, ids=str)
def test_convolutions(case: Any, regime: str, precision: str) -> None:
    op, layer, args, index = convolution(case, regime)
    check(op, layer, args, index, BOUNDS.get(precision))


@EVEN
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("dtype", [torch.float64, *HALVES], ids=str)
def test_convolutions_of_every_dtype(regime: str, dtype: torch.dtype) -> None:
    for case in CONVS[1:4] + CONVS[13:15] + CONVS[16:18]:
        op, layer, args, index = convolution(case, regime, dtype)
        check(op, layer, args, index)
        check(op, layer, [*args[:3], None], index)


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("pixels", [1, 2, 7, 16, 33])
def test_convolutions_of_every_image_size(regime: str, pixels: int) -> None:
    for batch, kernel in ((1, 1), (2, 3), (9, 5)):
        problem = ManifoldConv(regime, batch, 3, 4, pixels, kernel, bases=1 + pixels % 9)
        *args, index = problem.make()

        def layer(x: Tensor, w: Tensor, b: Tensor | None, pad: int = problem.padding) -> Tensor:
            return F.conv2d(x[None], w, b, padding=pad)[0]

        check(partial(manifold_conv2d, padding=problem.padding), layer, args, index)


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("batch", [1, 3])
def test_convolutions_of_more_pixels_than_are_summed_at_a_time(regime: str, batch: int) -> None:
    *args, index = ManifoldConv(regime, batch, 24, 40, 37, 3, bases=2).make()

    def layer(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        return F.conv2d(x[None], w, b, padding=1)[0]

    check(partial(manifold_conv2d, padding=1), layer, args, index)


@pytest.mark.parametrize("kind", ["channels last", "transposed", "sliced", "expanded"])
@pytest.mark.parametrize("regime", REGIMES)
def test_convolutions_of_any_strides(regime: str, kind: str) -> None:
    op, layer, args, index = convolution(CONVS[2], regime, torch.float64)
    if kind == "channels last":
        args[0] = args[0].to(memory_format=torch.channels_last)
    else:
        args = [with_strides(a, kind) for a in args]
    check(op, layer, args, index)


@pytest.mark.parametrize("regime", REGIMES)
def test_convolution_of_an_empty_batch(regime: str) -> None:
    *args, index = ManifoldConv(regime, 0, 2, 3, 5).make()
    at = leaves(args)
    y = manifold_conv2d(*at, index=index, padding=1)
    y.sum().backward()
    assert y.shape == (0, 3, 5, 5)
    assert all((a.grad == 0).all() and a.grad.shape == a.shape for a in at)


PARAMETERS = [*range(0, 36), 63, 64, 65, 97, 130, 257, 1021, 4099, 70001]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("contexts", [0, 1, 2, 3, 8])
def test_synthesize_of_every_size(dtype: torch.dtype, contexts: int) -> None:
    for n, parameters in enumerate(PARAMETERS):
        bases = (1 + n % 9) if n % 10 else 31
        at = leaves(Synthesize(parameters, bases, contexts, dtype).make())
        y = synthesize(*at)
        assert y.dtype == dtype
        g = cotangent(y, dtype)
        y.backward(g)
        wide = [a.detach().double() for a in (*at, g)]
        pairs = ((wide[0], wide[1]), (wide[2], wide[1].mT), (wide[0].mT, wide[2]))
        for given, (a, b) in zip((y, at[0].grad, at[1].grad), pairs):
            bound = BOUNDS[dtype] * (a.abs() @ b.abs()) + 1e-7 * (dtype in HALVES)
            assert ((given.detach().double() - a @ b).abs() <= bound).all(), parameters
        out = torch.full((contexts, 2 * parameters), torch.nan, dtype=dtype)
        with torch.no_grad():
            for buffer in (out[:, :parameters], out[:, ::2]):
                assert synthesize(*at, out=buffer) is buffer
                torch.testing.assert_close(buffer, y, rtol=0, atol=0)
        if contexts:
            torch.testing.assert_close(synthesize(at[0][0], at[1]), y[0])


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_synthesize_rounds_halves_once(dtype: torch.dtype) -> None:
    coeffs, bases = Synthesize(4099, 5, 3, dtype).make()
    wide = coeffs.float() / 3
    exact = wide.double() @ bases.double()
    summing = 5 * 2**-24 * (wide.double().abs() @ bases.double().abs())
    error = (synthesize(wide, bases).double() - exact).abs()
    rounding = torch.finfo(dtype).eps / 2 * (exact.abs() + summing)
    assert (error <= rounding + summing + torch.finfo(dtype).smallest_normal).all()


def test_synthesize_of_any_strides() -> None:
    coeffs, bases = Synthesize(130, 4, 3, torch.float64).make()
    for kind in ("transposed", "sliced", "expanded"):
        c, b = with_strides(coeffs, kind), with_strides(bases, kind)
        for args in ((c, bases), (coeffs, b), (c, b)):
            torch.testing.assert_close(synthesize(*args), args[0] @ args[1])
    out = torch.full((2 * 3, 130), torch.nan, dtype=torch.float64)
    synthesize(coeffs, bases, out=out[::2])
    torch.testing.assert_close(out[::2], coeffs @ bases)
    assert out[1::2].isnan().all()


def test_synthesize_into_an_input_or_with_gradients_is_refused() -> None:
    coeffs, bases = Synthesize(7, 2, 2).make()
    with pytest.raises(ValueError, match=r"^synthesize: out shares memory with an input"):
        synthesize(coeffs, bases, out=bases)
    with pytest.raises(ValueError, match=r"^synthesize: out= does not record gradients"):
        synthesize(coeffs.requires_grad_(), bases, out=torch.zeros(2, 7))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("contexts", [0, 1, 2, 8])
@pytest.mark.parametrize("preconditioned", [False, True])
def test_update_is_a_step_and_a_gradient(
    dtype: torch.dtype, contexts: int, preconditioned: bool
) -> None:
    for n, parameters in enumerate((0, 1, 2, 15, 17, 33, 257, 4099)):
        k = 1 + n % 9
        coeffs, bases = Synthesize(parameters, k, contexts, dtype).make()
        grad = cotangent(bases.new_empty(contexts, parameters), dtype)
        gram = cotangent(bases.new_empty(k, k), dtype) if preconditioned else None
        wide = [v.double() for v in (coeffs, bases, grad)]
        direction = wide[0] if gram is None else wide[0] @ gram.double()
        after = wide[1] - 0.25 * direction.mT @ wide[2]
        expected = wide[2] @ wide[1].mT
        magnitude = wide[1].abs() + 0.25 * direction.abs().mT @ wide[2].abs()
        given = synthesize_update_(bases, grad, coeffs, lr=0.25, inverse_gram=gram)
        accumulate = torch.float64 if dtype == torch.float64 else torch.float32
        assert given.dtype == accumulate
        bound = 4 * BOUNDS[accumulate] * (wide[2].abs() @ wide[1].abs().mT)
        assert ((given.double() - expected).abs() <= bound).all()
        bound = 4 * BOUNDS[dtype] * magnitude + 1e-7 * (dtype in HALVES)
        assert ((bases.double() - after).abs() <= bound).all()


def test_update_of_one_network_and_of_any_strides() -> None:
    coeffs, bases = Synthesize(33, 3, 4, torch.float64).make()
    grad = cotangent(bases.new_empty(4, 33), torch.float64)
    one = bases.clone()
    given = synthesize_update_(one, grad[0], coeffs[0], lr=torch.tensor(0.5))
    torch.testing.assert_close(given, bases @ grad[0])
    torch.testing.assert_close(one, bases - 0.5 * torch.outer(coeffs[0], grad[0]))
    for kind in ("transposed", "sliced"):
        at, c, g = (with_strides(v.clone(), kind) for v in (bases, coeffs, grad))
        given = synthesize_update_(at, g, c, lr=2)
        torch.testing.assert_close(given, grad @ bases.mT)
        torch.testing.assert_close(at, bases - 2 * coeffs.mT @ grad)


def test_update_is_refused_where_it_would_be_wrong() -> None:
    coeffs, bases = Synthesize(3, 3, 3).make()
    grad = torch.randn(3, 3)
    for bad in ((bases, bases, coeffs), (bases, grad, bases)):
        with pytest.raises(ValueError, match=r"^synthesize_update_: bases shares memory"):
            synthesize_update_(*bad, lr=0.1)
    with pytest.raises(ValueError, match=r"^synthesize_update_: bases must not be an expanded"):
        synthesize_update_(bases[:1].expand(3, 3), grad, coeffs, lr=0.1)
    for n in range(3):
        args = [bases.clone(), grad.clone(), coeffs.clone()]
        args[n].requires_grad_()
        with pytest.raises(ValueError, match=r"^synthesize_update_: records no gradients"):
            synthesize_update_(*args, lr=0.1)
        with torch.no_grad():
            synthesize_update_(*args, lr=0.1)
    with pytest.raises(ValueError, match=r"not under the transforms of torch.func"):
        torch.func.vmap(lambda g: synthesize_update_(bases, g, coeffs, lr=0.1))(grad[None])


def test_update_is_noticed_by_autograd() -> None:
    coeffs, bases = Synthesize(5, 3, 2).make()
    y = synthesize(coeffs.requires_grad_(), bases)
    with torch.no_grad():
        synthesize_update_(bases, torch.ones(2, 5), coeffs, lr=0.1)
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation"):
        y.sum().backward()


def test_problems_count_the_fewest_operations() -> None:
    assert ManifoldLinear("per-sample", 8, 16, 32).flops == 2 * 8 * 16 * 32 * 3
    assert ManifoldLinear("shared", 8, 16, 32).flops == 2 * (8 + 3) * 16 * 32
    assert ManifoldLinear("grouped", 8, 16, 32, groups=2).flops == 2 * (8 + 2 * 3) * 16 * 32
    assert ManifoldLinear("grouped", 8, 16, 32, groups=8).flops == 2 * 8 * 16 * 32 * 3
    # A weight of a convolution is used at every pixel, so one of its own pays for every sample.
    assert ManifoldConv("per-sample", 2, 4, 5, 6).flops == 2 * 2 * (36 + 3) * 4 * 5 * 9
    assert ManifoldLinear("shared", 8, 16, 32).bytes == 4 * (8 * 48 + 3 * 512)
    assert ManifoldLinear("shared", 8, 16, 32).backward_bytes == 4 * (8 * 64 + 6 * 512)
    conv = ManifoldConv("shared", 2, 4, 5, 6, dtype=torch.float64)
    assert conv.backward_bytes == 8 * (2 * 13 * 36 + 6 * 20 * 9)
    assert Synthesize(10, 3, 2).bytes == 4 * 50
    assert str(conv).endswith(" K=3 float64")
    assert testing.Synthesize is Synthesize
