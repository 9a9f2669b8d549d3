"""Pictures of barriers: curves over the segment, and the filled triangle. They need matplotlib."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from weightops import _check
from weightops.align.barrier import Barrier
from weightops.align.simplex import Simplex

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_HEIGHT = 3**0.5 / 2


def plot_barrier(barriers: Barrier | Mapping[str, Barrier], ax: Axes | None = None) -> list[Axes]:
    """Draw losses along segments, and the straight lines they would follow without a barrier.

    Args:
        barriers: one, or name -> barrier for a legend.
        ax: where to draw the losses alone; by default a new figure, with a panel of errors where there
            are any.

    Returns:
        The axes drawn on, the losses' and then the errors'; ``.figure`` is their figure.

    Raises:
        TypeError: ``barriers`` is something else.
    """
    named = barriers if isinstance(barriers, Mapping) else {"": barriers}
    for barrier in named.values():
        if not isinstance(barrier, Barrier):
            raise TypeError(
                "plot_barrier: barriers must be a Barrier or map names to them, "
                f"not {_check.describe(barriers)}"
            )
    panels = [("loss", 1, {name: each.losses for name, each in named.items()})]
    if ax is not None:
        axes = [ax]
    else:
        from matplotlib import pyplot

        errors = {k: b.errors for k, b in named.items() if not b.errors.isnan().all()}
        if errors:
            panels.append(("error, %", 100, errors))
        size = (4.4 * len(panels), 3.2)
        figure, grid = pyplot.subplots(
            1, len(panels), figsize=size, squeeze=False, layout="constrained"
        )
        axes = list(grid[0])
    for each, (title, scale, values) in zip(axes, panels, strict=True):
        for name, along in values.items():
            alphas = named[name].alphas
            color = f"C{list(named).index(name) % 10}"
            straight = scale * ((1 - alphas) * along[0] + alphas * along[-1])
            # One name for both panels.
            label = name if each is axes[0] else None
            each.plot(alphas, scale * along, color=color, label=label)
            each.plot(alphas, straight, color=color, linestyle="--", linewidth=0.8)
            each.fill_between(alphas, straight, scale * along, color=color, alpha=0.1, linewidth=0)
        each.set(xlabel="from one network to the other", ylabel=title, xlim=(0, 1))
        each.spines[["top", "right"]].set_visible(False)
    if isinstance(barriers, Mapping):
        if ax is None:
            figure.legend(loc="outside upper center", ncols=4, frameon=False)
        else:
            ax.legend(frameon=False)
    return axes


def plot_simplex(simplex: Simplex, ax: Axes | None = None) -> Axes:
    """Draw the losses over the triangle of three networks, and mark the highest above the plane.

    Args:
        simplex: of three corners.
        ax: where to draw; by default a new figure.

    Returns:
        The axes drawn on.

    Raises:
        ValueError: there are more or fewer corners than three, or the points span no triangle.
        TypeError: ``simplex`` is none.
    """
    if not isinstance(simplex, Simplex):
        raise TypeError(f"plot_simplex: simplex must be a Simplex, not {_check.describe(simplex)}")
    if simplex.weights.shape[1] != 3:
        raise ValueError(
            f"plot_simplex: simplex must have 3 corners, not {simplex.weights.shape[1]}"
        )
    if torch.linalg.matrix_rank(simplex.weights) < 3:
        raise ValueError("plot_simplex: the points of simplex all lie on a line")
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    if ax is None:
        _, ax = pyplot.subplots(figsize=(4.8, 4), layout="constrained")
    corners = torch.tensor([[0, 0], [1, 0], [0.5, _HEIGHT]], dtype=torch.float64)
    x, y = (simplex.weights @ corners).T.numpy()
    low, high = simplex.losses.min().item(), simplex.losses.max().item()
    # Differences of rounding are no landscape.
    levels = MaxNLocator(20).tick_values(low, max(high, low + 1e-3 * abs(low) + 1e-9))
    filled = ax.tricontourf(x, y, simplex.losses.numpy(), levels, cmap="viridis")
    pyplot.colorbar(filled, ax=ax, label="loss", shrink=0.8)
    for name, at, loss in zip("ABC", corners, simplex.corner_losses.tolist(), strict=True):
        ax.plot(*at, marker="o", color="white", markeredgecolor="black", zorder=3)
        centre = corners.mean(0)
        outside = centre + (at - centre) * 1.15
        ax.annotate(f"{name}\n{loss:.3g}", outside.tolist(), ha="center", va="center")
    ax.plot(*(simplex.worst @ corners), marker="X", color="white", markeredgecolor="black", ms=9)
    ax.set(xlim=(-0.15, 1.15), ylim=(-0.15, _HEIGHT + 0.15), aspect="equal")
    ax.set_title(f"barrier {simplex.loss:.3g}", fontsize="medium")
    ax.set_axis_off()
    return ax
