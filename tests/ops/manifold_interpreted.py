"""The GPU kernels of weight manifolds in Triton's interpreter, which is chosen as they are imported:
``test_manifold_triton.py`` runs this file in a process of its own."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from triton_interpreter import guard

from weightops import _op, manifold_conv2d, manifold_linear, synthesize
from weightops.ops.manifold import reference, triton_plan
from weightops.ops.manifold import triton as kernels
from weightops.ops.manifold import triton_synthesize as streams

# Two would spend the time waiting for each other where the machine is busy.
torch.set_num_threads(1)

HALVES = [torch.float16, torch.bfloat16]
DTYPES = [torch.float64, torch.float32, *HALVES]
#: a part of the largest value, a few roundings of it
TOLERANCES = {
    torch.float64: 1e-14,
    torch.float32: 2e-6,
    torch.float16: 2e-3,
    torch.bfloat16: 1.6e-2,
}


@pytest.fixture(autouse=True)
def guarded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    launched = {
        kernels: ("contract_rows", "contract_groups", "outer"),
        streams: ("combine", "descend", "gather"),
    }
    guard(monkeypatch, launched)
    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns with NaN
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["rows", "groups"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """By rows or by groups, whatever would pay."""
    monkeypatch.setattr(kernels, "_pays", lambda *_: request.param == "groups")
    return request.param


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class Problem:
    """A layer's arguments; items have contexts of their own, or one of ``contexts`` each."""

    def __init__(
        self,
        x: Sequence[int],
        weight: Sequence[int],
        geometry: Sequence[int] = (),
        contexts: int | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.geometry = list(geometry)
        self.dtype = dtype
        self.x, self.weight = self.normal(x), self.normal(weight)
        count = contexts or x[0]
        self.coeffs = self.normal((count, weight[0])).to(wide(dtype))
        self.shift = self.normal((count, weight[1])).to(wide(dtype))
        self.index = None
        if contexts:
            self.index = torch.randint(contexts, (x[0],), generator=self.generator)

    def normal(self, shape: Sequence[int]) -> Tensor:
        made = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        return made.to(self.dtype)

    def unused(self) -> Tensor:
        """Which contexts no item has, [G]."""
        at = torch.arange(len(self.x)) if self.index is None else self.index
        return torch.ones(len(self.coeffs), dtype=torch.bool).index_fill(0, at, False)

    def check(
        self,
        needs: Sequence[bool] = (True, True, True),
        precision: str = "highest",
        tolerance: float | None = None,
    ) -> None:
        """The layer and its gradients against the definition in float64."""
        tolerance = tolerance or TOLERANCES[self.dtype]
        args = (self.x, self.coeffs, self.index, self.weight, self.shift)
        y = kernels.contract(*args, self.geometry, precision)
        exact = [v.double() if v is not None and v.is_floating_point() else v for v in args]
        close(y, reference.contract(*exact, self.geometry, precision), self.dtype, tolerance)
        grad = self.normal(y.shape)
        given = kernels.contract_backward(grad, *args[:4], self.geometry, *needs, precision)
        expected = reference.contract_backward(
            grad.double(), *exact[:4], self.geometry, *needs, precision
        )
        dtypes = (self.dtype, self.coeffs.dtype, self.dtype)
        for got, wanted, dtype in zip(given, expected, dtypes, strict=True):
            close(got, wanted, dtype, tolerance)


def close(given: Tensor, expected: Tensor, dtype: torch.dtype, tolerance: float) -> None:
    assert given.shape == expected.shape
    assert given.dtype == dtype
    assert given.is_contiguous()
    largest = float(expected.abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(given.double(), expected, rtol=0, atol=tolerance * largest)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_layers(way: str, dtype: torch.dtype) -> None:
    Problem((5, 1, 7), (3, 9, 7), dtype=dtype).check()
    Problem((37, 1, 19), (2, 70, 19), contexts=4, dtype=dtype).check()
    Problem((6, 5, 8), (11, 16, 8), contexts=30, dtype=dtype).check()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_more_than_a_tile_each_way(way: str, dtype: torch.dtype) -> None:
    Problem((3, 67, 71), (2, 69, 71), dtype=dtype).check(tolerance=2 * TOLERANCES[dtype])


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_large_tiles_of_every_precision(
    way: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_plan, "_BUSY", 0)
    for dtype in DTYPES if precision == "highest" else [torch.float32]:
        Problem((135, 1, 48), (2, 72, 48), contexts=2, dtype=dtype).check(precision=precision)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (17, 2, 1), (40, 1, 2)], ids=str)
