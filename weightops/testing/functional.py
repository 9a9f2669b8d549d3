"""What tests and benchmarks ask a learned optimizer's functional."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from math import prod
from typing import Any

import torch
from torch import Tensor

from weightops.ops.equivariant.basis import Term
from weightops.ops.equivariant.plan import EquivariantPlan, code_of
from weightops.spec import WeightSpec


def _is_identity(term: Term) -> bool:
    return term.input_indices == term.output_indices


@dataclass(frozen=True)
class LearnedFunctional:
    """``functional`` of networks; by default of one, at the size of arXiv 2402.05232.

    ``own``: theta, and what is shared by all weights, are each network's. ``kind``: ``"unf"``, or ``"deep_sets"``, where
    the last layer sees one weight too.
    """

    spec: WeightSpec
    networks: int = 1
    own: bool = False
    kind: str = "unf"
    hidden: int = 32
    layers: int = 4
    momenta: int = 6
    shared: int = 11
    dtype: torch.dtype = torch.float32

    @cached_property
    def plan(self) -> EquivariantPlan:
        """Of the last layer."""
        if self.kind == "unf":
            return EquivariantPlan(self.spec)
        vector = WeightSpec({"w": ("w",)}, {"w": (self.spec.numel,)})
        return EquivariantPlan(vector, terms=_is_identity)

    @property
    def widths(self) -> list[int]:
        return [2 + self.momenta + self.shared, *[self.hidden] * (self.layers - 1), 1]

    @property
    def bytes(self) -> int:
        """Weights, gradients and momenta read once, f written once; the parameters are small beside them."""
        return (3 + self.momenta) * self.networks * self.spec.numel * self.dtype.itemsize

    @property
    def flops(self) -> int:
        """Two for each multiplication of channels; what all weights share is multiplied once."""
        into = [2 + self.momenta, *self.widths[1:-1]]
        single = self.spec.numel * sum(i * o for i, o in pairwise(into))
        return 2 * self.networks * (single + self.plan.products * self.hidden)

    def make(self, seed: int = 0) -> list[Any]:
        """The arguments of ``functional``; layers keep values of order one."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        numel, networks, plan = self.spec.numel, self.networks, self.plan
        rows = networks if self.own else 1
        theta = []
        for n, (into, out) in enumerate(pairwise(self.widths)):
            terms = 1 if n < self.layers - 1 else plan.num_terms
            theta.append(normal(rows, terms * into * out) / max(1, into * terms) ** 0.5)
        theta += [normal(rows, width) for width in (*self.widths[1:-1], plan.num_biases)]
        tensors = (
            *(normal(networks, numel), normal(networks, numel) * 1e-2),
            normal(self.momenta, networks, numel) * 1e-3,
            *(normal(rows, self.shared), torch.cat(theta, 1)),
        )
        sizes = [prod(shape) for shape in self.spec.shapes.values()]
        return [*(each.to(self.dtype) for each in tensors), sizes, self.widths, code_of(plan), 1e-5]
