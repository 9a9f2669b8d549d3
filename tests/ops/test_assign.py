"""assign against scipy, and against the proof of optimality that its own potentials are."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from weightops import _load, assign
from weightops.ops.assign import reference

Shape = tuple[int, int, int]


def uniform(shape: Shape, g: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=g, dtype=torch.float64)


def gram(shape: Shape, g: torch.Generator) -> Tensor:
    b, n, m = shape
    left = torch.randn(b, n, 24, generator=g, dtype=torch.float64)
    return left @ torch.randn(b, m, 24, generator=g, dtype=torch.float64).mT


def near_permutation(shape: Shape, g: torch.Generator) -> Tensor:
    _, n, m = shape
    planted = torch.eye(m, dtype=torch.float64)[torch.randperm(m, generator=g)][:n]
    return planted.expand(shape) + 0.1 * uniform(shape, g)


def mixed(shape: Shape, g: torch.Generator) -> Tensor:
    exponents = torch.randint(-30, 30, shape, generator=g).double()
    return (uniform(shape, g) - 0.5) * 2.0**exponents


def duplicated(shape: Shape, g: torch.Generator) -> Tensor:
    x = uniform(shape, g)
    return x[:, torch.arange(shape[1]) // 2][:, :, torch.arange(shape[2]) // 3]


def products(shape: Shape, g: torch.Generator) -> Tensor:
    """The worst case of shortest augmenting paths: cost (i + 1)(j + 1)."""
    b, n, m = shape
    one = torch.arange(1.0, n + 1, dtype=torch.float64)[:, None] * torch.arange(1.0, m + 1)
    return one.expand(b, n, m).contiguous()


FAMILIES: dict[str, Callable[[Shape, torch.Generator], Tensor]] = {
    "uniform": uniform,
    "gram": gram,
    "near permutation": near_permutation,
    "mixed magnitudes": mixed,
    "huge": lambda shape, g: (uniform(shape, g) - 0.5) * 1e300,
    "tiny": lambda shape, g: uniform(shape, g) * 1e-300,
    "large offset": lambda shape, g: uniform(shape, g) + 1e6,
    "integer ties": lambda shape, g: torch.randint(-3, 4, shape, generator=g).double(),
    "zero or one": lambda shape, g: (uniform(shape, g) < 0.15).double(),
    "constant": lambda shape, g: torch.full(shape, -2.5, dtype=torch.float64),
    "duplicated rows": duplicated,
    "products": products,
}
SHAPES = [
    *((3, 0, 0), (3, 0, 4), (0, 3, 4), (3, 1, 1), (3, 1, 7), (3, 2, 2), (4, 5, 5), (2, 7, 19)),
    *((2, 16, 16), (2, 17, 17), (2, 31, 64), (2, 63, 63), (2, 65, 67), (1, 128, 128), (1, 90, 131)),
]


def check(score: Tensor, columns: Tensor, maximize: bool, potentials: Tensor | None = None) -> None:
    """Columns are valid and as good as scipy's; potentials prove it without scipy."""
    problems, rows, cols = score.shape
    assert columns.shape == (problems, rows)
    assert columns.dtype == torch.int64
    wide = score.double()
    for b in range(problems):
        assert len(set(columns[b].tolist())) == rows
        assert columns[b].ge(0).all()
        assert columns[b].lt(cols).all()
        best = wide[b].numpy()[linear_sum_assignment(wide[b].numpy(), maximize)]
        mine = wide[b].gather(1, columns[b, :, None])[:, 0]
        if not rows:
            continue
        scale = wide[b].abs().max().item()
        # Sums of the same numbers in another order: no ties are lost, no error is allowed.
        assert abs(mine.sum().item() - best.sum()) <= 4e-16 * rows * scale
        if potentials is None:
            continue
        v = potentials[b]
        assert v.isfinite().all()
        reduced = wide[b] - v
        u = reduced.amax(1) if maximize else reduced.amin(1)
        own = reduced.gather(1, columns[b, :, None])[:, 0]
        tolerance = 1e-13 * (scale + v.abs().max().item())
        assert (own - u).abs().max() <= tolerance
        # No choice of columns has better potentials than the one made.
        chosen, best_choice = v[columns[b]].sum(), v.topk(rows, largest=maximize).values.sum()
        assert (chosen - best_choice).abs() <= tolerance * rows


