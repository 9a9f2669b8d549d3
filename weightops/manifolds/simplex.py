"""Mixtures of corners."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from weightops import _check
from weightops.manifolds.manifold import Manifold


@dataclass(frozen=True)
class Simplex(Manifold):
    """Mixtures of V corners: a context ``[..., V]`` is the weights themselves, phi(s) = s.

    At least 0 and summing to 1, as a softmax gives them; both may be missed by 1e-6, or by V roundings of
    the context's dtype. K = V, Gram (1 + [i = j]) / (V (V + 1)), its inverse V ((V + 1) [i = j] - 1). The
    derivative takes the V weights as free.

    Args:
        vertices: V, at least 2.

    Raises:
        ValueError: ``vertices`` is less than 2.
        TypeError: it is no integer.
    """

    vertices: int

    def __post_init__(self) -> None:
        _check.count("Simplex", "vertices", self.vertices, 2)

    @property
    def num_coeffs(self) -> int:
        return self.vertices

    @property
    def context_dims(self) -> int:
        return self.vertices

    @property
    def gram(self) -> Tensor:
        v = self.vertices
        return (torch.eye(v, dtype=torch.float64) + 1) / (v * (v + 1))

    @property
    def inverse_gram(self) -> Tensor:
        v = self.vertices
        return v * ((v + 1) * torch.eye(v, dtype=torch.float64) - 1)

    @property
    def constant(self) -> Tensor:
        return torch.ones(self.vertices, dtype=torch.float64)

    def _coeffs(self, context: Tensor) -> Tensor:
        # Not the caller's own tensor, as no other manifold's result is.
        return context.clone()

    def _derivative(self, context: Tensor) -> Tensor:
        eye = torch.eye(self.vertices, device=context.device, dtype=context.dtype)
        return eye.expand(*context.shape, self.vertices).clone()

    def _fits(self, context: Tensor) -> tuple[Tensor, str]:
        slack = max(1e-6, self.vertices * torch.finfo(context.dtype).eps)
        wide = context.double()
        fits = (wide >= -slack).all(-1) & ((wide.sum(-1) - 1).abs() <= slack)
        return fits, "be at least 0 and sum to 1"

    @property
    def _cube_dims(self) -> int:
        return self.vertices - 1

    def _from_cube(self, points: Tensor) -> Tensor:
        # Breaking off a share 1 - (1 - u)^(1/m) for the m corners that come after is Dirichlet(1, ..., 1).
        rest = torch.ones_like(points[:, 0])
        weights = []
        for after, u in zip(range(self.vertices - 1, 0, -1), points.unbind(1), strict=True):
            weights.append(rest * (1 - (1 - u) ** (1 / after)))
            rest = rest - weights[-1]
        return torch.stack([*weights, rest], 1)
