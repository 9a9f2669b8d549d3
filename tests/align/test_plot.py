"""Pictures of barriers show the curves, the straight lines and the corners they were given."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib import pyplot

from weightops.align.barrier import Barrier
from weightops.align.plot import plot_barrier, plot_simplex
from weightops.align.simplex import Simplex, _lattice

ALPHAS = torch.linspace(0, 1, 5, dtype=torch.float64)
LOSSES = torch.tensor([1.0, 2.0, 3.0, 2.5, 2.0], dtype=torch.float64)
BARRIER = Barrier(ALPHAS, LOSSES, LOSSES / 10)
WEIGHTS = _lattice(3, 5)
HEIGHTS = 1 + WEIGHTS.prod(1) + WEIGHTS[:, 1]
TRIANGLE = Simplex(
    WEIGHTS, HEIGHTS, HEIGHTS / 10, torch.tensor([1.0, 2, 1]).double(), torch.zeros(3).double()
)


@pytest.fixture(autouse=True)
def _drawn_without_a_screen() -> Iterator[None]:
    pyplot.switch_backend("Agg")
    yield
    pyplot.close("all")


def test_segments_are_drawn_with_the_lines_that_they_are_measured_against() -> None:
    losses, errors = plot_barrier(
        {"naive": BARRIER, "aligned": replace(BARRIER, losses=LOSSES / 2)}
    )
    curve, line, second, _ = losses.get_lines()
    assert np.allclose(curve.get_ydata(), LOSSES)
    assert np.allclose(line.get_ydata(), 1 + ALPHAS)
    assert np.allclose(second.get_ydata(), LOSSES / 2)
    assert np.allclose(errors.get_lines()[0].get_ydata(), 10 * LOSSES)
    assert [text.get_text() for text in losses.figure.legends[0].get_texts()] == [
        "naive",
        "aligned",
    ]
    losses.figure.canvas.draw()


def test_without_errors_there_is_one_panel_and_given_axes_are_drawn_on() -> None:
    assert len(plot_barrier(replace(BARRIER, errors=torch.full((5,), torch.nan)))) == 1
    _, ax = pyplot.subplots()
    assert plot_barrier({"naive": BARRIER}, ax) == [ax]
    assert len(ax.get_lines()) == 2
    assert plot_simplex(TRIANGLE, ax) is ax


@pytest.mark.parametrize("losses", [HEIGHTS, torch.ones(15).double(), torch.zeros(15).double()])
def test_the_triangle_marks_its_corners_and_its_worst_point(losses: torch.Tensor) -> None:
    ax = plot_simplex(replace(TRIANGLE, losses=losses))
    at = np.array([np.ravel(line.get_data()) for line in ax.get_lines()])
    assert np.allclose(at[:3], [[0, 0], [1, 0], [0.5, 3**0.5 / 2]])
    if losses is HEIGHTS:
        assert TRIANGLE.worst.tolist() in [[0.5, 0.25, 0.25], [0.25, 0.5, 0.25], [0.25, 0.25, 0.5]]
        assert np.allclose(at[3], TRIANGLE.worst @ torch.tensor(at[:3]))
    assert [text.get_text()[0] for text in ax.texts] == ["A", "B", "C"]
    ax.figure.canvas.draw()


def test_what_cannot_be_drawn_is_refused() -> None:
    with pytest.raises(TypeError, match="plot_barrier: barriers must be a Barrier or map names"):
        plot_barrier([BARRIER])
    with pytest.raises(TypeError, match="plot_simplex: simplex must be a Simplex"):
        plot_simplex(BARRIER)
    with pytest.raises(ValueError, match="plot_simplex: simplex must have 3 corners, not 2"):
        plot_simplex(replace(TRIANGLE, weights=WEIGHTS[:, :2]))
    with pytest.raises(ValueError, match="plot_simplex: the points of simplex all lie on a line"):
        plot_simplex(replace(TRIANGLE, weights=WEIGHTS[WEIGHTS[:, 2] == 0]))
