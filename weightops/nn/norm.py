"""Normalisation and dropout that commute with permuting neurons."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weightops.nn import _arguments
from weightops.spec import WeightSpec


class EquivariantNorm(nn.Module):
    """Layer norm of weight-space features: per sample and tensor, over its positions and channels.

    Every tensor has a scale and a shift per channel, so whatever permutes positions within tensors
    commutes with it. ``[B, P, C]`` to ``[B, P, C]``; float16 and bfloat16 are computed in float32.

    Args:
        spec: the weight space.
        channels: features per weight C.
        eps: added to the variance.
        device, dtype: of the parameters.

    Attributes:
        weight, bias: ``[tensors, C]``, one and zero at first.

    Raises:
        ValueError: a number is out of range.
        TypeError: an argument has the wrong type.
    """

    def __init__(
        self,
        spec: WeightSpec,
        channels: int,
        *,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _arguments.is_spec("EquivariantNorm", "spec", spec)
        _arguments.count("EquivariantNorm", "channels", channels)
        _arguments.number("EquivariantNorm", "eps", eps, 0, 1)
        self.spec, self.channels, self.eps = spec, channels, eps
        shape = (len(spec.shapes), channels)
        self.weight = nn.Parameter(torch.ones(shape, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(shape, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """``[B, P, C]`` to ``[B, P, C]``.

        Raises:
            ValueError: P or C is not the layer's.
            TypeError: ``x`` is no floating point tensor.
        """
        return self._apply_to(x, False)

    def forward_(self, x: Tensor) -> Tensor:
        """:meth:`forward` into ``x``'s own memory, where no gradient is recorded; returns ``x``."""
        return self._apply_to(x, True)

    def _apply_to(self, x: Tensor, inplace: bool) -> Tensor:
        _arguments.features("EquivariantNorm", x, self.spec, self.channels)
        if x.shape[0] == 0:
            return x
        done = []
        for t, piece in enumerate(_arguments.pieces(x, self.spec)):
            if piece.shape[1] == 0:
                continue
            wide = piece.float() if piece.dtype in (torch.float16, torch.bfloat16) else piece
            variance, mean = torch.var_mean(wide, (1, 2), correction=0, keepdim=True)
            scale = (variance + self.eps).rsqrt() * self.weight[t]
            shift = self.bias[t] - mean * scale
            if inplace and wide is piece:
                torch.addcmul(shift, piece, scale, out=piece)
            elif inplace:
                piece.copy_(torch.addcmul(shift, wide, scale))
            else:
                done.append(torch.addcmul(shift, wide, scale).to(x.dtype))
        return torch.cat(done, 1) if done else x

    def extra_repr(self) -> str:
        return f"{len(self.spec.shapes)} tensors, {self.channels}, eps={self.eps}"


class EquivariantDropout(nn.Module):
    """Drops whole channels of a sample, with probability ``p`` each, and scales the others by 1 / (1 - p).

    Positions share their fate, so this commutes exactly with permutations for any given draw. Identity
    in ``eval()``. ``[B, P, C]`` to ``[B, P, C]``.

    Raises:
        ValueError: ``p`` is not in [0, 1).
        TypeError: ``p`` is no number.
    """

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        _arguments.number("EquivariantDropout", "p", p, 0, 1)
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """``[B, P, C]`` to ``[B, P, C]``; a draw per sample and channel."""
        if not self.training or self.p == 0:
            return x
        return x * F.dropout(x.new_ones(x.shape[0], 1, x.shape[2]), self.p)

    def extra_repr(self) -> str:
        return f"p={self.p}"
