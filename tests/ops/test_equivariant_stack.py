"""equivariant_stack against the same layers one by one."""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from weightops import EquivariantPlan, WeightSpec, _load, testing
from weightops.ops import equivariant as op
from weightops.ops.equivariant import equivariant_stack, size
from weightops.ops.equivariant.reference import per_term

DOUBLE = torch.float64
kernel = pytest.mark.skipif(
    not _load.has_kernel("equivariant_stack", "cpu"), reason="only the kernel promises this"
)
RNN = EquivariantPlan(testing.rnn_spec(3, 5, 2))


def make(
    plan: EquivariantPlan,
    channels: tuple[int, ...],
    batch: int = 2,
    *,
    own: bool = False,
    bias: bool = True,
    dtype: torch.dtype = DOUBLE,
    seed: int = 0,
) -> list[Tensor]:
    """Features, and theta and bias of every layer in turn, scaled to keep values of order one."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=DOUBLE).to(dtype)

    lead = (batch,) if own else ()
    leaves = [normal(batch, plan.spec.numel, channels[0])]
    for into, out in pairwise(channels):
        leaves.append(normal(*lead, plan.num_terms, into, out) / into)
        if bias:
            leaves.append(normal(*lead, plan.num_biases, out))
    return leaves


def stack(leaves: list[Tensor], plan: EquivariantPlan, bias: bool, last: bool) -> Tensor:
    x, *rest = leaves
    thetas = rest[:: 1 + bias]
    biases = rest[1::2] if bias else [None] * len(thetas)
    return equivariant_stack(x, thetas, biases, plan, activate_last=last)


def singly(leaves: list[Tensor], plan: EquivariantPlan, bias: bool, last: bool) -> Tensor:
    x, *rest = leaves
    while rest:
        x = per_term(x, rest.pop(0), rest.pop(0) if bias else None, plan)
        x = torch.relu(x) if rest or last else x
    return x


def with_gradients(f: Callable, leaves: list[Tensor], *options: object) -> list[Tensor]:
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    y = f(leaves, *options)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)
    return [y.detach(), *torch.autograd.grad(y, leaves, weights.to(y.dtype))]


def check(plan: EquivariantPlan, leaves: list[Tensor], bias: bool, last: bool) -> None:
    ours, theirs = (with_gradients(f, leaves, plan, bias, last) for f in (stack, singly))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@settings(deadline=None, max_examples=40)
@given(
    st.integers(0, 2**31),
    st.sampled_from(list(testing.PLAN_OPTIONS)),
    st.sampled_from(["permute", "index", "channel"]),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
def test_a_stack_equals_the_definition_of_its_layers(
    seed: int, options: str, fixed: str, own: bool, bias: bool, last: bool
) -> None:
    spec = testing.random_spec(torch.Generator().manual_seed(seed), tensors=3, max_rank=3)
    assume(0 < size.count_terms(spec, spec, fixed) <= 250 and spec.numel < 2000)
    plan = EquivariantPlan(spec, fixed=fixed, **testing.PLAN_OPTIONS[options])
    assume(plan.num_terms > 0)
    check(plan, make(plan, (2, 3, 1, 2), own=own, bias=bias, seed=seed), bias, last)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("batch", [0, 1, 3])
@pytest.mark.parametrize(
    ("channels", "bias", "last"),
    [
        ((1, 16, 32, 3), True, False),
        ((3, 17, 1, 16), True, True),
        ((16, 16, 16), False, True),
        ((32, 17, 32), False, False),
        ((16, 1), True, True),
    ],
    ids=str,
)
def test_mixed_channels(
    channels: tuple[int, ...], bias: bool, last: bool, batch: int, dtype: torch.dtype
) -> None:
    spec = WeightSpec(
        {"w": ("a", "b"), "square": ("a", "a"), "c": ("b", "k", "a"), "bias": ("b",), "one": ()},
        {"w": (33, 7), "square": (33, 33), "c": (7, 3, 33), "bias": (7,), "one": ()},
    )
    plan = EquivariantPlan(spec, terms=lambda term: "c" not in (term.input, term.output))
    leaves = make(plan, channels, batch, bias=bias)
    if dtype == DOUBLE and batch:
        check(plan, leaves, bias, last)
        return
    given_ = stack([leaf.to(dtype) for leaf in leaves], plan, bias, last)
    expected = singly(leaves, plan, bias, last) if batch else given_.double()
    assert given_.shape == (batch, spec.numel, channels[-1])
    torch.testing.assert_close(given_.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(
    "channels", [(16, 16, 16), (16, 32, 16, 3), (3, 16, 17), (16, 1), (16, 1, 16)], ids=str
)
def test_every_way_to_write_a_convolution_ends_in_relu(
    channels: tuple[int, ...], dtype: torch.dtype, last: bool
) -> None:
    for kernel_size in (3, 5):
        plan = EquivariantPlan(testing.cnn_spec(3, 16, 32, kernel=kernel_size))
        leaves = make(plan, channels, dtype=dtype)
        y, rest = leaves[0], leaves[1:]
        while rest:
            y = op.equivariant_linear(y, rest.pop(0), rest.pop(0), plan)
            y = y.relu() if rest or last else y
        torch.testing.assert_close(stack(leaves, plan, True, last), y, rtol=1e-4, atol=1e-4)
        assert (y < 0).any() == (not last)


@kernel
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_halves_are_computed_in_float32(dtype: torch.dtype) -> None:
    leaves = make(RNN, (3, 16, 5), dtype=dtype)
    given_ = stack(leaves, RNN, True, True)
    expected = stack([leaf.float() for leaf in leaves], RNN, True, True)
    assert torch.equal(given_, expected.to(dtype))


def test_large_outputs_are_streamed_and_right() -> None:
    plan = EquivariantPlan(testing.rnn_spec(32, 130, 32))
    leaves = make(plan, (16, 16, 32), 2, dtype=torch.float32)
    given_ = stack(leaves, plan, True, True)
    layer = op.equivariant_linear(leaves[0], leaves[1], leaves[2], plan).relu()
    right = op.equivariant_linear(layer, *leaves[3:], plan).relu()
    torch.testing.assert_close(given_, right, rtol=1e-4, atol=1e-4)  # sums in another order


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("channels", [1, 16, 17])
def test_nan_and_infinities_pass_as_through_relu(channels: int, dtype: torch.dtype) -> None:
    # Between networks without them: what a thread keeps must not carry them over.
    clean = make(RNN, (channels, channels, channels), 3, dtype=dtype)
    expected = stack(clean, RNN, True, True)
    for value in (torch.nan, torch.inf, -torch.inf):
        leaves = [leaf.clone() for leaf in clean]
        leaves[0][1, 3] = value
        x, *rest = leaves
        between = op.equivariant_linear(x, rest[0], rest[1], RNN).relu()
        right = op.equivariant_linear(between, rest[2], rest[3], RNN).relu()
        given_ = stack(leaves, RNN, True, True)
        assert right[1].isnan().any()
        torch.testing.assert_close(given_, right, equal_nan=True)
        assert torch.equal(given_[[0, 2]], expected[[0, 2]])
        assert torch.equal(stack(clean, RNN, True, True), expected)


@kernel
@pytest.mark.parametrize("own", [False, True])
def test_threads_change_nothing(own: bool) -> None:
    plan = EquivariantPlan(testing.rnn_spec(8, 33, 8))
    leaves = make(plan, (3, 16, 17, 16), 5, own=own, dtype=torch.float32)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(stack(leaves, plan, True, False))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found)
    alone = [stack([leaf[i : i + 1] if own or not n else leaf for n, leaf in enumerate(leaves)], plan, True, False)
             for i in range(5)]  # fmt: skip
    assert torch.equal(torch.cat(alone), found[0])


@pytest.mark.parametrize("channels", [(16, 16, 16), (1, 16, 1), (3, 5, 2), (32, 1, 32)], ids=str)
@pytest.mark.parametrize("space", ["mlp", "cnn", "transformer"])
def test_several_threads_on_one_network_change_nothing(
    space: str, channels: tuple[int, ...]
) -> None:
    spec = {
        "mlp": testing.labelled_mlp_spec(300, 64, 10),
        "cnn": testing.cnn_spec(3, 16, 32),
        "transformer": testing.transformer_spec(dim=32, hidden=128),
    }[space]
    plan = EquivariantPlan(spec)
    leaves = make(plan, channels, 1, dtype=torch.float32)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(stack(leaves, plan, True, False))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_what_is_no_stack_is_named() -> None:
    x, theta, bias, *rest = make(RNN, (2, 2, 2))
    away = EquivariantPlan(testing.rnn_spec(3, 5, 2), WeightSpec({"h": ("h",)}, {"h": (5,)}))
    lead = torch.zeros(away.num_terms, 2, 2, dtype=DOUBLE)
    for thetas, biases, plan, what in (
        ([], [], RNN, "not 0 and 0"),
        ([theta, rest[0]], [bias], RNN, "not 2 and 1"),
        ([theta, rest[0]], [bias, None], RNN, "every layer"),
        ([lead, lead], [None, None], away, "to itself"),
    ):
        with pytest.raises(ValueError, match=what):
            equivariant_stack(x, thetas, biases, plan)


def test_strides_and_shared_parameters_among_own_ones() -> None:
    x, theta, bias, *rest = make(RNN, (3, 4, 2), 3)
    expected = stack([x, theta, bias, *rest], RNN, True, False)
    x = x.mT.contiguous().mT
    theta = theta.mT.contiguous().mT
    torch.testing.assert_close(stack([x, theta, bias, *rest], RNN, True, False), expected)
    own = [theta.expand(3, -1, -1, -1), bias, rest[0], rest[1].expand(3, -1, -1)]
    torch.testing.assert_close(stack([x, *own], RNN, True, False), expected)


def test_only_what_needs_a_gradient_gets_one() -> None:
    leaves = make(RNN, (2, 3, 2))
    full = with_gradients(stack, leaves, RNN, True, False)
    for i in range(len(leaves)):
        mine = [leaf.clone().requires_grad_(k == i) for k, leaf in enumerate(leaves)]
        y = stack(mine, RNN, True, False)
        weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)
        (gradient,) = torch.autograd.grad(y, mine[i], weights)
        torch.testing.assert_close(gradient, full[1 + i])


def test_what_does_not_fit_is_refused() -> None:
    x, first, bias, second, _ = make(RNN, (2, 3, 2))
    with pytest.raises(ValueError, match="theta has 2 input channels, but x has 3"):
        equivariant_stack(x, [first, first], [None, None], RNN)
    with pytest.raises(TypeError, match=r"theta is torch.float32, but x is torch.float64"):
        equivariant_stack(x, [first, second.float()], [None, None], RNN)
    code = op.code_of(RNN)
    other = EquivariantPlan(RNN.spec, WeightSpec({"h": ("h",)}, {"h": (5,)}))
    mixed = torch.zeros(1, other.num_terms, 2, 2, dtype=DOUBLE)
    two = second[None].expand(2, -1, -1, -1)
    for arguments in (
        (x, [], [], code, False),
        (x, [first[None], second[None]], [bias[None]], code, False),
        (x, [first[None], first[None]], [], code, False),
        (x, [first[None], second[None, 1:]], [], code, False),
        (x, [first[None], two], [], code, False),
        (x, [first[None]], [bias[None, :, 1:]], code, False),
        (x, [mixed, mixed], [], op.code_of(other), False),
    ):
        with pytest.raises(RuntimeError, match="equivariant"):
            op._stack(*arguments)
