"""The equivariant layer as a module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from weightops import _check
from weightops.nn import _arguments
from weightops.nn.lowrank import Factors, factorize
from weightops.ops.equivariant import EquivariantPlan, equivariant_linear
from weightops.ops.equivariant.plan import Selection
from weightops.spec import WeightSpec


class EquivariantLinear(nn.Module):
    """Every linear map between two weight spaces that commutes with permuting neurons (arXiv 2402.05232).

    Input ``[B, P_in, C_in]``, output ``[B, P_out, C_out]``, both of the parameters' dtype. Parameters with a
    leading axis of B, as ``torch.func.functional_call`` can give, are taken as each sample's own.

    Args:
        spec: the weight space of the input.
        in_channels, out_channels: features per weight, C_in and C_out.
        spec_out: the weight space of the output, ``spec`` by default.
        bias: whether to add a bias per output tensor and channel.
        fixed: what axes without a label are: ``"permute"`` (permutable, each with a label of its own),
            ``"index"`` or ``"channel"`` (every position has parameters of its own).
        terms: which of the basis maps: ``"full"``, ``"local"``, ``"mpnn"`` or ``predicate(term)``.
        rank: channels through which wide types are factored: the matrix ``[R C_in, W C_out]`` of a type
            with R readers and W writers becomes a product of two, wherever that has fewer parameters.
        normalize: ``"mean"`` or ``"sum"``, of indices that are not kept.
        device, dtype: of the parameters.

    Attributes:
        plan: the :class:`~weightops.EquivariantPlan` of all T terms.
        theta: ``[T, C_in, C_out]``; ``theta[t]`` belongs to ``plan.terms[t]``. With factored types only the
            terms that are not in one, or ``None`` where there are none.
        up, down: the factors, ``[., C_in, rank]`` and ``[., rank, C_out]``, or ``None``.
        bias: ``[num_biases, C_out]``, or ``None``.

    Raises:
        ValueError: an option is unknown, a number is below 1, or the parameters are larger than the
            machine's memory, which is said with their size before they are allocated.
        TypeError: an argument has the wrong type.
    """

    theta: Any  # which is present depends on the factors, so None is not said here
    up: Any
    down: Any
    bias: nn.Parameter | None

    def __init__(
        self,
        spec: WeightSpec,
        in_channels: int,
        out_channels: int,
        *,
        spec_out: WeightSpec | None = None,
        bias: bool = True,
        fixed: str = "permute",
        terms: Selection = "full",
        rank: int | None = None,
        normalize: str = "mean",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        where = "EquivariantLinear"
        _arguments.is_spec(where, "spec", spec)
        _arguments.count(where, "in_channels", in_channels)
        _arguments.count(where, "out_channels", out_channels)
        _check.flag(where, "bias", bias)
        if rank is not None:
            _arguments.count(where, "rank", rank)
        self.in_channels, self.out_channels, self.rank = in_channels, out_channels, rank
        self.plan = _arguments.plan_of(
            spec, spec_out, fixed=fixed, terms=terms, normalize=normalize
        )
        self.factors: Factors | None = None
        if rank is not None:
            self.factors = factorize(self.plan, in_channels, out_channels, rank)
        middle = rank or 0
        factors = self.factors
        wanted: dict[str, tuple[EquivariantPlan | None, int, int]] = {
            "theta": (self.plan if factors is None else factors.rest, in_channels, out_channels),
            "up": (None if factors is None else factors.up, in_channels, middle),
            "down": (None if factors is None else factors.down, middle, out_channels),
        }
        for plan, into, out in wanted.values():
            if plan is not None:
                plan.check_size(into, out, dtype or torch.get_default_dtype())
        for name, (plan, into, out) in wanted.items():
            shape = None if plan is None else (plan.num_terms, into, out)
            self.register_parameter(name, _parameter(shape, device, dtype))
        biases = (self.plan.num_biases, out_channels) if bias else None
        self.register_parameter("bias", _parameter(biases, device, dtype))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw theta from a normal distribution, and set the bias to zero.

        The variance is 1 / (C_in * number of terms that write the same output tensor), as in the paper's
        code; factors compose to that variance.
        """
        counts = torch.tensor(self.plan.terms_per_output, dtype=torch.int64)
        std = (counts * self.in_channels).repeat_interleave(counts).rsqrt()
        if self.factors is None:
            _draw(self.theta, std)
        else:
            assert self.rank is not None
            _draw(self.theta, std[self.factors.remaining])
            for group in self.factors.groups:
                fan_in = len(group.readers) * self.in_channels
                self.up[group.readers] = torch.randn_like(self.up[group.readers]) / fan_in**0.5
                scale = std[group.table[0]] * (fan_in / self.rank) ** 0.5
                drawn = torch.randn_like(self.down[group.writers])
                self.down[group.writers] = drawn * scale.to(drawn)[:, None, None]
        if self.bias is not None:
            self.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """``[B, P_in, C_in]`` to ``[B, P_out, C_out]``; errors are those of ``equivariant_linear``."""
        if self.factors is None:
            return equivariant_linear(x, self.theta, self.bias, self.plan)
        y = equivariant_linear(x, self.up, None, self.factors.up)
        y = equivariant_linear(y, self.down, self.bias, self.factors.down)
        if self.factors.rest is not None:
            y = y + equivariant_linear(x, self.theta, None, self.factors.rest)
        return y

    def to_per_term(self) -> dict[str, Tensor]:
        """The parameters in the layout of the paper's code: output tensor -> ``[T_i, C_in, C_out]``.

        Terms are numbered by input tensor, then by partition; factors are multiplied out. A key is a tensor's
        name, followed by ``(position)`` for every fixed axis where those are not permuted; the i-th key's
        bias is ``bias[i]``.
        """
        theta = self.theta
        if self.factors is not None:
            theta = self.factors.compose(self.up, self.down, self.theta)
        parts = map(str, self.plan.outputs.parts)
        return dict(zip(parts, theta.split(self.plan.terms_per_output), strict=True))

    @torch.no_grad()
    def from_per_term_(self, tensors: Mapping[str, Tensor]) -> EquivariantLinear:
        """Take parameters as :meth:`to_per_term` lays them out, and return the layer.

        Factors become those of the best approximation in least squares, which is exact where a type's
        matrix has no more than ``rank`` as its rank.

        Raises:
            ValueError: a tensor is missing, unknown or of another shape.
            TypeError: ``tensors`` does not map names to tensors.
        """
        where = "from_per_term_"
        if not isinstance(tensors, Mapping):
            raise TypeError(
                f"{where}: tensors must map output tensors to parameters, "
                f"not {_check.describe(tensors)}"
            )
        counts = self.plan.terms_per_output
        expected = dict(zip(map(str, self.plan.outputs.parts), counts, strict=True))
        for name in tensors.keys() ^ expected.keys():
            lacks = "the layer" if name in tensors else "tensors"
            raise ValueError(f"{where}: {lacks} has no output tensor {name!r}")
        for name, terms in expected.items():
            shape = [terms, self.in_channels, self.out_channels]
            _check.tensor(where, f"tensors[{name!r}]", tensors[name], str(shape))
            if list(tensors[name].shape) != shape:
                given = list(tensors[name].shape)
                raise ValueError(f"{where}: tensors[{name!r}] must have shape {shape}, not {given}")
        theta = torch.cat([tensors[name] for name in expected])
        if self.factors is None:
            self.theta.copy_(theta)
        else:
            self.factors.decompose_(theta.to(self.up), self.up, self.down, self.theta)
        return self

    def extra_repr(self) -> str:
        plan = self.plan
        options = "".join(
            f", {name}={value!r}"
            for name, value, default in (
                ("fixed", plan.fixed, "permute"),
                ("terms", plan.selection, "full"),
                ("rank", self.rank, None),
                ("normalize", plan.normalize, "mean"),
                ("bias", self.bias is not None, True),
            )
            if value != default
        )
        return f"{self.in_channels}, {self.out_channels}, num_terms={plan.num_terms}{options}"


def _parameter(
    shape: tuple[int, ...] | None, device: torch.device | str | None, dtype: torch.dtype | None
) -> nn.Parameter | None:
    return None if shape is None else nn.Parameter(torch.empty(shape, device=device, dtype=dtype))


def _draw(theta: Tensor | None, std: Tensor) -> None:
    if theta is not None:
        theta.normal_().mul_(std.to(theta)[:, None, None])
