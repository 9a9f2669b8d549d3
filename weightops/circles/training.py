"""Training of many networks that add modulo p, with their signals over time."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from weightops import _check
from weightops.circles import model
from weightops.population import training as population
from weightops.population._batches import Batches, network_seeds
from weightops.population._loop import run
from weightops.population._probes import SignalProbe, checked
from weightops.population._resolve import resolve
from weightops.spec import WeightSpec

_SIGNALS = "signals of the embedding"
_BETAS_EPS = (0.9, 0.999, 1e-8)


@dataclass(frozen=True)
class State:
    """What a training goes on from: steps made, networks ``[M, P]`` and moments of AdamW ``[2, M, P]``."""

    step: int
    flat: Tensor
    moments: Tensor


@dataclass(frozen=True)
class Training:
    """What :func:`train` gives.

    Attributes:
        spec: the layout of the networks.
        flat: the trained networks ``[M, P]``.
        losses: ``[R, M]``, of R recorded steps, before each.
        signals: ``[R, M, K]``, likewise.
        probes: name -> the probe's results, stacked in front.
        pairs: what each network was trained on, int64 ``[M, B, 2]``.
        held_out: the pairs left over, int64 ``[M, p^2 - B, 2]``.
        state: for ``train(..., state=)`` to go on from.
        diverged: ``[M]``, networks that had a loss, or have a weight, that is not finite.
    """

    spec: WeightSpec
    flat: Tensor
    losses: Tensor
    signals: Tensor
    probes: dict[str, Tensor]
    pairs: Tensor
    held_out: Tensor
    state: State
    diverged: Tensor

    @property
    def embedding(self) -> Tensor:
        """The trained embeddings ``[M, p, d]``, a view of ``flat``."""
        return self.spec.unflatten(self.flat)["embedding.weight"]


def train(
    num_models: int,
    p: int,
    d: int,
    *,
    steps: int,
    width: int = 100,
    lr: float | Tensor = 0.01,
    weight_decay: float = 0.5,
    share: float = 0.8,
    embedding: Tensor | None = None,
    frozen: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int | Sequence[int] = 0,
    data_seed: int | Sequence[int] | None = None,
    probes: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
    every: int = 1,
    state: State | None = None,
    progress: bool = False,
) -> Training:
    """Train M networks at once on ``(a + b) mod p``: full batches, cross-entropy, AdamW.

    The defaults are the paper's. A network's start and its pairs hang on its own seed alone, and one that diverges
    does not disturb the others.

    Args:
        num_models: M.
        p, d, width: tokens, dimensions of the embedding, and neurons, as for :func:`pair_spec`.
        steps: how many to make.
        lr: learning rate, one or per network ``[M]``.
        share: of the p^2 pairs that are trained on, rounded down; the others are held out.
        embedding: to begin with, ``[p, d]`` for all or ``[M, p, d]``; drawn from N(0, 1) by default.
        frozen: leave the embedding as it is.
        dtype: float32 or float64; the start is the same but for rounding.
        seed: of the networks: an integer, or one per network.
        data_seed: of the pairs, likewise; by default ``seed``.
        probes: name -> ``probe(flat)``, called at every ``every``-th step, before it.
        every: of how many steps losses and signals are recorded, counted from the state's step.
        state: from an earlier training with the same options, to go on: to the bit the same as all steps at once.
        progress: show a progress bar.

    Raises:
        ValueError: options out of range, p < 3, d < 1, shapes that do not fit.
        TypeError: wrong types or dtypes.

    Source: Ding et al. 2024, "Survival of the Fittest Representation", arXiv 2405.17420, section 2.
    """
    where = "train"
    _check.count(where, "num_models", num_models)
    model.check_sizes(where, p, d, width)
    _check.count(where, "steps", steps, 0)
    _check.count(where, "every", every)
    _check.flag(where, "frozen", frozen)
    _check.flag(where, "progress", progress)
    _check.number(where, "weight_decay", weight_decay, 0, sys.float_info.max)
    _check.number(where, "share", share, 0, 1)
    if int(p * p * share) < 1:
        raise ValueError(f"{where}: share is {share}, which is not one of {p * p} pairs")
    _check.float_dtype(where, dtype)
    rates = population._rates(where, lr, num_models)
    called = checked(where, probes)
    seeds = network_seeds(where, seed, num_models)
    pair_seeds = seeds if data_seed is None else network_seeds(where, data_seed, num_models)
    spec = model.pair_spec(p, d, width)
    if state is None:
        flat = model.initialize(spec, seeds, dtype)
        if embedding is not None:
            _check_start(where, embedding, num_models, p, d)
            spec.unflatten(flat)["embedding.weight"].copy_(embedding.detach())
        state = State(0, flat, flat.new_zeros(2, *flat.shape))
    else:
        _check_state(where, state, [num_models, spec.numel], dtype)
    pairs, held_out = model.split(p, share, pair_seeds)
    runner, tokens = resolve(where, state.flat, spec, pairs)
    made = run(
        where,
        runner,
        [0, p * d] if frozen else [],
        state.flat,
        state.moments,
        (tokens, pairs.sum(2) % p),
        Batches(pairs.shape[1], None, seeds),
        rates,
        "adamw",
        [weight_decay, *_BETAS_EPS],
        first=state.step,
        steps=steps,
        probes={_SIGNALS: SignalProbe(spec, model.EMBEDDING)} | called,
        every=every,
        progress=progress,
    )
    found = made.probes
    return Training(
        spec=spec,
        flat=made.flat,
        losses=made.losses,
        signals=found.pop(_SIGNALS, made.flat.new_empty(0, num_models, (p - 1) // 2)),
        probes=found,
        pairs=pairs,
        held_out=held_out,
        state=State(state.step + steps, made.flat, made.state.moments),
        diverged=made.diverged,
    )


def _check_start(where: str, embedding: Any, networks: int, p: int, d: int) -> None:
    _check.embedding(where, "embedding", embedding)
    if embedding.device.type != "cpu":
        raise ValueError(f"{where}: embedding must be on cpu, not {embedding.device}")
    if list(embedding.shape) not in ([p, d], [networks, p, d]):
        raise ValueError(
            f"{where}: embedding must have shape {[p, d]} or {[networks, p, d]}, "
            f"not {list(embedding.shape)}"
        )


def _check_state(where: str, state: Any, shape: list[int], dtype: torch.dtype) -> None:
    if not isinstance(state, State):
        raise TypeError(f"{where}: state must be a State, not {_check.describe(state)}")
    if list(state.flat.shape) != shape or state.flat.dtype != dtype:
        raise ValueError(
            f"{where}: state must have {dtype} networks {shape}, not {_check.describe(state.flat)}"
        )
