"""The picture: circles in their planes, signals over time, who survives, and the signals as a linear system."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
from reproduction import Results

COLORS = (
    *("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown", "tab:pink"),
    *("tab:olive", "tab:cyan"),
)
DEAD = "0.7"
#: tokens that are named
NAMED = 3


def draw(results: Results, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    look = {"svg.fonttype": "none", "svg.hashsalt": "circles", "font.size": 9}
    # Each text of the file names all fonts of the list.
    with plt.rc_context(look | {"font.sans-serif": ["DejaVu Sans"]}):
        figure = plt.figure(figsize=(13, 13), layout="constrained")
        top, bottom = figure.subfigures(2, 1, height_ratios=(1, 2.1))
        colors = colors_of(results["planes"]["frequencies"][:-1])
        draw_planes(top, results["planes"], colors)
        axes = bottom.subplots(2, 3)
        draw_signals(axes[0, 0], results["over time"], colors)
        draw_survival(axes[0, 1], results)
        draw_dynamics(axes[0, 2], results["dynamics"]["example"], colors)
        draw_circles(axes[1, 0], results["over time"])
        draw_dimensions(axes[1, 1], results["dimensions"])
        draw_competition(axes[1, 2], results)
        for axis in axes.flat:
            axis.spines[["top", "right"]].set_visible(False)
        figure.savefig(path, metadata={"Date": None, "Creator": None})
        plt.close(figure)
    # Tenths of a point are fine enough, and the file is a third smaller.
    path.write_text(re.sub(r"(\.\d)\d+", r"\1", path.read_text()))


def colors_of(circles: list[int]) -> dict[int, str]:
    """Frequency -> colour; of others but a network's circles grey."""
    return dict(zip(circles, COLORS, strict=False))


def draw_planes(figure: Any, found: Results, colors: dict[int, str]) -> None:
    """Tokens before training and after it; lines join those that are neighbours on the circle."""
    frequencies = found["frequencies"]
    axes = figure.subplots(2, len(frequencies), squeeze=False)
    for row, (name, title) in zip(axes, (("start", "at the start"), ("end", "trained"))):
        for axis, k, points in zip(row, frequencies, map(np.array, found[name])):
            p = len(points)
            around = np.argsort(np.arange(p) * k % p, kind="stable")
            closed = points[np.append(around, around[0])]
            axis.plot(*closed.T, color=colors.get(k, DEAD), linewidth=0.6)
            if name == "end" and k in colors:
                axis.plot(*points.T, "o", color=colors[k], markersize=3, markeredgewidth=0)
                for token, at in enumerate(points[:NAMED]):
                    axis.text(*(1.15 * at), str(token), ha="center", va="center", fontsize=8)
            axis.set_aspect("equal", "datalim")
            axis.set_axis_off()
            if name == "start":
                axis.set_title(f"k = {k}" if k in colors else f"k = {k}, which dies")
        row[0].text(-0.1, 0.5, title, rotation=90, va="center", transform=row[0].transAxes)
    figure.suptitle("the tokens of one network in the planes of its circles")


def draw_signals(axis: Any, found: Results, colors: dict[int, str]) -> None:
    signals, alive = np.array(found["signals"]), np.array(found["alive"])
    axis.plot(found["steps"], signals[:, ~alive], color=DEAD, linewidth=0.7)
    for k in np.argsort(-signals[-1])[: alive.sum()] + 1:
        color = colors.get(int(k), "black")
        axis.plot(found["steps"], signals[:, k - 1], color=color, label=f"k = {k}")
    axis.axhline(10, color="black", linewidth=0.7, linestyle=":")
    axis.set_yscale("log")
    axis.set_yticks(ticks := [0.1, 1, 10, 20, 50, 100], [f"{each:g}" for each in ticks])
    axis.minorticks_off()
    axis.set_ylim(max(0.05, 0.5 * signals.min()), 1.3 * signals.max())
    axis.set(title="its signals", xlabel="step", ylabel="signal")
    axis.legend(frameon=False, fontsize=8, title="survivors", title_fontsize=8, loc="lower left")


