"""Products of topologies."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from math import prod

import torch
from torch import Tensor

from weightops import _check
from weightops.manifolds.manifold import Manifold


@dataclass(frozen=True, init=False)
class Product(Manifold):
    """A context per factor, side by side: phi(s, t) = phi_a(s) (x) phi_b(t), the last factor fastest.

    K is the product of the factors' and the Gram the Kronecker product of theirs. A factor takes as many
    numbers of a context ``[..., context_dims]`` as its own contexts have. A product among the factors stands
    for its factors.

    Args:
        factors: manifolds.

    Raises:
        ValueError: there is no factor.
        TypeError: one is no Manifold.
    """

    factors: tuple[Manifold, ...]

    def __init__(self, *factors: Manifold) -> None:
        if not factors:
            raise ValueError("Product: factors must be at least one manifold, not none")
        flat: list[Manifold] = []
        for n, factor in enumerate(factors):
            if not isinstance(factor, Manifold):
                raise TypeError(
                    f"Product: factors[{n}] must be a Manifold, not {_check.describe(factor)}"
                )
            flat.extend(factor.factors if isinstance(factor, Product) else [factor])
        object.__setattr__(self, "factors", tuple(flat))

    def __repr__(self) -> str:
        return f"Product({', '.join(map(repr, self.factors))})"

    @property
    def num_coeffs(self) -> int:
        return prod(factor.num_coeffs for factor in self.factors)

    @property
    def context_dims(self) -> int:
        return sum(factor.context_dims for factor in self.factors)

    @property
    def gram(self) -> Tensor:
        return reduce(torch.kron, [factor.gram for factor in self.factors])

    @property
    def inverse_gram(self) -> Tensor:
        return reduce(torch.kron, [factor.inverse_gram for factor in self.factors])

    @property
    def constant(self) -> Tensor:
        return reduce(torch.kron, [factor.constant for factor in self.factors])

    def _parts(self, context: Tensor) -> Iterator[tuple[Manifold, Tensor]]:
        """Each factor with its own columns of ``context``."""
        sizes = [factor.context_dims for factor in self.factors]
        return zip(self.factors, context.split(sizes, -1), strict=True)

    def _coeffs(self, context: Tensor) -> Tensor:
        return reduce(_outer, [factor._coeffs(part) for factor, part in self._parts(context)])

    def _derivative(self, context: Tensor) -> Tensor:
        parts = self._parts(context)
        pairs = [(factor._coeffs(part), factor._derivative(part).mT) for factor, part in parts]
        return reduce(_product_rule, pairs)[1].mT

    def _check_domain(self, where: str, context: Tensor, column: str) -> None:
        first = 0
        for factor, part in self._parts(context):
            end = first + factor.context_dims
            factor._check_domain(where, part, str(first) if end == first + 1 else f"{first}:{end}")
            first = end

    @property
    def _cube_dims(self) -> int:
        return sum(factor._cube_dims for factor in self.factors)

    def _from_cube(self, points: Tensor) -> Tensor:
        parts = points.split([factor._cube_dims for factor in self.factors], -1)
        drawn = [factor._from_cube(part) for factor, part in zip(self.factors, parts, strict=True)]
        return torch.cat(drawn, -1)


def _outer(a: Tensor, b: Tensor) -> Tensor:
    """``[..., K]`` and ``[..., L]`` to ``[..., K * L]``."""
    return (a.unsqueeze(-1) * b.unsqueeze(-2)).flatten(-2)


def _product_rule(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Coefficients ``[..., K]`` and their derivative ``[..., context_dims, K]``, of both factors together."""
    (phi, slopes), (psi, others) = a, b
    by_each = [_outer(slopes, psi.unsqueeze(-2)), _outer(phi.unsqueeze(-2), others)]
    return _outer(phi, psi), torch.cat(by_each, -2)
