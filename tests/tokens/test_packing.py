"""Packing and unpacking against a definition by index arithmetic, number by number."""

import pickle
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from weightops import WeightSpec, _load, testing, tokens
from weightops.ops.tokens import reference, token_moments, token_pack, token_unpack
from weightops.tokens import TokenPlan

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
KINDS = ["network", "chunk", "layer", "channel"]
PADDING = -1


def weights_of_tokens(plan: TokenPlan) -> Tensor:
    """[T, D] int64: which of the network's weights stands where, or PADDING."""
    spec = plan.spec
    places = {name: spec.unflatten(torch.arange(spec.numel))[name] for name in spec.shapes}
    if plan.kind in ("network", "chunk"):
        runs = [list(range(spec.numel))]
    elif plan.kind == "layer":
        runs = [
            [i for name in names for i in places[name].flatten().tolist()] for names in plan.layers
        ]
    else:
        runs = []
        for names in plan.layers:
            shape = spec.shapes[names[0]]
            for row in range(shape[0] if shape else 1):
                tensors = [places[name][row] if shape else places[name] for name in names]
                runs.append([i for each in tensors for i in each.flatten().tolist()])
    rows = []
    for run in runs:
        for begin in range(0, len(run), plan.size):
            token = run[begin : begin + plan.size]
            rows.append(token + [PADDING] * (plan.size - len(token)))
    return torch.tensor(rows, dtype=torch.int64).view(-1, plan.size)


def packed_by_index(flat: Tensor, plan: TokenPlan) -> Tensor:
    index = weights_of_tokens(plan)
    return torch.cat([flat, torch.zeros_like(flat[:, :1])], 1)[:, index]


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8) if x.numel() else x


def random_bits(rows: int, columns: int, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    count = rows * columns * dtype.itemsize
    data = torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator)
    return data.view(dtype).view(rows, columns)


def make(spec: WeightSpec, kind: str, size: int) -> TokenPlan:
    return TokenPlan(spec, kind, size=max(size, spec.numel, 1) if kind == "network" else size)


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    n=st.integers(0, 3),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(KINDS),
    size=st.sampled_from([1, 2, 3, 8, 50, 1000]),
)
def test_tokens_hold_the_weights_that_the_definition_says_and_come_back_to_the_bit(
    seed: int, n: int, dtype: torch.dtype, kind: str, size: int
) -> None:
    spec = testing.random_spec(torch.Generator().manual_seed(seed), tensors=8)
    plan = make(spec, kind, size)
    flat = random_bits(n, spec.numel, dtype, seed)
    packed = tokens.pack(flat, plan)
    assert packed.shape == (n, plan.num_tokens, plan.size)
    assert packed.is_contiguous()
    assert torch.equal(bits(packed), bits(packed_by_index(flat, plan)))
    assert torch.equal(bits(reference.pack(flat, None, None, plan._code)), bits(packed))
    assert torch.equal(plan.mask, weights_of_tokens(plan) != PADDING)
    # What stands in the padding is not looked at.
    dirty = packed.masked_fill(~plan.mask, torch.nan)
    back = tokens.unpack(dirty, plan)
    assert back.is_contiguous()
    assert torch.equal(bits(back), bits(flat))
    assert torch.equal(bits(reference.unpack(dirty, None, None, plan._code)), bits(flat))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(KINDS),
    size=st.sampled_from([1, 3, 50]),
    per=st.sampled_from(["layer", "all"]),
)
def test_standardised_tokens_are_weights_less_their_mean_over_their_deviation(
    seed: int, dtype: torch.dtype, kind: str, size: int, per: str
) -> None:
    generator = torch.Generator().manual_seed(seed)
    spec = testing.random_spec(generator, tensors=8)
    plan = make(spec, kind, size)
    flat = (3 * torch.randn(3, spec.numel, generator=generator) + 1).to(dtype)
    found = tokens.statistics(flat, spec, per=per)
    wide = flat.double().clone()
    for n, (name, view) in enumerate(spec.unflatten(wide).items()):
        if prod(spec.shapes[name]):
            mean, std = (x if per == "all" else x[n] for x in (found.mean, found.std))
            view -= mean
            view /= std if std else 1.0
    packed = tokens.pack(flat, plan, statistics=found)
    exact = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {}
    torch.testing.assert_close(packed, packed_by_index(wide, plan).to(dtype), **exact)
    assert not packed[:, ~plan.mask].any()
    tolerance = {"rtol": 3e-2, "atol": 3e-2} if dtype.itemsize == 2 else exact
    torch.testing.assert_close(tokens.unpack(packed, plan, statistics=found), flat, **tolerance)
    args = (*found._factors(flat, inverse=True), plan._code)
    torch.testing.assert_close(packed, reference.pack(flat, *args), **exact)
    args = (*found._factors(flat), plan._code)
    unpacked = tokens.unpack(packed, plan, statistics=found)
    torch.testing.assert_close(unpacked, reference.unpack(packed, *args), **exact)


