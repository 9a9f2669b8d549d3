"""Universal Neural Functionals: the accuracy of recurrent networks, told from their weights alone.

A zoo of Elman networks that predict the next character of a text, trained at many rates, batch sizes and
lengths. A universal neural functional, Deep Sets and statistics of the weights (StatNN) tell test accuracy;
Kendall's tau over splits of the zoo. Source: Zhou, Finn and Harrison 2024, "Universal Neural Functionals",
arXiv 2402.05232. Ends with a table and pictures, in the folder reproduced.
"""

from __future__ import annotations

from concurrent.futures import as_completed
from dataclasses import asdict, dataclass

import reproduction
import torch
from prediction import predictors, report, zoo
from rich.console import Console


@dataclass(frozen=True)
class Recipe:
    """Parts of the zoo and networks of each, how predictors are trained, and on how many splits."""

    parts: int = 12
    networks: int = 64
    epochs: int = 50
    splits: int = 5
    predictors: tuple[str, ...] = predictors.PREDICTORS
    seed: int = 0


FULL = Recipe()
LONG = Recipe(parts=96, epochs=60)
QUICK = Recipe(parts=3, networks=48, epochs=80, splits=2, predictors=predictors.PREDICTORS[:3])


def compare(recipe: Recipe, console: Console) -> report.Results:
    """Train the zoo, then every predictor on every split, in two processes."""
    with reproduction.workers(console) as (pool, progress, facts):
        bar = progress.add_task("zoo", total=recipe.parts)
        building = [
            pool.submit(zoo.part, recipe.networks, number, recipe.seed)
            for number in range(recipe.parts)
        ]
        for future in as_completed(building):
            future.result()
            progress.advance(bar)
        parts = [future.result() for future in building]
        flat = torch.cat([each.flat for each in parts])
        accuracy = torch.cat([each.accuracy for each in parts])
        asked = [(name, split) for name in recipe.predictors for split in range(recipe.splits)]
        bar = progress.add_task("predictors", total=len(asked))
        running = [
            pool.submit(predictors.compare, name, flat, accuracy, split, recipe.epochs)
            for name, split in asked
        ]
        for future in as_completed(running):
            future.result()
            progress.advance(bar)
    found: dict[str, list[predictors.Results]] = {}
    for (name, _), future in zip(asked, running, strict=True):
        found.setdefault(name, []).append(future.result())
    return {
        **facts,
        "recipe": asdict(recipe) | {"predictors": list(recipe.predictors)},
        "weights": flat.shape[1],
        "zoo": {
            name: [
                float(f"{each:.4g}")
                for each in torch.cat([getattr(part, name) for part in parts]).tolist()
            ]
            for name in ("accuracy", "rate", "steps", "batch")
        },
        "predictors": found,
    }


if __name__ == "__main__":
    reproduction.run(
        "prediction",
        __doc__.splitlines()[0],
        "a zoo of 144 networks, two splits, short training",
        lambda quick, console: compare(QUICK if quick else FULL, console),
        report,
        width=120,
        long=("a zoo of 6,144 networks", lambda console: compare(LONG, console)),
    )
