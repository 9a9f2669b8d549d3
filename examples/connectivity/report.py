"""Results as tables and as a picture.

Results are what ``reproduce_connectivity.py`` writes as JSON. A measurement is ``{"loss": ..., "error": ...}``,
of the test images; those of all groups or pairs of networks are kept.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from reproduction import Results, Tables

UNITS = {"loss": "loss", "error": "error %"}
METRICS = {"loss": "test loss", "error": "test error, %"}
SEGMENTS = {
    "naive": "as trained",
    "weak": "weak",
    "third": "strong, by the third",
    "universe": "strong, together",
}
TRIANGLES = {name: title for name, title in SEGMENTS.items() if name != "weak"}
PERMUTATIONS = {
    "naive": "as trained",
    "final": "final",
    "weight": "own, by weights",
    "activation": "own, by activations",
}
MASKS = {
    "own": "own",
    "transported": "transported",
    "as is": "as it is",
    "random": "random",
}
METHODS = {"naive": "as trained", "weight": "by weights", "activation": "by activations"}
#: between the shades of a triangle
STEP = 0.125
#: of all keys above
COLORS = {
    "naive": "tab:red",
    "weak": "tab:blue",
    "third": "tab:orange",
    "universe": "tab:green",
    "final": "tab:blue",
    "weight": "tab:orange",
    "activation": "tab:green",
    "own": "tab:green",
    "transported": "tab:blue",
    "as is": "tab:red",
    "random": "tab:gray",
}


def of(found: Iterable[dict[str, Any]], metric: str) -> list[float]:
    """One number for each measurement; errors in percent."""
    scale = 100 if metric == "error" else 1
    return [scale * each[metric] for each in found]


def spread(numbers: Sequence[float], metric: str) -> str:
    """Mean and standard deviation between groups or pairs of networks."""
    digits = 1 if metric == "error" else 2
    text = f"{np.mean(numbers):.{digits}f}"
    return f"{text} ± {np.std(numbers, ddof=1):.{digits}f}" if len(numbers) > 1 else text


def percent(share: float) -> str:
    return f"{100 * share:g} %"


def group_means(groups: list[dict[str, Any]], kind: str, name: str, metric: str) -> list[float]:
    """One number a group of three networks; ``kind`` is ``"pairs"`` or ``"triangles"``."""
    return [float(np.mean(of(group[kind][name], metric))) for group in groups]


def alone(found: Iterable[dict[str, Any]]) -> str:
    return spread([float(np.mean(of(each["alone"], "error"))) for each in found], "error")


Rows = list[list[str]]


def widths(results: Results, metric: str) -> Rows:
    columns = [("pairs", name, title) for name, title in SEGMENTS.items()]
    columns += [("triangles", name, f"triangle, {title}") for name, title in TRIANGLES.items()]
    rows = [["width", "error alone, %", *(title for *_, title in columns)]]
    for width, groups in results["widths"].items():
        cells = [spread(group_means(groups, *column[:2], metric), metric) for column in columns]
        rows.append([width, alone(groups), *cells])
    return rows


def trajectories(results: Results, metric: str) -> Rows:
    found = results["trajectories"]
    rows = [["width", "permutation", *map(percent, found["shares"])]]
    for width, pairs in found["widths"].items():
        for name, title in PERMUTATIONS.items():
            at_shares = zip(*pairs, strict=True)
            cells = [spread(of((at[name] for at in ats), metric), metric) for ats in at_shares]
            rows.append([width, title, *cells])
    return rows


def pruned(results: Results, columns: Sequence[tuple[str, str, str, str]]) -> Rows:
    """Columns are the kind of measurements, which of them, the metric and the title."""
    rows = [["weights kept", *(title for *_, title in columns)]]
    for density, ats in at_densities(results, columns[0][0]):
        cells = [
            spread(of((at[kind][name] for at in ats), metric), metric)
            for kind, name, metric, _ in columns
        ]
        rows.append([percent(density), *cells])
    return rows


def at_densities(results: Results, kind: str) -> list[tuple[float, tuple[dict[str, Any], ...]]]:
    """Shares of weights kept, and what there is of each pair of networks: dense ones bear no masks."""
    found = results["pruning"]
    each = zip(found["densities"], zip(*found["pairs"], strict=True), strict=True)
    return [(density, ats) for density, ats in each if kind in ats[0]]


def rates(results: Results) -> Rows:
    columns = [(name, metric) for metric in METRICS for name in METHODS]
    titles = [f"{METHODS[name]}, {UNITS[metric]}" for name, metric in columns]
    rows = [["optimizer", "learning rate", "error alone, %", *titles]]
    for at in results["rates"]:
        cells = [
            spread(of((pair[name] for pair in at["pairs"]), metric), metric)
            for name, metric in columns
        ]
        rows.append([at["optimizer"], f"{at['rate']:g}", alone(at["pairs"]), *cells])
    return rows


def tables(results: Results) -> Tables:
    """Title -> rows, the first of which has the columns' names."""
    barriers = [
        ("barriers", name, metric, f"{title}, {UNITS[metric]}")
        for metric in METRICS
        for name, title in PERMUTATIONS.items()
    ]
    masks = [
        (training, name, "error", f"{title}, {training}")
        for training in ("rewound", "at once")
        for name, title in MASKS.items()
    ]
    return {
        **{
            f"three networks: barriers of {title}": widths(results, metric)
            for metric, title in METRICS.items()
        },
        **{
            f"checkpoints at shares of training: barriers of {title}": trajectories(results, metric)
            for metric, title in METRICS.items()
        },
        "pruned networks: barriers": pruned(results, barriers),
        "one network under masks, also another's: test error, %": pruned(results, masks),
        "weight and activation matching: barriers": rates(results),
    }


