"""Norms whose scale and shift follow a context, and batch norm with statistics for regions of contexts."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from weightops import _check
from weightops.manifolds.manifold import Manifold
from weightops.nn.manifold import Convert, ManifoldLayer
from weightops.ops.manifold import synthesize

#: norms with a scale for each channel, axis 1, and for the last axes
BATCH = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
INSTANCE = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
CHANNELS: tuple[type, ...] = (*BATCH, *INSTANCE, nn.GroupNorm)
TRAILING: tuple[type, ...] = (nn.LayerNorm, nn.RMSNorm)
#: how many axes a batch of theirs has
_DIMS = {kind: (n,) for kinds in (BATCH, INSTANCE) for n, kind in enumerate(kinds, 3)} | {
    nn.BatchNorm1d: (2, 3)
}


class ManifoldNorm(ManifoldLayer):
    """A norm of torch's, with a scale and a shift of their own for every context.

    A running mean and variance, as batch norm keeps them, would be those of all contexts together, which a
    single context has not; so it must be said what to do about them.

    Args:
        norm: LayerNorm, RMSNorm, GroupNorm, BatchNorm1d to 3d or InstanceNorm1d to 3d, itself left alone. Its
            scale and shift are those at every context at first.
        manifold: topology of scale and shift, or a number of bases K whose mixture each context is.
        batch_norm: for norms with running statistics: ``"batch"`` keeps none and always takes the batch's;
            ``"regions"`` normalises in training the entries of a batch whose contexts lie in one region
            together, and keeps running statistics for each region (BatchNorm only).
        regions: number of regions along each dimension of the contexts' domain. An entry belongs to the region
            whose centre has the nearest coefficients; on a line or circle these are equal parts. Where a
            training batch has less than two values a channel of a region, it takes the running statistics.

    Attributes:
        norm: without scale and shift.
        weight, bias: the bases ``[K, ...]``; ``None`` where ``norm`` has none.

    Raises:
        ValueError: ``norm`` has running statistics and ``batch_norm`` does not say what to do about them, or
            an option is unknown or out of range.
        TypeError: an argument has the wrong type.
    """

    norm: Any

    def __init__(
        self,
        norm: nn.Module,
        manifold: Manifold | int,
        *,
        batch_norm: str | None = None,
        regions: int = 8,
    ) -> None:
        super().__init__(manifold)
        self._take(norm, self._everywhere, batch_norm, regions)

    def _everywhere(self, param: nn.Parameter) -> nn.Parameter:
        value = param.detach()
        if self.manifold is not None:
            bases = self.manifold.around(value)
        else:
            bases = value.expand(self.num_bases, *value.shape).clone()
        return nn.Parameter(bases, param.requires_grad)

    def _take(self, norm: Any, convert: Convert, batch_norm: str | None, regions: int) -> None:
        where, kind = "ManifoldNorm", type(norm)
        if kind not in CHANNELS + TRAILING:
            raise TypeError(
                f"{where}: norm must be a LayerNorm, RMSNorm, GroupNorm, BatchNorm or InstanceNorm "
                f"of torch.nn, not {kind.__name__}"
            )
        if batch_norm is not None:
            _check.choice(where, "batch_norm", batch_norm, ("batch", "regions"))
        _check.count(where, "regions", regions)
        plain = deepcopy(norm)
        for name in ("weight", "bias"):
            param = getattr(norm, name, None)
            self.register_parameter(name, None if param is None else convert(param))
            if param is not None:
                plain.register_parameter(name, None)
        setattr(plain, _affine(kind), False)
        self.kind = kind
        if getattr(norm, "track_running_stats", False):
            if batch_norm is None:
                raise ValueError(
                    f"{where}: {kind.__name__} keeps a running mean and variance, which would be "
                    "those of all contexts together; batch_norm='regions' keeps them for regions "
                    "of contexts, batch_norm='batch' keeps none"
                )
            if batch_norm == "regions":
                plain = RegionNorm(plain, self.manifold, regions)
            else:
                plain.track_running_stats = False
                for name in ("running_mean", "running_var", "num_batches_tracked"):
                    plain.register_buffer(name, None)
        self.norm = plain
        self.train(norm.training)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        coeffs: Tensor | None = None,
        index: Tensor | None = None,
    ) -> Tensor:
        """``[B, ...]`` to ``[B, ...]``; contexts and errors as for :class:`ManifoldLinear`."""
        where, kind = "ManifoldNorm", self.kind
        _check.tensor(where, "x", x, "[B, ...]")
        _check.floating(where, "x", x)
        if kind in _DIMS and x.dim() not in _DIMS[kind]:
            raise ValueError(f"{where}: {kind.__name__} takes no x of shape {list(x.shape)}")
        at = self._at_each(x, context, coeffs, index, x if self.weight is None else self.weight)
        # Halves are rounded once, behind the scale and shift.
        wide = x if x.dtype == torch.float64 else x.float()
        y = self.norm(wide, at) if isinstance(self.norm, RegionNorm) else self.norm(wide)
        if self.weight is not None:
            scale = self._for(x, at, self.weight).to(y.dtype)
            if self.bias is None:
                y = y * scale
            else:
                y = torch.addcmul(self._for(x, at, self.bias).to(y.dtype), y, scale)
        return y.to(x.dtype)

    def _for(self, x: Tensor, at: Tensor, bases: Tensor) -> Tensor:
        """``bases`` at contexts, laid out to meet the axes of ``x``."""
        shape = bases.shape[1:]
        found = synthesize(at, bases.flatten(1))
        if self.kind in CHANNELS:
            return found.view(*at.shape[:-1], *shape, *[1] * (x.dim() - 2))
        between = x.dim() - at.dim() + 1 - len(shape)
        if between < 0:
            raise ValueError(
                f"ManifoldNorm: x {list(x.shape)} has no axis left for contexts before those of "
                f"the norm, {list(shape)}"
            )
        return found.view(*at.shape[:-1], *[1] * between, *shape)

    @classmethod
    def lifted(
        cls,
        module: nn.Module,
        manifold: Manifold,
        convert: Convert,
        batch_norm: str | None = None,
        regions: int = 8,
    ) -> ManifoldNorm:
        """``module`` with bases that ``convert`` gives for its parameters."""
        layer = cls.__new__(cls)
        ManifoldLayer.__init__(layer, manifold)
        layer._take(module, convert, batch_norm, regions)
        return layer

    def ordinary(self, convert: Convert, coeffs: Tensor) -> nn.Module:
        regional = isinstance(self.norm, RegionNorm)
        module = self.norm.ordinary(coeffs) if regional else deepcopy(self.norm)
        if self.weight is not None:
            setattr(module, _affine(self.kind), True)
        for name, bases in self._parameters.items():
            if bases is not None:
                setattr(module, name, convert(bases))
        return module.train(self.training)


def _affine(kind: type) -> str:
    return "affine" if kind in CHANNELS else "elementwise_affine"


class RegionNorm(nn.Module):
    """Batch norm, without scale and shift, with statistics for each of R regions of contexts.

    Args:
        norm: BatchNorm1d to 3d, whose statistics are those of every region at first.
        manifold: of the contexts.
        regions: number of regions along each dimension of the contexts' domain.

    Attributes:
        running_mean, running_var: ``[R, C]``.
        num_batches_tracked: ``[R]``, of batches that had more than a value a channel of the region.
        centers: the coefficients ``[R, K]`` of the regions' centres.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    centers: Tensor

    def __init__(self, norm: Any, manifold: Manifold | None, regions: int) -> None:
        super().__init__()
        if type(norm) not in BATCH:
            raise ValueError(
                "ManifoldNorm: batch_norm='regions' is for BatchNorm1d to 3d; "
                f"{type(norm).__name__} takes 'batch'"
            )
        if manifold is None:
            raise ValueError(
                "ManifoldNorm: batch_norm='regions' needs a manifold; coefficients alone have no "
                "domain to divide"
            )
        self.kind, self.num_features = type(norm), norm.num_features
        self.eps, self.momentum = norm.eps, norm.momentum
        mean = norm.running_mean
        centers = manifold.coeffs(manifold.grid(regions, dtype=torch.float64, device=mean.device))
        count = len(centers)
        self.register_buffer("centers", centers.to(mean.dtype), persistent=False)
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            value = getattr(norm, name)
            self.register_buffer(name, value.expand(count, *value.shape).clone())
        self.train(norm.training)

    def region(self, coeffs: Tensor) -> Tensor:
        """``[...]``, the number of the region of each of the ``coeffs`` ``[..., K]``."""
        apart = coeffs.detach().unsqueeze(-2) - self.centers.to(coeffs.dtype)
        return apart.square().sum(-1).argmin(-1)

    def forward(self, x: Tensor, coeffs: Tensor) -> Tensor:
        """``x`` ``[B, C, ...]`` of float32 or float64 at ``coeffs`` ``[B, K]`` or ``[K]``."""
        if x.shape[1] != self.num_features:
            raise ValueError(
                f"ManifoldNorm: x must have {self.num_features} channels, not {x.shape[1]}"
            )
        region = self.region(coeffs).expand(x.shape[0])
        values = x.reshape(*x.shape[:2], -1)
        mean, var = self.running_mean.to(x.dtype), self.running_var.to(x.dtype)
        if self.training:
            mean, var = self._statistics(values, region, mean, var)
        scale = (var + self.eps).rsqrt()
        y = (values - mean[region].unsqueeze(-1)) * scale[region].unsqueeze(-1)
        return y.view(x.shape)

    def _statistics(
        self, values: Tensor, region: Tensor, running_mean: Tensor, running_var: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Each region's mean and variance ``[R, C]`` of ``values`` ``[B, C, n]``, and tracked."""
        each = torch.full_like(values[:, :1, 0], values.shape[2])
        count = torch.zeros_like(running_mean[:, :1]).index_add(0, region, each)

        def mean_of(values: Tensor) -> Tensor:
            return torch.zeros_like(running_mean).index_add(0, region, values.sum(2)) / count.clamp(
                min=1
            )

        mean = mean_of(values)
        var = mean_of((values - mean[region].unsqueeze(-1)).square())
        enough = count > 1
        with torch.no_grad():
            self.num_batches_tracked += enough.squeeze(1)
            part = self.momentum
            if part is None:
                part = 1 / self.num_batches_tracked.clamp(min=1).to(mean.dtype).unsqueeze(1)
            unbiased = var * (count / (count - 1).clamp(min=1))
            for running, now, new in (
                (self.running_mean, running_mean, mean),
                (self.running_var, running_var, unbiased),
            ):
                running.copy_(torch.where(enough, now + part * (new - now), now))
        return torch.where(enough, mean, running_mean), torch.where(enough, var, running_var)

    def ordinary(self, coeffs: Tensor) -> nn.Module:
        """The batch norm at one context, with its region's statistics."""
        norm = self.kind(self.num_features, self.eps, self.momentum, affine=False)
        region = self.region(coeffs)
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            setattr(norm, name, getattr(self, name)[region].clone())
        return norm

    def extra_repr(self) -> str:
        return (
            f"{self.num_features}, regions={len(self.centers)}, eps={self.eps}, "
            f"momentum={self.momentum}"
        )
