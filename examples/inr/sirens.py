"""Digits as implicit neural representations: a small network with sines for every image."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import sqrt

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import weightops
from weightops import WeightSpec
from weightops.population import explain, population_forward, population_train

WIDTH = 8
OMEGA = 30.0
#: half the side of an image: SIREN's frequencies are for hundreds of pixels in -1 .. 1, and of 8 the
#: fastest sines would turn by more than half a wave from one to the next
EXTENT = 0.1
#: of all images; the others are to test on
TRAIN, VALIDATION = 1200, 300


class Siren(nn.Module):
    """Coordinates ``[B, 2]`` to grey values ``[B, 1]`` (Sitzmann et al. 2020, arXiv 2006.09661)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, WIDTH)
        self.second = nn.Linear(WIDTH, WIDTH)
        self.last = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.sin(OMEGA * self.first(x))
        return self.last(torch.sin(OMEGA * self.second(x)))


def initial(spec: WeightSpec, networks: int, generator: torch.Generator) -> Tensor:
    """SIREN's initialisation ``[N, P]``: uniform, weights within 1 / 2 and then sqrt(6 / n) / 30, biases as torch's."""
    flat = torch.empty(networks, spec.numel)
    inputs = {"first": 2, "second": WIDTH, "last": WIDTH}
    for name, part in spec.unflatten(flat).items():
        layer, kind = name.split(".")
        bound = 1 / sqrt(inputs[layer])
        if kind == "weight":
            bound = 1 / 2 if layer == "first" else sqrt(6 / WIDTH) / OMEGA
        part.uniform_(-bound, bound, generator=generator)
    return flat


@dataclass(frozen=True)
class Sirens:
    """Networks of all digits.

    Attributes:
        flat: ``[D, V, P]``, V networks for every image, one each for the shared initialisation.
        classes: ``[D]``.
        images: what they were fitted to, ``[D, 64]`` in -1 .. 1.
        psnr: of every network in dB, ``[D, V]``.
        train, validation, test: which images are for what, always the same ones.
        kernel: what trained them.
    """

    spec: WeightSpec
    flat: Tensor
    classes: Tensor
    images: Tensor
    psnr: Tensor
    train: Tensor
    validation: Tensor
    test: Tensor
    kernel: str


@cache
def fitted(start: str, networks: int, images: int, steps: int) -> Sirens:
    """One population with all SIRENs of all digits.

    Args:
        start: ``"own"``, an initialisation for every network, or ``"shared"``, one for all.
        networks: V.
        images: how many digits, up to 1,797.
        steps: of Adam.
    """
    generator = torch.Generator().manual_seed(0)
    data = load_digits()
    order = torch.randperm(len(data.target), generator=generator)[:images]
    pixels = torch.from_numpy(data.images).float().flatten(1)[order] / 8 - 1
    side = torch.linspace(-EXTENT, EXTENT, 8)
    x = torch.cartesian_prod(side, side)

    model = Siren()
    spec = weightops.trace(model, x)
    count = len(order) * networks
    first = initial(spec, 1 if start == "shared" else count, generator)
    targets = pixels.repeat_interleave(networks, 0)[..., None]
    trained = population_train(
        *(first.expand(count, -1), model, (x, targets)),
        steps=steps,
        lr=2e-3,
        weight_decay=0.0,
        every=steps,
        progress=False,
    )
    drawn = population_forward(trained.flat, model, x)
    psnr = -10 * ((drawn - targets) / 2).square().mean((1, 2)).log10()  # values are 2 apart at most
    ends = [images * end // len(data.target) for end in (TRAIN, TRAIN + VALIDATION)]
    parts = torch.arange(len(order)).tensor_split(ends)
    return Sirens(
        *(spec, trained.flat.unflatten(0, (-1, networks)), torch.from_numpy(data.target)[order]),
        *(pixels, psnr.unflatten(0, (-1, networks)), *parts, explain(model, x)),
    )
