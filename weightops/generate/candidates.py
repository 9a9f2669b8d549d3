"""Candidates evaluated, selected, fine-tuned, and compared with the best network of a zoo."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from weightops import _check
from weightops.generate._arguments import check_dtype, check_population, in_order_of, named
from weightops.generate.zoo import Zoo
from weightops.population import population_batchnorm, population_train
from weightops.population.forward import loss_and_accuracy

#: networks of a zoo that are in memory at once, and their weights
_NETWORKS, _WEIGHTS = 256, 2**24


class Scores(NamedTuple):
    """Accuracy and mean cross-entropy of N networks, ``[N]`` each."""

    accuracy: Tensor
    loss: Tensor


@dataclass(frozen=True)
class Retrieved:
    """The best network of a zoo on a task: its place, its weights ``[P]``, accuracy and loss."""

    index: int
    flat: Tensor
    accuracy: float
    loss: float


class FineTuned(NamedTuple):
    """Networks ``[N, P]`` after the last step, and accuracies ``[len(steps), N]``."""

    flat: Tensor
    accuracy: Tensor


@torch.no_grad()
def evaluate(flat: Tensor, model: nn.Module, x: Tensor, targets: Tensor) -> Scores:
    """Accuracy and mean cross-entropy ``[N]`` of all networks at once, in evaluation mode.

    Args:
        flat: networks ``[N, P]``, laid out as ``model``'s state dict, float32 or float64.
        model: the architecture; it does not change.
        x: ``[B, ...]``, or each network's own ``[N, B, ...]``.
        targets: int64 classes ``[B]`` or ``[N, B]``.

    Raises:
        ValueError: shapes or devices do not fit, a target is out of range, or there are no examples.
        TypeError: an argument has the wrong type or dtype.
    """
    return scores_of("evaluate", flat, model, x, targets)


def scores_of(where: str, flat: Tensor, model: Any, x: Any, targets: Any) -> Scores:
    check_population(where, flat, model)
    if isinstance(x, Tensor) and 0 in x.shape[:1]:
        raise ValueError(f"{where}: x must hold examples, not shape {list(x.shape)}")
    if not len(flat):
        one = scores_of(where, flat.new_zeros(1, flat.shape[1]), model, x, targets)
        return Scores(one.accuracy[:0], one.loss[:0])
    with named(where):
        loss, accuracy = loss_and_accuracy(flat, model, x, targets).unbind(1)
    return Scores(accuracy, loss)


def networks_at_once(numel: int) -> int:
    return max(1, min(_NETWORKS, _WEIGHTS // max(1, numel)))


def select(flat: Tensor, scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` networks ``[k, P]`` with the highest ``scores`` ``[N]``, best first, and their places ``[k]``.

    Of equal scores the first comes first; NaN comes last.

    Raises:
        ValueError: shapes do not fit, or ``k`` is not in 1 .. N.
        TypeError: an argument has the wrong type or dtype.
    """
    where = "select"
    _check.tensor(where, "flat", flat, "[N, P]", 2)
    check_dtype(where, "flat", flat)
    _check.tensor(where, "scores", scores, "[N]", 1)
    check_dtype(where, "scores", scores)
    _check.size(where, "scores", len(scores), len(flat), "flat's axis 0")
    _check.same_device(where, "scores", scores, "flat", flat)
    _check.count(where, "k", k)
    if k > len(flat):
        raise ValueError(f"{where}: k is {k}, but flat has {len(flat)} networks")
    order = scores.nan_to_num(-torch.inf, torch.inf, -torch.inf).argsort(
        descending=True, stable=True
    )
    return flat[order[:k]], order[:k]


