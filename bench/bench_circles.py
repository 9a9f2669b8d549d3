"""Networks that add two tokens: their training, first layer and signals, against what torch has."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import floors
import pytest
import torch
from circles_peers import LAYERS as LAYER_PEERS
from circles_peers import PEERS, SIGNALS
from timing import matmul_precision
from torch import Tensor

from weightops import circles, fourier_signal, token_pair_linear
from weightops.testing import FourierSignal, TokenPairs

#: networks -> steps of one call: enough for the set-up of a call not to count
TRAININGS = {16: 10, 64: 10}


@cache
def start(networks: int) -> circles.Training:
    problem = TokenPairs(networks)
    return circles.train(networks, problem.tokens, problem.size, width=problem.width, steps=0)


def ours(networks: int, steps: int, every: int) -> Callable[[], Tensor]:
    problem, state = TokenPairs(networks), start(networks).state
    return lambda: (
        circles.train(
            *(networks, problem.tokens, problem.size),
            width=problem.width,
            steps=steps,
            every=every,
            state=state,
        ).flat
    )


def training_of(implementation: str, networks: int, steps: int) -> Callable[[], Tensor]:
    if implementation == "weightops":
        return ours(networks, steps, steps)
    if implementation == "weightops-probes":
        return ours(networks, steps, 1)
    if implementation == "weightops-16s":
        some = ours(16, steps, steps)
        return lambda: torch.cat([some() for _ in range(networks // 16)])
    return PEERS[implementation.removeprefix("medium-")](start(networks), steps)


CASES = [
    (networks, implementation)
    for networks in TRAININGS
    for implementation in (
        "weightops",
        "weightops-probes",
        "weightops-16s",
        *PEERS,
        "medium-factored",
    )
    if networks > 16 or implementation != "weightops-16s"
]


@pytest.mark.parametrize(("networks", "implementation"), CASES)
def test_training(networks: int, implementation: str, measure, benchmark, device) -> None:
    if device != "cpu":
        pytest.skip("circles train on CPUs")
    benchmark.group = f"circles training {networks} networks"
    steps = TRAININGS[networks]
    benchmark.extra_info["steps"] = steps
    medium = implementation.startswith("medium-")
    with matmul_precision("medium" if medium else "highest"):
        if implementation != "weightops-16s":
            away = training_of(implementation, networks, 2)() - ours(networks, 2, 2)()
            # Of a hundredth that a step moves each weight by.
            assert away.abs().mean() < (1e-3 if medium else 1e-4)
        run = training_of(implementation, networks, steps)
        flops = steps * TokenPairs(networks).training_flops
        measure(run, 6 * start(networks).flat.nbytes, flops, rate=floors.peak_rate)


LAYERS = {"weightops": token_pair_linear, **LAYER_PEERS}


@pytest.mark.parametrize("implementation", LAYERS)
@pytest.mark.parametrize("passes", ["forward", "forward+backward"])
def test_token_pair_linear(passes: str, implementation: str, measure, benchmark) -> None:
    problem = TokenPairs(16)
    benchmark.group = f"token_pair_linear {problem} {passes}"
    pairs, *leaves = problem.make()
    f = LAYERS[implementation]
    torch.testing.assert_close(
        f(pairs, *leaves), token_pair_linear(pairs, *leaves), rtol=1e-4, atol=1e-4
    )
    if passes == "forward":
        measure(lambda: f(pairs, *leaves), problem.bytes, problem.flops, rate=floors.peak_rate)
        return
    for leaf in leaves:
        leaf.requires_grad_()
    grad = torch.randn(problem.networks, problem.count, problem.width)
    measure(
        lambda: torch.autograd.grad(f(pairs, *leaves), leaves, grad),
        problem.bytes + problem.backward_bytes,
        3 * problem.flops,
        rate=floors.peak_rate,
    )


@pytest.mark.parametrize("implementation", ["weightops", *SIGNALS])
@pytest.mark.parametrize("networks", [16, 64])
def test_fourier_signal(networks: int, implementation: str, measure, benchmark) -> None:
    problem = FourierSignal(networks)
    benchmark.group = f"fourier_signal {problem}"
    embedding = problem.make()
    f = {"weightops": fourier_signal, **SIGNALS}[implementation]
    torch.testing.assert_close(f(embedding), fourier_signal(embedding), rtol=1e-4, atol=1e-4)
    measure(lambda: f(embedding), problem.bytes, problem.flops, rate=floors.peak_rate)
