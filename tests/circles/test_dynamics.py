"""Linear dynamics: fits find the system that made the signals, and run it from the start."""

import pytest
import torch

from weightops import circles


def system(networks: int = 2, count: int = 4, steps: int = 60) -> circles.Dynamics:
    generator = torch.Generator().manual_seed(0)
    draw = torch.randn(networks, count, count, generator=generator, dtype=torch.float64)
    matrix = 0.05 * draw - 0.1 * torch.eye(count, dtype=torch.float64)
    offset = torch.randn(networks, count, generator=generator, dtype=torch.float64)
    return circles.Dynamics(matrix, offset, torch.ones(networks, dtype=torch.float64))


def test_least_squares_find_the_system_and_its_rollout() -> None:
    true = system()
    signals = true.rollout(torch.full((2, 4), 10.0), 60)
    assert signals.shape == (61, 2, 4)
    step = signals[0] + torch.einsum("mij,mj->mi", true.matrix, signals[0]) + true.offset
    torch.testing.assert_close(signals[1], step)
    found = circles.fit_dynamics(signals)
    torch.testing.assert_close(found.matrix, true.matrix)
    torch.testing.assert_close(found.offset, true.offset)
    torch.testing.assert_close(found.r2, true.r2)
    torch.testing.assert_close(found.rollout(signals[0], 60), signals)


def test_r2_is_the_explained_share_of_the_changes() -> None:
    noise = torch.randn(200, 2, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    signals = noise.cumsum(0)
    found = circles.fit_dynamics(signals)
    changes = signals[1:] - signals[:-1]
    predicted = torch.einsum("mij,tmj->tmi", found.matrix, signals[:-1]) + found.offset
    left = (changes - predicted).square().sum(0) / (changes - changes.mean(0)).square().sum(0)
    torch.testing.assert_close(found.r2, (1 - left).mean(1))
    assert (found.r2 < 0.3).all()


def test_a_lasso_is_sparse_and_explains_less() -> None:
    signals = system().rollout(torch.full((2, 4), 10.0), 60)
    exact, sparse = circles.fit_dynamics(signals), circles.fit_dynamics(signals, alpha=0.05)
    assert (sparse.matrix == 0).sum() > (exact.matrix == 0).sum()
    assert (sparse.r2 < exact.r2).all()
    assert (sparse.r2 > 0.5).all()
    loose = circles.fit_dynamics(signals, alpha=1e3)
    assert not loose.matrix.any()


def test_networks_that_diverged_are_nan_and_the_others_are_fitted() -> None:
    signals = system().rollout(torch.full((2, 4), 10.0), 60)
    expected = circles.fit_dynamics(signals)
    signals[30, 0, 1] = torch.inf
    found = circles.fit_dynamics(signals)
    assert found.matrix[0].isnan().all()
    assert found.r2[0].isnan()
    torch.testing.assert_close(found.matrix[1], expected.matrix[1])


@pytest.mark.parametrize(("alpha", "least"), [(None, 0.5), (0.001, 0.2)])
def test_signals_of_training_are_fitted(alpha: float | None, least: float) -> None:
    trained = circles.train(2, 11, 8, steps=80, width=16)
    found = circles.fit_dynamics(trained.signals, alpha=alpha)
    assert found.matrix.shape == (2, 5, 5)
    assert (found.r2 > least).all()
    assert found.rollout(trained.signals[0], 79).shape == trained.signals.shape
