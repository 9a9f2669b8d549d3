"""Circles: alive, counted, isolated, constructed, how circular they are and what one is worth."""

import pytest
import torch

import weightops
from weightops import circles

GENERATOR = torch.Generator().manual_seed(0)


def embedding(p: int, d: int = 6) -> torch.Tensor:
    return torch.randn(2, p, d, generator=GENERATOR, dtype=torch.float64)


def test_circles_are_counted_by_twice_the_mean_and_by_a_level() -> None:
    signals = torch.tensor([[9.0, 1.0, 1.0, 1.0], [20.0, 11.0, 12.0, 9.0], [5.0, torch.nan, 0, 0]])
    assert circles.alive(signals).tolist()[0] == [True, False, False, False]
    assert circles.count_circles(signals).tolist() == [1, 0, 0]
    assert circles.count_circles(signals, by="level").tolist() == [0, 3, 0]
    assert circles.count_circles(signals, by="level", level=4).tolist() == [1, 4, 1]
    infinite = torch.full((3,), torch.inf)
    assert circles.count_circles(infinite).item() == 0
    assert circles.count_circles(infinite, by="level").item() == 0


def test_counting_both_halves_of_the_transform_gives_as_many() -> None:
    x = embedding(11) * 0.1
    x[0] += circles.construct(11, 6, [(1, 4)], [(30.0, 40.0)])[0]
    x = x - x.mean(1, keepdim=True)
    rows = torch.fft.fft(x, dim=1).norm(dim=2)[:, 1:]
    expected = (rows > 2 * rows.mean(1, keepdim=True)).sum(1) // 2
    given = circles.count_circles(weightops.fourier_signal(x))
    assert given.tolist() == expected.tolist()
    assert given[0] == 2


def test_gradients_are_relative_to_the_start() -> None:
    signals = torch.tensor([[2.0, 4.0], [3.0, 3.0], [4.0, 2.0]])
    assert circles.frequency_gradients(signals, step=1).tolist() == [0.5, -0.25]
    assert circles.frequency_gradients(signals, step=2).tolist() == [1.0, -0.5]


@pytest.mark.parametrize("p", [7, 11, 12])
def test_frequencies_add_up_to_the_embedding_but_for_mean_and_p_over_2(p: int) -> None:
    x, count = embedding(p), (p - 1) // 2
    parts = [circles.isolate(x, k) for k in torch.eye(count, dtype=torch.bool)]
    rest = x.mean(1, keepdim=True)
    if p % 2 == 0:
        signs = (1 - 2 * (torch.arange(p) % 2)).double()[:, None]
        rest = rest + (signs * x).mean(1, keepdim=True) * signs
    torch.testing.assert_close(sum(parts) + rest, x)
    for k, part in enumerate(parts):
        signals = weightops.fourier_signal(part)
        torch.testing.assert_close(signals[:, k], weightops.fourier_signal(x)[:, k])
        signals[:, k] = 0
        torch.testing.assert_close(signals, torch.zeros_like(signals), rtol=0, atol=1e-12)
    every = torch.ones(2, count, dtype=torch.bool)
    torch.testing.assert_close(
        circles.isolate(x[0], every[0], mean=True), sum(parts)[0] + x[0].mean(0)
    )
    torch.testing.assert_close(circles.isolate(x, every), sum(parts))


@pytest.mark.parametrize("p", [7, 12])
def test_constructed_embeddings_have_the_signals_asked_for(p: int) -> None:
    x = circles.construct(p, 5, [(1, 2), (2,)], [(3.0, 4.0), (5.0,)], seed=3)
    expected = torch.zeros(2, (p - 1) // 2, dtype=torch.float64)
    expected[0, :2], expected[1, 1] = torch.tensor([3.0, 4.0]), 5
    torch.testing.assert_close(weightops.fourier_signal(x), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(x.mean(1), torch.zeros(2, 5, dtype=torch.float64))
    again = circles.construct(p, 5, [(1, 2), (2,)], [(3.0, 4.0), (5.0,)], seed=3)
    assert again.equal(x)


@pytest.mark.parametrize("p", [7, 11, 12])
def test_circularity_is_one_in_orthogonal_planes_and_less_where_they_mix(p: int) -> None:
    cos, sin = weightops.fourier_transform(p)[:, 0], weightops.fourier_transform(p)[:, 1]
    apart = torch.stack([cos[0], cos[1], sin[0], sin[1]], 1)
    found = circles.circularity(apart)
    torch.testing.assert_close(found[:2], torch.ones(2, dtype=torch.float64))
    assert (found[2:] < 1e-20).all()
    mixed = circles.circularity(apart[:, :2] + apart[:, 2:])
    torch.testing.assert_close(mixed[:2], torch.full((2,), 0.5, dtype=torch.float64))


@pytest.mark.parametrize("p", [7, 11])
def test_circularity_is_that_of_the_papers_code(p: int) -> None:
    x = embedding(p)
    spectrum = torch.fft.fft(x, dim=1)
    for m in range(2):
        for k in range(1, (p + 1) // 2):
            shares = []
            for direction in (spectrum[m, k].real, spectrum[m, k].imag):
                seen = x[m] @ direction
                seen = seen / seen.norm() / p**0.5
                turns = torch.exp(2j * torch.pi * k * torch.arange(p).double() / p)
                shares.append(2 * (seen * turns).sum().abs() ** 2)
            expected = (sum(shares) / 2).item()
            assert circles.circularity(x)[m, k - 1].item() == pytest.approx(expected, rel=1e-10)
    torch.testing.assert_close(circles.circularity(x[1]), circles.circularity(x)[1])


def test_accuracy_of_one_circle_is_that_of_the_network_without_the_others() -> None:
    trained = circles.train(2, 7, 4, steps=30, width=10, dtype=torch.float64)
    spec, pairs = trained.spec, trained.pairs
    for mean in (False, True):
        given = circles.single_circle_accuracy(trained.flat, spec, pairs, mean=mean)
        for k, frequency in enumerate(torch.eye(3, dtype=torch.bool)):
            flat = trained.flat.clone()
            part = spec.unflatten(flat)["embedding.weight"]
            part.copy_(circles.isolate(part.clone(), frequency, mean=mean))
            assert given[:, k].equal(circles.pair_accuracy(flat, spec, pairs))
    assert trained.embedding.equal(spec.unflatten(trained.state.flat)["embedding.weight"])


def test_of_two_competing_circles_both_or_the_stronger_survive() -> None:
    start = circles.construct(11, 16, [(2, 5)] * 4, [(10.0, 40.0)] * 4)
    given = circles.train(4, 11, 16, steps=60, embedding=start, width=24)
    torch.testing.assert_close(given.signals[0, :, [1, 4]], torch.tensor([[10.0, 40.0]] * 4))
    final = weightops.fourier_signal(given.embedding)
    assert (final[:, 4] > final[:, 1]).all()
