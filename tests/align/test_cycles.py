"""Composition along paths follows the networks, and cycles are counted unit by unit."""

import pytest
import torch

import weightops
from weightops import testing
from weightops.align.cycles import compose_path, cycle_error

SPEC = testing.mlp_spec(3, 6, 4, 2)


def random_path(steps: int, rows: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [SPEC.random_permutations(rows, generator) for _ in range(steps)]


def test_a_path_acts_like_its_steps_one_after_the_other() -> None:
    flat = torch.randn(3, SPEC.numel, generator=torch.Generator().manual_seed(1))
    path = random_path(3, rows=3)
    moved = flat
    for perms in path:
        moved = weightops.permute(moved, perms, SPEC)
    whole = compose_path(SPEC, path)
    assert torch.equal(weightops.permute(flat, whole, SPEC), moved)


def test_steps_without_a_label_leave_it_and_single_rows_serve_all() -> None:
    (first,), (second,) = random_path(1, rows=3), random_path(1, rows=1)
    single = {"h1": second["h1"][0].int()}
    whole = compose_path(SPEC, [first, single])
    assert torch.equal(whole["h1"], first["h1"][:, second["h1"][0]])
    assert torch.equal(whole["h2"], first["h2"])
    only = compose_path(SPEC, [single])
    assert list(only) == ["h1"]
    assert only["h1"].dtype == torch.int64
    assert only["h1"].shape == (6,)


def test_a_cycle_that_closes_has_no_error() -> None:
    first, second = random_path(2, rows=2)
    back = SPEC.invert(compose_path(SPEC, [first, second]))
    found = cycle_error(SPEC, [first, second, back])
    assert all(torch.equal(share, torch.zeros(2).double()) for share in found.labels.values())
    assert torch.equal(found.units, torch.zeros(2).double())


def test_units_that_do_not_come_back_are_counted() -> None:
    swap = {"h1": torch.tensor([[0, 1, 2, 3, 4, 5], [1, 0, 2, 3, 4, 5]]), "h2": torch.arange(4)}
    turn = {"h1": torch.tensor([0, 1, 2, 4, 5, 3])}
    found = cycle_error(SPEC, [swap, turn])
    assert found.labels["h1"].tolist() == [3 / 6, 5 / 6]
    assert found.labels["h2"].item() == 0
    assert found.units.tolist() == [3 / 10, 5 / 10]
    once = cycle_error(SPEC, [turn])
    assert once.labels["h1"].item() == 3 / 6
    assert once.labels["h2"].item() == 0
    assert once.units.item() == 3 / 10


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ([], "has no steps"),
        ({"h1": torch.arange(6)}, "must be a list of permutations, not dict"),
        ([torch.arange(6)], r"\[0\] must map labels to index tensors"),
        ([{"h9": torch.arange(6)}], r"\[0\] has label 'h9'"),
        ([{}, {"h1": torch.arange(5)}], r"\[1\]\['h1'\] has length 5"),
        ([{"h1": torch.zeros(6).long()}], r"\[0\]\['h1'\] is no permutation"),
        (
            [{"h1": torch.arange(6).repeat(2, 1)}, {"h2": torch.arange(4).repeat(3, 1)}],
            r"\[0\]\['h1'\] has 2 rows, but (path|cycle)\[1\]\['h2'\] has 3",
        ),
    ],
)
@pytest.mark.parametrize("function", [compose_path, cycle_error])
def test_bad_paths_are_refused(function, path, message: str) -> None:
    name = "path" if function is compose_path else "cycle"
    with pytest.raises((ValueError, TypeError), match=f"{function.__name__}: {name}.*{message}"):
        function(SPEC, path)


@pytest.mark.parametrize("function", [compose_path, cycle_error])
def test_what_is_no_spec_is_refused(function) -> None:
    with pytest.raises(TypeError, match=f"{function.__name__}: spec must be a WeightSpec"):
        function(None, [{}])
