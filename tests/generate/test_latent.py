"""Diffusion of latents: conditions decide, samples repeat, guidance weighs the condition."""

import pytest
import torch
from torch import Tensor

from weightops.generate import LatentDiffusion


def train(model: LatentDiffusion, x: Tensor, condition: Tensor, steps: int) -> list[float]:
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(steps):
        rows = torch.randint(len(x), (64,), generator=generator)
        loss = model.loss(x[rows], condition[rows], generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.fixture(scope="module")
def trained() -> tuple[LatentDiffusion, Tensor, Tensor]:
    """A model of two tight clusters, and for each its centre and its condition."""
    torch.manual_seed(0)
    centres = torch.tensor([[1.0, -1.0, 1.0, 1.0], [-1.0, 1.0, 1.0, -1.0]])
    conditions = torch.eye(2)
    which = torch.arange(2).repeat(200)
    x = centres[which] + 0.05 * torch.randn(400, 4)
    model = LatentDiffusion(4, 2, width=64, blocks=2, drop=0.2)
    train(model, x, conditions[which], 600)
    return model, centres, conditions


def test_samples_lie_where_the_condition_says(trained: tuple) -> None:
    model, centres, conditions = trained
    for centre, condition in zip(centres, conditions, strict=True):
        x = model.sample(condition.expand(64, -1), torch.Generator().manual_seed(0))
        assert (x - centre).abs().median() < 0.2


def test_guidance_leads_from_no_condition_where_both_clusters_come_to_the_one_asked_for(
    trained: tuple,
) -> None:
    model, centres, conditions = trained

    def near_first(guidance: float) -> float:
        generator = torch.Generator().manual_seed(0)
        x = model.sample(conditions[:1].expand(200, -1), generator, guidance=guidance)
        return (torch.cdist(x, centres).argmin(1) == 0).float().mean().item()

    assert 0.2 < near_first(0.0) < 0.7
    assert near_first(0.0) + 0.1 < near_first(0.5) < near_first(1.0)
    assert near_first(1.0) > 0.9


def test_samples_repeat_with_the_generator_and_depend_on_the_steps(trained: tuple) -> None:
    model, _, conditions = trained
    condition = conditions.repeat(3, 1)
    first, same, other = (
        model.sample(condition, torch.Generator().manual_seed(seed), steps=20) for seed in (0, 0, 1)
    )
    assert first.shape == (6, 4)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    fewer = model.sample(condition, torch.Generator().manual_seed(0), steps=5)
    assert not torch.equal(first, fewer)


def test_noise_that_the_model_knows_costs_nothing() -> None:
    """Latents all 0: the noise is the noisy latent over its scale, which a model can learn."""
    torch.manual_seed(0)
    model = LatentDiffusion(3, 1, width=64, blocks=2)
    losses = train(model, torch.zeros(1, 3), torch.zeros(1, 1), 400)
    assert sum(losses[-20:]) / 20 < 0.15 * sum(losses[:5]) / 5


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="LatentDiffusion: blocks must be at least 1, not 0"):
        LatentDiffusion(4, 2, blocks=0)
    with pytest.raises(ValueError, match=r"LatentDiffusion: drop must be in \[0, 1\), not 1"):
        LatentDiffusion(4, 2, drop=1)
    with pytest.raises(ValueError, match="LatentDiffusion: times must be at least 40, not 39"):
        LatentDiffusion(4, 2, times=39)
    model = LatentDiffusion(4, 2, width=8, blocks=1, times=40)
    generator = torch.Generator()
    with pytest.raises(ValueError, match="sample: steps must be at most 40, not 41"):
        model.sample(torch.zeros(1, 2), generator, steps=41)
    with pytest.raises(ValueError, match=r"guidance 2\.0 needs a model trained with drop above 0"):
        model.sample(torch.zeros(1, 2), generator, steps=5, guidance=2.0)