@pytest.mark.parametrize("shift", [0, 1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("kind", "size"),
    [
        *(("network", 300_001), ("chunk", 1000), ("layer", 36_993)),
        *(("channel", 288), ("channel", 101), ("channel", 1)),
    ],
)
def test_zoos_beyond_the_cache_split_anywhere(
    kind: str, size: int, dtype: torch.dtype, shift: int
) -> None:
    plan = TokenPlan(testing.resnet20_spec(), kind, size=size)
    count = 5 * 8 // dtype.itemsize
    # One element off, no network starts on a cache line.
    flat = random_bits(1, count * plan.spec.numel + shift, dtype, 0)[0, shift:].view(count, -1)
    assert flat.nbytes >= 2**22
    packed = tokens.pack(flat, plan)
    assert torch.equal(bits(packed), bits(packed_by_index(flat, plan)))
    assert torch.equal(bits(tokens.unpack(packed, plan)), bits(flat))
    memory = torch.empty(packed.numel() + shift, dtype=dtype)
    off = memory[shift:].view(packed.shape).copy_(packed)
    assert torch.equal(bits(tokens.unpack(off, plan)), bits(flat))


def test_any_strides_and_one_network() -> None:
    plan = TokenPlan(testing.mlp_spec(5, 7, 3), "channel", size=4)
    p = plan.spec.numel
    for flat in (
        torch.randn(4, 2 * p)[:, ::2],
        torch.randn(8, p + 3)[::2, 1 : p + 1],
        torch.randn(1, p).expand(4, -1),
        torch.randn(p, 1).expand(p, 4).mT,
        torch._neg_view(torch.randn(4, p)),
    ):
        packed = tokens.pack(flat, plan)
        assert torch.equal(packed, packed_by_index(flat, plan))
        assert torch.equal(tokens.pack(flat[1], plan), packed[1])
        assert torch.equal(tokens.unpack(packed[1], plan), flat[1])
        transposed = packed.permute(2, 1, 0).contiguous().permute(2, 1, 0)
        assert torch.equal(tokens.unpack(transposed, plan), flat)


def test_unpacking_of_what_was_not_packed_needs_no_padding_of_zero() -> None:
    plan = TokenPlan(testing.mlp_spec(5, 7, 3), "layer", size=6)
    generated = torch.randn(2, plan.num_tokens, 6)
    again = tokens.pack(tokens.unpack(generated, plan), plan)
    assert torch.equal(again, generated * plan.mask)


def test_gradients_pass_through_and_die_in_the_padding() -> None:
    plan = TokenPlan(testing.mlp_spec(2, 3, 2), "channel", size=2)
    flat = torch.randn(3, plan.spec.numel, dtype=torch.float64, requires_grad=True)
    found = tokens.statistics(flat.detach(), plan)
    tokens.pack(flat, plan, statistics=found).square().sum().backward()
    std = torch.cat([s.expand(prod(v)) for s, v in zip(found.std, plan.spec.shapes.values())])
    mean = torch.cat([s.expand(prod(v)) for s, v in zip(found.mean, plan.spec.shapes.values())])
    torch.testing.assert_close(flat.grad, 2 * (flat.detach() - mean) / std**2)
    packed = torch.randn(3, plan.num_tokens, 2, dtype=torch.float64, requires_grad=True)
    tokens.unpack(packed, plan, statistics=found).sum().backward()
    assert not packed.grad[:, ~plan.mask].any()
    assert (packed.grad[:, plan.mask] > 0).all()


def test_the_raw_ops_pass_opcheck() -> None:
    plan = TokenPlan(testing.mlp_spec(2, 3, 2), "channel", size=2)
    flat = torch.randn(3, plan.spec.numel, requires_grad=True)
    factors = [torch.randn(len(plan.spec.shapes)) for _ in range(2)]
    packed = torch.randn(3, plan.num_tokens, 2, requires_grad=True)
    for shift, scale in ([None, None], factors, [None, factors[1]]):
        testing.check_op(token_pack, flat, shift, scale, plan._code)
        testing.check_op(token_unpack, packed, shift, scale, plan._code)
    testing.check_op(token_moments, flat.detach(), [6, 3, 6, 2])


@pytest.mark.skipif(_load.reasons["cpu"] is not None, reason="no compiled library")
def test_kernels_refuse_what_would_reach_beyond_memory() -> None:
    plan = TokenPlan(testing.mlp_spec(2, 3, 2), "channel", size=2)
    flat, packed = torch.randn(3, plan.spec.numel), torch.randn(3, plan.num_tokens, 2)
    short = torch.ones(1)
    for op, *args in (
        (token_pack, flat[:, 1:], None, None),
        (token_pack, flat, short, None),
        (token_pack, flat, None, torch.ones(4, dtype=torch.float64)),
        (token_unpack, packed[..., :1], None, None),
        (token_unpack, packed[:, 1:], None, None),
        (token_unpack, packed, None, short),
    ):
        with pytest.raises(RuntimeError, match=r"token_(un)?pack: "):
            op.raw(*args, plan._code)
    for broken in (plan._code[:-1], [0, *plan._code[1:]], [*plan._code[:-1], 9]):
        with pytest.raises(ValueError, match=r"^(the plan|a piece|the pieces|tokens) "):
            token_pack.raw(flat, None, None, broken)
    with pytest.raises(RuntimeError, match=r"token_moments: "):
        token_moments(flat, [3])


def test_statistics_may_be_batched_by_vmap_in_the_raw_ops() -> None:
    plan = TokenPlan(testing.mlp_spec(2, 3, 2), "layer", size=4)
    flat, scale = torch.randn(3, plan.spec.numel), torch.rand(5, len(plan.spec.shapes))
    batched = torch.vmap(lambda s: token_pack(flat, None, s, plan._code))(scale)
    one_by_one = [token_pack(flat, None, s, plan._code) for s in scale]
    torch.testing.assert_close(batched, torch.stack(one_by_one))


def test_meta_tensors_pass() -> None:
    plan = TokenPlan(testing.mlp_spec(2, 3, 2), "layer", size=4)
    packed = tokens.pack(torch.empty(3, plan.spec.numel, device="meta"), plan)
    assert packed.is_meta
    assert packed.shape == (3, plan.num_tokens, 4)
    assert tokens.unpack(packed, plan).shape == (3, plan.spec.numel)


def test_a_plan_serves_after_pickle_and_json() -> None:
    spec = testing.mlp_spec(5, 7, 3)
    flat = torch.randn(2, spec.numel)
    for kind in KINDS:
        plan = make(spec, kind, 4)
        for copy in (pickle.loads(pickle.dumps(plan)), TokenPlan.from_json(plan.to_json())):
            assert torch.equal(tokens.pack(flat, copy), tokens.pack(flat, plan))
