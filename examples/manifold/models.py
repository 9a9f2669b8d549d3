"""Networks that know the context by their weights, as an input, by scales and shifts, or not at all.

All are multilayer perceptrons with two hidden layers for a task, and are called with inputs
``[B, inputs]`` and contexts, one each or one for all: ``model(x, context=context)``.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn

from manifold.tasks import Task
from weightops.manifolds import Lifted, Manifold, lift


def sizes(task: Task, width: int) -> list[int]:
    return [task.inputs, width, width, task.outputs]


def mlp(sizes: list[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def on_manifold(task: Task, width: int, manifold: Manifold) -> Lifted:
    """Weights that follow the context."""
    return lift(mlp(sizes(task, width)), manifold, spread=0.5)


class Alone(nn.Module):
    """No context."""

    def __init__(self, task: Task, width: int) -> None:
        super().__init__()
        self.mlp = mlp(sizes(task, width))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        return self.mlp(x)


class Concatenated(nn.Module):
    """The context as further inputs."""

    def __init__(self, task: Task, width: int) -> None:
        super().__init__()
        self.encode = task.encode
        first, *rest = sizes(task, width)
        self.mlp = mlp([first + task.encoded, *rest])

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        return self.mlp(torch.cat([x, self.encode(context).expand(len(x), -1)], 1))


class FiLM(nn.Module):
    """Scales and shifts of hidden units made from the context (Perez et al. 2018, arXiv 1709.07871).

    With shifts alone it is how diffusion models embed time since Ho et al. 2020.
    """

    def __init__(self, task: Task, width: int, *, scales: bool = True) -> None:
        super().__init__()
        self.encode, self.scales = task.encode, scales
        first, *hidden, last = sizes(task, width)
        self.linears = nn.ModuleList(map(nn.Linear, [first, *hidden[:-1]], hidden))
        self.last = nn.Linear(hidden[-1], last)
        self.splits = hidden * (1 + scales)
        self.generator = mlp([task.encoded, task.width // 2, sum(self.splits)])

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        parts = self.generator(self.encode(context)).split(self.splits, -1)
        count = len(self.linears)
        for n, linear in enumerate(self.linears):
            x = linear(x)
            if self.scales:
                x = x * (1 + parts[count + n])
            x = (x + parts[n]).relu()
        return self.last(x)


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def widest(build: Callable[[int], nn.Module], limit: int) -> int:
    """The width, at most 1024, at which ``build(width)`` has no more than ``limit`` parameters."""
    return bisect(range(1, 1025), limit, key=lambda width: parameters(build(width)))
