"""Stand-ins for :mod:`weightops.population`, with its signatures."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

#: networks evaluated at once
_CHUNK = 64


def population_forward(
    flat: Tensor, model: nn.Module, x: Tensor, *, reduce: str = "logits", targets: Any = None
) -> Tensor:
    """Logits ``[N, B, K]``, or by ``reduce`` ``"loss"``, ``"accuracy"`` (``[N]``) or ``"errors"`` (bool ``[N, B]``)."""
    network = copy.deepcopy(model).eval()

    def run(row: Tensor) -> Tensor:
        logits = functional_call(network, views(row, network), (x,))
        if reduce == "logits":
            return logits
        if reduce == "loss":
            return nn.functional.cross_entropy(logits, targets)
        right = logits.argmax(-1) == targets
        return ~right if reduce == "errors" else right.to(logits.dtype).mean()

    if not len(flat):
        return vmap(run)(flat.new_zeros(1, flat.shape[1]))[:0]
    return vmap(run, chunk_size=_CHUNK)(flat)


def population_train(
    flat: Tensor,
    model: nn.Module,
    data: tuple[Tensor, Tensor],
    *,
    steps: int,
    learning_rate: float = 1e-3,
    batch_size: int = 64,
    seed: int = 0,
    probes: tuple[Tensor, Tensor],
    every: int = 1,
) -> tuple[Tensor, Tensor]:
    """Train with Adam; networks ``[N, P]``, and accuracies on ``probes`` every so many steps, ``[1 + steps // every, N]``."""
    network = copy.deepcopy(model).eval()
    x, targets = data
    names = {name for name, _ in network.named_parameters()}

    def loss(row: Tensor, at: Tensor) -> Tensor:
        state = {k: v if k in names else v.detach() for k, v in views(row, network).items()}
        return nn.functional.cross_entropy(functional_call(network, state, (x[at],)), targets[at])

    generator = torch.Generator().manual_seed(seed)
    weights = flat.detach().clone().requires_grad_()
    optimizer = torch.optim.Adam([weights], learning_rate)
    probed = []
    for step in range(steps + 1):
        if step % every == 0:
            probed.append(
                population_forward(
                    weights.detach(), model, probes[0], reduce="accuracy", targets=probes[1]
                )
            )
        if step < steps and len(flat):
            at = torch.randint(len(x), (len(flat), batch_size), generator=generator).to(x.device)
            with torch.enable_grad():
                total = vmap(loss)(weights, at).sum()
            (weights.grad,) = torch.autograd.grad(total, weights)
            optimizer.step()
    return weights.detach(), torch.stack(probed)


def views(row: Tensor, model: nn.Module) -> dict[str, Tensor]:
    """Tensor of the model -> view of ``row`` ``[..., P]``."""
    tensors = layout(model)
    pieces = row.split([each.numel() for each in tensors.values()], -1)
    return {
        name: piece.reshape((*row.shape[:-1], *each.shape))
        for (name, each), piece in zip(tensors.items(), pieces)
    }


def layout(model: nn.Module) -> dict[str, Tensor]:
    """The model's floating tensors in the order of its state dict, tied ones once: ``WeightSpec.flatten``'s."""
    found: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_floating_point():
            found.setdefault(id(tensor), (name, tensor))
    return dict(found.values())
