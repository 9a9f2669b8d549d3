"""The network that adds modulo p: its layout, its start, and its outputs against torch's module."""

import pytest
import torch
from torch.func import functional_call

import weightops
from weightops import circles
from weightops.circles import model
from weightops.population._compile import PROGRAM


def population(p: int = 7, d: int = 3, width: int = 5) -> tuple[weightops.WeightSpec, torch.Tensor]:
    spec = circles.pair_spec(p, d, width)
    return spec, model.initialize(spec, [3, 4], torch.float64)


def test_the_papers_network_has_49311_weights() -> None:
    spec, network = circles.pair_spec(59, 128), circles.PairNetwork(59, 128)
    assert spec.numel == 49_311
    assert spec.flatten(network).shape == (1, 49_311)


def test_the_program_written_by_hand_is_what_tracing_gives() -> None:
    traced = weightops.trace(circles.PairNetwork(7, 3, 5), torch.zeros(2, 2, dtype=torch.int64))
    assert circles.pair_spec(7, 3, 5)._cache[PROGRAM] == traced._cache[PROGRAM]


def test_the_symmetries_are_proven() -> None:
    network, pairs = circles.PairNetwork(7, 3, 5).double(), torch.tensor([[0, 6], [3, 2]])
    weightops.verify(circles.pair_spec(7, 3, 5), network, pairs)


@pytest.mark.parametrize("p", [7, 11, 12])
def test_logits_and_gradients_are_those_of_the_module(p: int) -> None:
    spec, flat = population(p)
    flat.requires_grad_()
    pairs = torch.randint(p, (2, 20, 2))
    given = circles.pair_logits(flat, spec, pairs)
    network = circles.PairNetwork(p, 3, 5).double()
    expected = torch.stack(
        [
            functional_call(network, spec.state_dict(row), (own,))
            for row, own in zip(flat, pairs, strict=True)
        ]
    )
    torch.testing.assert_close(given, expected, rtol=1e-12, atol=1e-12)
    grads = [torch.autograd.grad(each.sin().sum(), flat)[0] for each in (given, expected)]
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)
    shared = circles.pair_logits(flat, spec, pairs[0])
    torch.testing.assert_close(shared[0], given[0])
    right = expected.argmax(2) == pairs.sum(2) % p
    torch.testing.assert_close(circles.pair_accuracy(flat, spec, pairs), right.double().mean(1))


def test_networks_start_as_torch_initialises_them() -> None:
    spec = circles.pair_spec(59, 64)
    parts = spec.unflatten(model.initialize(spec, [0], torch.float64))
    assert parts["embedding.weight"].std().sub(1).abs() < 0.05
    for name, inputs in (("first", 128), ("second", 100), ("third", 100)):
        bound = inputs**-0.5
        for kind in ("weight", "bias"):
            part = parts[f"{name}.{kind}"]
            assert 0.9 * bound < part.abs().max() <= bound
            assert abs(part.mean()) < 0.2 * bound
    single = model.initialize(spec, [5, 0], torch.float32)
    torch.testing.assert_close(
        single[1:], model.initialize(spec, [0], torch.float64).float(), rtol=0, atol=0
    )


def test_pairs_are_split_by_each_seed_alone() -> None:
    train, held_out = model.split(59, 0.8, [1, 2])
    assert train.shape == (2, 2784, 2)
    assert held_out.shape == (2, 697, 2)
    for both in torch.cat([train, held_out], 1):
        assert (59 * both[:, 0] + both[:, 1]).sort().values.equal(torch.arange(3481))
    assert not train[0].equal(train[1])
    assert model.split(59, 0.8, [2])[0][0].equal(train[1])
