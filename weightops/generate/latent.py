"""Diffusion of latents, given a condition."""

from __future__ import annotations

from math import log
from typing import Any

import torch
from torch import Tensor, nn

from weightops import _check
from weightops.generate._arguments import check_generator, check_like

#: sampling keeps its estimate of a latent, whose entries have unit variance, within this
RANGE = 4.0
#: betas rise from 1e-4 to .02 over 1,000 steps; over fewer they are as much larger
BETAS = (0.1, 20.0)
FREQUENCIES = 32


class Denoiser(nn.Module):
    """The noise in noisy latents ``[B, L]``: a perceptron with residual blocks.

    Args:
        latent: L.
        condition: C.
        width: of the blocks.
        blocks: their number.
    """

    def __init__(self, latent: int, condition: int, *, width: int = 512, blocks: int = 4) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(2 * FREQUENCIES, 128), nn.SiLU(), nn.Linear(128, 128))
        self.condition = nn.Sequential(nn.Linear(condition, 256), nn.SiLU(), nn.Linear(256, 128))
        self.enter, self.leave = nn.Linear(latent, width), nn.Linear(width, latent)
        self.blocks = nn.ModuleList(nn.Linear(width + 256, width) for _ in range(blocks))

    def forward(self, x: Tensor, times: Tensor, condition: Tensor) -> Tensor:
        """``[B, L]`` from ``x`` ``[B, L]`` at ``times`` int64 ``[B]`` and ``condition`` ``[B, C]``."""
        steps = torch.arange(FREQUENCIES, device=x.device) / FREQUENCIES
        angles = times[:, None] * torch.exp(-log(1e4) * steps)
        at = torch.cat([angles.sin(), angles.cos()], 1)
        known = torch.cat([self.condition(condition), self.time(at)], 1)
        h = self.enter(x)
        for block in self.blocks:
            h = h + nn.functional.silu(block(torch.cat([h, known], 1)))
        return self.leave(h)


