"""Meta-training: its gradient, that it learns, that it goes on after a stop, that processes share it."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import weightops
from weightops._checkpoints import CheckpointError
from weightops.learned import (
    Functional,
    LearnedOptimizer,
    MetaTraining,
    meta,
    meta_train,
)
from weightops.learned._inner import Inner
from weightops.learned._particles import Particles, unpack

D = torch.float64
X = torch.randn(24, 4, dtype=D, generator=torch.Generator().manual_seed(1))
Y = (X[:, 0] * X[:, 1] > 0).long() + (X[:, 2] > 0)


def model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).to(D)


SPEC = weightops.trace(model(), X)
BANK = SPEC.flatten([model(n) for n in range(8)])


def functional(kind: str = "unf") -> Functional:
    torch.manual_seed(0)
    return Functional(SPEC, kind, hidden=4, layers=3, dtype=D)


def learn(iterations: int = 6, **options: Any) -> MetaTraining:
    options = {"particles": 4, "truncation": 5, "horizon": 15, "progress": False} | options
    arguments = options.pop("arguments", (functional(), BANK, SPEC, (X, Y)))
    return meta_train(*arguments, iterations=iterations, **options)


def same(a: MetaTraining, b: MetaTraining, **tolerance: Any) -> None:
    tolerance = tolerance or {"rtol": 0, "atol": 0}
    for name in ("losses", "clipped"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), **tolerance)
    torch.testing.assert_close(a.functional.flatten(), b.functional.flatten(), **tolerance)
    for name in ("alpha", "beta", "momentum"):
        assert getattr(a, name) == pytest.approx(getattr(b, name), rel=tolerance["rtol"], abs=0)


@pytest.mark.parametrize("kind", ["unf", "deep_sets"])
def test_particles_are_trained_as_their_optimizers_would(kind: str) -> None:
    f = functional(kind)
    particles = Particles.fresh(BANK[:3], f.num_parameters + 3, 5, 15)
    psi = torch.randn(6, f.num_parameters + 3, dtype=D, generator=torch.Generator().manual_seed(0))
    psi[:, -3:] = psi[:, -3:].abs() * -0.1 - 0.05
    rows = torch.randint(24, (4, 3, 8), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        losses, clipped = particles.unroll(f, Inner("test", BANK[:1], SPEC, (X, Y)), psi, rows, 1e9)
    assert clipped == 0
    theta, *numbers = unpack(psi, D)
    for n in range(6):
        alpha, beta, momentum = (float(each[n]) for each in numbers)
        network = model(n // 2)
        own = functional(kind).load_flat_(theta[n])
        optimizer = LearnedOptimizer(SPEC, own, alpha, beta, network, momentum=momentum)
        total = 0.0
        for each in rows[:, n // 2]:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(network(X[each]), Y[each])
            loss.backward()
            optimizer.step()
            total += loss.item() / 4
        assert losses[n].item() == pytest.approx(total, rel=1e-9)
        torch.testing.assert_close(particles.flat[n], SPEC.flatten(network)[0])
    assert particles.step.tolist() == [4, 4, 4]


def test_unrolled_steps_have_the_gradient_of_finite_differences() -> None:
    f = functional()
    inner = Inner("test", BANK[:1], SPEC, (X, Y))
    rows = torch.arange(24).expand(3, 1, -1)
    size = f.num_parameters + 3
    psi = torch.cat([f.flatten(), torch.tensor([-0.1, 0.1, -0.2], dtype=D)])

    def loss(psi: Tensor, build: bool = False) -> Tensor:
        particles = Particles.fresh(BANK[:1], size, 5, 15)
        return particles.unroll(f, inner, psi.expand(2, -1), rows, 1e9, build)[0].mean()

    leaf = psi.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(leaf, True), leaf)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        direction = torch.randn(size, generator=generator, dtype=D)
        with torch.no_grad():
            slope = (loss(psi + 1e-5 * direction) - loss(psi - 1e-5 * direction)) / 2e-5
        assert (gradient @ direction).item() == pytest.approx(slope.item(), rel=1e-4)


def test_the_estimate_is_the_smoothed_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many small shifts give what autograd gives, over two truncations of one episode."""
    found: list[Tensor] = []
    monkeypatch.setattr(meta._Run, "_descend", lambda self, gradient: found.append(gradient))
    for estimator, particles in (("pes", 4000), ("backprop", 1)):
        options: dict[str, Any] = {
            "truncation": 4,
            "horizon": 8,
            "sigma": 1e-3,
            "alpha": 0.5,
            "beta": 0.5,
        }
        # With one span in the horizon all begin together.
        arguments = (functional(), BANK[:1], SPEC, (X, Y))
        learn(1, estimator=estimator, particles=particles, arguments=arguments, **options)
    sampled, exact = found
    # The deviation of an estimate from E dimensions and n pairs is sqrt(E / n) of its length.
    error = (sampled - exact).norm() / exact.norm()
    assert error < 2 * (len(exact) / 4000) ** 0.5
    assert torch.cosine_similarity(sampled, exact, 0) > 0.9


def test_shifts_are_summed_until_a_pair_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    original = meta._Run.iterate

    def iterate(self: Any) -> None:
        original(self)
        seen.append(self.particles.drift.norm(dim=1) > 0)

    monkeypatch.setattr(meta._Run, "iterate", iterate)
    learn(4, particles=3)  # ends after 5, 10 and 15 steps at first
    assert [each.tolist() for each in seen] == [
        *([False, True, True], [True, False, True], [True, True, False], [False, True, True]),
    ]


