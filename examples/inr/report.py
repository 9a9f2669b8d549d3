"""Results as tables and as a picture.

Results are what ``reproduce_inr.py`` writes as JSON: how well the SIRENs draw, and for every initialisation
and reader accuracies on test images, one a seed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from reproduction import Results, Tables

STARTS = {"own": "own initialisations", "shared": "one shared initialisation"}
COLORS = {"UNF": "tab:blue", "Deep Sets": "tab:green", "MLP": "tab:orange"}
CHANCE = 0.1

Rows = list[list[str]]


def spread(numbers: Sequence[float]) -> str:
    """Mean and standard deviation over seeds."""
    if len(numbers) < 2:
        return f"{np.mean(numbers):.3f}"
    return f"{np.mean(numbers):.3f} ± {np.std(numbers, ddof=1):.3f}"


def accuracies(results: Results) -> Rows:
    starts = results["readers"]
    rows = [["read by", *(STARTS[start] for start in starts)]]
    if "own" in starts:
        rows[0].insert(
            2, f"own, an image's {results['fits']['own']['of an image']} networks together"
        )
    for name in next(iter(starts.values())):
        row = [name]
        for start, readers in starts.items():
            row.append(spread(readers[name]["accuracy"]))
            if start == "own":
                row.append(spread(readers[name]["together"]))
        rows.append(row)
    rows.append(["MLP on the pixels", spread(results["pixels"]), *["-"] * (len(rows[0]) - 2)])
    return rows


def mean(results: Results, start: str, name: str) -> float:
    """Accuracy of single networks, over all seeds."""
    return float(np.mean(results["readers"][start][name]["accuracy"]))


def fits(results: Results) -> Rows:
    rows = [["SIRENs with", "networks", "of an image", "weights", "PSNR, dB", "least"]]
    for start, found in results["fits"].items():
        counts = (str(found[name]) for name in ("networks", "of an image", "weights"))
        rows.append([STARTS[start], *counts, *(f"{each:.1f}" for each in found["psnr"])])
    return rows


def tables(results: Results) -> Tables:
    """Title -> rows, the first of which has the columns' names."""
    seeds = len(results["pixels"])
    return {
        f"accuracy on SIRENs of test images, seeds: {seeds}": accuracies(results),
        "SIRENs": fits(results),
    }


def draw(results: Results, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    starts = results["readers"]
    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": "inr", "font.size": 9}):
        figure, axes = plt.subplots(1, len(starts), figsize=(5.5 * len(starts), 3.8), squeeze=False)
        for axis, (start, readers) in zip(axes[0], starts.items(), strict=True):
            draw_accuracies(axis, readers)
            axis.axhline(np.mean(results["pixels"]), color="tab:gray", linestyle="--", linewidth=1)
            axis.axhline(CHANCE, color="tab:gray", linestyle=":", linewidth=1)
            axis.set(title=f"SIRENs of digits, {STARTS[start]}", ylim=(0, 1))
            axis.set_ylabel("accuracy on test images")
            axis.spines[["top", "right"]].set_visible(False)
        figure.tight_layout()
        figure.savefig(path, metadata={"Date": None, "Creator": None})
        plt.close(figure)
    # Tenths of a point are fine enough, and the file is a third smaller.
    path.write_text(re.sub(r"(\.\d)\d+", r"\1", path.read_text()))


def draw_accuracies(axis: Any, readers: Results) -> None:
    """A bar each, pale for an image's networks together, and a point for every seed."""
    for at, (name, found) in enumerate(readers.items()):
        color = COLORS[name.removesuffix(", permuted")]
        axis.bar(at, np.mean(found["together"]), 0.7, color=color, alpha=0.3)
        axis.bar(at, np.mean(found["accuracy"]), 0.7, color=color)
        axis.plot([at] * len(found["accuracy"]), found["accuracy"], "k.", markersize=4)
    axis.set_xticks(range(len(readers)), [name.replace(", ", ",\n") for name in readers])
