"""Statistics of merged networks estimated anew: batch norm's (reset) and every unit's (REPAIR)."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from weightops import _check
from weightops.ops.permute import merge
from weightops.spec import WeightSpec

#: layers that are linear in their weights, and whose units lie on the first axis of these
LINEAR = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
# Below this share of the goal a standard deviation is rounding.
_DEAD = 1e-6


@torch.no_grad()
def reset_batch_norm(
    model: nn.Module, inputs: Tensor, batch_size: int, *, where: str = "reset_batch_norm"
) -> None:
    """Estimate the running statistics of every batch norm in ``model`` anew, over all of ``inputs``.

    Raises:
        ValueError: a batch has one value a channel.
    """
    if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()):
        with _estimating(where, model):
            for batch in _batches(inputs, batch_size):
                model(batch)


@torch.no_grad()
def repair(
    model: nn.Module,
    spec: WeightSpec,
    corners: Tensor,
    weights: Tensor | Sequence,
    inputs: Tensor,
    *,
    batch_size: int = 1000,
) -> Tensor:
    """Merge networks, and give each unit of the result the mean and deviation that theirs merge to.

    A unit's pre-activation gets the mean ``sum_m weights[m] mean_m`` and the standard deviation
    ``sum_m weights[m] std_m``, of the same inputs at the corners; layer by layer, so that each sees
    repaired ones before it. Linear layers and convolutions take the correction into weight and
    bias; those that a batch norm reads are left alone, and batch norms' statistics are estimated
    anew. Statistics of several batches are averaged. A corner itself stays what it is, but for its
    batch norms.

    Args:
        model: the architecture; it is copied, and neither its weights nor its mode change.
        spec: layout of its weights.
        corners: networks ``[M, P]``; align them first (:func:`weightops.align.match`).
        weights: ``[M]``, or ``[L, M]`` for L merges, as for :func:`weightops.merge`.
        inputs: ``[B, ...]`` inputs of the model, such as a thousand training samples.
        batch_size: inputs evaluated at once.

    Returns:
        ``[P]`` or ``[L, P]``.

    Source: Jordan et al. 2022, "REPAIR" (arXiv 2211.08403), section 3.

    Raises:
        ValueError: shapes or devices do not fit; a layer has no bias, or shares its weights; a batch
            has one value a unit.
        TypeError: an argument has the wrong type or dtype.
    """
    where = "repair"
    check_network(where, model, spec)
    spec.check_flat(where, corners, "corners", dims=2)
    _check.floating(where, "corners", corners)
    check_examples(where, "inputs", inputs)
    _check.count(where, "batch_size", batch_size)
    merged = merge(corners, weights, spec)
    if not isinstance(weights, Tensor):
        weights = torch.as_tensor(weights, dtype=torch.float64)
    shares = shares_of(weights, corners).view(-1, len(corners))
    network = copy.deepcopy(model).eval()
    units = UnitStatistics(where, network, spec, corners, inputs, batch_size)
    repaired = []
    for row, share in zip(merged.view(-1, spec.numel), shares, strict=True):
        spec.load_(network, row)
        units.repair_(network, share)
        repaired.append(spec.flatten(network))
    return torch.cat(repaired).view(merged.shape)


def check_network(where: str, model: Any, spec: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{where}: model must be a module, not {_check.describe(model)}")
    if not isinstance(spec, WeightSpec):
        raise TypeError(f"{where}: spec must be a WeightSpec, not {_check.describe(spec)}")


def check_examples(where: str, name: str, inputs: Any) -> None:
    _check.tensor(where, name, inputs, "[B, ...]")
    if inputs.dim() == 0 or len(inputs) == 0:
        raise ValueError(f"{where}: {name} must hold examples, not shape {list(inputs.shape)}")


def shares_of(weights: Tensor, corners: Tensor) -> Tensor:
    """``weights`` on the corners' device, in the dtype that sums of corners are taken in."""
    return weights.to(corners.device, torch.promote_types(corners.dtype, torch.float32))


