"""functional, which a learned optimizer asks at every step, against its definition."""

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from weightops import EquivariantPlan, WeightSpec, _load
from weightops.ops.equivariant.plan import code_of
from weightops.ops.functional import functional, functional_update, reference
from weightops.testing import (
    LearnedFunctional,
    cnn_spec,
    labelled_mlp_spec,
    mlp_spec,
    rnn_spec,
    transformer_spec,
)

D = torch.float64
kernel = pytest.mark.skipif(
    not _load.has_kernel("functional", "cpu"), reason="only the kernel promises this"
)
SPECS = {
    "mlp": mlp_spec(13, 17, 5),
    "labelled mlp": labelled_mlp_spec(7, 11, 130, 10),
    "several parts": labelled_mlp_spec(150, 64, 3),
    "cnn": cnn_spec(3, 16, 32, 10),  # a kernel's sums over taps are nearly as large as it
    "small cnn": cnn_spec(1, 4, 5, 3),
    "rnn": rnn_spec(9, 21, 4),
    "transformer": transformer_spec(dim=16, hidden=24),
    "a scalar, a diagonal": WeightSpec(
        {"s": (), "w": ("h", "k", "h"), "b": ("h",)}, {"s": (), "w": (5, 3, 5), "b": (5,)}
    ),
    "an empty tensor": WeightSpec({"w": ("h", "e"), "b": ("h",)}, {"w": (5, 0), "b": (5,)}),
    "nothing": WeightSpec({"w": ("h", "e")}, {"w": (0, 3)}),
}


def arguments(spec: WeightSpec, **options: Any) -> list[Any]:
    return LearnedFunctional(spec, **({"shared": 3, "dtype": D} | options)).make()


def check(given: list[Any]) -> None:
    torch.testing.assert_close(
        functional(*given), reference.functional(*given), rtol=1e-11, atol=1e-11
    )


@pytest.mark.parametrize("kind", ["unf", "deep_sets"])
@pytest.mark.parametrize(
    ("networks", "own"), [(1, False), (3, False), (2, True), (9, True), (9, False), (0, False)]
)
@pytest.mark.parametrize("name", SPECS)
def test_the_kernel_is_the_definition(name: str, networks: int, own: bool, kind: str) -> None:
    check(arguments(SPECS[name], networks=networks, own=own, kind=kind))


@pytest.mark.parametrize(
    ("hidden", "layers", "momenta"), [(1, 2, 0), (5, 3, 1), (20, 2, 6), (48, 3, 7), (33, 5, 2)]
)
@pytest.mark.parametrize("name", ["labelled mlp", "rnn", "a scalar, a diagonal"])
def test_layers_may_be_of_any_size(name: str, hidden: int, layers: int, momenta: int) -> None:
    check(arguments(SPECS[name], networks=2, hidden=hidden, layers=layers, momenta=momenta))


def test_widths_may_differ() -> None:
    given = arguments(SPECS["rnn"], hidden=5, layers=3)
    theta, plan = given[4], EquivariantPlan(SPECS["rnn"])
    given[6] = [11, 20, 7, 1]
    length = 11 * 20 + 20 * 7 + 7 * plan.num_terms + 20 + 7 + plan.num_biases
    given[4] = theta.repeat(1, -(-length // theta.shape[1]))[:, :length] / 2
    check(given)


def test_where_many_terms_read_a_tensor() -> None:
    # More than the kernel holds as numbers: it keeps the features.
    sizes = {f"w{n}": (4, 3) for n in range(26)}
    check(arguments(WeightSpec(dict.fromkeys(sizes, ("a", "b")), sizes), networks=2))


@pytest.mark.parametrize("name", ["several parts", "cnn", "transformer"])
@pytest.mark.parametrize("networks", [1, 9])
def test_float32_is_as_exact_as_plain_torch(name: str, networks: int) -> None:
    given = arguments(SPECS[name], networks=networks, dtype=torch.float32)
    exact = reference.functional(*(t.double() if isinstance(t, Tensor) else t for t in given))
    errors = [(f(*given) - exact).abs().max() for f in (functional, reference.functional)]
    assert errors[0] < 2 * errors[1] + 1e-6 * exact.abs().max()


@kernel
@pytest.mark.parametrize("networks", [1, 3, 9])
def test_results_are_the_same_to_the_bit_with_any_number_of_threads(networks: int) -> None:
    given = arguments(SPECS["several parts"], networks=networks, dtype=torch.float32)
    assert given[0].shape[1] > 2 * 4096
    found, threads = [], torch.get_num_threads()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            found.append(functional(*given))
    finally:
        torch.set_num_threads(threads)
    assert found[0].equal(found[1])
    assert found[0].equal(found[2])


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("more", [0, 2])
@pytest.mark.parametrize(
    ("name", "networks"), [("several parts", 1), ("labelled mlp", 9), ("an empty tensor", 2)]
)
def test_momenta_are_moved_before_they_are_read(
    name: str, networks: int, more: int, own: bool
) -> None:
    flat, grads, momenta, *rest = arguments(SPECS[name], networks=networks)
    extra = torch.randn(more, *flat.shape, dtype=D, generator=torch.Generator().manual_seed(1))
    momenta = torch.cat([momenta, extra])
    shares = torch.linspace(0, 1, len(momenta), dtype=D)[:, None]
    shares = shares / torch.arange(1, networks + 1) if own else shares
    moved, expected = momenta.clone(), momenta.clone()
    found = functional_update(moved, flat, grads, shares, *rest)
    proper = reference.update(expected, flat, grads, shares, *rest)
    torch.testing.assert_close(moved, expected, rtol=1e-14, atol=1e-16)
    torch.testing.assert_close(found, proper, rtol=1e-11, atol=1e-11)


@kernel
def test_momenta_that_cannot_be_moved_in_place_are_refused() -> None:
    flat, grads, momenta, *rest = small()
    turned = momenta.movedim(2, 0).contiguous().movedim(0, 2)
    with pytest.raises(RuntimeError, match="momenta must have contiguous rows"):
        functional_update(turned, flat, grads, torch.ones(1, 1, dtype=D), *rest)
    with pytest.raises(RuntimeError, match=r"shares must be \[R, 1 or N\]"):
        functional_update(momenta, flat, grads, torch.ones(2, 1, dtype=D), *rest)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e200])
