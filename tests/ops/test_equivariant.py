"""equivariant_linear against its definition, one term at a time."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from weightops import EquivariantPlan, WeightSpec, equivariant_linear, permute, testing
from weightops.ops import equivariant as op
from weightops.ops.equivariant import grouped, size
from weightops.ops.equivariant.reference import per_term

SEEDS = st.integers(0, 2**31)
MOST = 250  # terms, so that the definition takes no longer than it must
OPTIONS = testing.PLAN_OPTIONS


def random_plan(seed: int, fixed: str = "permute", **options: object) -> EquivariantPlan:
    spec = testing.random_spec(torch.Generator().manual_seed(seed), tensors=3, max_rank=3)
    assume(0 < size.count_terms(spec, spec, fixed) <= MOST and spec.numel < 2000)
    plan = EquivariantPlan(spec, fixed=fixed, **options)
    assume(plan.num_terms > 0)
    return plan


def make(
    plan: EquivariantPlan,
    batch: int = 2,
    channels: tuple[int, int] = (2, 3),
    *,
    own: bool = False,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Features, theta and bias; ``own`` ones for every sample on request."""
    generator = torch.Generator().manual_seed(seed)
    c_in, c_out = channels
    shapes = [(batch, plan.spec.numel, c_in)]
    shapes += [
        (batch, *shape) if own else shape
        for shape in ((plan.num_terms, c_in, c_out), (plan.num_biases, c_out))
    ]
    x, theta, bias = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes
    )
    return x, theta, bias


def with_gradients(
    layer: Callable, plan: EquivariantPlan, inputs: tuple[Tensor, ...]
) -> list[Tensor]:
    """A layer's values, and the gradients of a random function of them."""
    leaves = [value.detach().clone().requires_grad_() for value in inputs]
    y = layer(*leaves, plan)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [y.detach(), *torch.autograd.grad(y, leaves, weights.to(y.dtype))]


def check_against_definition(plan: EquivariantPlan, inputs: tuple[Tensor, ...]) -> None:
    given_, expected = (with_gradients(f, plan, inputs) for f in (equivariant_linear, per_term))
    for name, ours, theirs in zip(("y", "x", "theta", "bias"), given_, expected, strict=True):
        torch.testing.assert_close(
            ours, theirs, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
        )


@settings(deadline=None, max_examples=40)
@given(SEEDS, st.sampled_from(list(OPTIONS)), st.sampled_from(["permute", "index", "channel"]))
def test_layer_equals_its_definition(seed: int, options: str, fixed: str) -> None:
    plan = random_plan(seed, fixed, **OPTIONS[options])
    check_against_definition(plan, make(plan, seed=seed))


@settings(deadline=None, max_examples=15)
@given(SEEDS, st.booleans(), st.booleans())
def test_parameters_may_belong_to_each_sample(seed: int, own: bool, own_bias: bool) -> None:
    plan = random_plan(seed)
    x, theta, _ = make(plan, 3, own=own)
    bias = make(plan, 3, own=own_bias)[2]
    check_against_definition(plan, (x, theta, bias))
    rows = [
        equivariant_linear(x[b : b + 1], theta[b] if own else theta, None, plan) for b in range(3)
    ]
    torch.testing.assert_close(equivariant_linear(x, theta, None, plan), torch.cat(rows))


@settings(deadline=None, max_examples=25)
@given(SEEDS, st.sampled_from(list(OPTIONS)[:4]), st.sampled_from(["permute", "index"]))
def test_layer_commutes_with_permutations(seed: int, options: str, fixed: str) -> None:
    plan = random_plan(seed, fixed, **OPTIONS[options])
    x, theta, bias = make(plan)
    perms = plan.spec.random_permutations(1, torch.Generator().manual_seed(seed))
    source = permute(torch.arange(plan.spec.numel)[None], perms, plan.spec)[0]
    given_ = equivariant_linear(x[:, source], theta, bias, plan)
    expected = equivariant_linear(x, theta, bias, plan)[:, source]
    scale = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
    torch.testing.assert_close(given_, expected, rtol=0, atol=1e-12 * scale)


@settings(deadline=None, max_examples=25)
@given(SEEDS, st.sampled_from(list(OPTIONS)), st.sampled_from([1, 2, 4]))
def test_transposed_layer_is_the_adjoint(seed: int, options: str, groups: int) -> None:
    plan = random_plan(seed, **OPTIONS[options])
    x, theta, _ = make(plan, 4, own=True)
    theta, code = theta[:groups], op.code_of(plan)
    y = torch.randn(4, plan.spec_out.numel, 3, dtype=torch.float64)
    there = (op._linear(x, theta, None, code, False) * y).sum()
    back = (x * op._linear(y, theta, None, code, True)).sum()
    torch.testing.assert_close(there, back, rtol=1e-9, atol=1e-9)


