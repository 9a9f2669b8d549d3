"""What all topologies share: contexts in, coefficients out, the Gram and sampling."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from weightops import _check


class Manifold(ABC):
    """A topology of weights ``W(s) = sum_k phi_k(s) W_k``: the functions phi, and their geometry.

    A context ``s`` is a number, so contexts are ``[...]``, where ``context_dims`` is 1, and else a row,
    ``[..., context_dims]``. Instances are immutable and hashable; those of equal arguments are equal.
    Source: Benjamin et al. 2025, "Walking the Weight Manifold", arXiv 2505.22994.
    """

    @property
    @abstractmethod
    def num_coeffs(self) -> int:
        """Number of coefficients K."""

    @property
    def context_dims(self) -> int:
        """Numbers in a context."""
        return 1

    @property
    @abstractmethod
    def gram(self) -> Tensor:
        """``[K, K]``, float64: the mean of ``phi phi^T`` over the domain, all contexts alike."""

    @property
    def inverse_gram(self) -> Tensor:
        """``[K, K]``, float64."""
        return torch.linalg.inv(self.gram).contiguous()

    @property
    @abstractmethod
    def constant(self) -> Tensor:
        """``[K]``, float64: the coefficients of the constant one, ``constant @ phi(s) = 1`` for every s."""

    def around(self, mean: Tensor, noise: Tensor | None = None) -> Tensor:
        """Bases ``[K, ...]`` of weights that are ``mean`` ``[...]`` on average over the domain.

        Without ``noise`` they are ``mean`` everywhere. Draws ``noise`` ``[K, ...]`` of one variance make them
        vary with the context, with that variance on average over the domain.
        """
        constant = self.constant
        bases = constant.to(mean).view(-1, *[1] * mean.dim()) * mean
        if noise is None:
            return bases
        # What is left of each basis function less its mean.
        rest = torch.eye(len(constant), dtype=constant.dtype)
        rest = rest - torch.outer(constant, self.gram @ constant)
        rest = rest / (rest.mT @ self.gram @ rest).trace().sqrt()
        return bases + torch.tensordot(rest.to(noise), noise, 1)

    # What a topology adds, on contexts [..., context_dims] of float32 or float64.

    @abstractmethod
    def _coeffs(self, context: Tensor) -> Tensor:
        """``[..., K]``."""

    @abstractmethod
    def _derivative(self, context: Tensor) -> Tensor:
        """``[..., K, context_dims]``."""

    def _fits(self, context: Tensor) -> tuple[Tensor, str]:
        """Whether contexts lie in the domain, ``[...]``, and what they must do for that."""
        return context.isfinite().all(-1), "be finite"

    @property
    def _cube_dims(self) -> int:
        return self.context_dims

    def _from_cube(self, points: Tensor) -> Tensor:
        """Contexts spread evenly, for points ``[n, _cube_dims]`` spread evenly over the unit cube."""
        return points

    def coeffs(self, context: Tensor) -> Tensor:
        """The coefficients phi(s) ``[..., K]`` of contexts ``[...]`` or ``[..., context_dims]``.

        Differentiable any number of times, under every transform of ``torch.func`` and in
        ``torch.compile``. The result has ``context``'s dtype; halves are computed in float32.

        Raises:
            ValueError: a context lies outside the domain, or their shape does not fit. Values are not
                looked at under ``vmap``, in ``torch.compile`` and while a CUDA graph is captured; else
                the check waits for the GPU.
            TypeError: ``context`` is no floating point tensor.
        """
        return self._coeffs(self._columns(context)).to(context.dtype)

    def derivative(self, context: Tensor) -> Tensor:
        """d phi / d s: ``[..., K]``, or ``[..., K, context_dims]`` where a context has several numbers.

        Where pieces of a spline meet in a kink it is the one on the right. Raises as :meth:`coeffs`.
        """
        found = self._derivative(self._columns(context)).to(context.dtype)
        return found.squeeze(-1) if self.context_dims == 1 else found

    def _columns(self, context: Any) -> Tensor:
        """``context`` as ``[..., context_dims]``, wide enough to compute with, and in the domain."""
        where, dims = type(self).__name__, self.context_dims
        shape = "[...]" if dims == 1 else f"[..., {dims}]"
        _check.tensor(where, "context", context, shape)
        _check.floating(where, "context", context)
        if dims > 1 and (context.dim() == 0 or context.shape[-1] != dims):
            raise ValueError(f"{where}: context must have shape {shape}, not {list(context.shape)}")
        columns = context.unsqueeze(-1) if dims == 1 else context
        if not torch.compiler.is_compiling() and not (
            context.is_cuda and torch.cuda.is_current_stream_capturing()
        ):
            self._check_domain(where, columns, "")
        return columns if columns.dtype == torch.float64 else columns.float()

    def _check_domain(self, where: str, context: Tensor, column: str) -> None:
        """``context`` ``[..., context_dims]`` must lie in the domain; ``column`` is its place in a row."""
        fits, must = self._fits(context)
        try:
            if fits.all():
                return
        except RuntimeError:  # batches of vmap, meta and fake tensors have no values to look at
            return
        at = (~fits).nonzero()[0].tolist()
        row = [number.item() for number in context[tuple(at)]]
        place = ", ".join([*map(str, at), *filter(None, [column])])
        raise ValueError(
            f"{where}: context must {must}, but context{f'[{place}]' if place else ''} is "
            f"{row[0] if self.context_dims == 1 else row}"
        )

    def grid(
        self, n: int, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> Tensor:
        """The centres of equal parts of the domain, ``n`` along each dimension.

        ``[n]``, or where a context has several numbers ``[n^dimensions, context_dims]``, the last dimension
        fastest. A simplex of V corners has V - 1 dimensions.

        Raises:
            ValueError: ``n`` is less than 1.
            TypeError: it is no integer, or ``dtype`` is not floating point.
        """
        where = f"{type(self).__name__}.grid"
        _check.count(where, "n", n)
        dtype = _dtype(where, dtype)
        steps = (torch.arange(n, dtype=torch.float64, device=device) + 0.5) / n
        points = torch.cartesian_prod(*[steps] * self._cube_dims).view(-1, self._cube_dims)
        contexts = self._from_cube(points).to(dtype)
        return contexts.squeeze(1) if self.context_dims == 1 else contexts

    def sample(
        self,
        n: int,
        *,
        stratified: bool = False,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """``n`` contexts drawn evenly from the domain: ``[n]`` or ``[n, context_dims]``.

        Args:
            n: number of contexts.
            stratified: one context from each of ``n`` equal parts of the domain, in random order, which
                makes means over the contexts steadier; of several dimensions each is so divided (a
                Latin hypercube).
            generator: of random numbers.
            dtype: floating point; torch's default if ``None``.
            device: the generator's, or else torch's default, if ``None``.

        Raises:
            ValueError: ``n`` is negative.
            TypeError: an argument has the wrong type.
        """
        where = f"{type(self).__name__}.sample"
        _check.count(where, "n", n, 0)
        _check.flag(where, "stratified", stratified)
        if not (generator is None or isinstance(generator, torch.Generator)):
            raise TypeError(
                f"{where}: generator must be a torch.Generator, not {_check.describe(generator)}"
            )
        dtype = _dtype(where, dtype)
        on = _place(generator, device)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        points = torch.rand(n, self._cube_dims, generator=generator, dtype=wide, device=on)
        if stratified and n:
            parts = [
                torch.randperm(n, generator=generator, device=on) for _ in range(points.shape[1])
            ]
            points = (torch.stack(parts, 1) + points) / n
        contexts = self._from_cube(points).to(dtype)
        return contexts.squeeze(1) if self.context_dims == 1 else contexts

    def sample_few(
        self,
        n: int,
        contexts: int,
        *,
        stratified: bool = False,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Few contexts for a batch of ``n``, for ops that synthesise weights once a context.

        Args:
            n: size of the batch.
            contexts: number of contexts G; each serves ``n / G`` of the batch, rounded up or down, in
                random order.
            stratified, generator, dtype, device: as for :meth:`sample`.

        Returns:
            Contexts ``[G]`` or ``[G, context_dims]``, and each row's context, int64 ``[n]``: what ops
            take as ``coeffs=manifold.coeffs(contexts), index=index``.

        Raises:
            ValueError: ``n`` is negative or ``contexts`` less than 1.
            TypeError: an argument has the wrong type.
        """
        where = f"{type(self).__name__}.sample_few"
        _check.count(where, "n", n, 0)
        _check.count(where, "contexts", contexts)
        drawn = self.sample(
            contexts, stratified=stratified, generator=generator, dtype=dtype, device=device
        )
        on = _place(generator, device)
        return drawn, torch.randperm(n, generator=generator, device=on) % contexts


def _place(
    generator: torch.Generator | None, device: torch.device | str | None
) -> torch.device | str | None:
    return generator.device if device is None and generator is not None else device


def _dtype(where: str, dtype: Any) -> torch.dtype:
    dtype = torch.get_default_dtype() if dtype is None else dtype
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(
            f"{where}: dtype must be a floating point dtype, not {_check.describe(dtype)}"
        )
    return dtype