def draw_survival(axis: Any, results: Results) -> None:
    """Points: frequencies of one embedding; line: tenths of the frequencies of networks with their own."""
    found = results["one embedding"]
    for n, (start, rates) in enumerate(zip(found["start"], found["rates"], strict=True)):
        label = f"{found['networks']} networks with one embedding" if n == 0 else None
        axis.plot(
            start, rates, "o", color="tab:orange", alpha=0.5, markersize=4, mew=0, label=label
        )
    start, alive = (np.ravel(results["survival"][name]) for name in ("start", "alive"))
    parts = np.array_split(np.argsort(start, kind="stable"), 10)
    share = np.array([alive[part].mean() for part in parts])
    error = np.sqrt(share * (1 - share) / [len(part) for part in parts])
    at = [start[part].mean() for part in parts]
    axis.errorbar(at, share, error, color="tab:blue", marker="o", label="own embeddings, tenths")
    axis.set(
        title="who survives", xlabel="initial signal", ylabel="probability", ylim=(-0.03, 1.03)
    )
    axis.legend(frameon=False, fontsize=8, loc="upper left")


def draw_dynamics(axis: Any, example: Results, colors: dict[int, str]) -> None:
    steps = example["steps"]
    for n, (k, alive) in enumerate(zip(example["frequencies"], example["alive"], strict=True)):
        color = colors.get(k, "black") if alive else "0.5"
        for name, dash, label, look in (
            ("true", "-", "true", {"linewidth": 4, "alpha": 0.3}),
            ("least squares", "-", "least squares, from the start", {"linewidth": 1}),
            ("Lasso", ":", "Lasso, from the start", {"linewidth": 1.2}),
        ):
            values = np.array(example[name])[:, n]
            axis.plot(steps, values, dash, color=color, label=None if n else label, **look)
    axis.set(title="s(t + 1) - s(t) = A s(t) + b", xlabel="step", ylabel="signal")
    axis.legend(frameon=False, fontsize=8)


def draw_circles(axis: Any, found: Results) -> None:
    for name, color, label in (
        ("circles", "tab:blue", "above twice the mean"),
        ("level", "tab:red", "above 10"),
    ):
        counts = np.array(found[name])
        axis.plot(found["steps"], counts.mean(1), color=color, label=label)
        axis.fill_between(
            found["steps"], counts.min(1), counts.max(1), color=color, alpha=0.12, linewidth=0
        )
    axis.set(title="frequencies over time", xlabel="step", ylabel="how many")
    axis.legend(frameon=False, fontsize=8)


def draw_dimensions(axis: Any, found: Results) -> None:
    d = [int(each) for each in found]
    counts = [each["circles"] for each in found.values()]
    for at, each in zip(d, counts, strict=True):
        values, times = np.unique(each, return_counts=True)
        axis.scatter([at] * len(values), values, s=12 * times, color="tab:blue", alpha=0.35)
    axis.plot(d, [np.mean(each) for each in counts], color="tab:blue")
    axis.set_xscale("log", base=2)
    axis.set_xticks(d, [str(each) for each in d])
    axis.set_ylim(bottom=0)
    axis.set(title="circles", xlabel="dimensions of the embedding", ylabel="how many")


def draw_competition(axis: Any, results: Results) -> None:
    ratios, found = results["plan"]["ratios"], results["competition"]
    for name, color in (("stronger", "tab:blue"), ("weaker", "tab:orange")):
        shares = [each[name] for each in found]
        axis.plot(ratios, shares, "-o", color=color, markersize=4, label=f"the {name} one")
    axis.set_ylim(-0.03, 1.03)
    axis.set(title="two frequencies", xlabel="ratio of the signals", ylabel="survives")
    axis.legend(frameon=False, fontsize=8)
