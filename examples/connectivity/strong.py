"""Strong connectivity: whether one permutation a network connects three of them, over their width."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import torch
from torch import Tensor

import weightops
from connectivity.networks import MLP, Measured, Recipe, barrier, digits, rounded, test, train
from weightops import align
from weightops.align.many import match_all
from weightops.align.simplex import Simplex, barrier_simplex

#: along each side of the triangle
POINTS = 7


def triangle(recipe: Recipe, networks: Tensor) -> Simplex:
    """Test loss and error on the triangle between networks ``[3, P]``."""
    data = digits()
    return barrier_simplex(
        MLP(recipe.width),
        recipe.spec,
        networks,
        data.test,
        data.test_classes,
        points=POINTS,
        progress=False,
    )


def compare(recipe: Recipe, seeds: tuple[int, int, int]) -> dict[str, Any]:
    """Barriers between three networks as trained, each pair matched, and all three matched at once.

    Weak are segments between a network and one that is matched to it; strong, by the third, are those
    between two that are both matched to the third network. The universe has one permutation a network,
    found for all together.
    """
    torch.set_num_threads(1)
    spec = recipe.spec
    networks = torch.cat([train(recipe, seed) for seed in seeds])
    weak, strong = [], []
    triangles = {"naive": [triangle(recipe, networks)]}
    for reference, *others in ((0, 1, 2), (1, 2, 0), (2, 0, 1)):
        perms = align.match(spec, networks[reference], networks[others]).perms
        moved = weightops.permute(networks[others], perms, spec)
        weak.append(barrier(recipe, networks[reference], moved[0]))
        strong.append(barrier(recipe, *moved))
        aligned = torch.cat([networks[reference][None], moved])
        triangles.setdefault("third", []).append(triangle(recipe, aligned))
    perms = match_all(spec, networks, progress=False).perms
    universe = weightops.permute(networks, perms, spec)
    triangles["universe"] = [triangle(recipe, universe)]

    def pairs(networks: Tensor) -> list[Measured]:
        return [barrier(recipe, *pair) for pair in combinations(networks, 2)]

    return {
        "alone": [test(recipe, network) for network in networks],
        "pairs": {
            "naive": pairs(networks),
            "weak": weak,
            "third": strong,
            "universe": pairs(universe),
        },
        "triangles": {
            name: [
                {**rounded(each.loss, each.error), "losses": tidy(each.losses)} for each in found
            ]
            for name, found in triangles.items()
        },
        "weights": tidy(triangles["naive"][0].weights),
    }


def tidy(values: Tensor) -> list:
    return values.double().round(decimals=4).tolist()
