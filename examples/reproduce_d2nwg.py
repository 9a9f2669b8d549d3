"""Diffusion-based neural network weights generation: networks for tasks that no network was trained on.

Zoos of small networks, trained on digits that are rotated, chosen or labelled otherwise. A generator learns
their weights given a few images of each class, and draws networks for tasks that the zoo does not have.
Source: Soro et al. 2024, "Diffusion-based Neural Network Weights Generation", arXiv 2402.18153. Ends with
tables and curves, in the folder reproduced.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import as_completed

import reproduction
from generation import experiment, report
from generation.experiment import Recipe
from rich.console import Console

SEEDS = 3
# Half of the diffusion's steps, for CNNs, which are as good by then, and for comparisons between zoos.
SHORT = (600, 150, 1200)
FULL = (
    *(Recipe("rotations", "CNN", steps=SHORT, seed=seed) for seed in range(SEEDS)),
    *(Recipe("rotations", seed=seed) for seed in range(SEEDS)),
    Recipe("rotations", "narrow CNN", steps=SHORT),
    Recipe("rotations", "narrow MLP", steps=SHORT),
    Recipe("rotations", start="own", steps=SHORT),
    Recipe("rotations", start="aligned", steps=SHORT),
    Recipe("subsets", seen=80, unseen=6, networks=4, generated=8, steps=SHORT),
    Recipe("permuted labels", seen=100, unseen=6, networks=4, generated=8, steps=SHORT),
)
QUICK = (Recipe("rotations", networks=6, trained=200, steps=(250, 80, 800), generated=8),)


def compare(recipes: Sequence[Recipe], console: Console) -> report.Results:
    """Run all experiments, two at a time."""
    with reproduction.workers(console) as (pool, progress, facts):
        bar = progress.add_task("zoos and generators", total=len(recipes))
        running = [pool.submit(experiment.compare, recipe) for recipe in recipes]
        for future in as_completed(running):
            future.result()
            progress.advance(bar)
    zoos: dict[str, list[experiment.Results]] = {}
    for recipe, future in zip(recipes, running, strict=True):
        zoos.setdefault(recipe.name, []).append(future.result())
    return {**facts, "fine-tuning steps": list(experiment.FINE_TUNED), "zoos": zoos}


if __name__ == "__main__":
    reproduction.run(
        "generation",
        __doc__.splitlines()[0],
        "one small zoo, and a generator trained for a short time",
        lambda quick, console: compare(QUICK if quick else FULL, console),
        report,
        width=150,
    )
