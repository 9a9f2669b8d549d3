"""The definition of a population's forward: one network's layers in plain torch, mapped over networks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from weightops.ops.population.program import decode


def run(row: Tensor, x: Tensor, code: Sequence[int]) -> Tensor:
    """One network: ``row [P]``, ``x [B, *taken]`` -> ``[B, *made]``, flattened to ``[B, K]``."""
    _, layers = decode(code)
    values = [x]
    for layer in layers:
        taken = [values[i].reshape(len(x), *layer["taken"]) for i in layer["inputs"]]
        values.append(apply(layer, row, *taken))
    return values[-1].reshape(len(x), prod(layers[-1]["made"]))


def run_training(
    row: Tensor, x: Tensor, code: Sequence[int], share: Callable[[float | None], float]
) -> tuple[Tensor, Tensor]:
    """:func:`run` with batch norm by the batch's own statistics.

    Args:
        share: of a batch norm's momentum: how far its running statistics move towards the batch's.

    Returns:
        ``[B, K]``, and ``row`` with running statistics moved (variances unbiased).
    """
    _, layers = decode(code)
    values, moved = [x], row.detach().clone()
    for layer in layers:
        taken = [values[i].reshape(len(x), *layer["taken"]) for i in layer["inputs"]]
        if layer["kind"] == "batch_norm":
            variance, mean = torch.var_mean(taken[0].detach(), (0, 2, 3))
            by = share(layer["momentum"])
            for place, found in zip(layer["places"][2:], (mean, variance), strict=True):
                kept = moved[place : place + len(found)]
                moved[place : place + len(found)] = (1 - by) * kept + by * found
        values.append(apply(layer, row, *taken, training=True))
    return values[-1].reshape(len(x), prod(layers[-1]["made"])), moved


def apply(layer: dict, row: Tensor, x: Tensor, *others: Tensor, training: bool = False) -> Tensor:
    """What a layer makes of ``x [B, C, H, W]`` (or of any shape, elementwise)."""
    kind, (channels, height, width) = layer["kind"], layer["taken"]
    outputs, settings = layer["made"][0], layer["settings"]

    def tensor(which: int, *shape: int) -> Any:
        at = layer["places"][which]
        return None if at < 0 else row[at : at + prod(shape)].view(shape)

    if kind == "add":
        return x + others[0]
    if kind == "linear":
        return F.linear(x.view(len(x), channels), tensor(0, outputs, channels), tensor(1, outputs))[
            ..., None, None
        ]
    if kind == "conv":
        kernel, groups = settings[:2], settings[8]
        weight = tensor(0, outputs, channels // groups, *kernel)
        return F.conv2d(
            x, weight, tensor(1, outputs), settings[2:4], settings[4:6], settings[6:8], groups
        )
    if kind == "max_pool":
        return F.max_pool2d(x, settings[:2], settings[2:4], settings[4:6], settings[6:8])
    if kind == "average_pool":
        return F.avg_pool2d(
            x, settings[:2], settings[2:4], settings[4:6], count_include_pad=settings[8] == 1
        )
    if kind == "batch_norm":
        weight, bias, eps = tensor(0, channels), tensor(1, channels), layer["eps"]
        if training:
            return F.batch_norm(x, None, None, weight, bias, training=True, eps=eps)
        # Running statistics are data, not parameters: nothing is differentiated by them.
        mean, variance = tensor(2, channels).detach(), tensor(3, channels).detach()
        return F.batch_norm(x, mean, variance, weight, bias, eps=eps)
    if kind == "group_norm":
        return F.group_norm(
            x, settings[0], tensor(0, channels), tensor(1, channels), eps=layer["eps"]
        )
    if kind == "layer_norm":
        shape = [channels, height, width]
        return F.layer_norm(x, shape, tensor(0, *shape), tensor(1, *shape), eps=layer["eps"])
    if kind == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    return {"relu": torch.relu, "silu": F.silu, "gelu": F.gelu, "tanh": torch.tanh}[kind](x)


def population_logits(flat: Tensor, x: Tensor, code: Sequence[int], shared: bool) -> Tensor:
    """``flat [N, P]``, ``x [B, ...]`` (``shared``) or ``[N, B, ...]`` -> logits ``[N, B, K]``."""
    if not len(flat):
        made = decode(code)[1][-1]["made"]
        return flat.new_zeros(0, x.shape[0 if shared else 1], prod(made))
    rows = torch.func.vmap(lambda row, own: run(row, own, code), (0, None if shared else 0))
    return rows(flat, x)


def reduce(logits: Tensor, targets: Tensor, to: str) -> Tensor:
    """Logits ``[N, B, K]`` and targets (classes ``[N, B]``, or values ``[N, B, K]`` of a mean squared
    error) -> mean losses or accuracies ``[N]``, or which predictions are wrong ``[N, B]``."""
    if to == "loss":
        if targets.is_floating_point():
            return (logits - targets).square().mean((1, 2))
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        return losses.view(targets.shape).mean(1)
    wrong = logits.argmax(2) != targets
    return wrong if to == "errors" else 1 - wrong.to(logits.dtype).mean(1)
