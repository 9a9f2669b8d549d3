"""What reads a class from the weights of a SIREN: ``[N, P]`` to ``[N, 10]``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from inr.sirens import OMEGA
from weightops import WeightSpec
from weightops.nn import UNF

HIDDEN = 256


class Features(nn.Module):
    """Weights over their tensor's spread, and what a sine makes of them: ``[N, P]`` to ``[N, P, 3]``.

    A bias of 2 pi / 30 more is the same network, which shows in the sines alone.
    """

    scale: Tensor

    def __init__(self, spec: WeightSpec, flat: Tensor) -> None:
        super().__init__()
        spread = [part.std().expand(part[0].numel()) for part in spec.unflatten(flat).values()]
        self.register_buffer("scale", torch.cat(spread))

    def forward(self, flat: Tensor) -> Tensor:
        phase = OMEGA * flat
        return torch.stack([flat / self.scale, phase.sin(), phase.cos()], -1)


def pointwise(term: Any) -> bool:
    """Whether a map takes every weight to itself."""
    return term.input == term.output and term.input_indices == term.output_indices


def equivariant(spec: WeightSpec, flat: Tensor, width: int, terms: Any = "full") -> nn.Module:
    """Equivariant layers, means of all tensors, and a small MLP; x, y and the grey value keep their places."""
    layers = UNF(spec, [3, width, width, width], "silu", fixed="index", terms=terms, invariant=True)
    assert layers.pool is not None
    return nn.Sequential(
        *(Features(spec, flat), layers, nn.Linear(layers.pool.out_features(width), HIDDEN)),
        *(nn.SiLU(), nn.Dropout(0.2), nn.Linear(HIDDEN, 10)),
    )


def mlp(spec: WeightSpec, flat: Tensor, width: int) -> nn.Module:
    """On the same features, flattened."""
    return nn.Sequential(Features(spec, flat), nn.Flatten(), *_layers(3 * spec.numel))


def pixels() -> nn.Module:
    """On an image instead of its network, ``[N, 64]``."""
    return nn.Sequential(*_layers(64))


def _layers(inputs: int) -> list[nn.Module]:
    return [
        *(nn.Linear(inputs, HIDDEN), nn.ReLU(), nn.Dropout(0.2)),
        *(nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), nn.Dropout(0.2), nn.Linear(HIDDEN, 10)),
    ]


#: name -> what makes it, and its learning rate
READERS: dict[str, tuple[Callable[..., nn.Module], float]] = {
    "UNF": (equivariant, 1e-2),
    "Deep Sets": (partial(equivariant, terms=pointwise), 1e-2),
    "MLP": (mlp, 1e-3),
}
