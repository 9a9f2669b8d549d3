"""Barriers of classifiers on 5,000 samples, against loading the points one by one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from weightops.align.simplex import barrier_simplex
from weightops.testing import mlp_spec

SAMPLES, BATCH = 5000, 2500  # as many as both sides are fastest with


@dataclass(frozen=True)
class Path:
    """An MLP at points of a simplex, so many on an edge."""

    widths: tuple[int, ...]
    corners: int
    points: int

    def __str__(self) -> str:
        shape = {2: "segment", 3: "triangle"}[self.corners]
        return f"{'-'.join(map(str, self.widths))} {shape} of {self.points}"

    def make(self, device: str) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
        """Model, corners, inputs and targets."""
        torch.manual_seed(0)
        models = [Network(self.widths).to(device) for _ in range(self.corners)]
        inputs = torch.randn(SAMPLES, self.widths[0], device=device)
        targets = torch.randint(self.widths[-1], (SAMPLES,), device=device)
        corners = mlp_spec(*self.widths).flatten(models).detach()
        return models[0], corners, inputs, targets


class Network(nn.Module):
    """Linear layers as ``mlp_spec`` names them, ReLU between."""

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        for i, (inputs, outputs) in enumerate(pairwise(widths), start=1):
            self.add_module(f"fc{i}", nn.Linear(inputs, outputs))

    def forward(self, x: Tensor) -> Tensor:
        *hidden, last = self.children()
        for layer in hidden:
            x = layer(x).relu()
        return last(x)


@torch.no_grad()
def load_state_dict(
    model: nn.Module,
    states: list[dict[str, Tensor]],
    weights: Tensor,
    inputs: Tensor,
    targets: Tensor,
) -> Tensor:
    """Losses ``[L]`` at points ``weights`` [L, M], as a user writes it."""
    network = copy.deepcopy(model).eval()
    losses = []
    for share in weights.tolist():
        network.load_state_dict(
            {
                name: sum(w * state[name] for w, state in zip(share, states, strict=True))
                for name in states[0]
            }
        )
        loss, wrong = 0.0, 0
        for x, y in zip(inputs.split(BATCH), targets.split(BATCH), strict=True):
            logits = network(x)
            loss += nn.functional.cross_entropy(logits, y, reduction="sum").item()
            wrong += (logits.argmax(1) != y).sum().item()
        losses.append(loss / len(targets))
    return torch.tensor(losses, dtype=torch.float64)


@pytest.mark.parametrize("implementation", ["weightops", "load_state_dict"])
@pytest.mark.parametrize(
    "problem",
    [
        Path((784, 512, 512, 512, 10), 2, 25),
        Path((784, 512, 512, 512, 10), 3, 7),
        Path((784, 64, 64, 64, 10), 2, 25),
    ],
    ids=str,
)
def test_barrier(problem: Path, implementation: str, measure, benchmark, device: str) -> None:
    benchmark.group = f"barrier {problem}"
    spec = mlp_spec(*problem.widths)
    model, corners, inputs, targets = problem.make(device)

    def ours() -> tuple[Tensor, Tensor]:
        found = barrier_simplex(
            model, spec, corners, inputs, targets,
            points=problem.points, batch_size=BATCH, progress=False,
        )  # fmt: skip
        return found.weights, found.losses

    weights, losses = ours()
    if implementation == "weightops":
        measure(ours)
        return
    states = [dict(spec.unflatten(row)) for row in corners]
    peer: Callable[[], Tensor] = lambda: load_state_dict(model, states, weights, inputs, targets)  # noqa: E731
    torch.testing.assert_close(losses, peer(), rtol=1e-5, atol=0)
    measure(peer)
