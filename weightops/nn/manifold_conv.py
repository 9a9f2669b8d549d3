"""Convolutions whose weights follow a context."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.utils import _pair

from weightops import _check
from weightops.manifolds.manifold import Manifold
from weightops.nn.manifold import Convert, ManifoldLayer, _autocast
from weightops.ops.manifold import manifold_conv1d, manifold_conv2d

_OPTIONS = ("stride", "padding", "dilation", "groups", "padding_mode")


class _ManifoldConv(ManifoldLayer):
    _plain: Any
    kernel_size: Any
    padding_mode: Any
    _reversed_padding_repeated_twice: Any

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        manifold: Manifold | int,
        *,
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] | str = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        spread: float = 0.5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(manifold)
        where = type(self).__name__
        options = (stride, padding, dilation, groups, padding_mode)
        counts: dict[str, Any] = {
            "in_channels": in_channels,
            "out_channels": out_channels,
            "kernel_size": kernel_size,
            **dict(zip(_OPTIONS[:4], options[:4], strict=True)),
        }
        for name, value in counts.items():
            if name == "padding" and isinstance(value, str):
                continue
            for each in value if isinstance(value, (tuple, list)) else [value]:
                _check.count(where, name, each, 0 if name == "padding" else 1)
        _check.flag(where, "bias", bias)
        _check.number(where, "spread", spread, 0, 1)
        # What else may be wrong with these torch's layer says, and it brings them to one form.
        named = dict(zip(_OPTIONS, options, strict=True))
        plain = self._plain(in_channels, out_channels, kernel_size, device="meta", **named)
        self.in_channels, self.out_channels, self.spread = in_channels, out_channels, spread
        for name in ("kernel_size", *_OPTIONS, "_reversed_padding_repeated_twice"):
            setattr(self, name, getattr(plain, name))
        self._allocate(plain.weight.shape, bias, device, dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the bases as :class:`ManifoldLinear` does, from what torch's convolution draws its weights from."""
        self._draw_all(self.weight[0, 0].numel())

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        coeffs: Tensor | None = None,
        index: Tensor | None = None,
    ) -> Tensor:
        """``[B, in, ...]`` to ``[B, out, ...]``; contexts and errors as for :class:`ManifoldLinear`."""
        coeffs, index = self._at(context, coeffs, index)
        x, weight, bias = _autocast(x, self.weight, self.bias)
        options = {name: getattr(self, name) for name in _OPTIONS[:4]}
        if self.padding_mode != "zeros":
            x = F.pad(x, self._reversed_padding_repeated_twice, self.padding_mode)
            options["padding"] = 0
        convolve: Any = manifold_conv1d if self._plain is nn.Conv1d else manifold_conv2d
        return convolve(x, coeffs, weight, bias, index=index, **options)

    @classmethod
    def lifted(cls, module: Any, manifold: Manifold, convert: Convert) -> Any:
        """``module`` with bases that ``convert`` gives for its parameters."""
        return cls._like(module, manifold)._adopt(module, convert)

    @classmethod
    def _like(cls, module: Any, manifold: Manifold | int) -> Any:
        sizes = (module.in_channels, module.out_channels, module.kernel_size)
        options = {name: getattr(module, name) for name in _OPTIONS if hasattr(module, name)}
        return cls(*sizes, manifold, device="meta", **options)

    def ordinary(self, convert: Convert, coeffs: Tensor) -> nn.Module:
        sizes = (self.in_channels, self.out_channels, self.kernel_size)
        options = {name: getattr(self, name) for name in _OPTIONS}
        return self._release(self._plain(*sizes, device="meta", **options), convert)

    def extra_repr(self) -> str:
        ones = (1,) * len(self.kernel_size)
        defaults = (ones, (0,) * len(ones), ones, 1, "zeros")
        given = {name: getattr(self, name) for name in _OPTIONS}
        options = [
            f"{name}={value!r}"
            for (name, value), default in zip(given.items(), defaults, strict=True)
            if value != default
        ]
        first = (self.in_channels, self.out_channels, f"kernel_size={self.kernel_size}")
        last = (super().extra_repr(), f"bias={self.bias is not None}")
        return ", ".join(map(str, (*first, *options, *last)))


class ManifoldConv1d(_ManifoldConv):
    """:class:`ManifoldConv2d` of one axis: ``x`` ``[B, in, L]``, ``weight`` ``[K, out, in / groups, k]``."""

    _plain = nn.Conv1d


class ManifoldConv2d(_ManifoldConv):
    """A convolution with weights of its own for every context.

    Args:
        in_channels, out_channels, kernel_size: sizes.
        manifold: topology of the weights, or a number of bases K whose mixture each context is.
        stride, padding, dilation, groups, padding_mode: as for ``torch.nn.Conv2d``.
        bias: whether there is one.
        spread: of the initial weights' standard deviation, which part comes from the context.
        device, dtype: of the parameters.

    Attributes:
        weight: the bases ``[K, out, in / groups, kh, kw]``.
        bias: ``[K, out]``, or ``None``.

    Raises:
        ValueError: a number is out of range, or options do not fit each other.
        TypeError: an argument has the wrong type.
    """

    _plain = nn.Conv2d

    @classmethod
    def from_condconv(cls, module: nn.Module) -> ManifoldConv2d:
        """``timm.layers.CondConv2d`` as a manifold with a number of bases, and called as it is: ``conv(x, routing)``.

        Its ``weight`` ``[K, out * in / groups * kh * kw]`` is ours flattened, ``weight.unflatten(1,
        weight_shape)``. The parameters are copied. Source: Yang et al. 2019, "CondConv", arXiv 1904.04971.

        Raises:
            ValueError: it pads by the size of its input, as TensorFlow's "SAME" does with a stride.
            TypeError: ``module`` is no CondConv2d.
        """
        where = "from_condconv"
        names = ("weight_shape", "num_experts", "dynamic_padding", *_OPTIONS[:4])
        if not (isinstance(module, nn.Module) and all(hasattr(module, name) for name in names)):
            raise TypeError(
                f"{where}: module must be timm's CondConv2d, not {type(module).__name__}"
            )
        found: Any = module
        if found.dynamic_padding and _pair(found.stride) != (1, 1):
            raise ValueError(
                f"{where}: module pads by the size of its input, as padding 'same' with stride "
                f"{found.stride} must; pad the input itself, and set module.dynamic_padding = False"
            )
        layer = cls._like(found, found.num_experts)
        if found.dynamic_padding:
            layer.padding = "same"

        def copy(param: Tensor) -> nn.Parameter:
            shape = (-1, *found.weight_shape) if param is found.weight else param.shape
            return nn.Parameter(param.detach().clone().view(shape), param.requires_grad)

        return layer._adopt(found, copy)
