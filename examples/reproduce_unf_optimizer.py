"""Universal Neural Functionals: learned optimizers against tuned SGD with momentum and Adam.

An MLP, a CNN, a recurrent network and a transformer are trained by optimizers that persistent evolution
strategies learned, with a universal neural functional or with Deep Sets. Source: Zhou, Finn and Harrison 2024,
"Universal Neural Functionals", arXiv 2402.05232. Ends with tables and curves, in the folder reproduced.
"""

from __future__ import annotations

from concurrent.futures import Future, as_completed
from dataclasses import asdict, dataclass
from typing import Any

import reproduction
from optimizer import experiment, report
from optimizer.tasks import MLP, TASKS, traced
from rich.console import Console


@dataclass(frozen=True)
class Study:
    """What is trained, and how many functionals of each kind are learned, from seeds of their own."""

    recipe: experiment.Recipe
    tasks: tuple[str, ...] = tuple(TASKS)
    seeds: int = 3


FULL = Study(experiment.Recipe())
LONG = Study(
    experiment.Recipe(horizon=500, iterations=1000, further=1000, mlp_further=1000, every=50),
    seeds=5,
)
QUICK = Study(
    experiment.Recipe(
        **{"networks": 8, "chosen_by": 4, "particles": 4},
        **{"iterations": 10, "further": 10, "mlp_further": 10, "every": 10},
    ),
    (MLP,),
    1,
)


def compare(study: Study, console: Console) -> report.Results:
    """Tune the rules, then learn functionals from tuned SGD, two at a time."""
    recipe = study.recipe
    widths = experiment.WIDTHS if MLP in study.tasks else ()
    # The slowest first.
    tasks = study.tasks[::-1]
    with reproduction.workers(console) as (pool, progress, facts):

        def wait(title: str, running: dict[Any, Future]) -> dict[Any, Any]:
            bar = progress.add_task(title, total=len(running))
            for future in as_completed(running.values()):
                future.result()
                progress.advance(bar)
            return {key: future.result() for key, future in running.items()}

        asked = [(name, None) for name in tasks] + [(MLP, width) for width in widths]
        tuned = wait(
            "tuning",
            {
                (name, width, rule): pool.submit(experiment.tuned, name, rule, recipe, width)
                for name, width in asked
                for rule in experiment.RULES
            },
        )
        learned = wait(
            "meta-training",
            {
                (name, seed): pool.submit(
                    experiment.learn, name, seed, tuned[name, None, "SGD"]["settings"], recipe
                )
                for name in tasks
                for seed in range(study.seeds)
            },
        )
    return {
        **facts,
        "recipe": asdict(recipe) | {"seeds": study.seeds},
        "tasks": {
            name: {
                "weights": traced(TASKS[name])[1].numel,
                "rules": {rule: tuned[name, None, rule] for rule in experiment.RULES},
                "learned": [learned[name, seed] for seed in range(study.seeds)],
            }
            for name in study.tasks
        },
        "wider": {
            str(width): {rule: tuned[MLP, width, rule] for rule in experiment.RULES}
            for width in widths
        },
    }


if __name__ == "__main__":
    reproduction.run(
        "optimizer",
        __doc__.splitlines()[0],
        "the MLP alone, one seed, little meta-training",
        lambda quick, console: compare(QUICK if quick else FULL, console),
        report,
        width=150,
        long=(
            "500 steps, eight times as much meta-training, five seeds: hours",
            lambda console: compare(LONG, console),
        ),
    )
