"""Training of networks that add: against torch's own loop, in parts, frozen, diverging."""

from typing import Any

import pytest
import torch
from torch.nn import functional as F

import weightops
from weightops import circles

SMALL: dict[str, Any] = {"p": 11, "d": 6, "width": 12, "dtype": torch.float64}


def train(num_models: int = 3, **options: Any) -> circles.Training:
    return circles.train(num_models, **({"steps": 6} | SMALL | options))


def loop(training: circles.Training, start: torch.Tensor, n: int, **options: Any) -> Any:
    """The plain loop of one network: losses and weights."""
    p, d = training.spec.shapes["embedding.weight"]
    network = circles.PairNetwork(p, d, training.spec.shapes["third.weight"][1]).double()
    training.spec.load_(network, start)
    options = {"lr": 0.01, "weight_decay": 0.5} | options
    optimizer = torch.optim.AdamW(network.parameters(), **options)
    pairs, losses = training.pairs[n], []
    for _ in training.losses:
        loss = F.cross_entropy(network(pairs), pairs.sum(1) % p)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses), training.spec.flatten(network)[0]


def test_steps_are_those_of_torch() -> None:
    given, start = train(), train(steps=0).flat
    for n in range(3):
        losses, row = loop(given, start[n], n)
        torch.testing.assert_close(given.losses[:, n], losses, rtol=0, atol=1e-12)
        torch.testing.assert_close(given.flat[n], row.detach(), rtol=0, atol=1e-11)
    single = train(dtype=torch.float32)
    torch.testing.assert_close(single.losses.double(), given.losses, rtol=1e-4, atol=1e-5)


def test_five_steps_of_the_papers_network_have_torchs_losses() -> None:
    given, start = (circles.train(2, 59, 128, steps=n, dtype=torch.float64) for n in (5, 0))
    for n in range(2):
        losses, _ = loop(given, start.flat[n], n)
        torch.testing.assert_close(given.losses[:, n], losses, rtol=0, atol=1e-10)


def test_each_network_has_a_learning_rate_of_its_own() -> None:
    rates = torch.tensor([0.01, 0.03])
    given, start = train(2, lr=rates, weight_decay=0.1), train(2, steps=0).flat
    for n in range(2):
        losses, _ = loop(given, start[n], n, lr=float(rates.double()[n]), weight_decay=0.1)
        torch.testing.assert_close(given.losses[:, n], losses, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("every", [1, 2, 4])
def test_training_in_parts_is_training_at_once_to_the_bit(every: int, dtype: torch.dtype) -> None:
    probes = {"norm": lambda flat: flat.norm(dim=1)}
    options = {"every": every, "dtype": dtype, "probes": probes}
    whole = train(steps=7, **options)
    first = train(steps=3, **options)
    second = train(steps=4, state=first.state, **options)
    assert second.state.step == 7
    assert second.flat.equal(whole.flat)
    assert second.state.moments.equal(whole.state.moments)
    for name in ("losses", "signals"):
        assert torch.cat([getattr(first, name), getattr(second, name)]).equal(getattr(whole, name))
    assert torch.cat([first.probes["norm"], second.probes["norm"]]).equal(whole.probes["norm"])
    assert first.flat.equal(first.state.flat)


def test_signals_are_recorded_before_the_steps_of_which_they_are_asked_for() -> None:
    given = train(steps=7, every=3)
    assert given.signals.shape == (3, 3, 5)
    for record, step in enumerate((0, 3, 6)):
        embedding = train(steps=step).embedding
        torch.testing.assert_close(weightops.fourier_signal(embedding), given.signals[record])


def test_a_network_hangs_on_its_own_seed_alone() -> None:
    pair, alone = train(2, seed=[5, 9]), train(1, seed=[9])
    torch.testing.assert_close(pair.losses[:, 1:], alone.losses)
    assert pair.pairs[1].equal(alone.pairs[0])
    assert train(2).losses[0, 0] != train(2).losses[0, 1]
    shared = train(2, data_seed=[7, 7])
    assert shared.pairs[0].equal(shared.pairs[1])
    assert train(2).state.flat.equal(train(2).state.flat)


def test_a_given_embedding_is_begun_with_and_a_frozen_one_stays() -> None:
    embedding = torch.randn(11, 6, dtype=torch.float64)
    given = train(embedding=embedding, steps=1)
    expected = weightops.fourier_signal(embedding)
    torch.testing.assert_close(given.signals[0], expected.expand(3, -1))
    assert not given.embedding[0].equal(embedding)
    frozen = train(embedding=embedding.expand(3, -1, -1), frozen=True)
    for each in frozen.embedding:
        assert each.equal(embedding)
    torch.testing.assert_close(frozen.losses[0], given.losses[0])
    network = circles.PairNetwork(11, 6, 12).double()
    network.embedding.weight.requires_grad_(False)
    start = train(embedding=embedding, steps=0).flat[0]
    assert frozen.losses[-1, 0] < frozen.losses[0, 0]
    assert start[:66].equal(frozen.flat[0, :66])
    assert not frozen.state.moments[:, :, :66].any()


def test_networks_that_diverge_are_named_and_the_others_go_on() -> None:
    given = train(lr=torch.tensor([0.01, 1e300, 0.01], dtype=torch.float64))
    assert given.diverged.tolist() == [False, True, False]
    expected = train()
    for n in (0, 2):
        torch.testing.assert_close(given.losses[:, n], expected.losses[:, n])
        torch.testing.assert_close(given.flat[n], expected.flat[n])


@pytest.mark.parametrize("p", [3, 4, 7, 12])
def test_small_and_composite_moduli_train(p: int) -> None:
    given = train(2, p=p, d=1, steps=5)
    assert given.losses.isfinite().all()
    assert given.signals.shape == (5, 2, (p - 1) // 2)


def test_networks_learn_to_add() -> None:
    given = circles.train(2, 31, 64, steps=300, every=100)
    assert (circles.pair_accuracy(given.flat, given.spec, given.pairs) == 1).all()
    held_out = circles.pair_accuracy(given.flat, given.spec, given.held_out)
    assert (held_out > 0.3).all()  # by chance 1 / 31