def draw(results: Results, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": "connectivity", "font.size": 9}):
        figure, axes = plt.subplots(2, 3, figsize=(13, 9))
        draw_widths(axes[0, 0], results)
        draw_triangles(axes[0, 1], results)
        draw_rates(axes[0, 2], results)
        draw_trajectories(axes[1, 0], results)
        draw_pruned(axes[1, 1], results)
        draw_masks(axes[1, 2], results)
        for axis in axes.flat:
            axis.spines[["top", "right"]].set_visible(False)
        figure.tight_layout()
        figure.savefig(path, metadata={"Date": None, "Creator": None})
        plt.close(figure)
    # Tenths of a point are fine enough, and the file is a third smaller.
    path.write_text(re.sub(r"(\.\d)\d+", r"\1", path.read_text()))


def line(axis: Any, x: Sequence[float], found: Any, name: str, label: str, dash: str = "-") -> None:
    """The mean of ``found`` ``[points, networks]``, and a shade from the least to the greatest."""
    y = np.array(found)
    axis.plot(x, y.mean(1), dash, marker="o", markersize=3, color=COLORS[name], label=label)
    axis.fill_between(x, y.min(1), y.max(1), color=COLORS[name], alpha=0.12, linewidth=0)


def legend(axis: Any, title: str | None = None) -> None:
    axis.legend(
        frameon=False,
        fontsize=8,
        ncols=2,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.13),
        title=title,
        title_fontsize=8,
    )


def draw_widths(axis: Any, results: Results) -> None:
    x = [int(width) for width in results["widths"]]
    for name, title in SEGMENTS.items():
        found = [group_means(g, "pairs", name, "loss") for g in results["widths"].values()]
        line(axis, x, found, name, title)
    axis.set_xscale("log", base=2)
    axis.set_xticks(x, [str(width) for width in x])
    axis.set(title="two of three networks", xlabel="width", ylabel="barrier of test loss")
    legend(axis)


def draw_triangles(axis: Any, results: Results) -> None:
    width = next(iter(results["trajectories"]["widths"]))
    group = results["widths"][width][0]
    corners = np.array([[0, 0], [1, 0], [0.5, 0.75**0.5]])
    points = np.array(group["weights"]) @ corners
    highest = max(group["triangles"]["naive"][0]["losses"])
    levels = np.arange(0, highest + STEP, STEP)
    for n, name in enumerate(("naive", "universe")):
        losses = group["triangles"][name][0]["losses"]
        x, y = points.T + np.array([[1.1 * n], [0]])
        shades = axis.tricontourf(x, y, losses, levels=levels, cmap="viridis_r")
        axis.text(1.1 * n + 0.5, -0.08, SEGMENTS[name], ha="center", va="top")
    axis.figure.colorbar(
        shades, ax=axis, orientation="horizontal", label="test loss", ticks=levels[::4]
    )
    axis.set_aspect("equal")
    axis.set_axis_off()
    axis.set_title(f"the triangle of three networks, width {width}")


def draw_rates(axis: Any, results: Results) -> None:
    for optimizer, dash in (("SGD", "-"), ("AdamW", "--")):
        found = [at for at in results["rates"] if at["optimizer"] == optimizer]
        for name in ("weight", "activation"):
            y = [of((pair[name] for pair in at["pairs"]), "loss") for at in found]
            label = f"{METHODS[name]}, {optimizer}"
            line(axis, [at["rate"] for at in found], y, name, label, dash)
    axis.set_xscale("log")
    axis.set_ylim(bottom=0)
    axis.set(
        title="weight and activation matching",
        xlabel="learning rate",
        ylabel="barrier of test loss",
    )
    legend(axis)


def draw_trajectories(axis: Any, results: Results) -> None:
    found = results["trajectories"]
    width, pairs = next(iter(found["widths"].items()))
    for name, title in PERMUTATIONS.items():
        y = [of((at[name] for at in ats), "loss") for ats in zip(*pairs, strict=True)]
        line(axis, range(len(y)), y, name, title)
    axis.set_xticks(range(len(found["shares"])), [f"{100 * share:g}" for share in found["shares"]])
    axis.set(
        title=f"checkpoints, width {width}",
        xlabel="share of training, %",
        ylabel="barrier of test loss",
    )
    legend(axis, "permutation")


def draw_densities(axis: Any, results: Results, kind: str, metric: str, names: dict) -> None:
    ats = at_densities(results, kind)
    x = [100 * density for density, _ in ats]
    for name, title in names.items():
        line(axis, x, [of((at[kind][name] for at in each), metric) for _, each in ats], name, title)
    axis.set_xscale("log")
    axis.invert_xaxis()
    axis.set_xticks(x, [f"{each:g}" for each in x])
    axis.minorticks_off()
    axis.set_xlabel("weights kept, %")


def draw_pruned(axis: Any, results: Results) -> None:
    draw_densities(axis, results, "barriers", "loss", PERMUTATIONS)
    width = results["pruning"]["width"]
    axis.set(title=f"pruned networks, width {width}", ylabel="barrier of test loss")
    legend(axis, "permutation")


def draw_masks(axis: Any, results: Results) -> None:
    draw_densities(axis, results, "rewound", "error", MASKS)
    axis.set_yscale("log")
    axis.set_yticks(ticks := [5, 10, 20, 50, 90], [f"{each}" for each in ticks])
    axis.minorticks_off()
    width = results["pruning"]["width"]
    axis.set(title=f"trained under a mask, width {width}", ylabel="test error, %")
    legend(axis, "mask")
