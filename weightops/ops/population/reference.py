"""The definition of a population's forward: one network's layers in plain torch, mapped over networks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
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
    for layer, tensors in zip(layers, cut(row, layers), strict=True):
        taken = [values[i].reshape(len(x), *layer["taken"]) for i in layer["inputs"]]
        values.append(apply(layer, tensors, *taken))
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
    for layer, tensors in zip(layers, cut(row, layers), strict=True):
        taken = [values[i].reshape(len(x), *layer["taken"]) for i in layer["inputs"]]
        if layer["kind"] == "batch_norm":
            variance, mean = torch.var_mean(taken[0].detach(), (0, 2, 3))
            by = share(layer["momentum"])
            for place, found in zip(layer["places"][2:], (mean, variance), strict=True):
                kept = moved[place : place + len(found)]
                moved[place : place + len(found)] = (1 - by) * kept + by * found
        values.append(apply(layer, tensors, *taken, training=True))
    return values[-1].reshape(len(x), prod(layers[-1]["made"])), moved


def share_at(step: int) -> Callable[[float | None], float]:
    """How far running statistics move in a step, counted from 1; without a momentum they are means of all."""
    return lambda momentum: 1 / step if momentum is None else momentum


def cut(flat: Tensor, layers: Sequence[dict]) -> list[list[Tensor | None]]:
    """Per layer its tensors ``[..., *shape]`` of ``flat [..., P]``, ``None`` where it has none.

    Of one split, whose gradient is written once; slices' would be summed over all of P each.
    """
    shapes = [_shapes(layer) for layer in layers]
    ends = {
        at: at + prod(shape)
        for layer, known in zip(layers, shapes, strict=True)
        for at, shape in zip(layer["places"], known, strict=False)
        if at >= 0
    }
    bounds = sorted({0, flat.shape[-1], *ends, *ends.values()})
    pieces = flat.split([end - begin for begin, end in pairwise(bounds)], -1)
    of_place = dict(zip(bounds, pieces, strict=False))
    return [
        [
            of_place[at].unflatten(-1, shape) if at >= 0 else None
            for at, shape in zip(layer["places"], known, strict=False)
        ]
        for layer, known in zip(layers, shapes, strict=True)
    ]


def _shapes(layer: dict) -> list[tuple[int, ...]]:
    """Of weight and bias, then of running mean and variance, or of the embedding."""
    kind, (channels, *size), outputs = layer["kind"], layer["taken"], layer["made"][0]
    if kind == "linear":
        return [(outputs, channels), (outputs,)]
    if kind == "token_pair":
        tokens, features = layer["settings"][:2]
        return [(outputs, 2 * features), (outputs,), (tokens, features)]
    if kind == "conv":
        return [(outputs, channels // layer["settings"][8], *layer["settings"][:2]), (outputs,)]
    if kind == "layer_norm":
        return [(channels, *size)] * 2
    return [(channels,)] * {"batch_norm": 4, "group_norm": 2}.get(kind, 0)


def apply(
    layer: dict,
    tensors: Sequence[Any],
    x: Tensor,
    *others: Tensor,
    training: bool = False,
    lanes: int = 1,
) -> Tensor:
    """What a layer with its tensors makes of ``x [B, C, H, W]`` (or of any shape, elementwise).

    Of several ``lanes`` in the channels, one network's behind the other's, each has groups of its own.
    """
    kind, settings, eps = layer["kind"], layer["settings"], layer["eps"]
    found: Any = tensors[:2] or (None, None)
    weight, bias = found
    if kind == "add":
        return x + others[0]
    if kind == "linear":
        return F.linear(x.flatten(1), weight, bias)[..., None, None]
    if kind == "token_pair":
        embedded = F.embedding(x.flatten(1).long(), tensors[2])
        return F.linear(embedded.flatten(1), weight, bias)[..., None, None]
    if kind == "conv":
        groups = settings[8] * lanes
        return F.conv2d(x, weight, bias, settings[2:4], settings[4:6], settings[6:8], groups)
    if kind == "max_pool":
        return F.max_pool2d(x, settings[:2], settings[2:4], settings[4:6], settings[6:8])
    if kind == "average_pool":
        return F.avg_pool2d(
            x, settings[:2], settings[2:4], settings[4:6], count_include_pad=settings[8] == 1
        )
    if kind == "batch_norm":
        if training:
            return F.batch_norm(x, None, None, weight, bias, training=True, eps=eps)
        # Running statistics are data, not parameters: nothing is differentiated by them.
        mean, variance = (each.detach() for each in tensors[2:])
        return F.batch_norm(x, mean, variance, weight, bias, eps=eps)
    if kind == "group_norm":
        return F.group_norm(x, settings[0] * lanes, weight, bias, eps)
    if kind == "layer_norm":
        return F.layer_norm(x, layer["taken"], weight, bias, eps)
    if kind == "sine":
        return torch.sin(x if eps == 1 else eps * x)
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
    error) -> mean losses or accuracies ``[N]``, or both ``[N, 2]``: ``"scores"``, or which predictions are
    wrong ``[N, B]``."""
    if to == "scores":
        return torch.stack([reduce(logits, targets, each) for each in ("loss", "accuracy")], 1)
    if to == "loss":
        if targets.is_floating_point():
            return (logits - targets).square().mean((1, 2))
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        return losses.view(targets.shape).mean(1)
    wrong = logits.argmax(2) != targets
    return wrong if to == "errors" else 1 - wrong.to(logits.dtype).mean(1)


def own_targets(targets: Tensor) -> bool:
    """Whether every network has targets of its own."""
    return targets.dim() == (3 if targets.is_floating_point() else 2)


def for_each(targets: Tensor, networks: int) -> Tensor:
    """Targets with the networks in front."""
    return targets if own_targets(targets) else targets.expand(networks, *targets.shape)
