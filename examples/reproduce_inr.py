"""Digits read from the weights of networks that draw them (implicit neural representations).

Every image becomes a SIREN, all of them trained as one population, and equivariant layers (universal neural
functionals), Deep Sets and an MLP read its class from the weights, with hidden units permuted at random in
training and without. Sources: Sitzmann et al. 2020, "Implicit Neural Representations with Periodic Activation
Functions", arXiv 2006.09661; Zhou, Finn and Harrison 2024, "Universal Neural Functionals", arXiv 2402.05232.
Ends with tables and a picture, in the folder reproduced.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import as_completed
from typing import Any

import reproduction
from inr import experiment, report
from inr.experiment import PIXELS, Recipe
from inr.readers import READERS
from rich.console import Console


def recipes(starts: Sequence[str], seeds: int, **options: Any) -> tuple[Recipe, ...]:
    """All readers with and without permutations, and last the one that has the pixels."""
    return (
        *(
            Recipe(reader, start, permuted, seed, **options)
            for start in starts
            for reader in READERS
            for permuted in (False, True)
            for seed in range(seeds)
        ),
        *(Recipe(PIXELS, starts[-1], False, seed, **options) for seed in range(seeds)),
    )


FULL = recipes(("own", "shared"), 3)
LONG = recipes(("own", "shared"), 5, networks=40, steps=7200)
QUICK = recipes(("own",), 1, networks=8, images=900, fitted=300, steps=800)


def compare(recipes: Sequence[Recipe], console: Console) -> report.Results:
    """Train and test all readers, two at a time."""
    firsts = {recipe.start: recipe for recipe in recipes}
    with reproduction.workers(console) as (pool, progress, facts):
        bar = progress.add_task("SIRENs", total=len(firsts))
        fitting = {start: pool.submit(experiment.fit, recipe) for start, recipe in firsts.items()}
        for future in as_completed(fitting.values()):
            future.result()
            progress.advance(bar)
        bar = progress.add_task("readers of their weights", total=len(recipes))
        running = [pool.submit(experiment.compare, recipe) for recipe in recipes]
        for future in as_completed(running):
            future.result()
            progress.advance(bar)
    readers: dict[str, Any] = {start: {} for start in firsts}
    pixels = []
    for recipe, future in zip(recipes, running, strict=True):
        found = future.result()
        if recipe.reader == PIXELS:
            pixels.append(found["accuracy"])
            continue
        seeds = readers[recipe.start].setdefault(recipe.name, {name: [] for name in found})
        for name, value in found.items():
            seeds[name].append(value)
    return {
        **facts,
        "fits": {start: future.result() for start, future in fitting.items()},
        "readers": readers,
        "pixels": pixels,
    }


if __name__ == "__main__":
    reproduction.run(
        "inr",
        __doc__.splitlines()[0],
        "half of the digits, one seed, own initialisations only",
        lambda quick, console: compare(QUICK if quick else FULL, console),
        report,
        width=150,
        long=(
            "four times as many steps, more networks and seeds: half an hour",
            lambda console: compare(LONG, console),
        ),
    )
