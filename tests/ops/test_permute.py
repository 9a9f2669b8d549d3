"""permute, permute_axes and merge against index arithmetic, on every code path of the kernel."""

import os
import subprocess
import sys
from collections.abc import Sequence
from math import prod
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from weightops import WeightSpec, _load, merge, permute, permute_axes, testing
from weightops.ops.permute import reference
from weightops.ops.permute.plan import plan

DTYPES = [
    *(torch.bool, torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.complex64, torch.complex128),
]
HALVES = [torch.float16, torch.bfloat16]
SEEDS = st.integers(0, 2**31)
PRIMES = [0, 1, 2, 3, 7, 13, 17, 31, 67, 127, 509, 1021, 4099]


def random_bits(shape: Sequence[int], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Any bit pattern a dtype has, NaN payloads too; integers there is nothing special about."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.rand(*shape, generator=generator) < 0.5
    length = prod(shape) * dtype.itemsize
    data = torch.randint(0, 256, (length,), dtype=torch.uint8, generator=generator)
    return data.view(dtype).view(*shape)


def bits(x: Tensor) -> Tensor:
    """The same bits as integers: torch's own gather of halves rewrites NaNs."""
    same_size = {
        torch.float16: torch.int16,
        torch.bfloat16: torch.int16,
        torch.float32: torch.int32,
    }
    return x.view(same_size.get(x.dtype, x.dtype))


def assert_same_bits(given: Tensor, expected: Tensor, *, nan_payloads: bool = True) -> None:
    assert given.dtype == expected.dtype
    assert given.shape == expected.shape
    given, expected = (
        t.resolve_conj().resolve_neg().contiguous().flatten() for t in (given, expected)
    )
    if given.dtype in HALVES and not (nan_payloads and _load.reasons["cpu"] is None):
        given, expected = (t.masked_fill(t.isnan(), torch.nan) for t in (given, expected))
    if given.numel():
        assert torch.equal(given.view(torch.uint8), expected.view(torch.uint8))


def sources(spec: WeightSpec, perms: dict[str, Tensor], n: int) -> Tensor:
    """Where each weight of network n comes from, by numpy's own indexing."""
    found = []
    for row in range(n):
        pieces = [np.empty(0, dtype=np.int64)]
        for name, shape in spec.shapes.items():
            places = np.arange(prod(shape)).reshape(shape) + spec.offsets[name]
            for axis in range(len(shape)):
                factors = spec.factors(name, axis)
                moved = [
                    np.arange(size) if label not in perms else _row(perms[label], row)
                    for label, size in factors
                ]
                grid = np.arange(shape[axis]).reshape([size for _, size in factors])
                places = places.take(grid[np.ix_(*moved)].ravel(), axis)
            pieces.append(places.ravel())
        found.append(np.concatenate(pieces))
    return torch.from_numpy(np.stack(found)) if n else torch.empty(0, spec.numel, dtype=torch.int64)


def _row(index: Tensor, row: int) -> np.ndarray:
    return (index if index.dim() == 1 else index[row]).numpy()


def brute_force(
    flat: Tensor, perms: dict[str, Tensor], spec: WeightSpec, inverse: bool = False
) -> Tensor:
    index = sources(spec, perms, flat.shape[0])
    return bits(flat).gather(1, index.argsort(1) if inverse else index).view(flat.dtype)


def axes_brute_force(x: Tensor, perms: Sequence[Tensor | None]) -> Tensor:
    grids = [torch.arange(x.shape[0])]
    for axis, p in enumerate(perms, start=1):
        grids.append(torch.arange(x.shape[axis]) if p is None else p.long())
    views = []
    for axis, grid in enumerate(grids):
        shape = [1] * x.dim()
        shape[axis] = grid.shape[-1]
        if grid.dim() == 2:
            shape[0] = grid.shape[0]
        views.append(grid.view(shape))
    return bits(x)[tuple(views)].view(x.dtype)


def check_axes(x: Tensor, perms: Sequence[Tensor | None], **options: Tensor) -> None:
    assert_same_bits(permute_axes(x, perms, **options), axes_brute_force(x, perms))
    back = permute_axes(permute_axes(x, perms), perms, inverse=True)
    assert back.is_contiguous()
    assert_same_bits(back, x)


def random_perms(spec: WeightSpec, n: int, seed: int) -> dict[str, Tensor]:
    """Some labels missing, some shared by all networks, some int32."""
    generator = torch.Generator().manual_seed(seed)
    perms = spec.random_permutations(n, generator)
    kept = {}
    for label, index in perms.items():
        kind = int(torch.randint(4, (), generator=generator))
        if kind == 0:
            kept[label] = index
        elif kind == 1 and n:
            kept[label] = index[0]
        elif kind == 2:
            kept[label] = index.int()
    return kept


def named(size: int, dtype: torch.dtype = torch.float32) -> WeightSpec:
    return WeightSpec({"w": (None,)}, {"w": (size,)})


@settings(max_examples=150, deadline=None)
@given(seed=SEEDS, n=st.integers(0, 4), dtype=st.sampled_from(DTYPES), inverse=st.booleans())
def test_permute_equals_brute_force_and_reference(
    seed: int, n: int, dtype: torch.dtype, inverse: bool
) -> None:
    spec = testing.random_spec(torch.Generator().manual_seed(seed))
    flat, perms = random_bits((n, spec.numel), dtype, seed), random_perms(spec, n, seed)
    expected = brute_force(flat, perms, spec, inverse)
    assert_same_bits(permute(flat, perms, spec, inverse=inverse), expected)
    full = {k: perms.get(k, torch.arange(size)) for k, size in spec.labels.items()}
    index = (
        testing.pack({k: p.long().expand(n, -1) for k, p in full.items()}, spec) if full else None
    )
    if index is not None:
        given_by_torch = reference.permute(flat, index, plan(spec), inverse)
        assert_same_bits(given_by_torch, expected, nan_payloads=False)
    out = random_bits(flat.shape, dtype, seed + 1)
    assert permute(flat, perms, spec, inverse=inverse, out=out) is out
    assert_same_bits(out, expected)


@settings(max_examples=150, deadline=None)
@given(
    seed=SEEDS,
    shape=st.lists(st.sampled_from([0, 1, 2, 3, 5, 8, 17]), min_size=1, max_size=5),
    dtype=st.sampled_from(DTYPES),
    data=st.data(),
)
def test_permute_axes_equals_brute_force_and_reference(
    seed: int, shape: list[int], dtype: torch.dtype, data: st.DataObject
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, perms = random_bits(shape, dtype, seed), []
    for size in shape[1:]:
        p = testing.random_rows(shape[0], size, generator)
        shared = torch.randperm(size, generator=generator)
        perms.append(data.draw(st.sampled_from([None, p, p.int(), shared])))
    check_axes(x, perms)
    axes = [axis for axis, p in enumerate(perms, start=1) if p is not None]
    if axes:
        index = torch.cat([p.long().expand(shape[0], -1) for p in perms if p is not None], 1)
        given_by_torch = reference.permute_axes(x, index, axes)
        assert_same_bits(given_by_torch, axes_brute_force(x, perms), nan_payloads=False)


@pytest.mark.parametrize("block", [*range(1, 71), 100, 513])
def test_every_block_size_in_bytes(block: int) -> None:
    # Counts on both sides of the vector widths 8 and 16, and a row beyond the four gathered at once.
    for rows, cols in ((6, 37), (1, 8), (3, 16)):
        x = random_bits((2, rows, cols, block), torch.uint8)
        check_axes(x, [testing.random_rows(2, rows), testing.random_rows(2, cols), None])


@pytest.mark.parametrize("cols", PRIMES)
@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.float16, torch.float32, torch.float64, torch.complex128]
)
def test_every_row_length(cols: int, dtype: torch.dtype) -> None:
    x = random_bits((2, 5, cols), dtype)
    check_axes(x, [testing.random_rows(2, 5), testing.random_rows(2, cols)])
    check_axes(x, [None, torch.randperm(cols)])


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((2, 1024, 1024), torch.float32),
        ((2, 1031, 1021), torch.float32),
        ((1, 1024, 1024), torch.float64),
        ((1, 1021, 1031), torch.float64),
        ((3, 509, 997, 3), torch.float32),
        ((2, 509, 61, 9), torch.float64),
        ((3, 2048, 1024), torch.uint8),
        ((3, 1021, 2053), torch.bfloat16),
    ],
    ids=str,
)
@pytest.mark.parametrize("shift", [0, 1])
def test_outputs_that_stream_past_the_cache(
    shape: tuple[int, ...], dtype: torch.dtype, shift: int
) -> None:
    x = random_bits(shape, dtype)
    assert x.nbytes >= 2**22 or dtype == torch.float64
    perms: list[Tensor | None] = [testing.random_rows(shape[0], n) for n in shape[1:3]]
    perms += [None] * (len(shape) - 3)
    # One element off, no row starts on a cache line.
    out = random_bits((x.numel() + shift,), dtype, 1)[shift:].view(shape)
    assert permute_axes(x, perms, out=out) is out
    assert_same_bits(out, axes_brute_force(x, perms))
    assert_same_bits(permute_axes(out, perms, inverse=True), x)


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.float16, torch.float32, torch.complex64], ids=str
)
def test_large_networks_split_anywhere(dtype: torch.dtype) -> None:
    spec = testing.resnet20_spec()
    flat, perms = random_bits((5, spec.numel), dtype), spec.random_permutations(5)
    assert_same_bits(permute(flat, perms, spec), brute_force(flat, perms, spec))
    assert_same_bits(permute(permute(flat, perms, spec), perms, spec, inverse=True), flat)