def test_what_is_not_finite_is_as_in_the_definition(value: float) -> None:
    given = arguments(SPECS["mlp"], networks=2)
    given[1][0, 300] = value  # in a bias of one network
    found, expected = functional(*given), reference.functional(*given)
    torch.testing.assert_close(found, expected, equal_nan=True)
    assert found[1].isfinite().all()
    assert bool(found[0].isfinite().all()) == (value == 1e200)


def test_strides_do_not_matter() -> None:
    given = arguments(SPECS["labelled mlp"], networks=2, own=True)
    expected = reference.functional(*given)
    flat, grads, momenta, shared, theta = given[:5]
    given[:5] = [
        flat.mT.contiguous().mT,
        torch.cat([grads, grads], 1)[:, : grads.shape[1]],
        momenta.transpose(0, 1).contiguous().transpose(0, 1),
        shared.mT.contiguous().mT,
        torch.cat([theta, theta], 1)[:, : theta.shape[1]],
    ]
    torch.testing.assert_close(functional(*given), expected, rtol=1e-11, atol=1e-11)
    given[2] = momenta.movedim(2, 0).contiguous().movedim(0, 2)
    given[0] = flat[:1].expand(2, -1)
    torch.testing.assert_close(
        functional(*given), reference.functional(*given), rtol=1e-11, atol=1e-11
    )


def small(requires_grad: bool = False) -> list[Any]:
    spec = WeightSpec({"w": ("a", "b"), "v": ("a",)}, {"w": (2, 3), "v": (2,)})
    given = arguments(spec, networks=2, own=True, hidden=3, layers=3, momenta=1)
    return [t.requires_grad_(requires_grad) if isinstance(t, Tensor) else t for t in given]


def test_gradients_are_right_and_can_be_differentiated() -> None:
    given = small(True)
    assert torch.autograd.gradcheck(
        lambda *tensors: functional(*tensors, *given[5:]),
        given[:5],
        fast_mode=True,
        check_forward_ad=True,
    )
    assert torch.autograd.gradgradcheck(
        lambda *tensors: functional(*tensors, *given[5:]), given[:5], fast_mode=True
    )


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(requires_grad: bool) -> None:
    given = small(requires_grad)
    torch.library.opcheck(torch.ops.weightops.functional.default, given)
    if not requires_grad:
        flat, grads, momenta, *rest = given
        shares = torch.full((1, 1), 0.1, dtype=D)
        update = torch.ops.weightops.functional_update.default
        torch.library.opcheck(update, (momenta, flat, grads, shares, *rest))


@kernel
@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (0, torch.zeros(2, 9, dtype=D), "differ in shape"),
        (1, torch.zeros(8, dtype=D), "wrong number of axes"),
        (3, torch.zeros(3, 3, dtype=D), "a row, or one for each network"),
        (3, torch.zeros(1, 2, dtype=D), "the widths do not fit"),
        (4, torch.zeros(2, 7, dtype=D), "theta must have"),
        (4, torch.zeros(2, 7), "dtypes differ"),
        (5, [6, 3], "the sizes do not sum"),
        (6, [6, 1], "the widths do not fit"),
        (7, code_of(EquivariantPlan(SPECS["mlp"])), "the plan is of 328 weights, not 8"),
        (
            7,
            code_of(EquivariantPlan(mlp_spec(2, 3, 2), fixed="index")),
            "do not lie one after another",
        ),
    ],
)
def test_the_kernel_refuses_what_does_not_fit(at: int, value: Any, message: str) -> None:
    given = small()
    given[at] = value
    with pytest.raises((RuntimeError, ValueError), match=message):
        functional(*given)


@kernel
@pytest.mark.slow
@pytest.mark.parametrize("isa", ["generic", "avx2"])
def test_other_backends_are_the_definition(isa: str) -> None:
    subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "definition"],
        check=True,
        env=os.environ | {"WEIGHTOPS_ISA": isa},
    )  # fmt: skip
