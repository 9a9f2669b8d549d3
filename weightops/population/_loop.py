"""The loop of a training: the steps that one call makes, and what is recorded between."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from weightops._progress import track
from weightops.ops.population import training_reference
from weightops.ops.population.training import population_steps
from weightops.population import _probes
from weightops.population._batches import Batches
from weightops.population._probes import SignalProbe
from weightops.population._resolve import Runner

#: one call's steps: their rows, int64, stay below this many bytes, and Ctrl-C is heard between calls
_BATCH_BYTES, _CHUNK = 1 << 25, 256


@dataclass(frozen=True)
class TrainingState:
    """What a training goes on from.

    Attributes:
        step: steps made.
        moments: of the optimiser: ``[2, N, P]`` of adamw, ``[1, N, P]`` of sgd.
    """

    step: int
    moments: Tensor


@dataclass(frozen=True)
class Training:
    """What :func:`population_train` gives.

    Attributes:
        flat: the trained networks ``[N, P]``.
        losses: ``[recorded steps, N]``, each the loss of its mini-batch before the step.
        probes: name -> the probe's results, stacked in front.
        state: for ``population_train(..., state=)`` to go on from.
        diverged: ``[N]``, networks that had a loss, or have a weight, that is not finite.
    """

    flat: Tensor
    losses: Tensor
    probes: dict[str, Tensor]
    state: TrainingState
    diverged: Tensor


def run(
    where: str,
    runner: Runner,
    frozen: list[int],
    flat: Tensor,
    moments: Tensor,
    data: tuple[Tensor, Tensor],
    batches: Batches,
    rates: Tensor,
    optimizer: str,
    settings: list[float],
    first: int,
    steps: int,
    probes: Mapping[str, Callable[[Tensor], Tensor]],
    every: int,
    progress: bool,
) -> Training:
    """:func:`population_train` behind its checks."""
    x, targets = (each.detach() for each in data)
    flat, networks = flat.detach(), len(flat)
    # The kernel measures one; others are called.
    inside = next((name for name, each in probes.items() if isinstance(each, SignalProbe)), None)
    called = {name: probe for name, probe in probes.items() if name != inside}
    place: list[int] = []
    if inside is not None:
        probe: Any = probes[inside]
        probe.spec.check_flat(where, flat, dims=2)
        place = [*probe.place, every]
    advance = _stepper(runner, frozen, place)

    recorded: list[Tensor] = []
    found: dict[str, list[Tensor]] = {name: [] for name in probes}
    diverged = torch.zeros(networks, dtype=torch.bool, device=flat.device)
    bytes_a_step = 8 * max(1, networks * (batches.size or 1))
    most = max(1, min(_CHUNK, _BATCH_BYTES // bytes_a_step))
    chunks = [*_chunks(first, first + steps, most, every if called else 0)]
    for begin, end in track(chunks, "training", enabled=progress):
        if called and begin % every == 0:
            for name, each in called.items():
                found[name].append(_probes.call(where, name, each, flat)[None])
        drawn = batches.rows(begin, end).to(flat.device)
        flat, moments, losses, signals = advance(
            *(flat, moments, x, targets, drawn, rates, optimizer, settings, begin)
        )
        diverged |= ~losses.isfinite().all(0)
        recorded.append(losses[-begin % every :: every])
        if inside is not None:
            found[inside].append(signals)
    diverged |= ~flat.isfinite().all(1)
    return Training(
        flat.clone() if not chunks else flat,
        torch.cat([flat.new_empty(0, networks), *recorded]),
        {name: torch.cat(each) for name, each in found.items() if each},
        TrainingState(first + steps, moments),
        diverged,
    )


def _chunks(begin: int, end: int, most: int, every: int) -> Iterator[tuple[int, int]]:
    """Steps that one call makes; a step at which probes are called begins one."""
    while begin < end:
        stop = min(end, begin + most, begin - begin % every + every if every else end)
        yield begin, stop
        begin = stop


def _stepper(
    runner: Runner, frozen: list[int], probe: list[int]
) -> Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]:
    def advance(
        flat: Tensor, moments: Tensor, x: Tensor, targets: Tensor, rows: Tensor, rates: Tensor,
        optimizer: str, settings: list[float], step: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        data = flat, moments, x, targets, rows, rates
        options = runner.shared, frozen, optimizer, settings, step, probe
        if runner.call is not None:
            forward = runner.call
            return training_reference.steps(
                lambda flat, x, targets, shared, step: training_reference.loss_grad(
                    lambda row, x: (forward(row, x).flatten(1), row), flat, x, targets, shared
                ),
                *data,
                *options,
            )
        return population_steps(*data, runner.code, *options)

    return advance