@pytest.mark.slow
def test_more_than_two_to_the_31_elements() -> None:
    x = torch.zeros(2, 32769, 32768, dtype=torch.int8)
    x[:, :, 0] = torch.arange(32769).fmod(101).to(torch.int8)
    x[1, -1] = torch.arange(32768).fmod(97).to(torch.int8)
    rows = torch.arange(32769).flip(0)
    cols = torch.randperm(32768)
    given = permute_axes(x, [rows, cols])
    for row in (0, 1, 16384, 32767, 32768):
        assert torch.equal(given[:, row], x[:, 32768 - row][:, cols])


def strided(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    a, b, c = shape
    base = random_bits((2 * a + 1, 3 * b, 2 * c + 1), dtype)
    return {
        "transposed": random_bits((c, b, a), dtype).permute(2, 1, 0),
        "sliced": base[1::2, ::3, 1::2],
        "offset": base[1 : 1 + a, 1 : 1 + b, 1 : 1 + c],
        "expanded rows": random_bits((1, b, c), dtype).expand(a, b, c),
        "expanded columns": random_bits((a, b, 1), dtype).expand(a, b, c),
    }


@pytest.mark.parametrize("kind", strided((1, 1, 1)))
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.complex128])
def test_any_strides_of_input_and_out(kind: str, dtype: torch.dtype) -> None:
    x = strided((3, 7, 19), dtype)[kind]
    perms = [testing.random_rows(3, 7).t().contiguous().t(), torch.randperm(19 * 2)[::2].argsort()]
    check_axes(x, perms)
    if "expanded" not in kind:
        out = strided((3, 7, 19), dtype)[kind]
        assert permute_axes(x, perms, out=out) is out
        assert_same_bits(out, axes_brute_force(x, perms))


