"""A learned optimizer's functional, its step against an ordinary one, and its meta-training against a loop."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import floors
import pytest
import torch
from learned_peers import Particle, loop
from torch import Tensor, nn

import weightops
from weightops.learned import Functional, LearnedOptimizer
from weightops.learned._inner import Inner
from weightops.learned._particles import STRETCH, Particles
from weightops.ops.functional import functional, reference
from weightops.testing import (
    LearnedFunctional,
    best_time,
    cnn_spec,
    labelled_mlp_spec,
    rnn_spec,
    transformer_spec,
)

PROBLEMS = {
    "mlp 784-128-128-10": LearnedFunctional(labelled_mlp_spec(784, 128, 128, 10)),
    "mlp 784-128-128-10 deep sets": LearnedFunctional(
        labelled_mlp_spec(784, 128, 128, 10), kind="deep_sets"
    ),
    "cnn": LearnedFunctional(cnn_spec(3, 16, 32, 64)),
    "rnn": LearnedFunctional(rnn_spec()),
    "transformer": LearnedFunctional(transformer_spec()),
    "32 mlps 64-32-10": LearnedFunctional(labelled_mlp_spec(64, 32, 10), 32, own=True),
}
FUNCTIONALS: dict[str, Callable[..., Tensor]] = {
    "weightops": functional,
    "eager": reference.functional,
    "compiled": torch.compile(reference.functional, dynamic=False),
}


@pytest.mark.parametrize("implementation", FUNCTIONALS)
@pytest.mark.parametrize("name", PROBLEMS)
def test_functional(name: str, implementation: str, measure, benchmark, device) -> None:
    if device != "cpu":
        pytest.skip("its kernel is for CPUs")
    if (name, implementation) == ("rnn", "compiled"):
        pytest.skip("torch 2.13 makes code of the diagonal that its compiler refuses")
    benchmark.group = f"functional {name}"
    problem = PROBLEMS[name]
    given, f = problem.make(), FUNCTIONALS[implementation]
    torch.testing.assert_close(f(*given), functional(*given), rtol=1e-3, atol=1e-3)
    measure(lambda: f(*given), problem.bytes, problem.flops, rate=floors.peak_rate)


@pytest.mark.parametrize("implementation", ["weightops", "adamw-step"])
def test_step(implementation: str, measure, benchmark, device) -> None:
    """A step of the optimizer; and a fused one with the model's forward and backward, which it comes on top of."""
    if device != "cpu":
        pytest.skip("its kernel is for CPUs")
    benchmark.group = "learned step mlp 784-128-128-10"
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    )
    x, targets = torch.randn(128, 784), torch.randint(10, (128,))

    def differentiate() -> None:
        model.zero_grad()
        nn.functional.cross_entropy(model(x), targets).backward()

    if implementation == "adamw-step":
        adamw = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
        measure(lambda: (differentiate(), adamw.step()))
        return
    spec = weightops.trace(model, x[:2])
    optimizer = LearnedOptimizer(spec, Functional(spec), 1e-6, 1e-6, model)
    differentiate()
    problem = PROBLEMS["mlp 784-128-128-10"]
    # Momenta and weights are written too.
    measure(optimizer.step, 2 * problem.bytes, problem.flops, rate=floors.peak_rate)
    benchmark.extra_info["functional_ms"] = 1e3 * optimizer.measure(100).functional_seconds


STEPS, PAIRS, ROWS = 10, 16, 64


@cache
def meta_training() -> tuple[Functional, Inner, Tensor, Tensor, Tensor]:
    """Functional, inner problem, first networks ``[pairs, P]``, parameters ``[2 pairs, E]`` and rows ``[steps, pairs, B]``."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    x, targets = torch.rand(1797, 64), torch.randint(10, (1797,))
    own = Functional(labelled_mlp_spec(64, 32, 10))
    networks = 0.1 * torch.randn(PAIRS, own.spec.numel)
    numbers = torch.tensor([0.1, 0.03, 0.1], dtype=torch.float64).log() / STRETCH
    psi = torch.cat([own.flatten(), numbers.float()])
    shifted = psi + 0.01 * torch.randn(2 * PAIRS, len(psi))
    shifted[:, -3:] = psi[-3:]  # the loop has numbers that are the same for all
    rows = torch.randint(len(x), (STEPS, PAIRS, ROWS))
    return own, Inner("bench", networks, model, (x, targets)), networks, shifted, rows


@pytest.mark.parametrize("implementation", ["weightops", "loop"])
def test_meta_training(implementation: str, measure, benchmark, device) -> None:
    """The inner steps of persistent evolution strategies: losses and gradients, functionals, updates."""
    if device != "cpu":
        pytest.skip("its kernel is for CPUs")
    benchmark.group = f"learned meta-training {2 * PAIRS} mlps 64-32-10"
    own, inner, networks, psi, rows = meta_training()
    fresh = Particles.fresh(networks, psi.shape[1], STEPS, STEPS)
    if implementation == "loop":
        particles = [
            Particle(own, theta[:-3], row, 0.1, 0.03)
            for theta, row in zip(psi, fresh.flat, strict=True)
        ]
        run = loop(particles, inner.x, inner.targets, rows)
        run()
        with torch.no_grad():
            fresh.unroll(own, inner, psi, rows, 1e9)
        found = torch.stack([torch.cat([p.flatten() for p in each.params]) for each in particles])
        torch.testing.assert_close(found, fresh.flat, rtol=1e-3, atol=1e-4)
        measure(run)
        return
    problem = PROBLEMS["32 mlps 64-32-10"]
    flops = STEPS * problem.flops
    with torch.no_grad():
        measure(
            lambda: fresh.unroll(own, inner, psi, rows, 1e9),
            STEPS * 2 * problem.bytes,
            flops,
            rate=floors.peak_rate,
        )
        given = problem.make()
        seconds = STEPS * best_time(lambda: functional(*given), 0.5)
        benchmark.extra_info["functional_ms"] = 1e3 * seconds
