"""Training of N networks of one architecture at once."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from weightops import _check
from weightops.population import _probes
from weightops.population._batches import Batches, network_seeds
from weightops.population._loop import Training, TrainingState, run
from weightops.population._resolve import Runner, resolve
from weightops.population.forward import check_targets
from weightops.spec import WeightSpec
from weightops.tracing.export import read_weights

_MOST = sys.float_info.max
_MOMENTS = {"adamw": 2, "sgd": 1}
_DECAY = {"adamw": 1e-2, "sgd": 0.0}


def population_train(
    flat: Tensor,
    spec_or_model: WeightSpec | nn.Module,
    data: tuple[Tensor, Tensor],
    *,
    steps: int,
    optimizer: Literal["adamw", "sgd"] = "adamw",
    lr: float | Tensor = 1e-3,
    weight_decay: float | None = None,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    momentum: float = 0.0,
    nesterov: bool = False,
    batch_size: int | None = None,
    seed: int | Sequence[int] = 0,
    probes: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
    every: int = 1,
    state: TrainingState | None = None,
    progress: bool = True,
) -> Training:
    """Train every network of a population, each by itself, as ``torch.optim`` would.

    Layers that kernels have (see :func:`population_forward`) are trained with a network's weights, gradients
    and moments in the cache of one core for many steps, other models by batched torch, in eval mode. Of
    kernels' layers batch norm goes by the batch's own statistics, and its running statistics follow with its
    momentum as in torch (``momentum=None``: their means over all steps); :func:`population_batchnorm` replaces
    them by those of all samples. Other buffers, and parameters that don't require gradients, stay as they
    are. A network that diverges does not disturb the others.

    Args:
        flat: the networks ``[N, P]`` in the order of :meth:`WeightSpec.flatten`; not changed.
        spec_or_model: the architecture: a module, whose own weights do not matter, or a spec traced in this process.
        data: samples ``[D, ...]`` for all networks or ``[N, D, ...]``, and targets: classes, int64 ``[D]`` or
            ``[N, D]``, for cross-entropy, or values ``[D, K]`` or ``[N, D, K]`` for a mean squared error.
        steps: how many to make.
        optimizer: ``"adamw"`` or ``"sgd"``.
        lr: learning rate, one or per network ``[N]``.
        weight_decay: by default 0.01 for adamw and 0 for sgd, as in ``torch.optim``.
        betas, eps: of adamw.
        momentum, nesterov: of sgd; the dampening is 0.
        batch_size: rows of a mini-batch; ``None``: all rows at every step. An epoch takes its batches from a
            permutation of the rows, without the rest that fills no batch.
        seed: of the permutations: an integer, or one per network. A network's do not depend on the others.
        probes: name -> ``probe(flat)``, called at every ``every``-th step, before it. A :class:`SignalProbe` is
            measured by the kernel that trains, which costs next to nothing.
        every: of how many steps losses are recorded, counted from the state's step.
        state: from an earlier training with the same options, to go on: the same as all steps at once.
        progress: show a progress bar.

    Raises:
        ValueError: shapes do not fit, targets or options out of range, a model that does not export.
        TypeError: wrong types or dtypes.
    """
    where = "population_train"
    if not (isinstance(data, (tuple, list)) and len(data) == 2):
        raise TypeError(f"{where}: data must be a pair (x, targets), not {_check.describe(data)}")
    x, targets = data
    runner, x = resolve(where, flat, spec_or_model, x)
    targets = check_targets(where, runner, flat, x, targets)
    rows, networks = x.shape[0] if runner.shared else x.shape[1], len(flat)
    _check.count(where, "steps", steps, 0)
    _check.count(where, "every", every)
    _check.flag(where, "progress", progress)
    _check.choice(where, "optimizer", optimizer, tuple(_MOMENTS))
    settings = _settings(where, optimizer, weight_decay, betas, eps, momentum, nesterov)
    rates = _rates(where, lr, networks)
    if batch_size is not None:
        _check.count(where, "batch_size", batch_size)
        if batch_size > rows:
            raise ValueError(f"{where}: batch_size is {batch_size}, but data has {rows} rows")
    _check_norms(where, runner, batch_size or rows)
    batches = Batches(rows, batch_size, network_seeds(where, seed, networks))
    called = _probes.checked(where, probes)
    first, moments = _begin(where, state, optimizer, flat)
    frozen = _frozen(runner, spec_or_model)
    return run(
        *(where, runner, frozen, flat, moments, (x, targets), batches, rates, optimizer, settings),
        *(first, steps, called, every, progress),
    )


def _check_norms(where: str, runner: Runner, batch: int) -> None:
    for layer in runner.program.layers if runner.program else ():
        if layer.kind == "batch_norm" and batch * math.prod(layer.taken[1:]) < 2:
            raise ValueError(
                f"{where}: batch norm ({layer.tensors[2]}) needs two numbers of a channel in a batch at least, "
                f"but a batch has {batch} row of shape {list(layer.taken)} there"
            )


def _settings(
    where: str, optimizer: str, weight_decay: float | None, betas: Any, eps: float,
    momentum: float, nesterov: bool,
) -> list[float]:  # fmt: skip
    decay = _DECAY[optimizer] if weight_decay is None else weight_decay
    _check.number(where, "weight_decay", decay, 0, _MOST)
    if not (isinstance(betas, (tuple, list)) and len(betas) == 2):
        raise TypeError(f"{where}: betas must be a pair of numbers, not {_check.describe(betas)}")
    for i, beta in enumerate(betas):
        _check.number(where, f"betas[{i}]", beta, 0, 1)
    _check.number(where, "eps", eps, 0, _MOST)
    _check.number(where, "momentum", momentum, 0, _MOST)
    _check.flag(where, "nesterov", nesterov)
    if nesterov and momentum == 0:
        raise ValueError(f"{where}: nesterov needs a momentum above 0")
    if optimizer == "adamw":
        return [float(decay), *map(float, betas), float(eps)]
    return [float(decay), float(momentum), float(nesterov)]


def _rates(where: str, lr: float | Tensor, networks: int) -> Tensor:
    if not isinstance(lr, Tensor):
        _check.number(where, "lr", lr, 0, _MOST)
        return torch.full((networks,), float(lr), dtype=torch.float64)
    _check.tensor(where, "lr", lr, "[N]", 1)
    _check.floating(where, "lr", lr)
    _check.size(where, "lr", len(lr), networks, "the population")
    _check.finite(where, "lr", lr)
    if (lr < 0).any():
        raise ValueError(f"{where}: lr must not be negative")
    return lr.detach().to("cpu", torch.float64)


def _begin(
    where: str, state: TrainingState | None, optimizer: str, flat: Tensor
) -> tuple[int, Tensor]:
    shape = _MOMENTS[optimizer], *flat.shape
    if state is None:
        return 0, flat.new_zeros(shape)
    if not isinstance(state, TrainingState):
        raise TypeError(f"{where}: state must be a TrainingState, not {_check.describe(state)}")
    if state.moments.shape != shape or state.moments.dtype != flat.dtype:
        raise ValueError(
            f"{where}: state must have {flat.dtype} moments {list(shape)} for {optimizer}, "
            f"not {_check.describe(state.moments)}"
        )
    _check.same_device(where, "state", state.moments, "flat", flat)
    return state.step, state.moments


def _frozen(runner: Runner, model: WeightSpec | nn.Module) -> list[int]:
    """Begins and ends, in a network's row, of what is not trained."""
    if isinstance(model, WeightSpec):
        assert runner.program is not None
        held = {
            name
            for layer in runner.program.layers
            if layer.kind == "batch_norm"
            for name in layer.tensors[2:]
            if name
        }
        spans = {name: (model.offsets[name], shape.numel()) for name, shape in model.shapes.items()}
    else:
        weights = read_weights(model)
        trained = {
            weights.names[name]
            for name, parameter in model.named_parameters(remove_duplicate=False)
            if parameter.requires_grad and name in weights.names
        }
        held = weights.shapes.keys() - trained
        spans = {
            name: (at, math.prod(weights.shapes[name])) for name, at in weights.offsets.items()
        }
    return [
        bound for name, (at, size) in spans.items() if name in held for bound in (at, at + size)
    ]
