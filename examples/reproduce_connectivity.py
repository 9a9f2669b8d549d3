"""Simultaneous linear connectivity: which barriers between networks permutations remove.

Multilayer perceptrons on 5,000 images of MNIST. Three networks at once, over their width; checkpoints of
training and pruned networks under one permutation, and masks that it carries to the other network; weight
against activation matching, over learning rates. Source: Sharma et al. 2024, "Simultaneous linear
connectivity of neural networks modulo permutation", arXiv 2404.06498. Ends with tables and curves, in the
folder reproduced.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import as_completed
from dataclasses import dataclass
from typing import Any

import reproduction
from connectivity import rates, report, sequences, strong
from connectivity.networks import Recipe
from rich.console import Console


@dataclass(frozen=True)
class Plan:
    """How networks are trained whose barriers are compared.

    Attributes:
        groups: of three networks for each recipe of ``three``.
        pairs: of networks for each of the other recipes.
        checkpoints: the first of them is drawn.
    """

    groups: int
    pairs: int
    three: tuple[Recipe, ...]
    checkpoints: tuple[Recipe, ...]
    pruned: Recipe
    rates: tuple[Recipe, ...]


RATES = {"SGD": (0.003, 0.01, 0.03, 0.1, 0.2), "AdamW": (0.0001, 0.0003, 0.001, 0.003, 0.01)}
FULL = Plan(
    groups=3,
    pairs=3,
    three=tuple(Recipe(width) for width in (16, 32, 64, 128, 256, 512)),
    checkpoints=(Recipe(64), Recipe(512)),
    pruned=Recipe(128),
    rates=tuple(Recipe(64, 40, name, rate) for name, rates in RATES.items() for rate in rates),
)
QUICK = Plan(
    groups=1,
    pairs=1,
    three=(Recipe(16, 8), Recipe(64, 8)),
    checkpoints=(Recipe(64, 8),),
    pruned=Recipe(32, 8),
    rates=(Recipe(64, 8, rate=0.03), Recipe(64, 8, "AdamW", 0.003)),
)


def seeds_of(count: int, size: int) -> list[tuple[int, ...]]:
    """Seeds of ``count`` groups of ``size`` networks, all different."""
    return [tuple(range(size * n, size * (n + 1))) for n in range(count)]


def compare(plan: Plan, console: Console) -> report.Results:
    """Train, match and test all networks."""
    groups, pairs = seeds_of(plan.groups, 3), seeds_of(plan.pairs, 2)
    experiments: dict[str, tuple[Callable, Sequence[Recipe], list]] = {
        "three networks": (strong.compare, plan.three, groups),
        "pruned networks": (sequences.pruning, [plan.pruned], pairs),
        "checkpoints": (sequences.trajectory, plan.checkpoints, pairs),
        "learning rates": (rates.compare, plan.rates, pairs),
    }
    found: dict[str, dict[Recipe, list]] = {}
    with reproduction.workers(console) as (pool, progress, facts):
        bars = {}
        for name, (run, recipes, all_seeds) in experiments.items():
            bar = progress.add_task(name, total=len(recipes) * len(all_seeds))
            # Wide networks first: whoever is last should not be waited for.
            found[name] = {
                recipe: [pool.submit(run, recipe, seeds) for seeds in all_seeds]
                for recipe in sorted(recipes, key=lambda recipe: -recipe.width)
            }
            bars.update({future: bar for each in found[name].values() for future in each})
        for future in as_completed(bars):
            future.result()
            progress.advance(bars[future])

    def of(name: str, recipe: Recipe) -> list[Any]:
        return [future.result() for future in found[name][recipe]]

    return {
        **facts,
        "widths": {str(recipe.width): of("three networks", recipe) for recipe in plan.three},
        "trajectories": {
            "shares": list(sequences.SHARES),
            "widths": {str(recipe.width): of("checkpoints", recipe) for recipe in plan.checkpoints},
        },
        "pruning": {
            "width": plan.pruned.width,
            "densities": [1, *sequences.DENSITIES],
            "pairs": of("pruned networks", plan.pruned),
        },
        "rates": [
            {
                "optimizer": recipe.optimizer,
                "rate": recipe.rate,
                "pairs": of("learning rates", recipe),
            }
            for recipe in plan.rates
        ],
    }


if __name__ == "__main__":
    reproduction.run(
        "connectivity",
        __doc__.splitlines()[0],
        "few small networks, trained for a short time",
        lambda quick, console: compare(QUICK if quick else FULL, console),
        report,
        width=150,
    )
