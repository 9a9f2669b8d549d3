"""Layers whose weights follow a context: ``W(s) = sum_k phi_k(s) W_k``.

Source: Benjamin et al. 2025, "Walking the Weight Manifold", arXiv 2505.22994.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn

from weightops import _check
from weightops.manifolds.context import Place, current
from weightops.manifolds.manifold import Manifold
from weightops.ops.manifold import manifold_linear
from weightops.ops.manifold.arguments import ACCUMULATE

#: gives the bases of a parameter, or back: a parameter for the bases
Convert = Callable[[Any], Any]


class ManifoldLayer(nn.Module):
    """What layers on a manifold share: ``weight`` and ``bias`` ``[K, ...]``, and where to take them.

    Args:
        manifold: topology of the weights; or a number of bases K, for contexts that are the K coefficients
            themselves, as experts mixed by a router are.

    Raises:
        ValueError: the number is less than 1.
        TypeError: ``manifold`` is neither.
    """

    weight: Any
    bias: Any
    spread: float

    def __init__(self, manifold: Manifold | int) -> None:
        super().__init__()
        where = type(self).__name__
        if isinstance(manifold, Manifold):
            self.manifold: Manifold | None = manifold
            self.num_bases = manifold.num_coeffs
        elif isinstance(manifold, int) and not isinstance(manifold, bool):
            _check.count(where, "manifold", manifold)
            self.manifold, self.num_bases = None, manifold
        else:
            raise TypeError(
                f"{where}: manifold must be a Manifold or a number of bases, "
                f"not {_check.describe(manifold)}"
            )

    def _at(
        self, context: Tensor | None, coeffs: Tensor | None, index: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Coefficients and index: those given, or those of the ``at`` around."""
        where = type(self).__name__
        if context is None and coeffs is None and index is None:
            place = current(where)
        else:
            place = Place(where, context, coeffs, index)
        return place.coeffs_on(self.manifold), place.index

    def _allocate(self, shape: Sequence[int], bias: bool | None, device: Any, dtype: Any) -> None:
        """``weight`` for weights of ``shape``, and unless it is ``None`` a ``bias`` for their first axis."""

        def empty(shape: Sequence[int]) -> nn.Parameter:
            return nn.Parameter(torch.empty(self.num_bases, *shape, device=device, dtype=dtype))

        self.register_parameter("weight", empty(shape))
        if bias is not None:
            self.register_parameter("bias", empty(shape[:1]) if bias else None)

    def _at_each(
        self,
        x: Tensor,
        context: Tensor | None,
        coeffs: Tensor | None,
        index: Tensor | None,
        like: Tensor,
    ) -> Tensor:
        """Coefficients ``[B, K]`` of the entries of ``x``'s first axis, or ``[K]`` of all, wide enough to sum."""
        where, k = type(self).__name__, self.num_bases
        coeffs, index = self._at(context, coeffs, index)
        if coeffs.dim() not in (1, 2) or coeffs.shape[-1] != k:
            raise ValueError(
                f"{where}: coeffs must have shape [contexts, {k}] or [{k}], not {list(coeffs.shape)}"
            )
        accumulate = ACCUMULATE.get(like.dtype)
        if coeffs.dtype not in (like.dtype, accumulate):
            raise TypeError(
                f"{where}: coeffs must be {like.dtype} as what they mix, not {coeffs.dtype}"
            )
        coeffs = coeffs.to(accumulate)
        if index is not None:
            _check.tensor(where, "index", index, "[B]", 1)
            _check.index_dtype(where, "index", index)
            if coeffs.dim() == 1:
                raise ValueError(f"{where}: index needs coeffs [G, {k}], not [{k}]")
            if fault := _check.index_fault(index, coeffs.shape[0]):
                raise ValueError(f"{where}: index{fault}")
            coeffs = coeffs[index.long()]
        if coeffs.dim() == 2 and (x.dim() == 0 or coeffs.shape[0] != x.shape[0]):
            raise ValueError(
                f"{where}: there are {coeffs.shape[0]} contexts for the first axis of x "
                f"{list(x.shape)}; give one for each entry, an index, or one for all"
            )
        return coeffs

    @torch.no_grad()
    def _draw(self, bases: Tensor, spread: float, draw: Callable[[Tensor], Any]) -> None:
        """Bases of weights that have, at a context drawn at random, the variance ``draw`` gives them."""
        for basis in bases:
            draw(basis)
        if self.manifold is not None:
            mean = torch.empty_like(bases[0])
            draw(mean)
            noise = spread * bases if spread else None
            bases.copy_(self.manifold.around(sqrt(1 - spread**2) * mean, noise))

    def _draw_all(self, fan_in: int) -> None:
        bound = 1 / sqrt(fan_in)
        for bases in self.parameters(recurse=False):
            self._draw(bases, self.spread, lambda basis: basis.uniform_(-bound, bound))

    def _adopt(self, module: nn.Module, convert: Convert) -> Any:
        """This layer, with its parameters converted from those of ``module``."""
        for name in self._parameters:
            param = getattr(module, name)
            setattr(self, name, None if param is None else convert(param))
        return self.train(module.training)

    def _release(self, module: nn.Module, convert: Convert) -> nn.Module:
        """``module`` with its parameters converted from those of this layer."""
        for name, bases in self._parameters.items():
            setattr(module, name, None if bases is None else convert(bases))
        return module.train(self.training)

    def ordinary(self, convert: Convert, coeffs: Tensor) -> nn.Module:
        """The layer at one context: torch's, with the parameters that ``convert`` gives for the bases."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"manifold={self.num_bases if self.manifold is None else self.manifold}"


def _autocast(x: Any, weight: Tensor, bias: Tensor | None) -> tuple[Any, Tensor, Tensor | None]:
    """Cast under autocast as torch casts for an ordinary layer; the ops themselves are left alone by it."""
    device = weight.device.type
    if not torch.is_autocast_enabled(device):
        return x, weight, bias
    dtype = torch.get_autocast_dtype(device)

    def cast(t: Any) -> Any:
        eligible = isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64
        return t.to(dtype) if eligible else t

    return cast(x), cast(weight), cast(bias)


class ManifoldLinear(ManifoldLayer):
    """A linear layer with weights of its own for every context.

    Args:
        in_features, out_features: sizes.
        manifold: topology of the weights, or a number of bases K whose mixture each context is.
        bias: whether there is one.
        spread: of the initial weights' standard deviation, which part comes from the context.
        device, dtype: of the parameters.

    Attributes:
        weight: the bases ``[K, out, in]``.
        bias: ``[K, out]``, or ``None``.

    Raises:
        ValueError: a number is out of range.
        TypeError: an argument has the wrong type.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        manifold: Manifold | int,
        *,
        bias: bool = True,
        spread: float = 0.5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(manifold)
        where = "ManifoldLinear"
        _check.count(where, "in_features", in_features)
        _check.count(where, "out_features", out_features)
        _check.flag(where, "bias", bias)
        _check.number(where, "spread", spread, 0, 1)
        self.in_features, self.out_features, self.spread = in_features, out_features, spread
        self._allocate((out_features, in_features), bias, device, dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the bases: weights averaged over contexts as ``torch.nn.Linear`` draws its own, times
        ``(1 - spread^2)^(1/2)``, and what depends on the context, of mean 0, times ``spread``, so that W(s)
        at a random context has an ordinary layer's variance. With a number of bases each is drawn as
        ``torch.nn.Linear``'s, as for CondConv."""
        self._draw_all(self.in_features)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        coeffs: Tensor | None = None,
        index: Tensor | None = None,
    ) -> Tensor:
        """``[..., in]`` to ``[..., out]``, at the contexts given or those of ``weightops.manifolds.at``.

        Args:
            x: ``[..., in]`` of the parameters' dtype, or under autocast of any.
            context: ``[B]`` for the B entries of ``x``'s first axis, ``[G]`` with ``index``, or ``[]``; a
                last axis is added where a context of the manifold has several numbers.
            coeffs: ``[B, K]``, ``[G, K]`` with ``index``, or ``[K]``, instead of ``context``.
            index: ``[B]``, int64 or int32: entry b has context ``index[b]``.

        Raises:
            ValueError: there is no context, or one is outside the manifold's domain; shapes do not fit.
            TypeError: an argument has the wrong type or dtype.
        """
        coeffs, index = self._at(context, coeffs, index)
        x, weight, bias = _autocast(x, self.weight, self.bias)
        return manifold_linear(x, coeffs, weight, bias, index=index)

    @classmethod
    def lifted(cls, module: nn.Linear, manifold: Manifold, convert: Convert) -> ManifoldLinear:
        """``module`` with bases that ``convert`` gives for its parameters."""
        layer = cls(module.in_features, module.out_features, manifold, device="meta")
        return layer._adopt(module, convert)

    def ordinary(self, convert: Convert, coeffs: Tensor) -> nn.Module:
        module = nn.Linear(self.in_features, self.out_features, device="meta")
        return self._release(module, convert)

    def extra_repr(self) -> str:
        return (
            f"{self.in_features}, {self.out_features}, {super().extra_repr()}, "
            f"bias={self.bias is not None}"
        )