@pytest.mark.parametrize("maximize", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_sum_equals_scipy_and_potentials_certify_it(family: str, maximize: bool) -> None:
    g = torch.Generator().manual_seed(0)
    for shape in SHAPES:
        score = FAMILIES[family](shape, g)
        columns, potentials = assign(score, maximize=maximize, return_duals=True)
        assert potentials.shape == (shape[0], shape[2])
        assert potentials.dtype == torch.float64
        check(score, columns, maximize, potentials)
        if family not in ("huge", "tiny"):
            check(score.float(), assign(score.float(), maximize=maximize), maximize)


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    shape=st.tuples(st.integers(0, 3), st.integers(0, 12), st.integers(0, 12)),
    family=st.sampled_from(sorted(FAMILIES)),
    maximize=st.booleans(),
)
def test_small_problems_equal_scipy(seed: int, shape: Shape, family: str, maximize: bool) -> None:
    problems, rows, cols = shape
    score = FAMILIES[family](
        (problems, min(rows, cols), max(rows, cols)), torch.Generator().manual_seed(seed)
    )
    check(score, *_solved(score, maximize))


def _solved(score: Tensor, maximize: bool) -> tuple[Tensor, bool, Tensor]:
    columns, potentials = assign(score, maximize=maximize, return_duals=True)
    return columns, maximize, potentials


