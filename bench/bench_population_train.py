"""Training of populations against a lean loop over networks and against batched torch."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weightops.population import population_train

ROWS, BATCH = 1000, 64


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def cnn() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 6, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 4, 2), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(36, 20), nn.ReLU(), nn.Linear(20, 10)),
    )


def wide() -> nn.Module:
    """The shape of modular addition: full batch."""
    return nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 113))


#: name -> model, networks, shape of a sample, rows, rows of a batch, steps of one call
POPULATIONS: dict[str, tuple[Callable, int, tuple[int, ...], int, int | None, int]] = {
    "32 MLPs 64-32-10": (mlp, 32, (64,), ROWS, BATCH, 100),
    "16 CNNs": (cnn, 16, (3, 28, 28), ROWS, BATCH, 10),
    "16 MLPs 128-128-113, full batch": (wide, 16, (128,), 2784, None, 3),
}


def flops(model: nn.Module, sample: Tensor, rows: int) -> int:
    """Forward and the gradients of weights and of all inputs but the first layer's."""
    counted: list[int] = []
    model = copy.deepcopy(model)

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        reads = module.weight[0].numel()  # type: ignore[index, union-attr]
        counted.append(2 * reads * output.numel())

    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            module.register_forward_hook(count)
    with torch.no_grad():
        model(sample[None])
    return rows * (3 * sum(counted) - counted[0])


def forward(model: nn.Module, parameters: list[Tensor], x: Tensor) -> Tensor:
    """All networks at once: ``x [N, b, ...]`` -> ``[N, b, K]``; images as channels of one sample."""
    networks, rest = len(x), iter(parameters)
    for module in model:  # type: ignore[attr-defined]
        if isinstance(module, nn.Linear):
            weight, bias = next(rest), next(rest)
            x = torch.baddbmm(bias[:, None], x, weight.mT)
        elif isinstance(module, nn.Conv2d):
            weight, bias = next(rest), next(rest)
            side_by_side = x.transpose(0, 1).flatten(1, 2)
            made = F.conv2d(side_by_side, weight.flatten(0, 1), bias.flatten(), groups=networks)
            x = made.unflatten(1, (networks, -1)).transpose(0, 1)
        elif isinstance(module, nn.Flatten):
            x = x.flatten(2)
        elif isinstance(module, nn.MaxPool2d):
            x = module(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        else:
            x = module(x)
    return x


def views(model: nn.Module, flat: Tensor) -> list[Tensor]:
    sizes = [parameter.numel() for parameter in model.parameters()]
    parts = flat.split(sizes, 1)
    return [part.unflatten(1, p.shape) for part, p in zip(parts, model.parameters(), strict=True)]


@pytest.mark.parametrize("implementation", ["weightops", "loop", "batched-torch"])
@pytest.mark.parametrize("name", POPULATIONS)
def test_train(name: str, implementation: str, measure, benchmark) -> None:
    make, networks, shape, rows, batch, steps = POPULATIONS[name]
    benchmark.group = f"population training {name}"
    benchmark.extra_info["steps"] = steps
    torch.manual_seed(0)
    models = [make() for _ in range(networks)]
    flat = torch.stack([nn.utils.parameters_to_vector(m.parameters()).detach() for m in models])
    x, targets = torch.randn(rows, *shape), torch.randint(10, (rows,))
    picked = torch.stack([torch.randperm(rows)[: batch or rows] for _ in range(networks)])

    if implementation == "weightops":
        count = networks * steps * flops(models[0], x[0], batch or rows)
        measure(
            lambda: population_train(
                flat, models[0], (x, targets), steps=steps, batch_size=batch, progress=False
            ),
            6 * flat.nbytes,
            count,
        )
        return

    if implementation == "loop":
        optimizers = [torch.optim.AdamW(m.parameters(), fused=True) for m in models]

        def run() -> None:
            for model, optimizer, rows in zip(models, optimizers, picked, strict=True):
                for _ in range(steps):
                    optimizer.zero_grad(set_to_none=True)
                    taken = (x, targets) if batch is None else (x[rows], targets[rows])
                    F.cross_entropy(model(taken[0]), taken[1]).backward()
                    optimizer.step()

    else:
        weights = flat.clone().requires_grad_()
        optimizer = torch.optim.AdamW([weights], fused=True)
        everything = x.expand(networks, *x.shape)

        def run() -> None:
            for _ in range(steps):
                optimizer.zero_grad(set_to_none=True)
                taken = (
                    (everything, targets.expand(networks, -1))
                    if batch is None
                    else (x[picked], targets[picked])
                )
                logits = forward(models[0], views(models[0], weights), taken[0])
                mean = F.cross_entropy(logits.flatten(0, 1), taken[1].flatten())
                (mean * networks).backward()
                optimizer.step()

    measure(run)
