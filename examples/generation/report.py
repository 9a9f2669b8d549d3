"""Results as tables and as a picture.

Results are what ``reproduce_d2nwg.py`` writes as JSON: for each zoo accuracies on test images, one a task,
accuracies by steps of fine-tuning, and novelty.
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
    "retrieved": "best of the zoo, unseen tasks",
    "wrong task": "generated for another task",
    "random": "random",
}
STARTS = {
    "generated": "tab:blue",
    "retrieved": "tab:orange",
    "zoo's mean": "tab:green",
    "shared initialisation": "tab:gray",
    "random": "tab:red",
}

Rows = list[list[str]]


def spread(numbers: Sequence[float]) -> str:
    """Mean and standard deviation between tasks."""
    text = f"{np.mean(numbers):.3f}"
    return f"{text} ± {np.std(numbers, ddof=1):.3f}" if len(numbers) > 1 else text


def accuracies(results: Results) -> Rows:
    rows = [["zoo", *ROWS.values()]]
    for name, zoo in results["zoos"].items():
        rows.append([name, *(spread(zoo["accuracy"][row]) for row in ROWS)])
    return rows


def fine_tuned(results: Results) -> Rows:
    rows = [["zoo", "from", *(f"{steps} steps" for steps in results["fine-tuning steps"])]]
    for name, zoo in results["zoos"].items():
        for start, found in zoo["fine-tuned"].items():
            rows.append([name, start, *(f"{each:.3f}" for each in found)])
    return rows


def novelty(results: Results) -> Rows:
    titles = {"distance": "distance to the nearest", "overlap": "overlap of wrong predictions"}
    kinds = ("zoo", "reconstructed", "generated")
    rows = [["zoo", *(f"{kind}: {title}" for title in titles.values() for kind in kinds)]]
    for name, zoo in results["zoos"].items():
        found = zoo["novelty"]
        rows.append([name, *(f"{found[kind][each]:.2f}" for each in titles for kind in kinds)])
    return rows


def tables(results: Results) -> Tables:
    """Title -> rows, the first of which has the columns' names."""
    return {
        "accuracy on test images": accuracies(results),
        "fine-tuning on unseen tasks: accuracy on test images": fine_tuned(results),
        "novelty, seen tasks": novelty(results),
    }


def draw(results: Results, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": "generation", "font.size": 9}):
        figure, axes = plt.subplots(1, 3, figsize=(13, 4.2), width_ratios=(1.3, 1, 1))
        first = next(iter(results["zoos"]))
        draw_accuracies(axes[0], results)
        draw_tasks(axes[1], first, results["zoos"][first])
        draw_fine_tuned(axes[2], first, results)
        for axis in axes:
            axis.spines[["top", "right"]].set_visible(False)
        figure.tight_layout()
        figure.savefig(path, metadata={"Date": None, "Creator": None})
        plt.close(figure)
    # Tenths of a point are fine enough, and the file is a third smaller.
    path.write_text(re.sub(r"(\.\d)\d+", r"\1", path.read_text()))


def draw_accuracies(axis: Any, results: Results) -> None:
    shown = {
        "zoo": "tab:gray",
        "generated, seen": "tab:cyan",
        "generated, unseen": "tab:blue",
        "retrieved": "tab:orange",
        "wrong task": "tab:red",
    }
    zoos = results["zoos"]
    height = 0.8 / len(shown)
    for n, (row, color) in enumerate(shown.items()):
        means = [np.mean(zoo["accuracy"][row]) for zoo in zoos.values()]
        at = np.arange(len(zoos)) + (n - (len(shown) - 1) / 2) * height
        axis.barh(at, means, height, color=color, label=ROWS[row])
    axis.set_yticks(range(len(zoos)), list(zoos))
    axis.invert_yaxis()
    axis.set(title="networks for tasks of digits", xlabel="accuracy on test images", xlim=(0, 1))
    legend(axis)


def draw_tasks(axis: Any, name: str, zoo: dict[str, Any]) -> None:
    """Accuracy over the angle."""
    found, seen = zoo["accuracy"], zoo["recipe"]["seen"]
    at = [float(task.rstrip("°")) for task in zoo["tasks"]]
    axis.plot(at[:seen], found["zoo"], ".", color="tab:gray")
    for row, where, mark, color in (
        ("generated, seen", slice(seen), ".", "tab:cyan"),
        ("generated, unseen", slice(seen, None), "o", "tab:blue"),
        ("retrieved", slice(seen, None), "s", "tab:orange"),
        ("wrong task", slice(seen), "x", "tab:red"),
    ):
        axis.plot(at[where], found[row], mark, color=color)
    axis.set(title=f"{name}, colours as there", xlabel="angle, degrees", ylim=(0, 1))
    axis.set_ylabel("accuracy on test images")


def draw_fine_tuned(axis: Any, name: str, results: Results) -> None:
    steps = results["fine-tuning steps"]
    for start, found in results["zoos"][name]["fine-tuned"].items():
        axis.plot(range(len(steps)), found, "-o", markersize=3, color=STARTS[start], label=start)
    axis.set_xticks(range(len(steps)), [str(each) for each in steps])
    axis.set(title="fine-tuning on unseen tasks", xlabel="steps", ylim=(0, 1))
    axis.set_ylabel("accuracy on test images")
    legend(axis)


def legend(axis: Any) -> None:
    axis.legend(frameon=False, fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.15))