@torch.no_grad()
def retrieve(zoo: Zoo, model: nn.Module, x: Tensor, targets: Tensor) -> Retrieved:
    """The network of ``zoo`` with the highest accuracy on a task; of equal ones that of least loss.

    The baseline that generated networks are to beat. ``zoo.select`` narrows it.

    Args:
        zoo: a zoo of ``model``'s architecture.
        model: the architecture; its layout need not be the zoo's.
        x, targets: ``[B, ...]`` and int64 classes ``[B]``.

    Raises:
        ValueError: shapes or devices do not fit, a target is out of range, or there are no examples.
        TypeError: an argument has the wrong type or dtype.
    """
    where = "retrieve"
    if not isinstance(zoo, Zoo):
        raise TypeError(f"{where}: zoo must be a Zoo, not {_check.describe(zoo)}")
    found = [
        scores_of(where, in_order_of(where, model, zoo.spec, flat), model, x, targets)
        for flat, _ in zoo.batches(networks_at_once(zoo.spec.numel))
    ]
    accuracy, loss = (torch.cat(each) for each in zip(*found))
    highest = (accuracy == accuracy.max()).nonzero()[:, 0]
    best = highest[loss[highest].nan_to_num(torch.inf).argmin()]
    index = int(best)
    return Retrieved(index, zoo[index], accuracy[best].item(), loss[best].item())


def fine_tune(
    flat: Tensor,
    model: nn.Module,
    data: tuple[Tensor, Tensor],
    steps: Sequence[int],
    *,
    test: tuple[Tensor, Tensor],
    learning_rate: float = 1e-3,
    batch_size: int = 64,
    seed: int = 0,
) -> FineTuned:
    """Train all networks alike with Adam, and measure their accuracy after given numbers of steps.

    Batch norm goes by the batches' own statistics, and those in the networks are then re-estimated on ``data``.

    Args:
        flat: networks ``[N, P]``, laid out as ``model``'s state dict.
        model: the architecture; it does not change.
        data: ``x`` ``[B, ...]`` and int64 classes ``[B]`` to train on.
        steps: after which accuracy is measured, ascending; 0 is before the first.
        test: ``x`` and classes to measure it on.
        learning_rate: of Adam, in (0, 1].
        batch_size: examples a step, at most all; in an order of every network's own, anew each epoch.
        seed: of the batches.

    Raises:
        ValueError: shapes or devices do not fit, a number or a target is out of range.
        TypeError: an argument has the wrong type or dtype.
    """
    where = "fine_tune"
    check_population(where, flat, model)
    for name, each in (("data", data), ("test", test)):
        if not isinstance(each, (tuple, list)) or len(each) != 2:
            raise TypeError(f"{where}: {name} must be (x, targets), not {_check.describe(each)}")
        scores_of(f"{where}: {name}", flat[:1], model, *each)
    if isinstance(steps, (str, bytes)) or not isinstance(steps, Sequence):
        raise TypeError(f"{where}: steps must be a list of integers, not {_check.describe(steps)}")
    for n, step in enumerate(steps):
        _check.count(where, f"steps[{n}]", step, 0)
    if not steps or list(steps) != sorted(set(steps)):
        raise ValueError(f"{where}: steps must ascend, and be one or more, not {list(steps)}")
    _check.number(where, "learning_rate", learning_rate, 1e-30, 1 + 1e-9)
    _check.count(where, "batch_size", batch_size)
    _check.seed(where, seed)
    norms = any(isinstance(module, _BatchNorm) for module in model.modules())
    state, done, accuracy = None, 0, []
    for step in steps:
        with named(where):
            trained = population_train(
                flat,
                model,
                data,
                steps=step - done,
                lr=learning_rate,
                weight_decay=0.0,
                batch_size=min(batch_size, len(data[0])),
                seed=seed,
                state=state,
                progress=False,
            )
        flat, state, done = trained.flat, trained.state, step
        measured = population_batchnorm(flat, model, data[0]) if norms and step else flat
        accuracy.append(scores_of(where, measured, model, *test).accuracy)
    return FineTuned(measured, torch.stack(accuracy))
