"""A population's forward and gradients batched over networks: what runs where there is no kernel.

A value is ``[B, N, ...]``, or ``[B, 1, ...]`` while it is the same for all networks, as samples are that they
share: its linear layer or convolution is one wide one of all networks. Own values go through one batched
product, or through one convolution of N groups.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from weightops.ops.population import reference
from weightops.ops.population.program import decode
from weightops.ops.token_pair import token_pair_add
from weightops.ops.token_pair.reference import tables

#: ``(x [B, I], weight [O, I], bias [O] or None) -> [B, O]``
Product = Callable[[Tensor, Tensor, Any], Tensor]


def population_logits(
    flat: Tensor, x: Tensor, code: Sequence[int], shared: bool, product: Product = F.linear
) -> Tensor:
    """As :func:`reference.population_logits`; ``product`` makes the wide linear layers."""
    return _run(flat, x, code, shared, product=product)[0]


def losses(flat: Tensor, x: Tensor, targets: Tensor, code: Sequence[int], shared: bool) -> Tensor:
    """Mean losses ``[N]``."""
    logits = population_logits(flat, x, code, shared)
    return reference.reduce(logits, reference.for_each(targets, len(flat)), "loss")


def population_loss_grad(
    flat: Tensor, x: Tensor, targets: Tensor, code: Sequence[int], shared: bool
) -> tuple[Tensor, Tensor]:
    """Mean losses ``[N]`` and their gradients ``[N, P]``, in eval mode."""
    return _grad(flat, x, targets, code, shared)[:2]


def population_train_grad(
    flat: Tensor, x: Tensor, targets: Tensor, code: Sequence[int], shared: bool, step: int
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`training_reference.population_train_grad`."""
    return _grad(flat, x, targets, code, shared, reference.share_at(step))


def _grad(
    flat: Tensor, x: Tensor, targets: Tensor, code: Sequence[int], shared: bool, share: Any = None
) -> tuple[Tensor, Tensor, Tensor]:
    def total(flat: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        logits, moved = _run(flat, x, code, shared, share)
        each = reference.reduce(logits, reference.for_each(targets, len(flat)), "loss")
        return each.sum(), (each, moved)

    # The sum's gradient is each network's own: no loss depends on another's weights.
    grads, (_, (each, moved)) = torch.func.grad_and_value(total, has_aux=True)(flat)
    return each, grads, moved


def _run(
    flat: Tensor,
    x: Tensor,
    code: Sequence[int],
    shared: bool,
    share: Callable[[float | None], float] | None = None,
    product: Product = F.linear,
) -> tuple[Tensor, Tensor]:
    """Logits ``[N, B, K]``; with ``share`` as :func:`reference.run_training`, and ``flat`` with statistics moved."""
    _, layers = decode(code)
    samples, outputs, moved = x.shape[0 if shared else 1], prod(layers[-1]["made"]), flat
    if not len(flat):
        return flat.new_zeros(0, samples, outputs), flat
    if share is not None:
        moved = flat.detach().clone()
    values = [x[:, None] if shared else x.transpose(0, 1)]
    for layer, tensors in zip(layers, reference.cut(flat, layers), strict=True):
        read = [values[i] for i in layer["inputs"]]
        taken = [each.reshape(*each.shape[:2], *layer["taken"]) for each in read]
        if share is not None and layer["kind"] == "batch_norm":
            variance, mean = torch.var_mean(taken[0].detach(), (0, 3, 4))
            for place, found in zip(layer["places"][2:], (mean, variance), strict=True):
                kept = moved[:, place : place + found.shape[1]]
                kept.lerp_(found.expand_as(kept), share(layer["momentum"]))
        made = _apply(
            layer,
            tensors,
            *taken,
            networks=len(flat),
            training=share is not None,
            product=product,
        )
        values.append(made)
    made = values[-1].reshape(samples, values[-1].shape[1], outputs)
    return made.expand(-1, len(flat), -1).transpose(0, 1).contiguous(), moved


def _apply(
    layer: dict,
    tensors: Sequence[Any],
    x: Tensor,
    *others: Tensor,
    networks: int,
    training: bool,
    product: Product,
) -> Tensor:
    """What a layer makes of ``x [B, N or 1, C, H, W]``: ``[B, N or 1, ...]``."""
    kind, lanes = layer["kind"], x.shape[1]
    if kind == "linear":
        weight, bias = tensors
        if lanes == 1:
            stacked = None if bias is None else bias.flatten()
            return product(x.flatten(1), weight.flatten(0, 1), stacked).unflatten(1, (networks, -1))
        rows = x.flatten(2).transpose(0, 1)
        made = rows @ weight.mT if bias is None else torch.baddbmm(bias[:, None], rows, weight.mT)
        return made.transpose(0, 1)
    if kind == "token_pair":
        weight, bias, embedding = tensors
        pairs = x.detach().flatten(2).transpose(0, 1).long()
        return token_pair_add(tables(embedding, weight, bias), pairs).transpose(0, 1)
    if kind == "layer_norm":
        weight, bias = tensors
        made = reference.apply(layer, (), x)
        made = made if weight is None else made * weight
        return made if bias is None else made + bias
    if kind not in ("conv", "max_pool", "average_pool", "batch_norm", "group_norm"):
        return reference.apply(layer, (), x, *others)
    wide = kind == "conv" and layer["settings"][8] == 1 and lanes == 1
    if not wide and any(each is not None for each in tensors):
        lanes = networks
        x = x.expand(-1, lanes, -1, -1, -1)
    stacked = [None if each is None else each.flatten(0, 1) for each in tensors]
    made = reference.apply(layer, stacked, x.flatten(1, 2), training=training, lanes=lanes)
    return made.unflatten(1, (-1, layer["made"][0]))
