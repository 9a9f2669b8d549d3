"""The gradient of the universe's objective for 8 networks, against taking it pair by pair."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from weightops.align.universe import Universe
from weightops.testing import mlp_spec

SPEC = mlp_spec(784, 512, 512, 512, 10)
NETWORKS = 8


def soft_universe() -> Universe:
    """Some steps into Frank-Wolfe, where every matrix is a mixture of permutations."""
    generator = torch.Generator().manual_seed(0)
    flat = 0.05 * torch.randn(NETWORKS, SPEC.numel, generator=generator)
    universe = Universe(SPEC, flat, list(SPEC.shapes))
    for _ in range(3):
        universe.step(SPEC.random_permutations(NETWORKS, generator), 0.4)
    return universe


def pairs(universe: Universe) -> dict[str, Tensor]:
    """Gram by Gram, added up in place, from the moved tensors that the sum over networks also gets."""
    found = {label: torch.zeros_like(x) for label, x in universe.matrices.items()}
    for tensor in universe.tensors:
        for bit, (label, axis) in enumerate(tensor.places):
            moved, rest = (
                t.movedim(axis, 1).reshape(NETWORKS, SPEC.labels[label], -1)
                for t in (tensor.on[-1], tensor.on[-1 - (1 << bit)])
            )
            for i in range(NETWORKS):
                for j in range(NETWORKS):
                    if i != j:
                        found[label][i].addmm_(moved[j], rest[i].T)
    return found


def pairs_from_matrices(universe: Universe) -> dict[str, Tensor]:
    """As C2M3 writes it: for each pair the product of weights and matrices, both axes."""
    found = {label: torch.zeros_like(x) for label, x in universe.matrices.items()}
    for tensor in universe.tensors:
        if not tensor.places:
            continue
        weights = tensor.on[0].reshape(NETWORKS, tensor.on[0].shape[1], -1)
        row, column = (
            next((universe.matrices[label] for label, axis in tensor.places if axis == place), None)
            for place in (1, 2)
        )
        for i in range(NETWORKS):
            for j in range(NETWORKS):
                if i == j:
                    continue
                # X_j W_j Y_j^T is multiplied by Y_i W_i^T, or transposed by X_i W_i.
                other = weights[j] if row is None else row[j] @ weights[j]
                other = other if column is None else other @ column[j].T
                for label, axis in tensor.places:
                    if axis == 1:
                        back = other if column is None else other @ column[i]
                        found[label][i] += back @ weights[i].T
                    else:
                        back = other.T if row is None else other.T @ row[i]
                        found[label][i] += back @ weights[i]
    return found


IMPLEMENTATIONS: dict[str, Callable[[Universe], dict[str, Tensor]]] = {
    "weightops": Universe.gradient,
    "pairs": pairs,
    "pairs-from-matrices": pairs_from_matrices,
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradient(implementation: str, measure, benchmark) -> None:
    benchmark.group = f"universe gradient {NETWORKS} x MLP 784-512x3-10"
    universe = soft_universe()
    find = IMPLEMENTATIONS[implementation]
    expected = universe.gradient()
    for label, given in find(universe).items():
        torch.testing.assert_close(given, expected[label], rtol=1e-4, atol=1e-3)
    flops = sum(
        2 * tensor.on[0].numel() * SPEC.labels[label]
        for tensor in universe.tensors
        for label, _ in tensor.places
    )
    read = {id(t): t.nbytes for tensor in universe.tensors for t in tensor.on}
    written = sum(x.nbytes for x in universe.matrices.values())
    measure(lambda: find(universe), sum(read.values()) + written, flops)
