"""What tests and benchmarks compute: shapes and dtypes in one object that counts its own bytes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import Tensor

from weightops.ops.equivariant.plan import EquivariantPlan
from weightops.spec import Permutations, WeightSpec
from weightops.testing.specs import WEIGHT_SPACES


@dataclass(frozen=True)
class PermuteAxes:
    """``permute_axes`` of the first axes behind the batch axis."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    permuted: int = 2

    def __str__(self) -> str:
        return "x".join(map(str, self.shape))

    @property
    def bytes(self) -> int:
        """Each element read once and written once; the indices are small beside them."""
        return 2 * prod(self.shape) * self.dtype.itemsize

    def make(self, device: str = "cpu", seed: int = 0) -> tuple[Tensor, list[Tensor | None]]:
        generator = torch.Generator().manual_seed(seed)
        x = (torch.randn(self.shape, generator=generator) * 10).to(self.dtype)
        perms: list[Tensor | None] = [
            random_rows(self.shape[0], size, generator).to(device)
            for size in self.shape[1 : 1 + self.permuted]
        ]
        return x.to(device), perms + [None] * (len(self.shape) - 1 - self.permuted)


@dataclass(frozen=True)
class Networks:
    """``permute`` or ``merge`` of whole networks."""

    name: str
    spec: WeightSpec
    count: int = 1
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        return f"{self.name}x{self.count}"

    @property
    def bytes(self) -> int:
        """Bytes of ``permute``: each weight read once and written once."""
        return 2 * self.count * self.spec.numel * self.dtype.itemsize

    @property
    def merge_bytes(self) -> int:
        """Bytes of ``merge`` to one network: each weight read once, one network written."""
        return (self.count + 1) * self.spec.numel * self.dtype.itemsize

    def make(self, device: str = "cpu", seed: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        flat = torch.randn(self.count, self.spec.numel, generator=generator).to(device, self.dtype)
        perms = self.spec.random_permutations(self.count, generator)
        return flat, {label: index.to(device) for label, index in perms.items()}


@dataclass(frozen=True)
class Assign:
    """``assign`` of random problems: ``gram`` (two random networks' layers, maximised) or ``uniform``."""

    family: str
    size: int
    problems: int = 64

    def __str__(self) -> str:
        return f"{self.family}-{self.problems}x{self.size}"

    @property
    def maximize(self) -> bool:
        return self.family == "gram"

    @property
    def bytes(self) -> int:
        """Each score read once."""
        return self.problems * self.size**2 * 4

    def make(self, seed: int = 0, change: float = 0.02) -> tuple[Tensor, Tensor]:
        """Scores ``[B, n, n]``, and the same after a relative change (in the Frobenius norm)."""
        generator = torch.Generator().manual_seed(seed)
        b, n = self.problems, self.size

        def scores() -> Tensor:
            if self.family == "uniform":
                return torch.rand(b, n, n, generator=generator)
            left, right = torch.randn(2, b, n, 512, generator=generator)
            return left @ right.mT

        score, other = scores(), scores()
        noise = other - other.mean()
        return score, score + change * noise * (score.norm() / noise.norm())


#: arguments of plans that differ in what kernels do
PLAN_OPTIONS: dict[str, dict[str, Any]] = {
    "full": {},
    "sum": {"normalize": "sum"},
    "local": {"terms": "local"},
    "mpnn": {"terms": "mpnn"},
    "predicate": {"terms": lambda term: len(str(term)) % 3 != 0},
}


@dataclass(frozen=True)
class Equivariant:
    """An equivariant layer on a batch of networks of one of the :data:`WEIGHT_SPACES`."""

    space: str
    batch: int = 8
    in_channels: int = 16
    out_channels: int = 16
    own: bool = False  # parameters of its own for every sample

    def __str__(self) -> str:
        own = " own theta" if self.own else ""
        return f"{self.space} {self.in_channels}->{self.out_channels} B={self.batch}{own}"

    @cached_property
    def plan(self) -> EquivariantPlan:
        return EquivariantPlan(WEIGHT_SPACES[self.space]())

    @property
    def bytes(self) -> int:
        """Features read once and written once, in float32."""
        return 4 * self.batch * self.plan.spec.numel * (self.in_channels + self.out_channels)

    @property
    def flops(self) -> int:
        """Two a multiplication of channels, for every term at every position of its type."""
        return 2 * self.batch * self.plan.products * self.in_channels * self.out_channels

    def make(self, device: str = "cpu", seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """x, theta and bias."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(device)

        plan, lead = self.plan, (self.batch,) if self.own else ()
        theta = normal(*lead, plan.num_terms, self.in_channels, self.out_channels)
        x = normal(self.batch, plan.spec.numel, self.in_channels)
        return x, theta / self.in_channels, normal(*lead, plan.num_biases, self.out_channels)


def best_time(f: Callable[[], Any], seconds: float = 0.5) -> float:
    """The least seconds that one call of ``f`` took, over calls for about ``seconds``."""
    f()
    best, end = float("inf"), time.perf_counter() + seconds
    while True:
        began = time.perf_counter()
        f()
        now = time.perf_counter()
        best = min(best, now - began)
        if now > end:
            return best


def random_rows(rows: int, size: int, generator: torch.Generator | None = None) -> Tensor:
    """``[rows, size]`` of independent random permutations."""
    return torch.rand(rows, size, generator=generator).argsort(1)


def pack(perms: Permutations, spec: WeightSpec) -> Tensor:
    """Permutations of all labels side by side, as the raw ops take them."""
    return torch.cat([perms[label] for label in spec.labels], 1)
