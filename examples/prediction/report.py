"""Results as tables and as a picture.

Results are what ``reproduce_unf_zoo.py`` writes as JSON: how each network of the zoo was trained and its
accuracy, and for each predictor, split by split, Kendall's tau and what it says of the test networks.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from reproduction import Results, Tables
from scipy.stats import kendalltau

COLORS = {
    "UNF": "tab:blue",
    "Deep Sets": "tab:orange",
    "StatNN, boosted trees": "tab:green",
    "StatNN, perceptron": "tab:olive",
    "UNF, no positions": "tab:cyan",
    "Deep Sets, positions": "tab:red",
}
TRAINED = {"rate": "learning rate", "steps": "steps", "batch": "batch size"}


def taus(results: Results, name: str) -> np.ndarray:
    """``[splits]``."""
    return np.array([each["tau"] for each in results["predictors"][name]])


def spread(numbers: Sequence[float] | np.ndarray, digits: int = 3) -> str:
    """Mean and standard deviation."""
    return f"{np.mean(numbers):.{digits}f} ± {np.std(numbers, ddof=1):.{digits}f}"


def predicted(results: Results) -> list[list[str]]:
    splits = results["recipe"]["splits"]
    rows = [
        [
            "predictor",
            "tau",
            "less than UNF's, same split",
            "error of accuracy",
            *(f"split {n}" for n in range(splits)),
        ]
    ]
    for name, runs in results["predictors"].items():
        found = taus(results, name)
        apart = "-" if name == "UNF" else spread(taus(results, "UNF") - found)
        error = spread([each["error"] for each in runs], 4)
        rows.append([name, spread(found), apart, error, *(f"{each:.3f}" for each in found)])
    return rows


def networks(results: Results) -> list[list[str]]:
    zoo = results["zoo"]
    deciles = (0, 0.1, 0.25, 0.5, 0.75, 0.9, 1)
    numbers = [f"{each:.3f}" for each in np.quantile(zoo["accuracy"], deciles)]
    alone = [f"{kendalltau(zoo[each], zoo['accuracy'])[0]:.3f}" for each in TRAINED]
    names = ["least", "10 %", "25 %", "median", "75 %", "90 %", "most"]
    return [
        ["networks", *names, *(f"tau of the {each}" for each in TRAINED.values())],
        [str(len(zoo["accuracy"])), *numbers, *alone],
    ]


def tables(results: Results) -> Tables:
    """Title -> rows, the first of which has the columns' names."""
    return {
        "test accuracy told from weights, Kendall's tau": predicted(results),
        "test accuracy in the zoo": networks(results),
    }


def draw(results: Results, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": "prediction", "font.size": 9}):
        figure, axes = plt.subplots(1, 3, figsize=(13, 4.2))
        draw_zoo(axes[0], results["zoo"])
        draw_taus(axes[1], results)
        draw_networks(axes[2], results)
        for axis in axes:
            axis.spines[["top", "right"]].set_visible(False)
        figure.tight_layout()
        figure.savefig(path, metadata={"Date": None, "Creator": None})
        plt.close(figure)
    # Tenths of a point are fine enough, and the file is a third smaller.
    path.write_text(re.sub(r"(\.\d)\d+", r"\1", path.read_text()))


def draw_zoo(axis: Any, zoo: dict[str, list[float]]) -> None:
    batch = np.array(zoo["batch"])
    for size, color in zip(np.unique(batch), ("tab:gray", "tab:cyan", "tab:blue"), strict=False):
        of = batch == size
        rate, accuracy = np.array(zoo["rate"])[of], np.array(zoo["accuracy"])[of]
        axis.plot(rate, accuracy, ".", color=color, markersize=3, label=f"batches of {size:.0f}")
    axis.set(title="the zoo", xlabel="learning rate", ylabel="test accuracy", xscale="log")
    axis.legend(frameon=False, fontsize=8)


def draw_taus(axis: Any, results: Results) -> None:
    names = list(results["predictors"])
    for n, name in enumerate(names):
        found = taus(results, name)
        axis.barh(n, found.mean(), 0.7, color=COLORS[name], alpha=0.5)
        axis.plot(found, [n] * len(found), "o", color=COLORS[name], markersize=4)
    every = np.concatenate([taus(results, name) for name in names])
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.set(title="Kendall's tau, a point a split", xlabel="tau")
    axis.set_xlim(every.min() - 0.05, every.max() + 0.02)


def draw_networks(axis: Any, results: Results) -> None:
    for name in ("Deep Sets", "UNF"):
        run = results["predictors"][name][0]
        axis.plot(run["true"], run["said"], ".", color=COLORS[name], markersize=3, label=name)
    ends = [min(run["true"]), max(run["true"])]
    axis.plot(ends, ends, color="black", linewidth=0.5)
    axis.set(title="test networks of the first split", xlabel="test accuracy", ylabel="told")
    axis.legend(frameon=False, fontsize=8)