def test_sizes_of_one(way: str, sizes: tuple[int, int, int]) -> None:
    batch, inputs, outputs = sizes
    for bases in (1, 2):
        Problem((batch, 1, inputs), (bases, outputs, inputs), contexts=2).check()


CONVOLUTIONS = {
    "plain": ((2, 3, 6, 7), (2, 5, 3, 3, 3), (1, 1, 0, 0, 1, 1, 1)),
    "padded": ((2, 3, 5, 4), (3, 2, 3, 3, 2), (1, 1, 2, 1, 1, 1, 1)),
    "strided": ((3, 2, 7, 9), (2, 3, 2, 3, 3), (2, 3, 1, 1, 1, 1, 1)),
    "dilated": ((2, 2, 8, 9), (2, 3, 2, 2, 3), (1, 2, 1, 2, 3, 2, 1)),
    "grouped": ((3, 4, 6, 5), (2, 6, 2, 3, 2), (2, 1, 1, 0, 1, 1, 2)),
    "of one axis": ((3, 4, 1, 23), (2, 3, 4, 1, 4), (1, 2, 0, 3, 1, 1, 1)),
    "of a point": ((5, 4, 1, 1), (2, 3, 4, 1, 1), (1, 1, 0, 0, 1, 1, 1)),
    "many channels": ((2, 35, 4, 4), (2, 34, 35, 3, 3), (1, 1, 1, 1, 1, 1, 1)),
}


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_convolutions(way: str, kind: str) -> None:
    Problem(*CONVOLUTIONS[kind], contexts=2 if way == "groups" else None).check()