@settings(deadline=None, max_examples=25)
@given(SEEDS, st.sampled_from(["full", "sum", "predicate"]), st.sampled_from([1, 2, 4]))
def test_kernels_equal_the_grouped_form(seed: int, options: str, groups: int) -> None:
    plan = random_plan(seed, **OPTIONS[options])
    x, theta, bias = make(plan, 4, own=True)
    theta, bias, code = theta[:groups], bias[:groups], op.code_of(plan)
    y = torch.randn(4, plan.spec_out.numel, 3, dtype=torch.float64)
    for given_, expected in (
        (op._linear(x, theta, bias, code, False), grouped.linear(x, theta, bias, code)),
        (op._linear(y, theta, None, code, True), grouped.linear(y, theta, None, code, True)),
        (op._backward(x, theta, y, code, True), grouped.backward(x, theta, y, code, True)),
        (op._backward(x, theta, y, code, False), grouped.backward(x, theta, y, code, False)),
    ):
        torch.testing.assert_close(given_, expected, rtol=1e-9, atol=1e-9)


def test_layer_between_two_weight_spaces() -> None:
    spec = testing.labelled_mlp_spec(3, 5, 2)
    out = WeightSpec(
        {"h": ("n1",), "pair": ("n1", "n1"), "all": ()}, {"h": [5], "pair": [5, 5], "all": []}
    )
    for plan in (EquivariantPlan(spec, out), EquivariantPlan(out, spec)):
        check_against_definition(plan, make(plan))


def awkward_plan(n: int, m: int) -> EquivariantPlan:
    spec = WeightSpec(
        {"w": ("a", "b"), "square": ("a", "a"), "c": ("b", "k", "a"), "bias": ("b",), "one": ()},
        {"w": (n, m), "square": (n, n), "c": (m, 3, n), "bias": (m,), "one": ()},
    )
    return EquivariantPlan(spec, terms=lambda term: "c" not in (term.input, term.output) or m < 8)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("sizes", [(1, 2), (2, 7), (7, 33), (33, 65), (65, 1)], ids=str)
@pytest.mark.parametrize(
    "channels", [(1, 1), (1, 16), (3, 1), (32, 1), (16, 16), (17, 32), (32, 17), (32, 3)], ids=str
)
def test_awkward_sizes(channels: tuple[int, int], sizes: tuple[int, int], batch: int) -> None:
    plan = awkward_plan(*sizes)
    check_against_definition(plan, make(plan, batch, channels))
    check_precision(plan, batch, channels, torch.float32)


#: tensors whose sums are taken a band of their first axis at a time, some of which are 3 x 3 taps
BANDED = {
    "3x3": testing.cnn_spec(3, 12, 20, classes=4),
    "3x3, prime width": testing.cnn_spec(16, 17, classes=3),
    "2x2": testing.cnn_spec(24, 22, kernel=2, classes=3),
    "three axes": WeightSpec(
        {"a": ("i", "j", "k"), "b": ("i", "j", "l"), "c": ("i",)},
        {"a": (20, 15, 12), "b": (20, 15, 9), "c": (20,)},
    ),
    "two with the same neurons": WeightSpec(
        {"a": ("i", "j", "h", "w"), "b": ("i", "j", "u", "v"), "c": ("h", "w")},
        {"a": (16, 15, 3, 3), "b": (16, 15, 3, 3), "c": (3, 3)},
    ),
}


@pytest.mark.parametrize("options", [*OPTIONS])
@pytest.mark.parametrize("spec", BANDED.values(), ids=BANDED)
def test_sums_that_are_taken_by_bands(spec: WeightSpec, options: str) -> None:
    plan = EquivariantPlan(spec, **OPTIONS[options])
    check_against_definition(plan, make(plan, 3, (16, 16), own=options == "full"))


@pytest.mark.parametrize("channels", [(1, 16), (3, 2), (32, 1), (32, 16), (16, 48)], ids=str)
@pytest.mark.parametrize("spec", [BANDED["3x3"], BANDED["2x2"]], ids=["3x3", "2x2"])
def test_channels_of_sums_taken_by_bands(spec: WeightSpec, channels: tuple[int, int]) -> None:
    plan = EquivariantPlan(spec)
    check_against_definition(plan, make(plan, 2, channels))
    check_precision(plan, 2, channels, torch.float32)


