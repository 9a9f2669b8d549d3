"""A stand-in for training in :mod:`weightops.population`."""

from __future__ import annotations

import copy
from math import prod

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from weightops.population import population_forward
from weightops.tracing.export import Weights, read_weights


def population_train(
    flat: Tensor,
    model: nn.Module,
    data: tuple[Tensor, Tensor],
    *,
    steps: int,
    learning_rate: float = 1e-3,
    batch_size: int = 64,
    seed: int = 0,
    probes: tuple[Tensor, Tensor],
    every: int = 1,
) -> tuple[Tensor, Tensor]:
    """Train with Adam; networks ``[N, P]``, and accuracies on ``probes`` every so many steps, ``[1 + steps // every, N]``."""
    network = copy.deepcopy(model).eval()
    weights, (x, targets) = read_weights(model), data
    names = {name for name, _ in network.named_parameters()}

    def loss(row: Tensor, at: Tensor) -> Tensor:
        state = {k: v if k in names else v.detach() for k, v in _views(row, weights).items()}
        return nn.functional.cross_entropy(functional_call(network, state, (x[at],)), targets[at])

    generator = torch.Generator().manual_seed(seed)
    trained = flat.detach().clone().requires_grad_()
    optimizer = torch.optim.Adam([trained], learning_rate)
    probed = []
    for step in range(steps + 1):
        if step % every == 0:
            probed.append(
                population_forward(
                    trained.detach(), model, probes[0], reduce="accuracy", targets=probes[1]
                )
            )
        if step < steps and len(flat):
            at = torch.randint(len(x), (len(flat), batch_size), generator=generator).to(x.device)
            with torch.enable_grad():
                total = vmap(loss)(trained, at).sum()
            (trained.grad,) = torch.autograd.grad(total, trained)
            optimizer.step()
    return trained.detach(), torch.stack(probed)


def _views(row: Tensor, weights: Weights) -> dict[str, Tensor]:
    pieces = row.split([prod(shape) for shape in weights.shapes.values()])
    return {name: piece.view(weights.shapes[name]) for name, piece in zip(weights.shapes, pieces)}