class UnitStatistics:
    """Means and deviations of every unit at the corners, for REPAIR of the networks between them."""

    def __init__(
        self,
        where: str,
        network: nn.Module,
        spec: WeightSpec,
        corners: Tensor,
        inputs: Tensor,
        batch_size: int,
    ) -> None:
        self.where, self.batches = where, _batches(inputs, batch_size)
        self.layers: dict[str, Any] = {
            name: layer for name, layer in network.named_modules() if isinstance(layer, LINEAR)
        }
        found = []
        for row in corners:
            spec.load_(network, row)
            found.append(self._observe(network))
        self.layers = {name: self.layers[name] for name in found[0]}
        self._refuse(network)
        for name in self.layers:
            if len({len(each.get(name, ())) for each in found}) > 1:
                raise self._uneven(name)
        #: layer -> [M, calls, 2, units]
        self.corners = {
            name: torch.stack([torch.stack(each[name]) for each in found]) for name in self.layers
        }

    def repair_(self, network: nn.Module, share: Tensor) -> None:
        """Repair ``network``, which holds the corners' merge by ``share`` [M], in place."""
        goals = {name: torch.tensordot(share, each, 1) for name, each in self.corners.items()}
        found: dict[str, list[Tensor]] = {name: [] for name in self.layers}

        def correct(name: str, layer: nn.Module, args: Any, output: Tensor) -> Tensor:
            if len(found[name]) == len(goals[name]):
                raise self._uneven(name)
            goal = goals[name][len(found[name])]
            found[name].append(self._moments(name, layer, output))
            scale, shift = _correction(found[name][-1], goal)
            axis = _unit_axis(layer, output)
            shape = [-1 if each == axis else 1 for each in range(output.dim())]
            return (output * scale.view(shape) + shift.view(shape)).to(output.dtype)

        self._run(network, correct)
        for name, layer in self.layers.items():
            if len(found[name]) != len(goals[name]):
                raise self._uneven(name)
            scale, shift = _correction(torch.stack(found[name]).mean(0), goals[name].mean(0))
            weight, bias = layer.weight, layer.bias
            weight.mul_(scale.view(-1, *[1] * (weight.dim() - 1)))
            bias.mul_(scale).add_(shift)

    def _observe(self, network: nn.Module) -> dict[str, list[Tensor]]:
        """Layer -> per call the mean and deviation of its units, [2, units], of those no batch norm reads."""
        found: dict[str, list[Tensor]] = {}
        made, normed = WeakIdKeyDictionary(), set()

        def observe(name: str, layer: nn.Module, args: Any, output: Tensor) -> None:
            found.setdefault(name, []).append(self._moments(name, layer, output))
            made[output] = name

        with ExitStack() as stack:
            for norm in _batch_norms(network).values():
                handle = norm.register_forward_pre_hook(
                    lambda norm, args: normed.add(made.get(args[0]))
                )
                stack.callback(handle.remove)
            self._run(network, observe)
        return {name: calls for name, calls in found.items() if name not in normed}

    def _run(self, network: nn.Module, hook: Callable[..., Tensor | None]) -> None:
        with ExitStack() as stack:
            stack.enter_context(_estimating(self.where, network))
            for name, layer in self.layers.items():
                stack.callback(layer.register_forward_hook(partial(hook, name)).remove)
            for batch in self.batches:
                network(batch)

    def _moments(self, name: str, layer: nn.Module, output: Tensor) -> Tensor:
        axis = _unit_axis(layer, output)
        if output.numel() <= output.shape[axis]:
            raise _too_small(self.where, name, output)
        others = [each for each in range(output.dim()) if each != axis]
        wide = output.to(torch.promote_types(output.dtype, torch.float32))
        std, mean = torch.std_mean(wide, others, correction=0)
        return torch.stack([mean, std])

    def _refuse(self, network: nn.Module) -> None:
        uses = Counter(id(p) for _, p in network.named_parameters(remove_duplicate=False))
        for name, layer in self.layers.items():
            own = layer._parameters
            if own.get("weight") is None or own.get("bias") is None:
                raise ValueError(
                    f"{self.where}: {name} has no {'bias' if 'weight' in own else 'weight'} of its "
                    "own that takes up the correction, nor does a batch norm read it"
                )
            if any(uses[id(p)] > 1 for p in own.values()):
                raise ValueError(
                    f"{self.where}: {name} shares its weights with another layer, "
                    "which the correction would change"
                )

    def _uneven(self, name: str) -> ValueError:
        return ValueError(
            f"{self.where}: {name} is called more often by some networks than by others, "
            "so that its statistics can't be compared"
        )


def _correction(found: Tensor, goal: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and shift that turn means and deviations ``found`` [2, units] into ``goal``."""
    alive = found[1] > _DEAD * goal[1]
    scale = torch.where(alive, goal[1] / found[1], 1)
    return scale, goal[0] - scale * found[0]


def _unit_axis(layer: nn.Module, output: Tensor) -> int:
    return output.dim() - 1 if isinstance(layer, nn.Linear) else 1


def _batch_norms(model: nn.Module) -> dict[str, nn.modules.batchnorm._BatchNorm]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
    }


@contextmanager
def _estimating(where: str, model: nn.Module) -> Iterator[None]:
    """Within, batch norms use each batch's statistics; they end up with the batches' plain mean."""

    def check(name: str, norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        if args[0].numel() <= args[0].shape[1]:
            raise _too_small(where, name, args[0])

    norms = _batch_norms(model)
    momenta = {name: norm.momentum for name, norm in norms.items()}
    with ExitStack() as stack:
        for name, norm in norms.items():
            norm.reset_running_stats()
            norm.momentum = None
            norm.train()
            stack.callback(norm.register_forward_pre_hook(partial(check, name)).remove)
        try:
            yield
        finally:
            for name, norm in norms.items():
                norm.momentum = momenta[name]
                norm.eval()


def _too_small(where: str, name: str, given: Tensor) -> ValueError:
    return ValueError(
        f"{where}: a batch gives {name} a tensor of shape {list(given.shape)}, one value a unit, "
        "which has no statistics; pass more inputs, or a larger batch_size"
    )


def _batches(inputs: Tensor, batch_size: int) -> tuple[Tensor, ...]:
    """Batches of ``batch_size`` at most, none much smaller than the others: each counts the same."""
    return inputs.tensor_split(max(1, ceil(len(inputs) / batch_size)))
