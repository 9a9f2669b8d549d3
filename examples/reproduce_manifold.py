"""Walking the weight manifold: networks whose weights follow a context, against the alternatives.

Digits of 16 x 16 turned (weights on an ellipse), under noise (on a line), turned and coloured (on a torus),
and a denoiser for diffusion (on a B-spline along the level of noise). Compared to the context as an input,
FiLM or a time embedding, and no context, in contexts that were trained and in those held out. Source:
Benjamin et al. 2025, "Walking the Weight Manifold", arXiv 2505.22994. Ends with tables and curves, in the
folder reproduced.
"""

from __future__ import annotations

from concurrent.futures import as_completed

import reproduction
from manifold import report
from manifold.training import COMPARISONS, run
from rich.console import Console

QUICK = ("rotation, an arc held out", "noise", "denoising")


def compare(quick: bool, console: Console) -> report.Results:
    """Train and test all methods with all seeds."""
    seeds, steps = (1, 150) if quick else (3, 1200)
    chosen = [(task, methods) for task, methods in COMPARISONS if not quick or task.name in QUICK]
    found, futures = {}, {}
    with reproduction.workers(console) as (pool, progress, facts):
        for task, methods in chosen:
            bar = progress.add_task(f"{task.name}, {len(methods)} networks", total=seeds)
            for seed in range(seeds):
                futures[pool.submit(run, task, methods, seed, steps)] = task, seed, bar
        for future in as_completed(futures):
            task, seed, bar = futures[future]
            found[task.name, seed] = future.result()
            progress.advance(bar)
    return {
        **facts,
        "steps": steps,
        "tasks": {
            task.name: {
                "score": task.scored,
                "contexts": task.grid().tolist(),
                "parts": {name: part.tolist() for name, part in task.parts(task.grid()).items()},
                "methods": {
                    method.name: {
                        "parameters": method.parameters(task),
                        "scores": [found[task.name, seed][n] for seed in range(seeds)],
                    }
                    for n, method in enumerate(methods)
                },
            }
            for task, methods in chosen
        },
    }


if __name__ == "__main__":
    reproduction.run(
        "manifold",
        __doc__.splitlines()[0],
        "three tasks, one seed, short training",
        compare,
        report,
        width=130,
    )