def check_precision(
    plan: EquivariantPlan, batch: int, channels: tuple[int, int], dtype: torch.dtype
) -> None:
    """The mean square error is at most twice that of the definition in the same dtype, or a few roundings."""
    inputs = make(plan, batch, channels, dtype=dtype)
    exact = with_gradients(per_term, plan, tuple(value.double() for value in inputs))
    ours = with_gradients(equivariant_linear, plan, inputs)
    theirs = with_gradients(per_term, plan, inputs)
    names = ("y", "x", "theta", "bias")
    for name, right, given_, other in zip(names, exact, ours, theirs, strict=True):
        assert given_.dtype == dtype
        error, allowed = ((value.double() - right).norm() for value in (given_, other))
        # A type is one long dot product, where the definition adds up short ones.
        least = (4 if dtype == torch.float32 else 1) * torch.finfo(dtype).eps * right.norm()
        assert error <= 2 * torch.maximum(allowed, least), (name, error, allowed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["mlp", "rnn"])
def test_halves_are_as_exact_as_their_dtype(name: str, dtype: torch.dtype) -> None:
    spec = {"mlp": testing.labelled_mlp_spec(30, 17, 5), "rnn": testing.rnn_spec(8, 33, 8)}[name]
    check_precision(EquivariantPlan(spec), 3, (16, 16), dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_strides_do_not_matter(dtype: torch.dtype) -> None:
    plan = EquivariantPlan(testing.rnn_spec(3, 5, 2))
    x, theta, bias = make(plan, 4, (3, 4), dtype=dtype)
    shapes = {
        "transposed": lambda v: v.mT.contiguous().mT,
        "batch last": lambda v: v.movedim(0, -1).contiguous().movedim(-1, 0),
        "sliced": lambda v: torch.cat([v, v + 1], -1)[..., : v.shape[-1]],
        "stepped": lambda v: torch.stack([v, v + 1], -1).flatten(-2)[..., ::2],
        "shifted": lambda v: torch.cat([v.flatten()[:1], v.flatten()])[1:].view(v.shape),
    }
    expected = equivariant_linear(x, theta, bias, plan)
    grad = torch.randn(expected.shape).to(dtype)
    for name, change in shapes.items():
        leaves = [change(v).detach().requires_grad_() for v in (x, theta, bias)]
        y = equivariant_linear(*leaves, plan)
        torch.testing.assert_close(y, expected, msg=name)
        assert y.is_contiguous()
        plain = [v.clone().contiguous().requires_grad_() for v in (x, theta, bias)]
        right = torch.autograd.grad(equivariant_linear(*plain, plan), plain, grad)
        for a, b in zip(torch.autograd.grad(y, leaves, change(grad)), right, strict=True):
            torch.testing.assert_close(a, b, msg=name)
    one = x[:1].expand(4, -1, -1)
    torch.testing.assert_close(
        equivariant_linear(one, theta, bias, plan),
        equivariant_linear(one.clone(), theta, bias, plan),
    )
    own = theta[None].expand(4, -1, -1, -1)
    torch.testing.assert_close(equivariant_linear(x, own, bias, plan), expected)


@pytest.mark.parametrize("own", [False, True])
def test_empty_batch(own: bool) -> None:
    plan = EquivariantPlan(testing.rnn_spec(3, 5, 2))
    given_ = with_gradients(equivariant_linear, plan, make(plan, 0, own=own))
    assert given_[0].shape == (0, plan.spec_out.numel, 3)
    assert all(value.abs().sum() == 0 for value in given_)


def test_gradients_are_found_for_what_needs_them() -> None:
    plan = EquivariantPlan(testing.rnn_spec(3, 5, 2))
    x, theta, bias = make(plan)
    full = with_gradients(equivariant_linear, plan, (x, theta, bias))
    for i in range(3):
        leaves = [value.clone().requires_grad_(i == k) for k, value in enumerate((x, theta, bias))]
        y = equivariant_linear(*leaves, plan)
        weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
        (gradient,) = torch.autograd.grad(y, leaves[i], weights)
        torch.testing.assert_close(gradient, full[1 + i])


def test_theta_is_split_by_output_tensor_as_in_the_paper() -> None:
    plan = EquivariantPlan(testing.labelled_mlp_spec(3, 4, 2))
    x, theta, _ = make(plan)
    names = [term.output for term in plan.terms]
    assert list(dict.fromkeys(names)) == list(plan.spec_out.shapes)
    assert names == sorted(names, key=list(plan.spec_out.shapes).index)
    y = plan.spec_out.unflatten(equivariant_linear(x, theta, None, plan).movedim(-1, 0))
    for name in plan.spec_out.shapes:
        chosen = torch.tensor([output == name for output in names], dtype=theta.dtype)
        alone = equivariant_linear(x, theta * chosen[:, None, None], None, plan).movedim(-1, 0)
        for other, value in plan.spec_out.unflatten(alone).items():
            torch.testing.assert_close(value, y[name] if other == name else 0 * value)


def test_bad_arguments_are_named() -> None:
    plan = EquivariantPlan(testing.rnn_spec(3, 5, 2))
    x, theta, bias = make(plan, 2, (3, 4))
    t, p, n = plan.num_terms, plan.spec.numel, plan.num_biases
    cases: list[tuple[type[Exception], str, tuple]] = [
        (TypeError, "plan must be an EquivariantPlan, not WeightSpec", (x, theta, bias, plan.spec)),
        (TypeError, "x must be a tensor", (x.numpy(), theta, bias, plan)),
        (TypeError, "x must be floating point, not torch.int64", (x.long(), theta, bias, plan)),
        (TypeError, "x must be floating point", (x + 0j, theta, bias, plan)),
        (TypeError, "theta must be a tensor", (x, None, bias, plan)),
        (TypeError, "bias must be a tensor", (x, theta, 1.0, plan)),
        (
            TypeError,
            "theta is torch.float32, but x is torch.float64",
            (x, theta.float(), bias, plan),
        ),
        (
            TypeError,
            "bias is torch.float32, but x is torch.float64",
            (x, theta, bias.float(), plan),
        ),
        (TypeError, "x must be a dense tensor", (x.to_sparse(), theta, bias, plan)),
        (ValueError, "theta is on meta, but x is on cpu", (x, theta.to("meta"), bias, plan)),
        (ValueError, "bias is on meta, but x is on cpu", (x, theta, bias.to("meta"), plan)),
        (ValueError, r"x must have shape \[B, P_in, C_in\]", (x[0], theta, bias, plan)),
        (ValueError, rf"x has shape .* {p} weights", (x[:, 1:], theta, bias, plan)),
        (ValueError, rf"theta has {t - 1} terms .* plan has {t}", (x, theta[1:], bias, plan)),
        (ValueError, "theta has 2 input channels, but x has 3", (x, theta[:, 1:], bias, plan)),
        (ValueError, "theta must have shape", (x, theta[0], bias, plan)),
        (ValueError, "theta must have shape", (x, theta.expand(3, -1, -1, -1), bias, plan)),
        (ValueError, "x and theta must have channels", (x, theta[..., :0], bias[:, :0], plan)),
        (ValueError, "x and theta must have channels", (x[..., :0], theta[:, :0], bias, plan)),
        (ValueError, rf"bias must have shape \[{n}, 4\]", (x, theta, bias[1:], plan)),
        (ValueError, rf"bias must have shape \[{n}, 4\]", (x, theta, bias[:, 1:], plan)),
        (ValueError, "bias must have shape", (x, theta, bias[0], plan)),
        (ValueError, "bias must have shape", (x, theta, bias.expand(3, -1, -1), plan)),
    ]
    for error, message, arguments in cases:
        with pytest.raises(error, match=f"equivariant_linear: {message}"):
            equivariant_linear(*arguments)


def test_values_that_are_not_finite_are_named_on_request() -> None:
    plan = EquivariantPlan(testing.rnn_spec(3, 5, 2))
    for i, name in enumerate(("x", "theta", "bias")):
        inputs = make(plan)
        inputs[i].view(-1)[1] = torch.nan
        equivariant_linear(*inputs, plan)
        with pytest.raises(ValueError, match=rf"{name} must be finite, but {name}\[.*, 1\] is nan"):
            equivariant_linear(*inputs, plan, check_finite=True)
    equivariant_linear(*make(plan), plan, check_finite=True)


def test_raw_ops_refuse_what_does_not_fit() -> None:
    plan = EquivariantPlan(testing.rnn_spec(3, 5, 2))
    x, theta, bias = make(plan, 3, own=True)
    code = op.code_of(plan)
    y = torch.randn(3, plan.spec_out.numel, 3, dtype=torch.float64)
    for arguments in (
        (x[0], theta, bias, code, False),
        (x, theta[:2], bias[:2], code, False),
        (x, theta[:0], bias[:0], code, False),
        (x, theta[:, 1:], bias, code, False),
        (x[:, 1:], theta, bias, code, False),
        (x[..., 1:], theta, bias, code, False),
        (x, theta, bias[..., 1:], code, False),
        (x, theta, bias, code, True),
        (y, theta, bias, code, True),
    ):
        with pytest.raises(RuntimeError, match="equivariant"):
            op._linear(*arguments)
    with pytest.raises(RuntimeError, match="equivariant"):
        op._backward(x, theta, y[:, 1:], code, True)