def test_strided_out_leaves_what_lies_between() -> None:
    buffer = torch.full((2, 6, 40), 7.0)
    x, perms = torch.randn(2, 3, 20), [torch.randperm(3), torch.randperm(20)]
    permute_axes(x, perms, out=buffer[:, ::2, 1::2])
    assert_same_bits(buffer[:, ::2, 1::2], axes_brute_force(x, perms))
    assert (buffer[:, 1::2] == 7).all()
    assert (buffer[:, :, ::2] == 7).all()


def test_expanded_networks_and_permutations() -> None:
    spec = testing.mlp_spec(5, 7, 3)
    flat, perms = torch.randn(1, spec.numel).expand(4, -1), spec.random_permutations(4)
    assert_same_bits(permute(flat, perms, spec), brute_force(flat.clone(), perms, spec))
    one = {label: index[:1].expand(4, -1) for label, index in perms.items()}
    assert_same_bits(permute(flat, one, spec), brute_force(flat.clone(), one, spec))
    wide = torch.randn(4, 2 * spec.numel)
    assert_same_bits(permute(wide[:, ::2], perms, spec), brute_force(wide[:, ::2], perms, spec))
    out = torch.full_like(wide, torch.nan)[:, ::2]
    assert permute(flat, perms, spec, out=out) is out
    assert_same_bits(out, brute_force(flat.clone(), perms, spec))


