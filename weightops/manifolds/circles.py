"""Periodic topologies, whose contexts go round in 1: Fourier series, the ellipse, the torus."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import pi

import torch
from torch import Tensor

from weightops import _check
from weightops.manifolds.manifold import Manifold
from weightops.manifolds.product import Product


def _waves(context: Tensor, harmonics: int) -> Tensor:
    """``[..., 1 + 2 harmonics]`` for ``[..., 1]``: 1, cos 2 pi s, sin 2 pi s, cos 4 pi s, ..."""
    # The nearest integer taken off, which is exact, a far context is as precise as one near zero.
    angle = _frequencies(context, harmonics) * (context - context.round())
    waves = torch.stack([angle.cos(), angle.sin()], -1).flatten(-2)
    return torch.cat([torch.ones_like(context), waves], -1)


def _slopes(context: Tensor, harmonics: int) -> Tensor:
    """The derivative of :func:`_waves`, ``[..., 1 + 2 harmonics]``."""
    frequencies = _frequencies(context, harmonics)
    angle = frequencies * (context - context.round())
    slopes = torch.stack([-angle.sin() * frequencies, angle.cos() * frequencies], -1)
    return torch.cat([torch.zeros_like(context), slopes.flatten(-2)], -1)


def _frequencies(context: Tensor, harmonics: int) -> Tensor:
    steps = torch.arange(1, harmonics + 1, device=context.device, dtype=context.dtype)
    return steps * (2 * pi)


def _mean_squares(waves: int) -> Tensor:
    """The Gram of a constant and ``waves`` sines and cosines."""
    return torch.tensor([1.0] + [0.5] * waves, dtype=torch.float64).diag()


def _first(count: int) -> Tensor:
    return torch.eye(count, dtype=torch.float64)[0]


@dataclass(frozen=True)
class Fourier(Manifold):
    """A closed curve: phi(s) = (1, cos 2 pi s, sin 2 pi s, ..., cos 2 pi H s, sin 2 pi H s).

    K = 1 + 2 H, Gram diag(1, 1/2, ..., 1/2). Any real context, of period 1.

    Args:
        harmonics: H.

    Raises:
        ValueError: ``harmonics`` is less than 1.
        TypeError: it is no integer.
    """

    harmonics: int

    def __post_init__(self) -> None:
        _check.count(type(self).__name__, "harmonics", self.harmonics)

    @property
    def num_coeffs(self) -> int:
        return 1 + 2 * self.harmonics

    @property
    def gram(self) -> Tensor:
        return _mean_squares(2 * self.harmonics)

    @property
    def constant(self) -> Tensor:
        return _first(self.num_coeffs)

    def _coeffs(self, context: Tensor) -> Tensor:
        return _waves(context, self.harmonics)

    def _derivative(self, context: Tensor) -> Tensor:
        return _slopes(context, self.harmonics).unsqueeze(-1)


@dataclass(frozen=True)
class Ellipse(Fourier):
    """phi(s) = (1, cos 2 pi s, sin 2 pi s): a centre and two axes. K = 3, Gram diag(1, 1/2, 1/2).

    Any real context, of period 1.
    """

    harmonics: int = field(default=1, init=False, repr=False)


@dataclass(frozen=True)
class Torus(Manifold):
    """A context per circle, ``[..., circles]`` (``[...]`` for one), each any real number of period 1.

    All products of the circles' (1, cos, sin), the last circle fastest: K = 3^circles, 9 for two, the Gram
    the Kronecker product of diag(1, 1/2, 1/2). Additive, a sum of ellipses: (1, cos 2 pi s_1,
    sin 2 pi s_1, cos 2 pi s_2, ...), K = 1 + 2 circles, 5 for two, Gram diag(1, 1/2, ..., 1/2).

    Args:
        circles: number of circles.
        additive: no products.

    Raises:
        ValueError: ``circles`` is less than 1.
        TypeError: an argument has the wrong type.
    """

    circles: int = 2
    additive: bool = field(default=False, kw_only=True)
    _product: Product = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        _check.count("Torus", "circles", self.circles)
        _check.flag("Torus", "additive", self.additive)
        object.__setattr__(self, "_product", Product(*[Ellipse()] * self.circles))

    @property
    def num_coeffs(self) -> int:
        return 1 + 2 * self.circles if self.additive else 3**self.circles

    @property
    def context_dims(self) -> int:
        return self.circles

    @property
    def gram(self) -> Tensor:
        return _mean_squares(2 * self.circles) if self.additive else self._product.gram

    @property
    def constant(self) -> Tensor:
        return _first(self.num_coeffs)

    def _coeffs(self, context: Tensor) -> Tensor:
        if not self.additive:
            return self._product._coeffs(context)
        waves = _waves(context.unsqueeze(-1), 1)[..., 1:]
        return torch.cat([torch.ones_like(context[..., :1]), waves.flatten(-2)], -1)

    def _derivative(self, context: Tensor) -> Tensor:
        if not self.additive:
            return self._product._derivative(context)
        slopes = _slopes(context.unsqueeze(-1), 1)[..., 1:]
        # A circle's two functions hang on its own context only.
        own = torch.eye(self.circles, device=context.device, dtype=context.dtype)
        rows = slopes.unsqueeze(-1) * own.unsqueeze(1)
        constant = torch.zeros_like(context).unsqueeze(-2)
        return torch.cat([constant, rows.flatten(-3, -2)], -2)
