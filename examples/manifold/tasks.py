"""Digits in varying contexts: turned, under noise, turned and in colour; and noise to be found in them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cache
from math import log, pi

import torch
from reproduction import Digits
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn.functional import affine_grid, cross_entropy, grid_sample, interpolate, mse_loss

from weightops.manifolds import BSpline, Ellipse, Line, Manifold, Torus


@cache
def digits(size: int) -> Digits:
    """scikit-learn's 1,797 digits of 8 x 8, always the same 1,300 of them to train on."""
    data = load_digits()
    order = torch.randperm(len(data.images), generator=torch.Generator().manual_seed(0))
    x = torch.from_numpy(data.images).float().div(16).unsqueeze(1)[order]
    if size != x.shape[-1]:
        x = interpolate(x, size=(size, size), mode="bilinear")
    y = torch.from_numpy(data.target).long()[order]
    return Digits.split(x, y, 1300)


class Task(ABC):
    """What a network is to find, in contexts ``[B]`` or ``[B, context_dims]`` of a manifold.

    Attributes:
        manifold: topology of the contexts.
        size: of images.
        inputs, outputs, width: of a network.
        encoded: numbers that stand for a context where it is an input.
        points: contexts to test in, along each dimension of the domain.
        draws: how often each test image is seen in each.
        scored: what the score is.
    """

    name: str
    scored = "accuracy on test digits"
    manifold: Manifold
    size, inputs, outputs, width = 16, 256, 10, 64
    encoded, points, draws = 2, 40, 1

    @abstractmethod
    def examples(
        self, x: Tensor, classes: Tensor, context: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Inputs ``[B, inputs]`` and what to find in them, for images ``[B, 1, size, size]``."""

    @abstractmethod
    def encode(self, context: Tensor) -> Tensor:
        """``[..., encoded]``."""

    @abstractmethod
    def parts(self, context: Tensor) -> dict[str, Tensor]:
        """Parts of the domain to report on: name -> which of the contexts lie in it, bool ``[B]``."""

    def held_out(self, context: Tensor) -> Tensor:
        """Which contexts are never trained at, bool ``[B]``."""
        return torch.zeros(len(context), dtype=torch.bool)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Contexts to train at, drawn evenly from those that are not held out."""
        context = self.manifold.sample(n, generator=generator)
        while (held := self.held_out(context)).any():
            context[held] = self.manifold.sample(int(held.sum()), generator=generator)
        return context

    def grid(self) -> Tensor:
        """Contexts to test in."""
        return self.manifold.grid(self.points)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(output, target)

    def score(self, output: Tensor, target: Tensor) -> Tensor:
        return (output.argmax(1) == target).float().mean()


def turn(x: Tensor, angle: Tensor) -> Tensor:
    """Images ``[B, 1, H, W]``, each turned about its centre by its angle ``[B]``."""
    c, s, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    matrix = torch.stack([c, -s, zero, s, c, zero], 1).view(-1, 2, 3)
    grid = affine_grid(matrix, list(x.shape), align_corners=False)
    return grid_sample(x, grid, align_corners=False)


def circle(context: Tensor) -> Tensor:
    """``[..., 2]``: where on the unit circle contexts of period 1 are."""
    return torch.stack([(2 * pi * context).cos(), (2 * pi * context).sin()], -1)


class Rotation(Task):
    """Digits turned by any angle, or by any but those of an arc."""

    manifold = Ellipse()

    def __init__(self, arc: tuple[float, float] | None = None) -> None:
        self.arc = arc
        self.name = "rotation" if arc is None else "rotation, an arc held out"

    def examples(
        self, x: Tensor, classes: Tensor, context: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        return turn(x, 2 * pi * context).flatten(1), classes

    def encode(self, context: Tensor) -> Tensor:
        return circle(context)

    def held_out(self, context: Tensor) -> Tensor:
        first, end = self.arc or (0, 0)
        return (context >= first) & (context < end)

    def parts(self, context: Tensor) -> dict[str, Tensor]:
        held = self.held_out(context)
        if self.arc is None:
            return {"all angles": ~held}
        return {"other angles": ~held, "held-out arc": held}


class Noise(Task):
    """Digits under noise of a standard deviation of up to 2, and in tests up to 2.5."""

    name, manifold = "noise", Line()
    encoded, draws = 1, 4
    highest, trained = 2.5, 2.0

    def examples(
        self, x: Tensor, classes: Tensor, context: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        noise = torch.randn(x.shape, generator=generator)
        return (x + self.highest * context.view(-1, 1, 1, 1) * noise).flatten(1), classes

    def encode(self, context: Tensor) -> Tensor:
        return context.unsqueeze(-1)

    def held_out(self, context: Tensor) -> Tensor:
        return context > self.trained / self.highest

    def parts(self, context: Tensor) -> dict[str, Tensor]:
        held = self.held_out(context)
        return {"noise up to 2": ~held, "2 to 2.5": held}


class RotationAndHue(Task):
    """Turned digits in colour: a hue is an angle in the plane of two pairs of opponent colours.

    Held out is where both lie in an arc: every angle is seen, and every hue, but not together.
    """

    name, manifold = "rotation and hue", Torus(2)
    inputs, encoded, points = 512, 4, 12
    arc = (0.25, 0.5)

    def examples(
        self, x: Tensor, classes: Tensor, context: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        angle, hue = context.unbind(1)
        grey = turn(x, 2 * pi * angle).flatten(1)
        return (circle(hue).unsqueeze(2) * grey.unsqueeze(1)).flatten(1), classes

    def encode(self, context: Tensor) -> Tensor:
        return circle(context).flatten(-2)

    def held_out(self, context: Tensor) -> Tensor:
        return ((context >= self.arc[0]) & (context < self.arc[1])).all(-1)

    def parts(self, context: Tensor) -> dict[str, Tensor]:
        held = self.held_out(context)
        return {"other contexts": ~held, "held-out square": held}


class Denoising(Task):
    """The noise in digits of 8 x 8 (Ho et al. 2020, arXiv 2006.11239), whose level is the context.

    A context s in 0 .. 1 is a time in the cosine schedule (Nichol and Dhariwal 2021, arXiv 2102.09672).
    """

    name, manifold = "denoising", BSpline(4, degree=2)
    scored = "squared error of the noise on test digits"
    size, inputs, outputs, width = 8, 64, 64, 128
    encoded, points, draws = 64, 20, 4

    def examples(
        self, x: Tensor, classes: Tensor, context: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        noise = torch.randn(len(x), self.inputs, generator=generator)
        angle = pi / 2 * context.unsqueeze(1)
        return angle.cos() * (2 * x.flatten(1) - 1) + angle.sin() * noise, noise

    def encode(self, context: Tensor) -> Tensor:
        """Sines and cosines of geometrically spaced frequencies up to 1000, as times are embedded."""
        angle = context.unsqueeze(-1) * torch.linspace(0, log(1000), self.encoded // 2).exp()
        return torch.cat([angle.sin(), angle.cos()], -1)

    def parts(self, context: Tensor) -> dict[str, Tensor]:
        low, high = context < 0.25, context > 0.75
        return {
            "all times": context >= 0,
            "s < 1/4": low,
            "between": ~(low | high),
            "s > 3/4": high,
        }

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return mse_loss(output, target)

    def score(self, output: Tensor, target: Tensor) -> Tensor:
        return mse_loss(output, target)
