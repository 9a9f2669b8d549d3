"""Results as tables and as a picture.

Results are what ``reproduce_manifold.py`` writes as JSON: for each task its contexts, its parts of their
domain, and for each method its parameters and scores ``[seeds, contexts]``.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from reproduction import Results, Tables

#: a method's name up to its first comma -> colour; those of one colour differ in their dashes
COLORS = {
    "ellipse": "tab:blue",
    "B-spline": "tab:blue",
    "line": "tab:purple",
    "line (wrong topology)": "tab:pink",
    "ellipse (wrong topology)": "tab:pink",
    "concatenation": "tab:orange",
    "time embedding": "tab:orange",
    "FiLM": "tab:green",
    "time embedding with scales": "tab:green",
    "no context": "tab:gray",
    "no noise level": "tab:gray",
}
DASHES = ("-", "--", ":")


def over(scores: list[list[float]], part: list[bool]) -> np.ndarray:
    """The mean over the contexts of a part, for each seed."""
    return np.array(scores)[:, np.array(part)].mean(1)


def spread(values: np.ndarray) -> str:
    """Mean and standard deviation between seeds."""
    mean = f"{values.mean():.3f}"
    return f"{mean} ± {values.std(ddof=1):.3f}" if len(values) > 1 else mean


def rows(task: Results) -> list[list[str]]:
    """The first has the columns' names."""
    found = [["network", "parameters", *task["parts"]]]
    for name, method in task["methods"].items():
        parts = [spread(over(method["scores"], part)) for part in task["parts"].values()]
        found.append([name, f"{method['parameters']:,}", *parts])
    return found


def tables(results: Results) -> Tables:
    return {f"{name}: {task['score']}": rows(task) for name, task in results["tasks"].items()}


def draw(results: Results, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = [
        ("rotation, an arc held out", "held-out arc", 360, "angle, degrees", "accuracy"),
        ("noise", "2 to 2.5", 2.5, "noise, standard deviation", "accuracy above no context's"),
        ("denoising", None, 1, "time s", "error, relative to no noise level's"),
    ]
    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": "manifold", "font.size": 9}):
        figure, axes = plt.subplots(1, len(panels), figsize=(13, 5.2))
        for axis, (name, shaded, scale, xlabel, ylabel) in zip(axes, panels, strict=True):
            task = results["tasks"][name]
            x = scale * np.array(task["contexts"])
            scores = {method: np.array(m["scores"]) for method, m in task["methods"].items()}
            *_, without = scores.values()
            drawn: list[str] = []
            for method, each in scores.items():
                color = COLORS[method.split(",")[0]]
                if name == "noise":
                    each = each - without.mean(0)
                elif name == "denoising":
                    each = each / without.mean(0)
                axis.plot(x, each.mean(0), DASHES[drawn.count(color)], color=color, label=method)
                axis.fill_between(x, each.min(0), each.max(0), color=color, alpha=0.1, linewidth=0)
                drawn.append(color)
            if shaded is not None:
                inside = x[np.array(task["parts"][shaded])]
                half = (x[1] - x[0]) / 2
                axis.axvspan(inside[0] - half, inside[-1] + half, color="0.9", zorder=0)
            axis.set(title=name, xlabel=xlabel, ylabel=ylabel)
            axis.spines[["top", "right"]].set_visible(False)
            axis.legend(frameon=False, fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.13))
        axes[0].set_xticks(range(0, 361, 90))
        figure.tight_layout()
        figure.savefig(path, metadata={"Date": None, "Creator": None})
        plt.close(figure)
    # Tenths of a point are fine enough, and the file is a third smaller.
    path.write_text(re.sub(r"(\.\d)\d+", r"\1", path.read_text()))
