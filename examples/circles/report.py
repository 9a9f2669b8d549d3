"""Results as tables and as a picture.

Results are what ``reproduce_circles.py`` writes as JSON: the plan, and what each of ``studies`` gives.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from reproduction import Results, Tables

from circles.pictures import draw

__all__ = ["draw", "of_quartiles", "tables"]

Rows = list[list[str]]
#: shown of the longer training
STEPS = (0, 200, 300, 500, 1000, 2000, 3000, 10_000, 30_000)


def spread(numbers: Sequence[float], digits: int = 3) -> str:
    """Mean and standard deviation."""
    return f"{np.mean(numbers):.{digits}f} ± {np.std(numbers, ddof=1):.{digits}f}"


def dimensions(results: Results) -> Rows:
    rows = [["d", "networks", "99 % or more", "accuracy", "circles", "fewest", "most", "above 10"]]
    for d, found in results["dimensions"].items():
        accuracy, circles = found["accuracy"], found["circles"]
        good = sum(each >= 0.99 for each in accuracy)
        ends = [str(min(circles)), str(max(circles))]
        level = f"{np.mean(found['level']):.1f}"
        rows.append(
            [d, str(len(accuracy)), str(good), spread(accuracy), spread(circles, 1), *ends, level]
        )
    return rows


def over_time(results: Results) -> Rows:
    found = results["over time"]
    at = [n for n, step in enumerate(found["steps"]) if step in STEPS]
    rows = [["", *(f"step {found['steps'][n]:,}" for n in at)]]
    for name, title in (("circles", "above twice the mean"), ("level", "above 10")):
        rows.append([title, *(f"{np.mean(found[name][n]):.1f}" for n in at)])
    return rows


def of_quartiles(results: Results, name: str) -> list[float]:
    """How many of the frequencies survive, from the lowest quarter to the highest."""
    values, alive = (np.ravel(results["survival"][each]) for each in (name, "alive"))
    order = np.argsort(values, kind="stable")
    return [float(alive[part].mean()) for part in np.array_split(order, 4)]


def means(results: Results, name: str) -> tuple[float, float]:
    """Of the frequencies that survive, and of the others."""
    values, alive = (np.array(results["survival"][each]) for each in (name, "alive"))
    return float(values[alive == 1].mean()), float(values[alive == 0].mean())


def quartiles(results: Results) -> Rows:
    names = ["lowest quarter", "second", "third", "highest"]
    rows = [["frequencies by their", *names, "mean of survivors", "of the others"]]
    for name, title, digits in (("start", "initial signal", 1), ("growth", "early growth", 4)):
        shares = [f"{each:.3f}" for each in of_quartiles(results, name)]
        ends = [f"{each:.{digits}f}" for each in means(results, name)]
        rows.append([title, *shares, *ends])
    return rows


def told(results: Results) -> Rows:
    found = results["survival"]["auc"]
    return [["area under the curve", *found], ["", *(f"{each:.3f}" for each in found.values())]]


def one_embedding(results: Results) -> Rows:
    found = results["one embedding"]
    columns = ["correlation with the initial signal", "5 strongest", "between", "5 weakest"]
    rows = [["embedding", *columns]]
    numbers = (found[name] for name in ("correlation", "strongest", "between", "weakest"))
    for n, each in enumerate(zip(*numbers, strict=True)):
        rows.append([str(n), *(f"{number:.2f}" for number in each)])
    return rows


def shared(results: Results) -> Rows:
    rows = [["two networks with", "circles of the one that the other has, too"]]
    for title, share in zip(
        ("one embedding", "different ones"), results["one embedding"]["shared"], strict=True
    ):
        rows.append([title, f"{share:.2f}"])
    return rows


def competition(results: Results) -> Rows:
    columns = ["stronger survives", "weaker survives", "others", "3, 5 or 7 times the stronger"]
    rows = [["weaker to stronger", *columns, "accuracy"]]
    for ratio, found in zip(results["plan"]["ratios"], results["competition"], strict=True):
        shares = [f"{found[name]:.2f}" for name in ("stronger", "weaker")]
        others = [f"{np.mean(found[name]):.1f}" for name in ("born", "odd")]
        rows.append([f"{ratio:.2g}", *shares, *others, spread(found["accuracy"])])
    return rows


def dynamics(results: Results) -> Rows:
    columns = ["R² of the changes", "fewest", "R² of the roll-out", "its circles are right"]
    rows = [["fit", *columns, "zeros", "R² for another network"]]
    for name in ("least squares", "Lasso"):
        found = results["dynamics"][name]
        another = max(found["another"])
        rows.append(
            [
                name,
                f"{np.mean(found['r2']):.4f}",
                f"{min(found['r2']):.4f}",
                f"{np.mean(found['rollout']):.4f}",
                f"{sum(found['right'])} of {len(found['right'])}",
                f"{np.mean(found['zeros']):.2f}",
                "below 0" if another < 0 else f"at most {another:.2f}",
            ]
        )
    return rows


def alone(results: Results) -> Rows:
    found = results["alone"]
    shapes = {f"circularity of {name}": spread(each) for name, each in found["circularity"].items()}
    accuracies = {f"accuracy, {name}": spread(each) for name, each in found["accuracy"].items()}
    return [["of a network", "mean"], *map(list, (shapes | accuracies).items())]


def tables(results: Results) -> Tables:
    """Title -> rows, the first of which has the columns' names."""
    plan = results["plan"]
    return {
        f"networks after {plan['steps']:,} steps": dimensions(results),
        f"frequencies of {plan['longer'][0]} networks over time": over_time(results),
        "share of frequencies that survive": quartiles(results),
        "survivors told from the others, in networks that were not fitted": told(results),
        f"survival in {plan['per_embedding']} networks of one embedding": one_embedding(results),
        "how alike survivors are": shared(results),
        f"two frequencies, {plan['per_ratio']} networks a ratio": competition(results),
        f"signals of {plan['networks']} networks as linear systems": dynamics(results),
        "what is left of the embedding": alone(results),
    }