@pytest.mark.parametrize("maximize", [True, False])
@pytest.mark.parametrize(
    "family", ["uniform", "gram", "mixed magnitudes", "integer ties", "products"]
)
@pytest.mark.parametrize("shape", [(2, 40, 40), (2, 21, 33), (3, 1, 5)])
def test_any_starting_duals_give_the_same_sum(family: str, maximize: bool, shape: Shape) -> None:
    g = torch.Generator().manual_seed(0)
    score = FAMILIES[family](shape, g)
    _, own = assign(score, maximize=maximize, return_duals=True)
    noise = torch.randn(own.shape, generator=g, dtype=torch.float64)
    holes = own.clone()
    holes[:, ::2], holes[:, 1::3] = torch.nan, torch.inf
    starts = {
        "own": own,
        "perturbed": own + 0.01 * noise,
        "float32": own.float(),
        "half": own.clamp(-1e4, 1e4).half(),
        "unrelated": 1e3 * noise,
        "zero": torch.zeros_like(own),
        "huge": 1e300 * noise,
        "nan": torch.full_like(own, torch.nan),
        "infinite": torch.full_like(own, -torch.inf),
        "holes": holes,
        "expanded": own[:1].expand_as(own),
    }
    for name, start in starts.items():
        before = start.clone()
        columns, potentials = assign(score, maximize=maximize, duals=start, return_duals=True)
        assert start.equal(before) or before.isnan().any(), f"{name} duals were written to"
        check(score, columns, maximize, potentials)
    moved = score + 0.01 * torch.randn(shape, generator=g, dtype=torch.float64)
    columns, potentials = assign(moved, maximize=maximize, duals=own, return_duals=True)
    check(moved, columns, maximize, potentials)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_numpy_equals_torch(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    for shape in ((3, 20, 20), (2, 5, 9), (0, 3, 3), (2, 0, 0)):
        score = gram(shape, g).to(dtype)
        columns, potentials = assign(score, return_duals=True)
        got = assign(score.numpy(), return_duals=True)
        assert all(isinstance(each, np.ndarray) for each in got)
        assert np.array_equal(got[0], columns)
        assert np.array_equal(got[1], potentials)
        for start in (potentials, potentials.numpy()):
            warm = assign(score.numpy(), duals=start)
            assert np.array_equal(warm, assign(score, duals=start))
    score, duals = gram((2, 5, 9), g).numpy(), np.zeros((2, 9))
    expected = assign(np.ascontiguousarray(score[::-1]))
    assert np.array_equal(assign(score[::-1]), expected)
    assert np.array_equal(assign(score[::-1].astype(">f8"), duals=duals[::-1]), expected)
    score.flags.writeable = duals.flags.writeable = False
    assert np.array_equal(assign(score, duals=duals)[::-1], expected)
    assert np.array_equal(assign(score[1], duals=duals[1]), expected[0])


def test_one_problem_needs_no_batch_axis() -> None:
    score = gram((2, 6, 8), torch.Generator().manual_seed(0))
    columns, potentials = assign(score, return_duals=True)
    for b in range(2):
        one = assign(score[b], return_duals=True)
        assert torch.equal(one[0], columns[b])
        assert torch.equal(one[1], potentials[b])
        check(score[b : b + 1], assign(score[b], duals=potentials[b])[None], True)


def test_any_strides() -> None:
    g = torch.Generator().manual_seed(0)
    base = gram((8, 24, 30), g)
    for view in (
        base.mT[:, :20].mT.mT,
        base[::2, 1::2, ::2][:, :, :13],
        base.permute(1, 0, 2)[:5],
        base[:1].expand(3, -1, -1),
        base[:, :3, :1].expand(-1, -1, 7),
        torch._neg_view(base),
        base.requires_grad_(),
    ):
        copy = view.detach().resolve_neg().contiguous()
        assert torch.equal(assign(view), assign(copy))
        check(copy, assign(view), True)


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float16,
        torch.bfloat16,
        torch.int8,
        torch.uint8,
        torch.int32,
        torch.int64,
        torch.float32,
    ],
    ids=str,
)
def test_other_dtypes_are_solved_as_they_are(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    score = (50 * uniform((4, 23, 29), g)).to(dtype)
    if dtype == torch.int64:
        score += 2**40
    columns, potentials = assign(score, return_duals=True)
    check(score, columns, True, potentials)
    if dtype != torch.bfloat16:
        assert np.array_equal(assign(score.numpy()), columns)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_a_score_that_is_not_finite_is_named(value: float, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    for at in ((0, 0, 0), (4, 30, 66), (2, 0, 66), (3, 30, 1)):
        score = uniform((5, 31, 67), g).to(dtype)
        score[at] = value
        pattern = (
            rf"^assign: score must be finite, but score\[{', '.join(map(str, at))}\] is {value}"
        )
        for given_score in (score, score.numpy()):
            with pytest.raises(ValueError, match=pattern):
                assign(given_score)


def test_results_do_not_depend_on_threads_or_the_run() -> None:
    g = torch.Generator().manual_seed(0)
    # Constant scores have every permutation for an answer, so any race would show.
    for score in (
        gram((33, 40, 40), g),
        FAMILIES["constant"]((33, 20, 30), g),
        mixed((9, 64, 70), g),
    ):
        expected = assign(score, return_duals=True)
        found = [assign(score, return_duals=True)]
        found.append(tuple(map(torch.from_numpy, assign(score.numpy(), return_duals=True))))
        try:
            torch.set_num_threads(1)
            found.append(assign(score, return_duals=True))
            found.append(tuple(map(torch.from_numpy, assign(score.numpy(), return_duals=True))))
        finally:
            torch.set_num_threads(2)
        for columns, potentials in found:
            assert torch.equal(columns, expected[0])
            assert torch.equal(potentials, expected[1])
        # Nor on the company that a problem is solved in.
        assert torch.equal(assign(score[5:6])[0], expected[0][5])


@pytest.mark.parametrize("maximize", [True, False])
@pytest.mark.parametrize(
    "family", ["uniform", "gram", "integer ties", "duplicated rows", "constant"]
)
def test_reference_agrees_and_its_potentials_certify(family: str, maximize: bool) -> None:
    g = torch.Generator().manual_seed(0)
    for shape in ((2, 13, 13), (2, 5, 11), (1, 40, 40), (2, 1, 1), (2, 0, 3), (0, 2, 2)):
        score = FAMILIES[family](shape, g)
        columns, potentials = reference.assign(score, maximize, None)
        check(score, columns, maximize, potentials)
        mine = assign(score, maximize=maximize)
        theirs = score.gather(2, columns[..., None]).sum((1, 2))
        torch.testing.assert_close(score.gather(2, mine[..., None]).sum((1, 2)), theirs)
        # What the reference found is a start for the kernel, and the other way round.
        check(score, assign(score, maximize=maximize, duals=potentials), maximize)


@pytest.mark.skipif(_load.reasons["cpu"] is not None, reason="no compiled library")
def test_a_large_problem_equals_scipy() -> None:
    g = torch.Generator().manual_seed(0)
    for family in ("uniform", "gram"):
        score = FAMILIES[family]((1, 700, 700), g).float()
        columns, potentials = assign(score, return_duals=True)
        check(score, columns, True, potentials)
        check(score, assign(score, duals=potentials), True)


def test_arrays_of_one_number_may_have_any_stride() -> None:
    backwards = np.zeros(2)[::-1][:1]
    assert backwards.strides[0] < 0
    assert assign(backwards[None], duals=backwards).tolist() == [0]
