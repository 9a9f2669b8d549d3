"""Results as tables and as a picture.

Results are what ``reproduce_d2nwg.py`` writes as JSON: for each zoo its runs, one a seed, with accuracies on
test images, one a task, accuracies by steps of fine-tuning, and novelty.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from reproduction import Results, Tables

ROWS = {
    "zoo": "zoo",
    "reconstructed": "reconstructed",
    "generated, seen": "generated, seen tasks",
    "generated, unseen": "generated, unseen tasks",
    "best generated": "best generated, unseen tasks",
    "retrieved": "best of the zoo, unseen tasks",
    "halfway": "halfway between neighbours, unseen tasks",
    "wrong task": "generated for another task",
    "random": "random",
}
SHOWN = {
    "zoo": "tab:gray",
    "generated, seen": "tab:cyan",
    "generated, unseen": "tab:blue",
    "best generated": "tab:purple",
    "retrieved": "tab:orange",
    "halfway": "tab:green",
    "wrong task": "tab:red",
}
STARTS = {
    "generated": "tab:blue",
    "retrieved": "tab:orange",
    "zoo's mean": "tab:green",
    "shared initialisation": "tab:gray",
    "random": "tab:red",
}

Rows = list[list[str]]
Runs = Sequence[dict[str, Any]]


def numbers(runs: Runs, row: str) -> list[float]:
    """Accuracies in all tasks of all runs."""
    return [each for run in runs for each in run["accuracy"][row]]


def accuracy(runs: Runs, row: str) -> float:
    return float(np.mean(numbers(runs, row)))


def after(results: Results, runs: Runs, start: str, steps: int) -> float:
    """Accuracy on unseen tasks after so many steps of fine-tuning."""
    at = results["fine-tuning steps"].index(steps)
    return float(np.mean([run["fine-tuned"][start][at] for run in runs]))


def spread(numbers: Sequence[float]) -> str:
    """Mean and standard deviation."""
    return f"{np.mean(numbers):.3f} ± {np.std(numbers, ddof=1):.3f}" if numbers else "-"


def accuracies(results: Results) -> Rows:
    rows = [["zoo", *ROWS.values()]]
    for name, runs in results["zoos"].items():
        rows.append([name, *(spread(numbers(runs, row)) for row in ROWS)])
    return rows


def seeds(results: Results) -> Rows:
    shown = ("zoo", "generated, unseen", "best generated", "retrieved", "halfway", "wrong task")
    rows = [["zoo, seed", *(ROWS[row] for row in shown), "5 steps", "80 from random"]]
    for name, runs in results["zoos"].items():
        for run in runs if len(runs) > 1 else ():
            found = [accuracy([run], row) for row in shown]
            found += [after(results, [run], *at) for at in (("generated", 5), ("random", 80))]
            rows.append([f"{name}, {run['recipe']['seed']}", *(f"{each:.3f}" for each in found)])
    return rows


def fine_tuned(results: Results) -> Rows:
    steps = results["fine-tuning steps"]
    rows = [["zoo", "from", *(f"{each} steps" for each in steps)]]
    for name, runs in results["zoos"].items():
        for start in runs[0]["fine-tuned"]:
            found = [after(results, runs, start, each) for each in steps]
            rows.append([name, start, *(f"{each:.3f}" for each in found)])
    return rows


def novelty(results: Results) -> Rows:
    titles = {"distance": "distance to the nearest", "overlap": "overlap of wrong predictions"}
    kinds = ("zoo", "reconstructed", "generated")
    rows = [["zoo", *(f"{kind}: {title}" for title in titles.values() for kind in kinds)]]
    for name, runs in results["zoos"].items():
        found = [
            np.mean([run["novelty"][kind][each] for run in runs])
            for each in titles
            for kind in kinds
        ]
        rows.append([name, *(f"{each:.2f}" for each in found)])
    return rows


def tables(results: Results) -> Tables:
    """Title -> rows, the first of which has the columns' names."""
    return {
        "accuracy on test images": accuracies(results),
        "accuracy on test images, by seed": seeds(results),
        "fine-tuning on unseen tasks: accuracy on test images": fine_tuned(results),
        "novelty, seen tasks": novelty(results),
    }


def draw(results: Results, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": "generation", "font.size": 9}):
        figure, axes = plt.subplots(2, 2, figsize=(12, 8.5), width_ratios=(1.3, 1))
        names = list(results["zoos"])[:2]
        draw_accuracies(axes[0, 0], results)
        draw_fine_tuned(axes[1, 0], names[0], results)
        for axis, name in zip(axes[:, 1], names, strict=False):
            draw_tasks(axis, name, results["zoos"][name])
        for axis in axes.flat:
            axis.spines[["top", "right"]].set_visible(False)
        figure.tight_layout()
        figure.savefig(path, metadata={"Date": None, "Creator": None})
        plt.close(figure)
    # Tenths of a point are fine enough, and the file is a third smaller.
    path.write_text(re.sub(r"(\.\d)\d+", r"\1", path.read_text()))


def draw_accuracies(axis: Any, results: Results) -> None:
    zoos = results["zoos"]
    height = 0.8 / len(SHOWN)
    for n, (row, color) in enumerate(SHOWN.items()):
        found = {
            at: accuracy(runs, row) for at, runs in enumerate(zoos.values()) if numbers(runs, row)
        }
        at = np.array(list(found)) + (n - (len(SHOWN) - 1) / 2) * height
        axis.barh(at, list(found.values()), height, color=color, label=ROWS[row])
    axis.set_yticks(range(len(zoos)), list(zoos))
    axis.invert_yaxis()
    axis.set(title="networks for tasks of digits", xlabel="accuracy on test images", xlim=(0, 1))
    legend(axis)


def draw_tasks(axis: Any, name: str, runs: Runs) -> None:
    """Accuracy over the angle, one point a seed."""
    for run in runs:
        seen = run["recipe"]["seen"]
        at = [float(task.rstrip("°")) for task in run["tasks"]]
        for row, where, mark in (
            ("zoo", slice(seen), "."),
            ("generated, seen", slice(seen), "."),
            ("generated, unseen", slice(seen, None), "o"),
            ("best generated", slice(seen, None), "^"),
            ("retrieved", slice(seen, None), "s"),
            ("halfway", slice(seen, None), "D"),
        ):
            axis.plot(at[where], run["accuracy"][row], mark, color=SHOWN[row], markersize=4)
    axis.set(title=f"{name}, colours as in the bars", xlabel="angle, degrees", ylim=(0.65, 1))
    axis.set_ylabel("accuracy on test images")


def draw_fine_tuned(axis: Any, name: str, results: Results) -> None:
    steps, runs = results["fine-tuning steps"], results["zoos"][name]
    for start in runs[0]["fine-tuned"]:
        found = [after(results, runs, start, each) for each in steps]
        axis.plot(range(len(steps)), found, "-o", markersize=3, color=STARTS[start], label=start)
    axis.set_xticks(range(len(steps)), [str(each) for each in steps])
    axis.set(title=f"{name}: fine-tuning on unseen tasks", xlabel="steps", ylim=(0, 1))
    axis.set_ylabel("accuracy on test images")
    legend(axis)


def legend(axis: Any) -> None:
    axis.legend(frameon=False, fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.12))
