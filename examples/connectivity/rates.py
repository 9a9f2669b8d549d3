"""Weight matching against activation matching, over learning rates and optimizers."""

from __future__ import annotations

from typing import Any

import torch

from connectivity.networks import Recipe, barrier, both_matchings, move, test, train


def compare(recipe: Recipe, seeds: tuple[int, int]) -> dict[str, Any]:
    """Barriers between two networks as trained, and after either matching."""
    torch.set_num_threads(1)
    first, second = (train(recipe, seed)[0] for seed in seeds)
    return {
        "alone": [test(recipe, first), test(recipe, second)],
        "naive": barrier(recipe, first, second),
        **{
            method: barrier(recipe, first, move(recipe, second, perms))
            for method, perms in both_matchings(recipe, first, second).items()
        },
    }
