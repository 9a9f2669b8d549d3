"""Sweeps: the same as training at once, wherever they were killed, and they refuse what is not theirs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from weightops import circles
from weightops.circles import _sweep

OPTIONS: dict[str, Any] = {"p": 7, "d": 3, "steps": 7, "batch": 3, "width": 5}


def results(folder: Path, **changes: Any) -> list[dict[str, torch.Tensor]]:
    return list(circles.sweep(folder, [5, 6, 7, 8], **(OPTIONS | changes)))


def test_a_sweep_gives_what_training_gives(tmp_path: Path) -> None:
    found = results(tmp_path)
    assert [each["seeds"].tolist() for each in found] == [[5, 6, 7], [8]]
    expected = circles.train(3, 7, 3, steps=7, width=5, seed=[5, 6, 7])
    for name in ("flat", "losses", "signals", "diverged"):
        assert found[0][name].equal(getattr(expected, name))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("networks-000000.safetensors", "networks-000003.safetensors", "sweep.json"),
    ]


@pytest.mark.parametrize("calls", [1, 2, 3])
def test_a_killed_sweep_goes_on_to_the_bit_and_loses_one_run_at_most(
    calls: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = results(tmp_path / "whole")
    made: list[int] = []

    def dying(train: Callable, after: int | None) -> Callable:
        def run(num_models: int, *args: Any, **options: Any) -> Any:
            if options["steps"]:
                if after is not None and len(made) == after:
                    raise KeyboardInterrupt
                made.append(num_models * options["steps"])
            return train(num_models, *args, **options)

        return run

    monkeypatch.setattr(_sweep, "train", dying(circles.train, calls))
    with pytest.raises(KeyboardInterrupt):
        results(tmp_path / "killed")
    assert max(made) <= 3 * 3  # an m-th of 7 steps, rounded up
    monkeypatch.setattr(_sweep, "train", dying(circles.train, None))
    again = results(tmp_path / "killed")
    assert sum(made) == 4 * 7
    for one, other in zip(again, whole, strict=True):
        assert all(one[name].equal(other[name]) for name in other)


def test_a_sweep_begins_with_given_embeddings_and_is_of_these_alone(tmp_path: Path) -> None:
    start = torch.randn(4, 7, 3)
    for name, given in (("each", start), ("all", start[0])):
        found = results(tmp_path / name, embedding=given)
        own = given[:3] if name == "each" else given
        expected = circles.train(3, 7, 3, steps=7, width=5, seed=[5, 6, 7], embedding=own)
        assert found[0]["flat"].equal(expected.flat)
        assert found[0]["signals"].equal(expected.signals)
        again = results(tmp_path / name, embedding=given)
        assert again[1]["flat"].equal(found[1]["flat"])
    for other in (start + 1, None):
        with pytest.raises(ValueError, match="is of another sweep: embedding differ"):
            results(tmp_path / "each", embedding=other)


def test_a_network_that_diverges_is_kept_as_such(tmp_path: Path) -> None:
    for _ in range(2):
        assert all(each["diverged"].all() for each in results(tmp_path, lr=1e38))


def test_other_arguments_and_broken_files_are_refused(tmp_path: Path) -> None:
    results(tmp_path)
    with pytest.raises(
        ValueError, match=r"^sweep: .*sweep.json: is of another sweep: d, lr differ"
    ):
        results(tmp_path, d=4, lr=0.1)
    (tmp_path / "networks-000003.safetensors").write_bytes(b"abc")
    with pytest.raises(ValueError, match=r"^sweep: .*000003.safetensors: is truncated"):
        results(tmp_path)
    (tmp_path / "sweep.json").write_text("{")
    with pytest.raises(ValueError, match=r"^sweep: .*sweep.json: is truncated or no JSON"):
        results(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"^sweep: .*file"):
        results(tmp_path / "file")


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"batch": 0}, ValueError, "sweep: batch must be at least 1"),
        ({"steps": 0}, ValueError, "sweep: steps must be at least 1"),
        ({"p": 2}, ValueError, "sweep: p must be at least 3"),
        ({"lr": torch.ones(3)}, TypeError, "sweep: lr must be a number"),
        ({"embedding": 3}, TypeError, "sweep: embedding must be a tensor"),
        (
            {"embedding": torch.ones(3, 7, 3)},
            ValueError,
            r"sweep: embedding must have shape \[7, 3",
        ),
        ({"seed": 3}, TypeError, "sweep: options must be some of width, lr"),
    ],
)
def test_bad_arguments_are_named_and_nothing_is_written(
    changes: dict, error: type, text: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match="^" + text):
        results(tmp_path / "none", **changes)
    assert not (tmp_path / "none").exists()
    for seeds in ([], 3, [1, -1], ["a"]):
        with pytest.raises((TypeError, ValueError), match=r"^sweep: seed"):
            circles.sweep(tmp_path / "none", seeds, **OPTIONS)
    with pytest.raises(TypeError, match=r"^sweep: folder must be a path, not int 3"):
        circles.sweep(3, [1], **OPTIONS)
