"""Piecewise polynomial curves: the line, Bezier curves, B-splines open and closed."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import comb

import numpy as np
import torch
from torch import Tensor

from weightops import _check
from weightops.manifolds.manifold import Manifold


class _Spline(Manifold):
    """Polynomials of ``degree`` on ``_spans`` pieces of equal length, smoothly joined.

    Computed in x, which grows by 1 a span, by the recursion of Cox and de Boor (de Boor 1978, "A
    Practical Guide to Splines", chapter X): all terms are positive, so that no degree cancels digits.
    """

    degree: int
    ring: bool

    @property
    def _spans(self) -> int:
        return 1

    @property
    def num_coeffs(self) -> int:
        return self._spans + (0 if self.ring else self.degree)

    @property
    def gram(self) -> Tensor:
        # Gauss-Legendre with degree + 1 points a span is exact to degree 2 * degree + 1.
        nodes, weights = np.polynomial.legendre.leggauss(self.degree + 1)
        x = np.arange(self._spans)[:, None] + (nodes + 1) / 2
        phi = self._fold(self._basis(torch.from_numpy(x).reshape(-1, 1), self.degree))
        share = torch.from_numpy(weights / (2 * self._spans)).repeat(self._spans)
        return phi.mT @ (share[:, None] * phi)

    @property
    def constant(self) -> Tensor:
        return torch.ones(self.num_coeffs, dtype=torch.float64)

    def _knots(self, like: Tensor) -> Tensor:
        """Integers in x: clamped at both ends, or running on beyond them."""
        end = self._spans + self.degree
        knots = torch.arange(-self.degree, end + 1, device=like.device, dtype=like.dtype)
        return knots if self.ring else knots.clamp(0, self._spans)

    def _basis(self, x: Tensor, degree: int) -> Tensor:
        """The splines of ``degree`` on these knots ``[..., spans + 2 self.degree - degree]``."""
        knots = self._knots(x)
        span = x.detach().floor().clamp(0, self._spans - 1)
        first = torch.arange(
            -self.degree, self._spans + self.degree, device=x.device, dtype=x.dtype
        )
        phi = (first == span).to(x.dtype)
        for q in range(1, degree + 1):
            # Where knots coincide the spline of lower degree is zero, whatever it is divided by.
            rise = (x - knots[:-q]) / (knots[q:] - knots[:-q]).clamp(min=1)
            phi = rise[..., :-1] * phi[..., :-1] + (1 - rise[..., 1:]) * phi[..., 1:]
        return phi

    def _fold(self, phi: Tensor) -> Tensor:
        """On a ring, what runs over the end goes on at the start."""
        if not self.ring:
            return phi
        k, p = self._spans, self.degree
        return torch.cat([phi[..., :p] + phi[..., k:], phi[..., p:k]], -1)

    def _in_spans(self, context: Tensor) -> Tensor:
        if not self.ring:
            return context * self._spans
        # Shifted so that the k-th function is symmetric about k / K.
        turned = context - context.round() + (1 - self.degree) / (2 * self._spans)
        return (turned - turned.floor()) * self._spans

    def _coeffs(self, context: Tensor) -> Tensor:
        return self._fold(self._basis(self._in_spans(context), self.degree))

    def _derivative(self, context: Tensor) -> Tensor:
        knots, p = self._knots(context), self.degree
        lower = self._basis(self._in_spans(context), p - 1)
        lower = lower / (knots[p:] - knots[:-p]).clamp(min=1)
        slopes = (lower[..., :-1] - lower[..., 1:]) * (p * self._spans)
        return self._fold(slopes).unsqueeze(-1)

    def _fits(self, context: Tensor) -> tuple[Tensor, str]:
        if self.ring:
            return super()._fits(context)
        return ((context >= 0) & (context <= 1)).all(-1), "lie in [0, 1]"


@dataclass(frozen=True)
class Bezier(_Spline):
    """phi_k(s) = binom(n, k) s^k (1 - s)^(n - k) for k = 0 .. n, the degree. K = n + 1, contexts in [0, 1].

    Gram binom(n, i) binom(n, j) / binom(2 n, i + j) / (2 n + 1); its inverse is that of Juettler 1998, "The
    dual basis functions for the Bernstein polynomials", and grows about fourfold a degree: for a curve that
    bends often take a :class:`BSpline`.

    Args:
        degree: n.

    Raises:
        ValueError: ``degree`` is less than 1.
        TypeError: it is no integer.
    """

    degree: int
    ring = False

    def __post_init__(self) -> None:
        _check.count("Bezier", "degree", self.degree)

    @property
    def inverse_gram(self) -> Tensor:
        n = self.degree

        def share(i: int, m: int) -> int:
            return comb(n + m + 1, n - i) * comb(n - m, n - i)

        def entry(i: int, j: int) -> float:
            total = sum((2 * m + 1) * share(i, m) * share(j, m) for m in range(min(i, j) + 1))
            return (-1) ** (i + j) * total / (comb(n, i) * comb(n, j))

        rows = [[entry(i, j) for j in range(n + 1)] for i in range(n + 1)]
        return torch.tensor(rows, dtype=torch.float64)


@dataclass(frozen=True)
class Line(Bezier):
    """phi(s) = (1 - s, s) for contexts in [0, 1]. K = 2, Gram [[1/3, 1/6], [1/6, 1/3]]."""

    degree: int = field(default=1, init=False, repr=False)


@dataclass(frozen=True)
class BSpline(_Spline):
    """Uniform B-splines of a degree p: each context mixes p + 1 neighbours of K control points.

    Open: contexts in [0, 1], K - p spans, knots repeated at the ends, so that the curve starts at the first
    control point and ends at the last one. A ring: any real context, of period 1, K spans, the k-th function
    symmetric about its peak at k / K. The Gram is integrated span by span, exactly.

    Args:
        control_points: K, at least p + 1.
        degree: p, at least 1.
        ring: whether the end joins the start.

    Raises:
        ValueError: a number is out of range.
        TypeError: an argument has the wrong type.
    """

    control_points: int
    degree: int = 3
    ring: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        _check.count("BSpline", "degree", self.degree)
        _check.count("BSpline", "control_points", self.control_points, self.degree + 1)
        _check.flag("BSpline", "ring", self.ring)

    @property
    def _spans(self) -> int:
        return self.control_points - (0 if self.ring else self.degree)
