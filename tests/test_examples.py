"""What the experiments of ``examples`` show, in short form and in full, and what the docs tell of them."""

import json
from pathlib import Path

import pytest
import reproduce_manifold
from manifold import report
from rich.console import Console

DOCS = Path(__file__).resolve().parent.parent / "docs"


def means(results: report.Results, task: str, part: str) -> dict[str, float]:
    found = results["tasks"][task]
    return {
        name: report.over(method["scores"], found["parts"][part]).mean()
        for name, method in found["methods"].items()
    }


def test_weights_on_an_ellipse_reach_into_a_held_out_arc(tmp_path: Path) -> None:
    results = reproduce_manifold.compare(True, Console(quiet=True))
    report.show(Console(quiet=True), results)
    report.save(results, tmp_path)
    assert (tmp_path / "manifold.svg").stat().st_size > 10_000
    assert json.loads((tmp_path / "manifold.json").read_text()) == results
    arc = means(results, "rotation, an arc held out", "held-out arc")
    ellipse = arc["ellipse, ManifoldDescent(SGD)"]
    assert ellipse > 0.2 + arc["no context"]
    assert ellipse > 0.2 + arc["concatenation, equal parameters"]
    assert ellipse > 0.1 + arc["line (wrong topology), ManifoldDescent(SGD)"]


def check_trends(results: report.Results) -> None:
    circle = means(results, "rotation", "all angles")
    ellipse = circle["ellipse, ManifoldDescent(SGD)"]
    assert ellipse > 0.96
    assert ellipse > 0.03 + circle["no context"]
    assert ellipse > 0.005 + circle["concatenation, equal parameters"]

    arc = means(results, "rotation, an arc held out", "held-out arc")
    ellipse = arc["ellipse, ManifoldDescent(SGD)"]
    assert ellipse > 0.15 + arc["no context"]
    assert ellipse > 0.02 + arc["concatenation"]
    assert ellipse > 0.01 + arc["concatenation, equal parameters"]
    assert ellipse > 0.01 + arc["line (wrong topology), ManifoldDescent(SGD)"]

    noise = means(results, "noise", "noise up to 2")
    line = noise["line, ManifoldDescent(SGD)"]
    assert line > 0.003 + noise["no context"]
    assert line > 0.003 + noise["ellipse (wrong topology), ManifoldDescent(SGD)"]

    square = means(results, "rotation and hue", "held-out square")
    torus = square["torus, ManifoldDescent(SGD)"]
    assert torus > 0.02 + square["concatenation, equal parameters"]
    assert torus > 0.05 + square["square (wrong topology), ManifoldDescent(SGD)"]

    error = means(results, "denoising", "all times")
    spline = error["B-spline, AdamW"]
    assert spline < 0.85 * error["no noise level"]
    assert spline < error["time embedding, equal parameters"]
    assert spline < error["ellipse (wrong topology), AdamW"]


@pytest.mark.slow
def test_trends_of_the_full_experiment() -> None:
    check_trends(reproduce_manifold.compare(False, Console(quiet=True)))


def test_docs_tell_the_committed_run() -> None:
    results = json.loads((DOCS / "manifold.json").read_text())
    page = (DOCS / "reproductions.md").read_text()
    assert report.markdown(results) in page
    assert results["date"] in page
    check_trends(results)
