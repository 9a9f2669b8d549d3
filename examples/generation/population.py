"""Many networks of one architecture at once: wrong predictions, and training in batched torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, cross_entropy

from weightops import WeightSpec
from weightops.population import population_forward


def logits(flat: Tensor, spec: WeightSpec, model: nn.Sequential, images: Tensor) -> Tensor:
    """``[N, B, K]`` of networks ``[N, P]`` for ``[B, C, H, W]``, or ``[N, B, C, H, W]`` one by one."""
    n, weights = len(flat), spec.unflatten(flat)
    h = images if images.dim() == 5 else images.expand(n, *images.shape)
    for name, layer in model.named_children():
        if isinstance(layer, nn.Linear):
            weight, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
            h = torch.baddbmm(bias[:, None], h, weight.mT)
        elif isinstance(layer, nn.Conv2d):
            weight, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
            # Each network is a group of [B, N C, H, W].
            h = conv2d(
                h.transpose(0, 1).flatten(1, 2),
                weight.flatten(0, 1),
                bias.flatten(),
                padding=layer.padding,
                groups=n,
            )
            h = h.unflatten(1, (n, -1)).transpose(0, 1)
        else:
            h = layer(h.flatten(0, 1)).unflatten(0, h.shape[:2])
    return h


def errors(flat: Tensor, model: nn.Sequential, images: Tensor, classes: Tensor) -> Tensor:
    """Which predictions are wrong, bool ``[N, B]``."""
    return population_forward(flat, model, images, reduce="errors", targets=classes)


def accuracy(flat: Tensor, model: nn.Sequential, images: Tensor, classes: Tensor) -> Tensor:
    """``[N]``."""
    return population_forward(flat, model, images, reduce="accuracy", targets=classes)


def train(
    flat: Tensor,
    spec: WeightSpec,
    model: nn.Sequential,
    images: Tensor,
    classes: Tensor,
    tasks: Tensor,
    *,
    steps: Sequence[int],
    seed: int,
    batch: int = 64,
    rate: float = 3e-3,
) -> list[Tensor]:
    """Networks ``[N, P]`` after each of ``steps`` of Adam from ``flat``; 0 is the start.

    Network n learns ``images[tasks[n]]`` ``[B, C, H, W]`` of ``classes[tasks[n]]`` ``[B]``.
    """
    weights = flat.clone().requires_grad_()
    optimizer = torch.optim.Adam([weights], lr=rate, fused=True)
    generator = torch.Generator().manual_seed(seed)
    found = []
    for step in range(max(steps) + 1):
        if step in steps:
            found.append(weights.detach().clone())
        if step == max(steps):
            break
        rows = torch.randint(images.shape[1], (len(flat), batch), generator=generator)
        at = tasks[:, None], rows
        predicted = logits(weights, spec, model, images[at])
        optimizer.zero_grad()
        loss = cross_entropy(predicted.flatten(0, 1), classes[at].flatten(), reduction="sum")
        (loss / batch).backward()
        optimizer.step()
    return found
