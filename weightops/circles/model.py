"""Networks that add two tokens modulo p, as one flat row each: their layout, their start, their outputs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weightops import _check
from weightops.ops.population import Layer, Program
from weightops.population import population_forward
from weightops.population._batches import _mix
from weightops.population._compile import PROGRAM
from weightops.spec import WeightSpec

EMBEDDING = "embedding.weight"


class PairNetwork(nn.Module):
    """The paper's network: tokens ``[B, 2]`` -> logits ``[B, p]`` of their sum modulo p.

    An embedding ``[p, d]`` from N(0, 1), the two embeddings side by side, and layers 2 d - width - width - p with
    SiLU between, of torch's own initialisation.

    Source: Ding et al. 2024, "Survival of the Fittest Representation", arXiv 2405.17420, section 2.
    """

    def __init__(self, p: int, d: int, width: int = 100) -> None:
        super().__init__()
        check_sizes("PairNetwork", p, d, width)
        self.embedding = nn.Embedding(p, d)
        self.first = nn.Linear(2 * d, width)
        self.second = nn.Linear(width, width)
        self.third = nn.Linear(width, p)

    def forward(self, pairs: Tensor) -> Tensor:
        x = F.silu(self.first(self.embedding(pairs).flatten(-2)))
        return self.third(F.silu(self.second(x)))


def check_sizes(where: str, p: Any, d: Any, width: Any) -> None:
    _check.count(where, "p", p, 3)
    _check.count(where, "d", d)
    _check.count(where, "width", width)


def pair_spec(p: int, d: int, width: int = 100) -> WeightSpec:
    """The symmetries and the flat layout of :class:`PairNetwork`; its embedding comes first.

    Raises:
        ValueError: p < 3, d < 1 or width < 1.
        TypeError: they are no integers.
    """
    check_sizes("pair_spec", p, d, width)
    return _spec(p, d, width)


@lru_cache(maxsize=64)
def _spec(p: int, d: int, width: int) -> WeightSpec:
    spec = WeightSpec(
        {
            "embedding.weight": (None, "embedding"),
            **{"first.weight": ("first", (None, "embedding")), "first.bias": ("first",)},
            **{"second.weight": ("second", "first"), "second.bias": ("second",)},
            **{"third.weight": (None, "second"), "third.bias": (None,)},
        },
        {
            "embedding.weight": (p, d),
            **{"first.weight": (width, 2 * d), "first.bias": (width,)},
            **{"second.weight": (width, width), "second.bias": (width,)},
            **{"third.weight": (p, width), "third.bias": (p,)},
        },
    )
    spec._cache[PROGRAM] = Program(
        (2,),
        (
            Layer(
                *("token_pair", (0,), (2,), (width,)),
                ("first.weight", "first.bias", EMBEDDING),
                (p, d),
            ),
            Layer("silu", (1,), (width,), (width,)),
            Layer("linear", (2,), (width,), (width,), ("second.weight", "second.bias")),
            Layer("silu", (3,), (width,), (width,)),
            Layer("linear", (4,), (width,), (p,), ("third.weight", "third.bias")),
        ),
    )
    return spec


def initialize(spec: WeightSpec, seeds: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Networks ``[M, P]`` as torch initialises them, each from its seed; of all dtypes the same but for rounding."""
    flat = torch.empty(len(seeds), spec.numel, dtype=torch.float64)
    parts = spec.unflatten(flat)
    for n, seed in enumerate(seeds):
        generator = torch.Generator().manual_seed(_mix(seed, 0))
        for name, part in parts.items():
            if name == "embedding.weight":
                part[n].normal_(generator=generator)
                continue
            inputs = prod(spec.shapes[name.split(".")[0] + ".weight"][1:])
            part[n].uniform_(-(inputs**-0.5), inputs**-0.5, generator=generator)
    return flat.to(dtype)


def split(p: int, share: float, seeds: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The pairs of each network to train on and to hold out, int64 ``[M, B, 2]`` and ``[M, p^2 - B, 2]``."""
    count = int(p * p * share)
    drawn = [
        torch.randperm(p * p, generator=torch.Generator().manual_seed(_mix(seed, 1)))
        for seed in seeds
    ]
    rows = torch.stack(drawn) if drawn else torch.empty(0, p * p, dtype=torch.int64)
    trained = torch.zeros(rows.shape, dtype=torch.bool).scatter_(1, rows[:, :count], True)
    # In ascending order, without sorting.
    parts = [
        torch.where(taken)[1].view(len(rows), size)
        for taken, size in ((trained, count), (~trained, p * p - count))
    ]
    first, second = (torch.stack([part // p, part % p], 2) for part in parts)
    return first, second


def check_networks(where: str, flat: Any, spec: Any) -> tuple[int, int, int]:
    """p, d and width of the networks ``flat`` ``[M, P]``."""
    if not isinstance(spec, WeightSpec):
        raise TypeError(f"{where}: spec must be a WeightSpec, not {_check.describe(spec)}")
    embedding, first = (
        spec.shapes.get(f"{name}.weight", (0, 0)) for name in ("embedding", "first")
    )
    sizes = (*embedding, first[0])
    if len(sizes) != 3 or min(sizes) < 1 or spec != _spec(*sizes):
        raise ValueError(f"{where}: spec must be one of pair_spec, not {_check.describe(spec)}")
    spec.check_flat(where, flat, dims=2)
    if flat.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{where}: flat must be float32 or float64, not {flat.dtype}")
    return sizes


def pair_logits(flat: Tensor, spec: WeightSpec, pairs: Tensor) -> Tensor:
    """Logits of all networks, differentiable.

    Args:
        flat: networks ``[M, P]``, float32 or float64.
        spec: their layout, from :func:`pair_spec`.
        pairs: tokens in 0 .. p - 1, int64 or int32 ``[B, 2]`` or ``[M, B, 2]``.

    Returns:
        ``[M, B, p]``.

    Raises:
        ValueError: shapes or devices do not fit, a token out of range.
        TypeError: an argument has the wrong type or dtype.
    """
    where = "pair_logits"
    p, *_ = check_networks(where, flat, spec)
    _check_pairs(where, pairs, flat, p)
    return population_forward(flat, spec, pairs)


def pair_accuracy(flat: Tensor, spec: WeightSpec, pairs: Tensor) -> Tensor:
    """The share of pairs whose sum modulo p each network gets right, ``[M]``; arguments as for :func:`pair_logits`."""
    where = "pair_accuracy"
    p, *_ = check_networks(where, flat, spec)
    _check_pairs(where, pairs, flat, p)
    if pairs.shape[-2] == 0:
        raise ValueError(f"{where}: pairs holds no pair (shape {list(pairs.shape)})")
    return population_forward(flat, spec, pairs, reduce="accuracy", targets=pairs.sum(-1) % p)


def _check_pairs(where: str, pairs: Any, flat: Tensor, p: int) -> None:
    _check.tensor(where, "pairs", pairs, "[B, 2] or [M, B, 2]")
    _check.index_dtype(where, "pairs", pairs)
    _check.same_device(where, "pairs", pairs, "flat", flat)
    front = [len(flat)] if pairs.dim() == 3 else []
    if pairs.dim() < 2 or list(pairs.shape) != [*front, pairs.shape[-2], 2]:
        expected = ", ".join(map(str, [*front, "B", 2]))
        raise ValueError(f"{where}: pairs must have shape [{expected}], not {list(pairs.shape)}")
    if fault := _check.index_fault(pairs, p):
        raise ValueError(f"{where}: pairs{fault}")
