"""What tests and benchmarks compute on weight manifolds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

#: how the items of a batch come by their contexts: one each, one of a few, one for all
REGIMES = ("per-sample", "grouped", "shared")

#: x, coeffs, weight, bias and index, in ``manifold_linear``'s order
Arguments = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]


def _make(
    problem: ManifoldLinear | ManifoldConv,
    x_shape: Sequence[int],
    weight_shape: Sequence[int],
    device: str,
    seed: int,
) -> Arguments:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    x = normal(problem.batch, *x_shape)
    weight = normal(problem.bases, *weight_shape) / max(prod(weight_shape[1:]), 1) ** 0.5
    bias = normal(problem.bases, problem.outputs)
    lead = {"per-sample": (problem.batch,), "grouped": (problem.groups,), "shared": ()}
    coeffs = normal(*lead[problem.regime], problem.bases)
    x, coeffs, weight, bias = (v.to(device, problem.dtype) for v in (x, coeffs, weight, bias))
    if problem.regime != "grouped":
        return x, coeffs, weight, bias, None
    index = torch.randint(problem.groups, (problem.batch,), generator=generator)
    return x, coeffs, weight, bias, index.to(device)


def _fewest(problem: ManifoldLinear | ManifoldConv, weights: int, uses: int) -> int:
    """Two FLOPs for each of the ``uses`` an item makes of ``weights``, on scaled inputs or synthesised."""
    contexts = {"per-sample": problem.batch, "grouped": problem.groups, "shared": 1}
    synthesis = 2 * contexts[problem.regime] * problem.bases * weights
    return min(2 * problem.batch * problem.bases * uses, 2 * problem.batch * uses + synthesis)


def _contexts(problem: ManifoldLinear | ManifoldConv) -> str:
    return f"{problem.groups} contexts" if problem.regime == "grouped" else problem.regime


def _unless_float32(dtype: torch.dtype) -> str:
    return "" if dtype == torch.float32 else f" {str(dtype).removeprefix('torch.')}"


@dataclass(frozen=True)
class ManifoldLinear:
    """``manifold_linear`` of a batch with one of the :data:`REGIMES`; ``groups`` contexts where grouped."""

    regime: str
    batch: int
    inputs: int
    outputs: int
    bases: int = 3
    groups: int = 8
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        layer = f"{self.inputs}->{self.outputs} B={self.batch} K={self.bases}"
        return f"{_contexts(self)} {layer}{_unless_float32(self.dtype)}"

    @property
    def bytes(self) -> int:
        """x and the bases read once, y written once; coefficients and biases are small beside them."""
        io = self.batch * (self.inputs + self.outputs)
        return (io + self.bases * self.inputs * self.outputs) * self.dtype.itemsize

    @property
    def backward_bytes(self) -> int:
        """x, the bases and y's gradient read once, the gradients by x and the bases written once."""
        io = self.batch * (2 * self.inputs + self.outputs)
        return (io + 2 * self.bases * self.inputs * self.outputs) * self.dtype.itemsize

    @property
    def flops(self) -> int:
        """The fewest: a product of depth ``K * inputs``, or of depth ``inputs`` behind a synthesis."""
        weights = self.inputs * self.outputs
        return _fewest(self, weights, weights)

    def make(self, device: str = "cpu", seed: int = 0) -> Arguments:
        """x ``[B, in]``, coeffs, weight ``[K, out, in]``, bias and index (``None`` unless grouped)."""
        return _make(self, (self.inputs,), (self.outputs, self.inputs), device, seed)


@dataclass(frozen=True)
class ManifoldConv:
    """``manifold_conv2d`` on square images, padded so that odd kernels keep their size; ``groups`` contexts."""

    regime: str
    batch: int
    inputs: int
    outputs: int
    pixels: int
    kernel: int = 3
    bases: int = 3
    groups: int = 8
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        layer = f"{self.inputs}->{self.outputs} {self.kernel}x{self.kernel}"
        images = f"at {self.pixels}x{self.pixels} B={self.batch} K={self.bases}"
        return f"{_contexts(self)} {layer} {images}{_unless_float32(self.dtype)}"

    @property
    def padding(self) -> int:
        return self.kernel // 2

    @property
    def bytes(self) -> int:
        """x and the bases read once, y written once."""
        io = self.batch * (self.inputs + self.outputs) * self.pixels**2
        weights = self.bases * self.inputs * self.outputs * self.kernel**2
        return (io + weights) * self.dtype.itemsize

    @property
    def backward_bytes(self) -> int:
        """x, the bases and y's gradient read once, the gradients by x and the bases written once."""
        io = self.batch * (2 * self.inputs + self.outputs) * self.pixels**2
        weights = self.bases * self.inputs * self.outputs * self.kernel**2
        return (io + 2 * weights) * self.dtype.itemsize

    @property
    def flops(self) -> int:
        """The fewest, with every tap counted at every pixel."""
        weights = self.inputs * self.outputs * self.kernel**2
        return _fewest(self, weights, weights * self.pixels**2)

    def make(self, device: str = "cpu", seed: int = 0) -> Arguments:
        """x ``[B, C, H, W]``, coeffs, weight ``[K, out, C, k, k]``, bias and index."""
        image, kernel = (self.pixels, self.pixels), (self.kernel, self.kernel)
        shape = (self.outputs, self.inputs, *kernel)
        return _make(self, (self.inputs, *image), shape, device, seed)


@dataclass(frozen=True)
class Synthesize:
    """``synthesize`` of whole networks of ``parameters`` weights, or ``synthesize_update_`` of their bases."""

    parameters: int
    bases: int = 3
    contexts: int = 1
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        networks = f"{self.parameters:,} weights K={self.bases} G={self.contexts}"
        return f"{networks}{_unless_float32(self.dtype)}"

    @property
    def bytes(self) -> int:
        """The bases read once, the networks written once."""
        return (self.bases + self.contexts) * self.parameters * self.dtype.itemsize

    @property
    def update_bytes(self) -> int:
        """Bases read once and written once, gradients read once."""
        return (2 * self.bases + self.contexts) * self.parameters * self.dtype.itemsize

    @property
    def flops(self) -> int:
        return 2 * self.contexts * self.bases * self.parameters

    def make(self, device: str = "cpu", seed: int = 0) -> tuple[Tensor, Tensor]:
        """coeffs ``[G, K]`` and bases ``[K, P]``."""
        generator = torch.Generator().manual_seed(seed)
        coeffs = torch.randn(self.contexts, self.bases, generator=generator)
        bases = torch.randn(self.bases, self.parameters, generator=generator)
        return coeffs.to(device, self.dtype), bases.to(device, self.dtype)
