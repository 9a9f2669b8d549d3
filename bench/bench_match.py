"""Weight matching of trained networks against the textbook algorithm and rebasin."""

from __future__ import annotations

import copy
import warnings
from functools import cache
from math import prod

import pytest
import torch
from networks import NETWORKS, digits, trained
from torch import Tensor

import weightops
from weightops import align
from weightops.align._arguments import is_statistic
from weightops.ops.match import plan, reference

OTHERS = 8


@cache
def problem(name: str, others: int = 1) -> tuple[weightops.WeightSpec, Tensor]:
    """The spec, and networks ``[1 + others, P]``."""
    models = [trained(name, seed) for seed in range(1 + others)]
    spec = weightops.trace(models[0], digits()[0][:2])
    weightops.verify(spec, models[0], digits()[0][:2])
    return spec, spec.flatten(models).detach()


def counted(spec: weightops.WeightSpec) -> list[str]:
    return [tensor for tensor in spec.shapes if not is_statistic(tensor)]


def flops(spec: weightops.WeightSpec) -> int:
    """Every label's Gram once: a first visit needs no less."""
    return sum(
        2 * size * prod(spec.shapes[tensor])
        for label, size in spec.labels.items()
        for tensor, _ in spec.occurrences(label)
        if not is_statistic(tensor)
    )


def textbook(spec: weightops.WeightSpec, flat: Tensor) -> float:
    order = torch.rand(100, len(spec.labels), generator=torch.Generator().manual_seed(0)).argsort(1)
    code = plan(spec, counted(spec), 1)
    _, history, sweeps = reference.match_weights(flat[:1], flat[1:2, None], code, order)
    return history[sweeps[0], 0].item()


@pytest.mark.parametrize("implementation", ["weightops", "textbook", "rebasin"])
@pytest.mark.parametrize("name", NETWORKS)
def test_match(name: str, implementation: str, measure, benchmark) -> None:
    benchmark.group = f"match {name}"
    spec, flat = problem(name)
    if implementation == "weightops":
        measure(lambda: align.match(spec, flat[0], flat[1:]), 2 * flat[0].nbytes, flops(spec))
        reached = align.match(spec, flat[0], flat[1:]).objective.item()
        assert reached >= textbook(spec, flat) * (1 - 1e-5)
        benchmark.extra_info["objective"] = reached
        return
    if implementation == "textbook":
        benchmark.pedantic(lambda: textbook(spec, flat), rounds=1 if name == "vgg16" else 5)
        benchmark.extra_info["objective"] = textbook(spec, flat)
        return
    from rebasin import PermutationCoordinateDescent

    models = [trained(name, seed) for seed in range(2)]

    def fresh() -> tuple:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            moved = copy.deepcopy(models[1])
            return (PermutationCoordinateDescent(models[0], moved, digits()[0][:2]),), {}

    # It permutes the network that it is given.
    benchmark.pedantic(lambda pcd: pcd.rebasin(), setup=fresh, rounds=1 if name == "vgg16" else 3)


@pytest.mark.parametrize("implementation", ["weightops", "one"])
@pytest.mark.parametrize("name", ["mlp", "resnet20 1x"])
def test_match_many(name: str, implementation: str, benchmark) -> None:
    benchmark.group = f"match {name}, {OTHERS} networks"
    spec, flat = problem(name, OTHERS)
    if implementation == "weightops":
        benchmark.pedantic(lambda: align.match(spec, flat[0], flat[1:]), rounds=10, warmup_rounds=1)
        return

    # One after the other, so that the mean over networks is the time of one.
    networks = iter(list(range(1, 1 + OTHERS)) * 10)

    def one() -> None:
        for _ in range(OTHERS):
            n = next(networks)
            align.match(spec, flat[0], flat[n : n + 1])

    benchmark.pedantic(one, rounds=10)