@pytest.mark.parametrize("estimator", ["pes", "backprop"])
def test_it_learns(estimator: str) -> None:
    # Unrolled steps are differentiated twice, which takes longer, and need fewer.
    iterations, lr = {"pes": (60, 0.02), "backprop": (16, 0.04)}[estimator]
    made = learn(iterations, estimator=estimator, lr=lr, alpha=0.05)
    fifth = iterations // 5
    assert made.losses[-fifth:].mean() < made.losses[3 : 3 + fifth].mean() - 0.1
    assert made.alpha > 0.05


@pytest.mark.parametrize("estimator", ["pes", "backprop"])
def test_a_seed_decides_and_nothing_global_does(estimator: str) -> None:
    torch.manual_seed(0)
    first = learn(seed=1, estimator=estimator)
    torch.manual_seed(5)
    same(learn(seed=1, estimator=estimator), first)
    assert not torch.equal(learn(seed=2, batch_size=8, estimator=estimator).losses, first.losses)


class Stopped(BaseException):
    pass


@pytest.mark.parametrize("estimator", ["pes", "backprop"])
def test_it_goes_on_where_it_was_killed(
    estimator: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"estimator": estimator, "batch_size": 8}
    whole = learn(7, **options)
    path = tmp_path / "run.safetensors"
    original, calls = meta._Run.iterate, []

    def iterate(self: Any) -> None:
        if len(calls) == 5:
            raise Stopped
        calls.append(1)
        original(self)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(meta._Run, "iterate", iterate)
        learn(7, checkpoint=path, every=2, **options)
    same(learn(7, checkpoint=path, every=2, **options), whole)
    same(learn(7, checkpoint=path, every=2, **options), whole)  # it is over: nothing is done
    same(learn(9, checkpoint=path, every=2, **options), learn(9, **options))


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    learn(2, checkpoint=path)
    for options, name in (
        ({"seed": 3}, "seed"),
        ({"sigma": 0.1}, "sigma"),
        ({"alpha": 0.2}, "inputs"),
    ):
        with pytest.raises(CheckpointError, match=f"^meta_train: .*is of another run: {name} is"):
            learn(2, checkpoint=path, **options)
    functional().save(path)
    with pytest.raises(CheckpointError, match="is no checkpoint of a meta-training"):
        learn(2, checkpoint=path)


@pytest.mark.parametrize(
    ("path", "error", "message"),
    [
        (3, TypeError, "checkpoint must be a path, not int 3"),
        ("f\0", ValueError, "checkpoint must be a path, which has no null character"),
        ("missing/run.safetensors", ValueError, "can't be written: missing is no folder"),
    ],
)
def test_a_checkpoint_that_can_not_be_is_refused(path: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=f"^meta_train: .*{message}"):
        learn(1, checkpoint=path)


@pytest.mark.parametrize("estimator", ["pes", "backprop"])
def test_exploding_losses_are_capped_and_counted(estimator: str) -> None:
    made = learn(4, alpha=1e6, beta=1e3, estimator=estimator, most=4.0)
    assert made.clipped.sum() > 0
    assert made.losses.max() <= 4.0
    assert made.functional.flatten().isfinite().all()
    assert 0 < made.alpha < float("inf")


def test_what_was_learned_is_not_shared_with_what_was_given() -> None:
    given = functional()
    before = given.flatten()
    made = learn(3, arguments=(given, BANK, SPEC, (X, Y)))
    assert torch.equal(given.flatten(), before)
    assert not torch.equal(made.functional.flatten(), before)


def test_models_without_kernels_are_trained_too() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).sin())

    odd = Odd().to(D)
    spec = weightops.trace(odd, X)
    for estimator in ("pes", "backprop"):
        arguments = (functional().on(spec), spec.flatten(odd), odd, (X, Y))
        assert learn(2, estimator=estimator, arguments=arguments).losses.isfinite().all()


SHARED = """
import sys
import torch, torch.distributed as dist
sys.path.insert(0, {folder!r})
import test_meta
dist.init_process_group("gloo")
path = {path!r} or None
made = test_meta.learn(3, batch_size=8, checkpoint=path, every=2, estimator={estimator!r})
torch.save([made.functional.flatten(), made.losses, made.clipped,
            torch.tensor([made.alpha, made.beta, made.momentum])], {out!r} + str(dist.get_rank()))
dist.destroy_process_group()
"""


@pytest.mark.parametrize("estimator", ["pes", pytest.param("backprop", marks=pytest.mark.slow)])
def test_two_processes_do_what_one_does(estimator: str, tmp_path: Path) -> None:
    path = str(tmp_path / "run.safetensors")
    code = SHARED.format(
        folder=str(Path(__file__).parent),
        path=path,
        out=str(tmp_path / "made"),
        estimator=estimator,
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = os.environ | {
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"},
        "OMP_NUM_THREADS": "1",
    }
    processes = [
        subprocess.Popen([sys.executable, "-c", code], env=environment | {"RANK": str(rank)})
        for rank in range(2)
    ]
    assert [process.wait(timeout=240) for process in processes] == [0, 0]
    alone = learn(3, batch_size=8, estimator=estimator)
    numbers = torch.tensor([alone.alpha, alone.beta, alone.momentum])
    for rank in range(2):
        made = torch.load(tmp_path / f"made{rank}")
        wanted = [alone.functional.flatten(), alone.losses, alone.clipped, numbers]
        torch.testing.assert_close(made, wanted, rtol=1e-6, atol=1e-8)
    # One process goes on from what two have written.
    more = learn(4, batch_size=8, estimator=estimator, checkpoint=path, every=2)
    same(more, learn(4, batch_size=8, estimator=estimator), rtol=1e-6, atol=1e-8)
