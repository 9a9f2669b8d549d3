"""Results as tables and as a picture.

Results are what ``reproduce_unf_optimizer.py`` writes as JSON: for every task the tuned rules, and every seed's
learned optimizers, each with the losses of the networks that it trains, step by step.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from reproduction import Results, Tables

COLORS = {"SGD": "tab:gray", "Adam": "tab:green", "Deep Sets": "tab:orange", "UNF": "tab:blue"}
Rows = list[list[str]]


def of(task: Results, name: str, what: str = "mean") -> np.ndarray:
    """Of every seed's optimizer, or of the one that was tuned."""
    if name in task["rules"]:
        return np.array([task["rules"][name][what]])
    return np.array([seed[name][what] for seed in task["learned"]])


def spread(numbers: Sequence[float] | np.ndarray) -> str:
    """Mean and standard deviation over seeds."""
    if len(numbers) < 2:
        return f"{np.mean(numbers):.3f}"
    return f"{np.mean(numbers):.3f} ± {np.std(numbers, ddof=1):.3f}"


def losses(results: Results, what: str) -> Rows:
    head = ["", "weights", *COLORS, "UNF less than SGD", "UNF less than Deep Sets, same seed"]
    rows = [head]
    for name, task in results["tasks"].items():
        found = {each: of(task, each, what) for each in COLORS}
        apart = [spread(found[other] - found["UNF"]) for other in ("SGD", "Deep Sets")]
        numbers = (spread(each) for each in found.values())
        rows.append([name, f"{task['weights']:,}", *numbers, *apart])
    return rows


def settings(results: Results) -> Rows:
    rows = [["", "SGD: alpha, momentum", "Adam: rate, betas"]]
    for kind in ("Deep Sets", "UNF"):
        rows[0] += [f"{kind}: parameters", "alpha, momentum, beta", "iterations"]
    for name, task in results["tasks"].items():
        row = [name, *(listed(rule["settings"]) for rule in task["rules"].values())]
        for kind in ("Deep Sets", "UNF"):
            runs = [seed[kind] for seed in task["learned"]]
            middle = np.mean([run["settings"] for run in runs], 0)
            chosen = [int(np.argmin(run["tried"])) * results["recipe"]["every"] for run in runs]
            row += [f"{runs[0]['parameters']:,}", listed(middle), ", ".join(map(str, chosen))]
        rows.append(row)
    return rows


def listed(numbers: Sequence[float] | np.ndarray) -> str:
    return ", ".join(f"{each:.3g}" for each in numbers)


def wider(results: Results) -> Rows:
    rows = [["hidden units", *COLORS]]
    for width, rules in results["wider"].items():
        (task,) = (
            each for each in results["tasks"].values() if "wider" in each["learned"][0]["UNF"]
        )
        kinds = (
            [s[kind]["wider"][width]["mean"] for s in task["learned"]]
            for kind in ("Deep Sets", "UNF")
        )
        rows.append(
            [
                width,
                *(f"{rule['mean']:.3f}" for rule in rules.values()),
                *(spread(each) for each in kinds),
            ]
        )
    return rows


def tables(results: Results) -> Tables:
    """Title -> rows, the first of which has the columns' names."""
    recipe = results["recipe"]
    found = {
        f"mean loss over {recipe['horizon']} steps, seeds: {recipe['seeds']}": losses(
            results, "mean"
        ),
        "mean loss over the last tenth of them": losses(results, "final"),
        "what was tuned and learned": settings(results),
    }
    if results["wider"]:
        found["learned on 32 hidden units, run on more: mean loss"] = wider(results)
    return found


def draw(results: Results, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tasks = results["tasks"]
    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": "optimizer", "font.size": 9}):
        columns = -(-len(tasks) // 2) + 1
        figure = plt.figure(figsize=(4.4 * columns, 6.4))
        grid = figure.add_gridspec(min(2, len(tasks)), columns)
        for n, (name, task) in enumerate(tasks.items()):
            draw_curves(figure.add_subplot(grid[n // (columns - 1), n % (columns - 1)]), name, task)
        draw_means(figure.add_subplot(grid[:, -1]), tasks)
        for axis in figure.axes:
            axis.spines[["top", "right"]].set_visible(False)
        figure.tight_layout()
        figure.savefig(path, metadata={"Date": None, "Creator": None})
        plt.close(figure)
    # Tenths of a point are fine enough, and the file is a third smaller.
    path.write_text(re.sub(r"(\.\d)\d+", r"\1", path.read_text()))


def smooth(curve: np.ndarray, span: int = 5) -> np.ndarray:
    """Means of ``span`` steps."""
    return np.apply_along_axis(np.convolve, -1, curve, np.full(span, 1 / span), "valid")


def draw_curves(axis: Any, name: str, task: Results) -> None:
    for each, color in COLORS.items():
        curves = smooth(of(task, each, "losses"))
        steps = np.arange(curves.shape[1]) + 2
        style = "--" if each in task["rules"] else "-"
        axis.plot(steps, curves.mean(0), style, color=color, linewidth=1.3, label=each)
        if len(curves) > 1:
            axis.fill_between(
                steps, curves.min(0), curves.max(0), color=color, alpha=0.2, linewidth=0
            )
    axis.set(title=f"{name}, {task['weights']:,} weights", xlabel="step", ylabel="training loss")
    axis.set_yscale("log")
    low, high = axis.get_ylim()
    wide = high > 3 * low
    axis.set_yticks([0.1, 0.2, 0.5, 1, 2] if wide else np.arange(2, 4, 0.2), minor=False)
    axis.set_yticks([], minor=True)
    axis.set_ylim(low, high)
    axis.yaxis.set_major_formatter("{x:g}")
    axis.legend(frameon=False, fontsize=8)


def draw_means(axis: Any, tasks: Results) -> None:
    """Mean losses over SGD's, a point for every seed."""
    names = [name for name in COLORS if name != "SGD"]
    for n, task in enumerate(tasks.values()):
        for at, name in enumerate(names):
            over = of(task, name) / of(task, "SGD")
            place = n + 0.25 * (at - 1)
            label = name if n == 0 else None
            axis.barh(place, over.mean() - 1, 0.22, 1, color=COLORS[name], alpha=0.4, label=label)
            axis.plot(over, [place] * len(over), "o", color=COLORS[name], markersize=4)
    axis.axvline(1, color=COLORS["SGD"], linestyle="--", linewidth=1.3, label="SGD")
    axis.set_yticks(range(len(tasks)), [name.replace(" on ", "\non ") for name in tasks])
    axis.invert_yaxis()
    axis.set(title="mean loss over the horizon,\nover tuned SGD's; a point a seed", xlabel="ratio")
    axis.legend(frameon=False, fontsize=8)
