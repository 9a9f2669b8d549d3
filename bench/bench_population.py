"""Populations of small networks against what torch has: a loop, vmap, grouped convolutions, batched products."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from timing import matmul_precision
from torch import Tensor, nn

from weightops.population import population_forward

SAMPLES = 1000


def _cnn() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 5), nn.MaxPool2d(2), nn.ReLU()),
        *(nn.Conv2d(8, 6, 5), nn.MaxPool2d(2), nn.ReLU()),
        *(nn.Conv2d(6, 4, 2), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(36, 20), nn.ReLU(), nn.Linear(20, 10)),
    )


def _mlp(inputs: int, hidden: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, 10))


# work -> (model, networks, shape of a sample, multiply-adds of a sample)
PROBLEMS: dict[str, tuple[Callable[[], nn.Module], int, tuple[int, ...], int]] = {
    "population 64 CNNs forward": (
        *(_cnn, 64, (3, 28, 28)),
        8 * 75 * 576 + 6 * 200 * 64 + 4 * 24 * 9 + 36 * 20 + 20 * 10,
    ),
    "population 256 MLPs 64-32-10 forward": (
        *(lambda: _mlp(64, 32), 256, (64,)),
        64 * 32 + 32 * 10,
    ),
    "population 64 MLPs 784-128-10 forward": (
        *(lambda: _mlp(784, 128), 64, (784,)),
        784 * 128 + 128 * 10,
    ),
}


@cache
def problem(work: str) -> tuple[nn.Module, Tensor, Tensor, dict[str, Tensor]]:
    """The architecture, networks ``[N, P]``, samples, and views of the networks' tensors ``[N, ...]``."""
    make, networks, shape, _ = PROBLEMS[work]
    torch.manual_seed(0)
    model = make().eval()
    flat = torch.stack(
        [torch.cat([p.detach().flatten() for p in make().parameters()]) for _ in range(networks)]
    )
    sizes = [p.numel() for p in model.parameters()]
    views = {
        name: part.view(networks, *p.shape)
        for (name, p), part in zip(model.named_parameters(), flat.split(sizes, 1), strict=True)
    }
    return model, flat, torch.randn(SAMPLES, *shape), views


def loop(work: str) -> Callable[[], Tensor]:
    _, flat, x, _ = problem(work)
    networks = []
    for row in flat:
        network = PROBLEMS[work][0]().eval()
        nn.utils.vector_to_parameters(row, network.parameters())
        networks.append(network)
    return lambda: torch.stack([network(x) for network in networks])


def vmap(work: str) -> Callable[[], Tensor]:
    model, _, x, views = problem(work)
    run = torch.func.vmap(lambda held: torch.func.functional_call(model, held, (x,)))
    return lambda: run(views)


def grouped(work: str, channels_last: bool = False) -> Callable[[], Tensor]:
    """All networks as the groups of one convolution; the first one, of the same images, needs none."""
    _, flat, x, views = problem(work)
    n = len(flat)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)

    def run() -> Tensor:
        y = x
        for layer, pools in (("0", True), ("3", True), ("6", False)):
            weight = views[f"{layer}.weight"].flatten(0, 1)
            if channels_last:
                weight = weight.contiguous(memory_format=torch.channels_last)
            y = F.conv2d(
                y, weight, views[f"{layer}.bias"].flatten(), groups=1 if layer == "0" else n
            )
            y = (F.max_pool2d(y, 2) if pools else y).relu_()
        y = y.reshape(SAMPLES, n, 36).transpose(0, 1)
        y = torch.baddbmm(views["9.bias"][:, None], y, views["9.weight"].mT).relu_()
        return torch.baddbmm(views["11.bias"][:, None], y, views["11.weight"].mT)

    return run


def batched(work: str, wide: bool = False) -> Callable[[], Tensor]:
    """Products batched over networks; ``wide``: the first layer is one product for all of them."""
    _, _, x, views = problem(work)
    n, hidden, inputs = views["0.weight"].shape

    def run() -> Tensor:
        if wide:
            y = F.linear(x, views["0.weight"].reshape(-1, inputs), views["0.bias"].flatten())
            y = y.relu_().view(SAMPLES, n, hidden).transpose(0, 1)
        else:
            same = x.expand(n, -1, -1)
            y = torch.baddbmm(views["0.bias"][:, None], same, views["0.weight"].mT).relu_()
        return torch.baddbmm(views["2.bias"][:, None], y, views["2.weight"].mT)

    return run


def ours(work: str) -> Callable[[], Tensor]:
    model, flat, x, _ = problem(work)
    return lambda: population_forward(flat, model, x)


CONVOLUTIONS = {
    "loop": loop,
    "vmap": vmap,
    "grouped": grouped,
    "grouped-channels-last": lambda work: grouped(work, channels_last=True),
}
PRODUCTS = {
    "loop": loop,
    "vmap": vmap,
    "baddbmm": batched,
    "wide": lambda work: batched(work, wide=True),
}
CASES = [
    (work, name)
    for work, (_, _, shape, _) in PROBLEMS.items()
    for names in [CONVOLUTIONS if len(shape) > 1 else PRODUCTS]
    for name in ("weightops", *names, "weightops-medium", *(f"medium-{name}" for name in names))
]


@pytest.mark.parametrize(("work", "implementation"), CASES)
def test_population_forward(work: str, implementation: str, measure, benchmark) -> None:
    benchmark.group = work
    _, networks, _, products = PROBLEMS[work]
    medium = "medium" in implementation
    name = implementation.removeprefix("medium-").removesuffix("-medium")
    make = {"weightops": ours, **CONVOLUTIONS, **PRODUCTS}[name]
    with matmul_precision("medium" if medium else "highest"), torch.no_grad():
        run, reference = make(work), ours(work)()
        worst = (run() - reference).abs().max() / reference.abs().max()
        assert worst < (2e-2 if medium else 1e-5)
        if name != "weightops":
            measure(run)
            return
        _, flat, x, _ = problem(work)
        moved = flat.nbytes + x.nbytes + reference.nbytes
        measure(run, moved, 2 * products * networks * SAMPLES)
