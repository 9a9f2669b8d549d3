"""Means and deviations against torch in float64, however the zoo comes, and at the edges of numbers."""

import pickle
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from weightops import WeightSpec, testing, tokens
from weightops.ops.tokens import reference, token_moments
from weightops.tokens import Statistics, TokenPlan

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
MLP = testing.mlp_spec(4, 3, 2)


def by_torch(flat: Tensor, spec: WeightSpec, per: str) -> tuple[Tensor, Tensor]:
    views = spec.unflatten(flat.double()).values() if per == "layer" else [flat.double()]
    found = [
        (v.mean(), v.std(correction=0)) if v.numel() else (torch.zeros(()).double(),) * 2
        for v in views
    ]
    mean, std = (torch.stack(each) for each in zip(*found))
    return (mean, std) if per == "layer" else (mean[0], std[0])


def assert_by_torch(found: Statistics, flat: Tensor) -> None:
    mean, std = by_torch(flat, found.spec, found.per)
    torch.testing.assert_close(found.mean, mean, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(found.std, std, rtol=1e-11, atol=1e-12)
    assert found.count == len(flat)


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    n=st.integers(1, 5),
    dtype=st.sampled_from(DTYPES),
    per=st.sampled_from(["layer", "all"]),
)
def test_statistics_equal_torch_in_float64(seed: int, n: int, dtype: torch.dtype, per: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    spec = testing.random_spec(generator)
    flat = (torch.randn(n, spec.numel, generator=generator) * 3 + 2).to(dtype)
    found = tokens.statistics(flat, spec, per=per)
    assert found.mean.dtype == found.std.dtype == torch.float64
    assert_by_torch(found, flat)
    sizes = [prod(shape) for shape in spec.shapes.values()]
    torch.testing.assert_close(
        token_moments(flat, sizes), reference.moments(flat, sizes), rtol=1e-11, atol=1e-11
    )


@pytest.mark.parametrize("per", ["layer", "all"])
@pytest.mark.parametrize("parts", [[2500], [1, 2499], [1000, 0, 1000, 500]], ids=str)
def test_a_stream_gives_what_the_whole_zoo_gives(parts: list[int], per: str) -> None:
    flat = 100 + torch.randn(2500, MLP.numel) * torch.arange(1, 2501)[:, None]
    found = Statistics(MLP, per=per)
    for part in flat.split(parts):
        assert found.update(part) is found
    assert_by_torch(found, flat)


def test_large_tensors_and_rows_of_any_strides() -> None:
    spec = testing.resnet20_spec()
    wide = torch.randn(6, 2 * spec.numel) + 5
    for flat in (wide[::2, : spec.numel], wide[:, ::2], wide[:1, : spec.numel].expand(3, -1)):
        assert_by_torch(tokens.statistics(flat, spec), flat)
    assert_by_torch(tokens.statistics(wide[0, : spec.numel], spec), wide[:1, : spec.numel])


def test_a_mean_far_from_zero_costs_no_digits() -> None:
    flat = torch.randn(7, MLP.numel, dtype=torch.float64) + 1e9
    found = tokens.statistics(flat, MLP)
    _, std = by_torch(flat - 1e9, MLP, "layer")
    torch.testing.assert_close(found.std, std, rtol=1e-7, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_constant_tensor_has_deviation_zero_and_comes_back_to_the_bit(dtype: torch.dtype) -> None:
    flat = torch.randn(1500, MLP.numel).to(dtype)
    flat[:, :12] = 0.1
    found = Statistics(MLP)
    for part in flat.split([1, 700, 799]):
        found.update(part)
    assert found.std[0] == 0
    assert found.mean[0] == flat[0, 0].double()
    plan = TokenPlan(MLP, "layer")
    packed = tokens.pack(flat, plan, statistics=found)
    assert torch.isfinite(packed).all()
    assert not packed[:, 0, :12].any()
    back = tokens.unpack(packed, plan, statistics=found)
    assert torch.equal(back[:, :12], flat[:, :12])
    same = tokens.statistics(torch.full_like(flat, 0.1), MLP, per="all")
    assert same.std == 0


def test_the_smallest_deviations_overflow_nothing() -> None:
    flat = torch.randn(3, MLP.numel, dtype=torch.float64) * 1e-310
    plan = TokenPlan(MLP, "layer")
    packed = tokens.pack(flat, plan, statistics=tokens.statistics(flat, MLP))
    assert torch.isfinite(packed).all()


def test_what_is_not_finite_is_refused_by_place_and_leaves_no_trace() -> None:
    found = tokens.statistics(torch.ones(2, MLP.numel), MLP)
    flat = torch.ones(3, MLP.numel)
    flat[2, 5] = torch.nan
    with pytest.raises(ValueError, match=r"^update: flat must be finite, but flat\[2, 5\] is nan$"):
        found.update(flat)
    with pytest.raises(ValueError, match=r"^update: flat has weights whose squares are no finite"):
        found.update(torch.randn(2, MLP.numel, dtype=torch.float64) * 1e300)
    assert found.count == 2
    assert torch.equal(found.mean, torch.ones(4, dtype=torch.float64))


def test_no_networks_and_no_weights() -> None:
    assert tokens.statistics(torch.ones(0, MLP.numel), MLP).count == 0
    for spec in (WeightSpec({}, {}), WeightSpec({"w": ("a", None)}, {"w": (3, 0)})):
        for per in ("layer", "all"):
            found = tokens.statistics(torch.ones(2, 0), spec, per=per)
            assert found.count == 2
            assert not found.mean.any()
            assert not found.std.any()
        plan = TokenPlan(spec, "channel", size=3)
        packed = tokens.pack(torch.ones(2, 0), plan, statistics=found)
        assert packed.shape == (2, 0, 3)
        assert tokens.unpack(packed, plan, statistics=found).shape == (2, 0)


def test_gradients_are_not_recorded() -> None:
    flat = torch.randn(2, MLP.numel, requires_grad=True)
    found = tokens.statistics(flat, MLP)
    assert not found.mean.requires_grad


def test_statistics_read_back_to_the_bit() -> None:
    found = tokens.statistics(torch.randn(5, MLP.numel), MLP, per="all")
    for copy in (
        Statistics.from_json(found.to_json(), spec=MLP),
        pickle.loads(pickle.dumps(found)),
    ):
        assert (copy.per, copy.count, copy.spec) == ("all", 5, MLP)
        more = torch.randn(3, MLP.numel)
        assert torch.equal(
            copy.update(more).std, Statistics.from_json(found.to_json()).update(more).std
        )
    with pytest.raises(
        ValueError,
        match=r"^Statistics.from_json: text is of another spec: they differ in fc2.weight",
    ):
        Statistics.from_json(found.to_json(), spec=testing.mlp_spec(4, 3, 1))


def test_packing_refuses_statistics_of_other_networks() -> None:
    plan, flat = TokenPlan(MLP, "layer"), torch.randn(2, MLP.numel)
    other = testing.mlp_spec(4, 3, 2, 2)
    with pytest.raises(
        ValueError, match=r"^pack: statistics are of another spec: they differ in fc2"
    ):
        tokens.pack(flat, plan, statistics=tokens.statistics(torch.randn(1, other.numel), other))
    with pytest.raises(ValueError, match=r"^pack: statistics are of no network$"):
        tokens.pack(flat, plan, statistics=Statistics(MLP))
