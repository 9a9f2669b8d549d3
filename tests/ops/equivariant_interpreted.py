"""The GPU kernels of equivariant layers in Triton's interpreter, which is chosen as they are imported:
``test_equivariant_triton.py`` runs this file in a process of its own."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from weightops import EquivariantPlan, WeightSpec, _op, equivariant_linear
from weightops.ops.equivariant import grouped, tables
from weightops.ops.equivariant import triton as kernels
from weightops.ops.equivariant.plan import code_of
from weightops.testing import specs

ARCHITECTURES = {
    "mlp": specs.labelled_mlp_spec(5, 4, 3, 2),
    "cnn": specs.cnn_spec(2, 3, 2, classes=2, kernel=2),
    "rnn": specs.rnn_spec(2, 12, 2),  # more than a tile of rows, and more than a share of gradient
    "transformer": specs.transformer_spec(1, dim=2, hidden=3),
}
REPEATED = {
    "rank 3": WeightSpec({"a": ("h", "h", "h")}, {"a": (3, 3, 3)}),
    "around": WeightSpec(
        {"a": ("h", "g", "h"), "b": ("g", "h"), "c": ()}, {"a": (3, 4, 3), "b": (4, 3), "c": ()}
    ),
    "product": WeightSpec({"a": (("h", "g"), "h"), "b": (None, "g")}, {"a": (6, 3), "b": (2, 2)}),
    "empty": WeightSpec({"a": (None, "h"), "b": ("h",)}, {"a": (0, 3), "b": (3,)}),
}


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns with NaN
    yield
    torch.use_deterministic_algorithms(False)


def make(
    plan: EquivariantPlan, batch: int, c_in: int, c_out: int, groups: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (
        (batch, plan.spec.numel, c_in),
        (groups, plan.num_terms, c_in, c_out),
        (groups, plan.num_biases, c_out),
        (batch, plan.spec_out.numel, c_out),
    )
    made = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    x, theta, bias, grad = (each.to(dtype) for each in made)
    return x, theta, bias, grad


def close(given: Tensor, expected: Tensor, tolerance: float) -> None:
    assert given.shape == expected.shape
    assert given.dtype == expected.dtype
    assert given.is_contiguous()
    largest = float(expected.abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(given, expected, rtol=0, atol=tolerance * largest)


def check(
    plan: EquivariantPlan,
    *,
    batch: int = 2,
    channels: tuple[int, int] = (3, 2),
    groups: int = 1,
    dtype: torch.dtype = torch.float64,
    tolerance: float = 1e-13,
) -> None:
    """The layer and its gradients against plain torch."""
    code = code_of(plan)
    x, theta, bias, grad = make(plan, batch, *channels, groups, dtype)
    close(kernels.linear(x, theta, bias, code), grouped.linear(x, theta, bias, code), tolerance)
    given = kernels.backward(x, theta, grad, code, True)
    for got, expected in zip(given, grouped.backward(x, theta, grad, code, True), strict=True):
        close(got, expected, tolerance)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures(name: str) -> None:
    check(EquivariantPlan(ARCHITECTURES[name]))


def test_gru() -> None:
    plan = EquivariantPlan(specs.gru_seq2seq_spec(2, 3))  # the gradients of 2,058 terms take 10 s
    x, theta, bias, _ = make(plan, 2, 2, 2, 1, torch.float64)
    given, expected = (f.linear(x, theta, bias, code_of(plan)) for f in (kernels, grouped))
    close(given, expected, 1e-13)


@pytest.mark.parametrize("name", REPEATED)
def test_repeated_labels_products_and_empty_tensors(name: str) -> None:
    check(EquivariantPlan(REPEATED[name]))


@pytest.mark.parametrize(
    "options",
    [
        {"fixed": "index"},
        {"terms": "local"},
        {"terms": "mpnn"},
        {"terms": lambda term: False},
        {"terms": lambda term: len(str(term)) % 3 != 0, "normalize": "sum"},
    ],
    ids=["index", "local", "mpnn", "none", "predicate"],
)
def test_options(options: dict) -> None:
    check(EquivariantPlan(specs.mlp_spec(2, 3, 3, 2), **options))


def test_between_two_specs() -> None:
    out = WeightSpec(
        {"a": ("h", "h"), "b": (), "c": ("q", "h")}, {"a": (4, 4), "b": (), "c": (3, 4)}
    )
    check(EquivariantPlan(specs.rnn_spec(3, 4, 2), out))


@pytest.mark.parametrize("channels", [(1, 70), (70, 1), (17, 16)])
def test_channels_in_float32(channels: tuple[int, int]) -> None:
    check(
        EquivariantPlan(specs.rnn_spec(1, 3, 2), terms="local"),
        channels=channels,
        dtype=torch.float32,
        tolerance=1e-6,
    )


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float16, 1e-3), (torch.bfloat16, 1e-2)], ids=str
)
def test_half_types_are_summed_in_float32(dtype: torch.dtype, tolerance: float) -> None:
    check(EquivariantPlan(specs.rnn_spec(3, 5, 2)), dtype=dtype, tolerance=tolerance)


@pytest.mark.parametrize("groups", [2, 4])
def test_parameters_of_each_group(groups: int) -> None:
    check(EquivariantPlan(specs.labelled_mlp_spec(3, 2)), batch=4, groups=groups)


def test_strides() -> None:
    plan = EquivariantPlan(specs.labelled_mlp_spec(3, 2))
    code = code_of(plan)
    x, theta, bias, grad = make(plan, 2, 3, 2, 1, torch.float64)
    expected = grouped.linear(x, theta, bias, code)
    turned = x.mT.contiguous().mT, theta.mT.contiguous().mT, bias.mT.contiguous().mT
    close(kernels.linear(*turned, code), expected, 1e-13)
    repeated = theta.expand(2, -1, -1, -1), bias.expand(2, -1, -1)
    close(kernels.linear(x, *repeated, code), expected, 1e-13)
    to_x = grouped.linear(grad, theta, None, code, True)
    close(kernels.linear(grad, turned[1], None, code, True), to_x, 1e-13)
    given = kernels.backward(turned[0], turned[1], grad.mT.contiguous().mT, code, True)[0]
    close(given, to_x, 1e-13)


def test_results_are_the_same_every_time() -> None:
    plan = EquivariantPlan(specs.rnn_spec(2, 12, 2), terms="local")
    x, theta, _, grad = make(plan, 2, 3, 2, 1, torch.float32)
    first, second = (kernels.backward(x, theta, grad, code_of(plan), True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_what_is_not_served_goes_to_plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_layer", None)
    plan = EquivariantPlan(specs.labelled_mlp_spec(2, 3))
    check(plan, batch=0)
    monkeypatch.setattr(tables, "MOST_DIMENSIONS", 1)
    check(plan)


def test_through_the_front_door(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = EquivariantPlan(specs.rnn_spec(2, 3, 2))
    x, theta, bias, grad = make(plan, 2, 2, 2, 1, torch.float64)

    def derivatives() -> list[Tensor]:
        inputs = [each.clone().requires_grad_() for each in (x, theta[0], bias[0])]
        y = equivariant_linear(*inputs, plan)
        first = torch.autograd.grad(y, inputs, grad, create_graph=True)
        second = torch.autograd.grad(sum((each**2).sum() for each in first), inputs[:2])
        return [y.detach(), *(each.detach() for each in first), *second]

    expected = derivatives()
    launched = []
    for name in ("linear", "backward"):
        launch = getattr(kernels, name)

        def kernel(*args: object, launch: object = launch) -> object:
            launched.append(launch)
            return launch(*args)

        _op.serve(f"equivariant_{name}", "cpu", kernel, "Triton's interpreter")
    given = derivatives()
    assert len(launched) > 3
    for got, wanted in zip(given, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)