class LatentDiffusion(nn.Module):
    """Denoising diffusion of latents of unit variance, with the schedules of ``diffusers``.

    Training predicts the noise (DDPM), sampling is deterministic given its noise (DDIM).

    Source: Soro et al. 2024, arXiv 2402.18153, section 3.4; Ho et al. 2020, "Denoising Diffusion
    Probabilistic Models", arXiv 2006.11239; Song et al. 2021, "Denoising Diffusion Implicit Models",
    arXiv 2010.02502.

    Args:
        latent: L, entries of a latent.
        condition: C, entries of a condition.
        width: of the denoiser's blocks.
        blocks: their number.
        times: steps of the noise's schedule, at least 40; its betas rise from .1 / times to 20 / times.
        drop: probability that training drops a condition; above 0 the model also samples without
            condition, and guidance has an effect.

    Raises:
        ValueError: a size is not positive, or ``drop`` is not in ``[0, 1)``.
        TypeError: a size is no integer, ``drop`` no number.
    """

    def __init__(
        self,
        latent: int,
        condition: int,
        *,
        width: int = 512,
        blocks: int = 4,
        times: int = 1000,
        drop: float = 0.0,
    ) -> None:
        super().__init__()
        sizes = {"latent": latent, "condition": condition, "width": width, "blocks": blocks}
        for name, size in sizes.items():
            _check.count("LatentDiffusion", name, size)
        _check.count("LatentDiffusion", "times", times, 40)
        _check.number("LatentDiffusion", "drop", drop, 0, 1)
        # A second, which whoever does not sample need not wait for.
        from diffusers import DDPMScheduler

        self.latent, self.drop = latent, drop
        self.noise: dict[str, Any] = {
            **{"num_train_timesteps": times, "beta_schedule": "linear"},
            **{"beta_start": BETAS[0] / times, "beta_end": BETAS[1] / times},
        }
        self.schedule: Any = DDPMScheduler(**self.noise)
        self.denoiser = Denoiser(latent, condition, width=width, blocks=blocks)
        self.nothing = nn.Parameter(torch.zeros(condition))

    def loss(self, x: Tensor, condition: Tensor, generator: torch.Generator) -> Tensor:
        """Mean squared error of the noise predicted, a scalar, at one random time for each latent.

        Args:
            x: latents ``[B, L]``.
            condition: ``[B, C]``.
            generator: of times and noise, on the device of ``x``.

        Raises:
            ValueError: shapes or devices do not fit.
            TypeError: an argument has the wrong type or dtype.
        """
        where = "LatentDiffusion.loss"
        check_like(where, "x", x, "[B, L]", self.nothing)
        if x.dim() != 2 or x.shape[1] != self.latent:
            raise ValueError(f"{where}: x must have shape [B, {self.latent}], not {list(x.shape)}")
        self._check_condition(where, condition)
        _check.size(where, "condition", len(condition), len(x), "x's axis 0")
        check_generator(where, generator, x.device)
        rows, device = len(x), x.device
        steps = self.schedule.config.num_train_timesteps
        times = torch.randint(steps, (rows,), generator=generator, device=device)
        noise = torch.randn(x.shape, generator=generator, device=device, dtype=x.dtype)
        if self.drop:
            dropped = torch.rand(rows, 1, generator=generator, device=device) < self.drop
            condition = torch.where(dropped, self.nothing, condition)
        noisy = self.schedule.add_noise(x, noise, times)
        return (self.denoiser(noisy, times, condition) - noise).square().mean()

    def _check_condition(self, where: str, condition: Any) -> None:
        check_like(where, "condition", condition, "[B, C]", self.nothing)
        entries = len(self.nothing)
        if condition.dim() != 2 or condition.shape[1] != entries:
            raise ValueError(
                f"{where}: condition must have shape [B, {entries}], not {list(condition.shape)}"
            )

    def check(self, where: str, steps: Any, guidance: Any) -> None:
        """Raise where :meth:`sample` can't take such ``steps`` or ``guidance``."""
        known = self.schedule.config.num_train_timesteps
        _check.count(where, "steps", steps)
        if steps > known:
            raise ValueError(f"{where}: steps must be at most {known}, not {steps}")
        _check.number(where, "guidance", guidance, 0, 1e9)
        if guidance != 1 and not self.drop:
            raise ValueError(
                f"{where}: guidance {guidance} needs a model trained with drop above 0"
            )

    @torch.no_grad()
    def sample(
        self,
        condition: Tensor,
        generator: torch.Generator,
        *,
        steps: int = 50,
        guidance: float = 1.0,
    ) -> Tensor:
        """Latents ``[B, L]``, one for each condition.

        Args:
            condition: ``[B, C]``.
            generator: of the noise to begin with, on the condition's device.
            steps: evaluations of the denoiser, at most as many as the schedule has.
            guidance: above 1 away from what is predicted without condition (classifier-free
                guidance); needs a model trained with ``drop``.

        Raises:
            ValueError: ``steps`` is not in 1 .. ``times``; guidance without ``drop``; the condition's shape
                or a device does not fit.
            TypeError: an argument has the wrong type or dtype.
        """
        from diffusers import DDIMScheduler

        where = "LatentDiffusion.sample"
        self._check_condition(where, condition)
        check_generator(where, generator, condition.device)
        self.check(where, steps, guidance)
        schedule: Any = DDIMScheduler(
            **self.noise, clip_sample_range=RANGE, timestep_spacing="trailing"
        )
        schedule.set_timesteps(steps)
        x = torch.randn(len(condition), self.latent, generator=generator, device=condition.device)
        nothing = self.nothing.expand_as(condition)
        for time in schedule.timesteps.tolist():
            times = torch.full((len(x),), time, device=x.device)
            noise = self.denoiser(x, times, condition)
            if guidance != 1:
                without = self.denoiser(x, times, nothing)
                noise = without + guidance * (noise - without)
            x = schedule.step(noise, time, x).prev_sample
        return x