def test_conjugate_and_negative_views() -> None:
    x = torch.randn(2, 5, 19, dtype=torch.complex64)
    perms = [testing.random_rows(2, 5), testing.random_rows(2, 19)]
    for view in (x.conj(), x.conj().imag, torch._neg_view(x.real)):
        assert view.is_conj() or view.is_neg()
        torch.testing.assert_close(
            permute_axes(view, perms),
            axes_brute_force(view.resolve_conj().resolve_neg(), perms),
            rtol=0,
            atol=0,
        )
    with pytest.raises(
        ValueError, match="permute_axes: out must not be a conjugate or negative view"
    ):
        permute_axes(x, perms, out=torch.zeros_like(x).conj())
    weights = [0.5, -1.0]
    spec = WeightSpec({"w": ("a",)}, {"w": (19,)})
    negative = torch._neg_view(torch.randn(2, 19))
    torch.testing.assert_close(merge(negative, weights, spec), 0.5 * negative[0] - negative[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_out_is_wholly_written_and_returned(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        spec = testing.random_spec(generator)
        flat, perms = torch.randn(3, spec.numel, dtype=dtype), spec.random_permutations(3)
        out = torch.full_like(flat, torch.nan)
        assert permute(flat, perms, spec, out=out) is out
        assert not out.isnan().any()
        for shape in ((spec.numel,), (2, spec.numel), (0, spec.numel)):
            weights = torch.ones(*shape[:-1], 3)
            out = torch.full(shape, torch.nan, dtype=dtype)
            assert merge(flat, weights, spec, perms=perms, out=out) is out
            assert not out.isnan().any()
            assert_same_bits(out, merge(flat, weights, spec, perms=perms))
            spaced = torch.full((*shape[:-1], 2 * spec.numel), torch.nan, dtype=dtype)[..., ::2]
            assert merge(flat, weights, spec, perms=perms, out=spaced) is spaced
            assert_same_bits(spaced, out)


def test_out_that_overlaps_or_wants_gradients_is_refused() -> None:
    spec = testing.mlp_spec(3, 4, 2)
    both = torch.randn(5, spec.numel)
    flat, perms = both[:2], spec.random_permutations(2)
    for out in (flat, both[1:3]):
        with pytest.raises(ValueError, match=r"permute: out shares memory with an input"):
            permute(flat, perms, spec, out=out)
    permute(flat, perms, spec, out=both[2:4])
    with pytest.raises(ValueError, match=r"permute: out= does not record gradients"):
        permute(flat, perms, spec, out=torch.zeros(2, spec.numel, requires_grad=True))
    with pytest.raises(ValueError, match=r"merge: out= does not record gradients"):
        merge(flat, torch.ones(2, requires_grad=True), spec, out=torch.zeros(spec.numel))
    with pytest.raises(ValueError, match=r"permute: out must not be an expanded tensor"):
        permute(flat, perms, spec, out=torch.zeros(1, spec.numel).expand(2, -1))
    x = torch.randn(2, 3, requires_grad=True)
    with pytest.raises(ValueError, match=r"permute_axes: out= does not record gradients"):
        permute_axes(x, [None], out=torch.zeros(2, 3))
    with torch.no_grad():
        permute_axes(x, [None], out=torch.zeros(2, 3))


def test_product_with_an_empty_fixed_factor() -> None:
    spec = WeightSpec({"w": (("h", None),), "b": ("h",)}, {"w": (0,), "b": (3,)})
    flat, perms = torch.arange(3.0)[None], {"h": torch.tensor([2, 0, 1])}
    assert permute(flat, perms, spec).tolist() == [[2.0, 0.0, 1.0]]
    assert merge(flat, [2.0], spec, perms=perms).tolist() == [4.0, 0.0, 2.0]


def test_identity_still_copies() -> None:
    spec = testing.mlp_spec(3, 4, 2)
    flat = torch.randn(2, spec.numel)
    for result in (permute(flat, {}, spec), permute_axes(flat, [None])):
        assert torch.equal(result, flat)
        assert result.data_ptr() != flat.data_ptr()


def test_bad_permutations_are_refused_even_with_nothing_to_move() -> None:
    twice = torch.tensor([0, 0, 1])
    spec = WeightSpec({"w": ("a", None)}, {"w": (3, 0)})
    for n in (0, 2):
        with pytest.raises(ValueError, match=r"permute: perms\['a'\] is no permutation"):
            permute(torch.zeros(n, 0), {"a": twice}, spec)
        with pytest.raises(ValueError, match=r"permute_axes: perms\[0\] is no permutation"):
            permute_axes(torch.zeros(n, 3, 0), [twice, None])
    with pytest.raises(ValueError, match=r"merge: perms\['a'\] is no permutation"):
        merge(torch.zeros(2, 0), [1.0, 1.0], spec, perms={"a": twice})


def exact_merge(flat: Tensor, weights: Tensor, spec: WeightSpec, perms: dict[str, Tensor]) -> tuple:
    """The sums in float64, and the sums of magnitudes that bound their rounding errors."""
    networks = brute_force(flat.double(), perms, spec)
    terms = weights.double()[:, :, None] * networks
    return terms.sum(1), terms.abs().sum(1)


@settings(max_examples=80, deadline=None)
@given(
    seed=SEEDS,
    m=st.integers(1, 6),
    outputs=st.sampled_from([1, 2, 3, 11, 40]),
    dtype=st.sampled_from([torch.float64, torch.float32, *HALVES]),
    permuted=st.booleans(),
)
def test_merge_rounds_once(
    seed: int, m: int, outputs: int, dtype: torch.dtype, permuted: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    spec = testing.random_spec(generator)
    flat = torch.randn(m, spec.numel, dtype=torch.float64, generator=generator).to(dtype)
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    weights = torch.randn(outputs, m, dtype=torch.float64, generator=generator).to(accumulate)
    weights[torch.rand(outputs, m, generator=generator) < 0.2] = 0.0
    perms = random_perms(spec, m, seed) if permuted else {}
    given = merge(flat, weights, spec, perms=perms if permuted else None)
    exact, magnitude = exact_merge(flat, weights, spec, perms)
    summing = m * torch.finfo(accumulate).eps / 2 * magnitude
    rounding = torch.finfo(dtype).eps / 2 * (exact.abs() + summing)
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps / 2
    assert given.dtype == dtype
    assert ((given.double() - exact).abs() <= summing + rounding + smallest).all()
    if dtype in HALVES and spec.numel:
        eager = (weights @ brute_force(flat.float(), perms, spec)).to(dtype)
        ulp = torch.finfo(dtype).eps * eager.double().abs() + 2 * smallest
        assert ((given.double() - eager.double()).abs() <= ulp + 2 * summing).all()
    for row in range(min(outputs, 3)):
        one = merge(flat, weights[row].tolist(), spec, perms=perms)
        torch.testing.assert_close(one, given[row])


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("permuted", [False, True])
def test_merge_of_every_half_precision_bit_pattern(dtype: torch.dtype, permuted: bool) -> None:
    flat = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(dtype)[None]
    spec = WeightSpec({"w": ("a",)}, {"w": (65536,)})
    p = torch.randperm(65536)
    given = merge(flat, [1.0], spec, perms={"a": p} if permuted else None)
    expected = flat[0][p] if permuted else flat[0]
    nan = expected.isnan()
    assert torch.equal(given.isnan(), nan)
    if _load.reasons["cpu"] is None:
        assert_same_bits(given[~nan], expected[~nan])
    assert torch.equal(given[~nan], expected[~nan])


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_merge_rounds_halves_like_torch_everywhere(dtype: torch.dtype) -> None:
    flat = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(dtype)[None]
    # Ties to even, the step to infinity (3 x 21840 = 65520) and every subnormal are among these.
    weights = torch.tensor(
        [0.5, 1.5, 3.0, -0.75, 1 / 3, 1025 / 1024, 2**-10, 1.1e-7, 3e38, -1e-38, 0.0]
    )
    given = merge(flat, weights[:, None], named(65536))
    expected = (weights[:, None] * flat.float()).to(dtype)
    torch.testing.assert_close(given, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES], ids=str)
def test_merge_of_special_values_equals_eager(dtype: torch.dtype) -> None:
    top, low = torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal
    values = [0.0, -0.0, 1.0, top, -top, low, low / 4, torch.inf, -torch.inf, torch.nan]
    flat = torch.cartesian_prod(*[torch.tensor(values, dtype=dtype)] * 2).T.contiguous()
    # A second weight beyond 1 may overflow in a product that a fused multiply-add never rounds.
    weights = torch.cartesian_prod(
        torch.tensor([0.0, 1.0, -1.0, 0.5, 2.0]), torch.tensor([0.0, 1.0, -1.0, 0.5])
    )
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    wide, w = flat.to(accumulate), weights.to(accumulate)
    expected = (w[:, :1] * wide[0] + w[:, 1:] * wide[1]).to(dtype)
    torch.testing.assert_close(
        merge(flat, weights, named(flat.shape[1])), expected, equal_nan=True, rtol=0, atol=0
    )


def test_merge_weights_are_numbers_in_any_form() -> None:
    flat, spec = torch.randn(2, 5, dtype=torch.float64), named(5)
    expected = 0.1 * flat[0] + 3 * flat[1]
    forms = (
        [0.1, 3],
        (0.1, 3.0),
        np.array([0.1, 3.0]),
        [torch.tensor(0.1, dtype=torch.float64), np.int8(3)],
    )
    for weights in (*forms, torch.tensor([0.1, 3.0], dtype=torch.float64)):
        torch.testing.assert_close(merge(flat, weights, spec), expected, rtol=1e-15, atol=1e-15)
    rows = merge(flat, [np.array([0.1, 3.0])], spec)
    torch.testing.assert_close(rows, expected[None], rtol=1e-15, atol=1e-15)
    compiled = torch.compile(lambda x: merge(x, [0.1, 3], spec), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(flat), expected)


def test_merge_of_a_large_network_over_threads() -> None:
    spec = testing.resnet20_spec()
    flat, perms = torch.randn(3, spec.numel), spec.random_permutations(3)
    weights = torch.randn(2, 3)
    exact, magnitude = exact_merge(flat, weights, spec, perms)
    error = (merge(flat, weights, spec, perms=perms).double() - exact).abs()
    assert (error <= 4 * torch.finfo(torch.float32).eps * magnitude).all()


# What a backend could get wrong, in a few seconds.
CORE = "brute_force or block_size or row_length or stream or bit_pattern or special or rounds"
ASSIGN = "scipy or starting_duals"


def test_the_backend_is_the_one_asked_for() -> None:
    host = _load.host()
    if os.environ.get("WEIGHTOPS_DISABLE_NATIVE"):
        assert host is None
        assert not any(_load.has_kernel(op, "cpu") for op in ("permute", "merge", "assign"))
        assert _load.reasons["cpu"] == "WEIGHTOPS_DISABLE_NATIVE is set"
    elif host is not None and (wish := os.environ.get("WEIGHTOPS_ISA")):
        assert host.isa in {wish, "generic"}


@pytest.mark.parametrize(
    "setting",
    [
        *(f"WEIGHTOPS_ISA={isa}" for isa in ("generic", "avx2", "avx512")),
        "WEIGHTOPS_DISABLE_NATIVE=1",
    ],
)
def test_other_backends_pass_too(setting: str) -> None:
    name, value = setting.split("=")
    if name == "WEIGHTOPS_ISA" and _load.reasons["cpu"] is not None:
        pytest.skip("no compiled library")
    environment = {k: v for k, v in os.environ.items() if k != "WEIGHTOPS_REQUIRE_NATIVE"}
    here, chosen = Path(__file__), f"{CORE} or {ASSIGN} or asked_for or of_every or test_every"
    options = ["-q", "-x", "-p", "no:cacheprovider", "-k", chosen]
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            *options,
            str(here),
            *(str(here.with_name(f"test_{name}.py")) for name in ("assign", "manifold")),
        ],
        env={**environment, name: value},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]


def test_merge_of_networks_at_odd_addresses() -> None:
    spec = WeightSpec({"w": ("h", None)}, {"w": (5, 3)})
    values = torch.randn(2, 15)
    memory = np.zeros(2 * 60 + 1, dtype=np.uint8)
    memory[1:] = np.frombuffer(values.numpy().tobytes(), dtype=np.uint8)
    odd = torch.from_numpy(memory[1:].view(np.float32).reshape(2, 15))
    out = torch.from_numpy(np.zeros(61, dtype=np.uint8)[1:].view(np.float32))
    assert odd.data_ptr() % 4
    torch.testing.assert_close(merge(odd, [1.0, 2.0], spec), values[0] + 2 * values[1])
    merge(odd, [1.0, 2.0], spec, out=out)
    torch.testing.assert_close(out.clone(), values[0] + 2 * values[1])
