"""Simultaneous weak connectivity: one permutation for whole sequences of two networks.

Sequences are a network's checkpoints in training, and its prunings by iterative magnitude pruning with
rewinding (Frankle et al. 2020, arXiv 1912.05671), whose masks are transported to the other network.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from connectivity.networks import (
    Measured,
    Permutations,
    Recipe,
    barrier,
    both_matchings,
    move,
    test,
    train,
)
from weightops import align

#: shares of training
SHARES = (0.0, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0)
#: shares of the weight matrices' entries that are kept, step by step
DENSITIES = (0.5, 0.25, 0.12, 0.06, 0.03)
#: the epoch that pruned networks are rewound to
REWOUND = 2


def connect(
    recipe: Recipe, first: Tensor, second: Tensor, final: Permutations
) -> dict[str, Measured]:
    """Barriers between two networks ``[P]``: as trained, permuted by ``final``, and by matching these two."""
    return {
        "naive": barrier(recipe, first, second),
        "final": barrier(recipe, first, move(recipe, second, final)),
        **{
            method: barrier(recipe, first, move(recipe, second, perms))
            for method, perms in both_matchings(recipe, first, second).items()
        },
    }


def trajectory(recipe: Recipe, seeds: tuple[int, int]) -> list[dict[str, Any]]:
    """Barriers between the checkpoints of two networks, for each of ``SHARES``."""
    torch.set_num_threads(1)
    keep = [round(share * recipe.steps) for share in SHARES[:-1]]
    first, second = (train(recipe, seed, keep=keep) for seed in seeds)
    final = align.match(recipe.spec, first[-1], second[-1:]).perms
    return [connect(recipe, *pair, final) for pair in zip(first, second, strict=True)]


def prune(recipe: Recipe, network: Tensor, mask: Tensor, density: float) -> Tensor:
    """The mask of the largest entries of all weight matrices together; biases are kept."""
    matrices = torch.cat(
        [
            torch.full(shape, float(len(shape) > 1)).flatten()
            for shape in recipe.spec.shapes.values()
        ]
    )
    size = network.abs() * mask * matrices
    kept = round(density * int(matrices.sum()))
    return torch.zeros_like(mask).index_fill(0, size.topk(kept).indices, 1) + (1 - matrices)


def shuffle(recipe: Recipe, mask: Tensor, seed: int) -> Tensor:
    """A random mask that keeps as many entries of each tensor."""
    generator = torch.Generator().manual_seed(seed)
    return torch.cat(
        [
            each.flatten()[torch.randperm(each.numel(), generator=generator)]
            for each in recipe.spec.unflatten(mask).values()
        ]
    )


def pruning(recipe: Recipe, seeds: tuple[int, int]) -> list[dict[str, Any]]:
    """Barriers between two dense networks, then for each of ``DENSITIES`` between the two pruned ones.

    With these, test loss and error of the second network under four masks.

    Masks are the second network's own, the first's transported by the permutation of the dense networks,
    the first's as it is, and one that is random but for the density of each layer. They are put on the
    second network's final weights ("at once"), or trained under from the epoch ``REWOUND`` on
    ("rewound").
    """
    torch.set_num_threads(1)
    early = REWOUND * recipe.steps // recipe.epochs
    (early_first, first), (early_second, second) = (
        train(recipe, seed, keep=[early]) for seed in seeds
    )
    final = align.match(recipe.spec, first, second[None]).perms
    pruned_first, pruned_second = first, second
    mask_first = mask_second = torch.ones_like(first)

    def retrain(seed: int, start: Tensor, mask: Tensor) -> Tensor:
        return train(recipe, seed, start=start, first=early, mask=mask)[0]

    found: list[dict[str, Any]] = [{"barriers": connect(recipe, first, second, final)}]
    for density in DENSITIES:
        mask_first = prune(recipe, pruned_first, mask_first, density)
        mask_second = prune(recipe, pruned_second, mask_second, density)
        pruned_first = retrain(seeds[0], early_first, mask_first)
        pruned_second = retrain(seeds[1], early_second, mask_second)
        others = {
            "transported": move(recipe, mask_first, recipe.spec.invert(final)),
            "as is": mask_first,
            "random": shuffle(recipe, mask_first, seeds[0]),
        }
        masks = {"own": mask_second, **others}
        trained = {name: retrain(seeds[1], early_second, mask) for name, mask in others.items()}
        found.append(
            {
                "barriers": connect(recipe, pruned_first, pruned_second, final),
                "rewound": {
                    name: test(recipe, network)
                    for name, network in {"own": pruned_second, **trained}.items()
                },
                "at once": {name: test(recipe, second * mask) for name, mask in masks.items()},
            }
        )
    return found