@pytest.mark.parametrize("contexts", [None, 2, 7])
@pytest.mark.parametrize("items", [1, 4])
def test_convolutions_of_single_channels_are_torchs(
    contexts: int | None, items: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_by_rows", "_by_groups", "_products"):
        monkeypatch.setattr(kernels, name, None)
    for outputs, dtype in ((5, torch.float64), (10, torch.bfloat16)):
        weight, geometry = (3, outputs, 1, 3, 2), (2, 1, 1, 0, 1, 2, 5)
        problem = Problem((items, 5, 6, 7), weight, geometry, contexts, dtype)
        problem.coeffs[problem.unused()] = torch.nan
        problem.check()
        for needs in ((True, False, False), (False, True, False), (False, False, True)):
            problem.check(needs)


def test_convolutions_of_torch_are_as_precise_as_was_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    setting = torch.backends.cudnn.conv
    before, seen = setting.fp32_precision, []
    convolve = torch.nn.functional.conv2d

    def seeing(*args: Any) -> Tensor:
        seen.append(setting.fp32_precision)
        return convolve(*args)

    monkeypatch.setattr(torch.nn.functional, "conv2d", seeing)
    problem = Problem((2, 3, 4, 4), (2, 3, 3, 2, 2), (1, 1, 0, 0, 1, 1, 1), 1, torch.float32)
    for precision in ("highest", "high"):
        problem.check(precision=precision)
    assert seen[-1] == setting.fp32_precision == before
    assert seen.count("ieee") >= 1


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_convolutions_of_narrower_types(way: str, dtype: torch.dtype) -> None:
    Problem(*CONVOLUTIONS["grouped"], contexts=2, dtype=dtype).check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_context_for_all(dtype: torch.dtype) -> None:
    for x, weight, geometry in (((4, 3, 7), (3, 5, 7), ()), CONVOLUTIONS["grouped"]):
        problem = Problem(x, weight, geometry, contexts=1, dtype=dtype)
        problem.check()
        problem.index = None
        problem.check()


@pytest.mark.parametrize("needs", [(a, b, c) for a in (0, 1) for b in (0, 1) for c in (0, 1)])
def test_only_what_is_needed(way: str, needs: tuple[int, int, int]) -> None:
    for contexts in (None, 3, 1):
        Problem((5, 2, 7), (3, 9, 7), contexts=contexts).check([bool(n) for n in needs])


@pytest.mark.parametrize("order", ["shuffled", "sorted", "reversed", "of one"])
def test_contexts_in_any_order_some_unused(way: str, order: str) -> None:
    problem = Problem((41, 1, 9), (3, 10, 9), contexts=6, dtype=torch.float32)
    assert problem.index is not None
    index = problem.index.clamp(1, 4)
    index[index == 2] = 3
    problem.index = {
        "shuffled": index,
        "sorted": index.sort().values,
        "reversed": index.sort(descending=True).values,
        "of one": torch.full_like(index, 4),
    }[order]
    problem.check()
    args = (problem.x, problem.coeffs, problem.index, problem.weight)
    grad = problem.normal((41, 1, 10))
    given = kernels.contract_backward(grad, *args, [], True, True, True, "highest")
    assert (given[1][problem.unused()] == 0).all()
    problem.coeffs[problem.unused()] = torch.nan
    again = kernels.contract_backward(grad, *args, [], True, True, True, "highest")
    assert all(torch.equal(a, b) for a, b in zip(given, again, strict=True))


def test_rows_are_shared_out_and_contexts_taken_in_turn(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = Problem((600, 1, 6), (2, 5, 6), contexts=2)
    problem.check()
    monkeypatch.setattr(kernels, "_HELD", 1)
    problem.check()
    Problem((4, 150, 6), (2, 5, 6), dtype=torch.bfloat16).check()


def test_many_contexts_of_few_weights(way: str) -> None:
    Problem((40, 3, 4), (2, 3, 4)).check()


@pytest.mark.parametrize("kind", ["transposed", "expanded", "sliced"])
def test_strides(way: str, kind: str) -> None:
    problem = Problem((6, 4, 5), (3, 7, 5), contexts=4)
    for name in ("x", "coeffs", "weight", "shift", "index"):
        value = getattr(problem, name)
        if kind == "transposed":
            changed = value.mT.contiguous().mT if value.dim() > 1 else value
        elif kind == "expanded":
            changed = value[:1].expand(value.shape)
        else:
            changed = torch.stack([value, value], -1)[..., 0]
        setattr(problem, name, changed)
        problem.check()


def test_a_number_that_is_none_stays_in_its_row(way: str) -> None:
    problem = Problem((37, 1, 9), (3, 10, 9), contexts=5, dtype=torch.float32)
    assert problem.index is not None
    problem.x[5, 0, 3] = torch.nan
    args = (problem.index, problem.weight, problem.shift, [], "highest")
    rows = kernels.contract(problem.x, problem.coeffs, *args).isnan().all(-1)[:, 0]
    assert rows.nonzero().tolist() == [[5]]
    problem.x[5, 0, 3] = 0
    problem.coeffs[2, 1] = torch.nan
    rows = kernels.contract(problem.x, problem.coeffs, *args).isnan().all(-1)[:, 0]
    assert torch.equal(rows, problem.index == 2)


def test_results_are_the_same_every_time(way: str) -> None:
    problem = Problem((300, 1, 9), (3, 10, 9), contexts=5, dtype=torch.float32)
    grad = problem.normal((300, 1, 10))
    args = (grad, problem.x, problem.coeffs, problem.index, problem.weight, [])
    first, second = (
        kernels.contract_backward(*args, True, True, True, "highest") for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_what_is_not_served_goes_to_plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_by_rows", "_by_groups", "_products", "vendor"):
        monkeypatch.setattr(kernels, name, None)
    Problem((0, 1, 4), (2, 3, 4)).check()
    Problem((2, 0, 4), (2, 3, 4)).check()
    Problem((2, 1, 0), (2, 3, 0)).check()
    Problem((2, 1, 4), (2, 0, 4)).check()
    monkeypatch.setattr(kernels, "_MOST", 5)
    Problem((3, 1, 4), (2, 3, 4)).check()


def test_many_rows_of_a_context_pay_for_its_weights() -> None:
    def pays(rows: int, contexts: int, bases: int, dtype: torch.dtype, precision: str) -> bool:
        layer = triton_plan.Layer.of((rows, 1, 8), (rows, 1, 8), (bases, 8, 8), (), False)
        return kernels._pays(layer, torch.empty(contexts, bases), precision, dtype)

    assert pays(4096, 8, 3, torch.bfloat16, "highest")
    assert not pays(512, 8, 3, torch.bfloat16, "highest")
    assert pays(512, 8, 3, torch.float32, "highest")
    assert not pays(512, 8, 3, torch.float32, "medium")
    assert not pays(4096, 4096, 9, torch.float32, "highest")
    assert not pays(4096, 8, 1, torch.float32, "highest")
    assert pays(4096, 10**6, 9, torch.float32, "highest") == pays(
        4096, 4096, 9, torch.float32, "highest"
    )


PARAMETERS = (1, 1024, 2500)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bases", [1, 3, 9])
@pytest.mark.parametrize("contexts", [1, 4])
def test_synthesize(dtype: torch.dtype, bases: int, contexts: int) -> None:
    for size in PARAMETERS:
        at = Problem((contexts, 1, 1), (bases, size), dtype=dtype)
        expected = reference.synthesize(at.coeffs.double(), at.weight.double())
        close(streams.synthesize(at.coeffs, at.weight), expected, dtype, TOLERANCES[dtype])
        buffer = torch.full((contexts, 2 * size), torch.nan, dtype=dtype)
        streams.synthesize_into(at.coeffs, at.weight, buffer[:, ::2])
        close(buffer[:, ::2].contiguous(), expected, dtype, TOLERANCES[dtype])
        assert buffer[:, 1::2].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bases", [1, 3, 9])
@pytest.mark.parametrize("contexts", [1, 4, 17])
def test_update(dtype: torch.dtype, bases: int, contexts: int) -> None:
    for size in PARAMETERS:
        at = Problem((contexts, 1, 1), (bases, size), dtype=dtype)
        grad, step = at.normal((contexts, size)), at.normal(at.coeffs.shape).to(at.coeffs.dtype)
        wanted, after = at.weight.double(), at.weight.clone()
        args = (grad.double(), at.coeffs.double(), step.double())
        expected = reference.synthesize_update(wanted, *args)
        given = streams.synthesize_update(after, grad, at.coeffs, step)
        close(given, expected, at.coeffs.dtype, TOLERANCES[wide(dtype)])
        close(after, wanted, dtype, TOLERANCES[dtype])


def test_streams_of_any_strides() -> None:
    at = Problem((3, 1, 1), (4, 130))
    coeffs = at.coeffs.mT.contiguous().mT
    bases = torch.stack([at.weight, at.weight], -1)[..., 0]
    expected = at.coeffs @ at.weight
    torch.testing.assert_close(streams.synthesize(coeffs, bases), expected)
    one = at.weight[:1].expand(4, 130)
    torch.testing.assert_close(streams.synthesize(at.coeffs, one), at.coeffs @ one)
    grad = at.normal((130, 3)).mT
    given = streams.synthesize_update(bases, grad, coeffs, coeffs)
    torch.testing.assert_close(given, grad @ at.weight.mT)
    torch.testing.assert_close(bases, at.weight - at.coeffs.mT @ grad)


def test_streams_of_nothing() -> None:
    for contexts, bases, size in ((0, 2, 3), (2, 3, 0), (2, 0, 3)):
        coeffs, at = torch.zeros(contexts, bases), torch.zeros(bases, size)
        assert torch.equal(streams.synthesize(coeffs, at), torch.zeros(contexts, size))
        grad = torch.zeros(contexts, size)
        given = streams.synthesize_update(at, grad, coeffs, coeffs)
        assert torch.equal(given, torch.zeros(contexts, bases))


def test_through_the_front_door(way: str) -> None:
    linear = Problem((6, 2, 5), (3, 4, 5), contexts=2)
    image = Problem((3, 4, 5, 4), (2, 6, 2, 3, 2), contexts=2)

    def derivatives() -> list[Tensor]:
        found = []
        for op, at in ((manifold_linear, linear), (manifold_conv2d, image)):
            inputs = [v.clone().requires_grad_() for v in (at.x, at.coeffs, at.weight)]
            options = {"groups": 2, "padding": 1} if op is manifold_conv2d else {}
            y = op(*inputs, index=at.index, **options)
            first = torch.autograd.grad(y.square().sum(), inputs, create_graph=True)
            second = torch.autograd.grad(sum(v.square().sum() for v in first), inputs)
            found += [y.detach(), *(v.detach() for v in first), *second]
        coeffs, bases = linear.coeffs.clone().requires_grad_(), linear.weight.flatten(1)
        found += torch.autograd.grad(synthesize(coeffs, bases).square().sum(), coeffs)
        return found

    expected = derivatives()
    called = []
    for module, names in (
        (kernels, ("contract", "contract_backward")),
        (streams, ("synthesize", "synthesize_update")),
    ):
        for name in names:
            launch = getattr(module, name)

            def kernel(*args: Any, launch: Callable = launch) -> Any:
                called.append(launch.__name__)
                return launch(*args)

            op = name if module is streams else f"manifold_{name}"
            _op.serve(op, "cpu", kernel, "Triton's interpreter")
    given = derivatives()
    assert {"contract", "contract_backward", "synthesize"} <= set(called)
    for got, wanted in zip(given, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)
