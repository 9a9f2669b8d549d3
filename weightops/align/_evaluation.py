"""Losses of the networks between corner networks: the engine of barrier and barrier_simplex."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from weightops import _check, _load
from weightops._progress import track
from weightops.align.statistics import (
    LINEAR,
    UnitStatistics,
    check_examples,
    check_model,
    reset_batch_norm,
    shares_of,
)
from weightops.ops.manifold import manifold_linear, synthesize
from weightops.ops.permute import merge
from weightops.spec import WeightSpec

Loss = Callable[[Any, Tensor], Tensor]
# Bytes of layers' outputs at the corners that may be kept.
_BUDGET = 2**29
# To mix an output of a layer takes as long as so many of its products, for every corner.
_MIX = 32
# Products that our kernel computes faster than torch, to no larger error: measured on AVX-512.
_FEWEST_PRODUCTS, _FEWEST_OUTPUTS, _MOST_INPUTS = 2**25, 64, 1024


@torch.no_grad()
def evaluate(
    where: str,
    model: nn.Module,
    spec: WeightSpec,
    corners: Tensor,
    weights: Tensor,
    inputs: Tensor,
    targets: Tensor,
    *,
    loss: Loss | None,
    batch_size: int,
    norm_inputs: Tensor | None,
    norm: str,
    progress: bool,
) -> tuple[Tensor, Tensor]:
    """Mean losses and errors ``[L]``, float64 on the CPU, of the networks ``weights @ corners``.

    ``weights`` is float64 ``[L, M]``, ``corners`` ``[M, P]``, both checked; the rest is what
    :func:`weightops.align.barrier` takes, and checked here but for types of model and spec.
    """
    _check_data(where, inputs, targets, loss, norm_inputs)
    _check.count(where, "batch_size", batch_size)
    _check.flag(where, "progress", progress)
    _check.choice(where, "norm", norm, ("reset", "repair"))
    if norm == "repair" and norm_inputs is None:
        raise ValueError(f"{where}: norm='repair' needs norm_inputs to take statistics of")
    network = copy.deepcopy(model).eval()
    check_model(where, network, spec, corners, inputs)
    units = None
    data = [inputs]
    if norm_inputs is not None:
        data.append(norm_inputs)
        if norm == "repair":
            units = UnitStatistics(where, network, spec, corners, norm_inputs, batch_size)
            # Repair changes the layers' weights, so that outputs are no mix of the corners'.
            data = []
    layers = _Layers(network, spec, corners, data)
    row = torch.empty_like(corners[0])
    lies_there = _lie_in(network, spec, row)
    measured = []
    for share in track(shares_of(weights, corners).unbind(), where, enabled=progress):
        merge(corners, share, spec, out=row)
        if not lies_there:
            spec.load_(network, row)
        layers.share = share
        if units is not None:
            units.repair_(network, share)
        elif norm_inputs is not None:
            reset_batch_norm(network, norm_inputs, batch_size, where=where)
        measured.append(_measure(where, network, inputs, targets, loss, batch_size))
    losses, errors = (torch.stack(measured).cpu() / len(inputs)).unbind(1)
    return losses, errors


def _measure(
    where: str,
    network: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    loss: Loss | None,
    batch_size: int,
) -> Tensor:
    """Sums of losses and of errors, float64 [2]; no errors (NaN) where the loss is the caller's."""
    sums = []
    for x, y in zip(inputs.split(batch_size), targets.split(batch_size), strict=True):
        outputs = network(x)
        if loss is None:
            each = nn.functional.cross_entropy(outputs, y, reduction="none")
            wrong = (outputs.argmax(1) != y).sum(dtype=torch.float64)
        else:
            each = loss(outputs, y)
            _check.tensor(where, "what loss returns", each, "[B]")
            if each.shape != y.shape[:1]:
                raise ValueError(
                    f"{where}: loss must return one loss a sample, [{len(y)}], "
                    f"not {list(each.shape)}"
                )
            wrong = torch.full((), torch.nan, dtype=torch.float64, device=each.device)
        sums.append(torch.stack([each.sum(dtype=torch.float64), wrong]))
    return torch.stack(sums).sum(0)


class _Layers:
    """Computes a network's linear layers and convolutions in fewer operations, by setting their ``forward``.

    A layer that reads a view of the data is computed at the corners once, and mixed at each point: it
    is linear in its weights, so that its output at ``sum_m share[m] corner_m`` is the sum of its outputs
    at the corners.

    Attributes:
        share: the corners' weights ``[M]`` at the present point, whose network the layers hold.
    """

    def __init__(
        self, network: nn.Module, spec: WeightSpec, corners: Tensor, data: list[Tensor]
    ) -> None:
        self.share = corners.new_zeros(len(corners))
        self.one = corners.new_ones(1)
        self.data = {each.untyped_storage().data_ptr() for each in data if not each.is_inference()}
        self.left = _BUDGET
        views = spec.unflatten(corners)
        for name, layer in network.named_modules():
            weight, bias = (views.get(f"{name}.{each}") for each in ("weight", "bias"))
            if (
                type(layer) in LINEAR
                and weight is not None
                and (layer.bias is None) == (bias is None)
            ):
                layer.forward = partial(self._forward, layer, weight, bias, {})

    def _forward(
        self,
        layer: Any,
        weight: Tensor,
        bias: Tensor | None,
        known: dict[tuple, Tensor | None],
        x: Tensor,
    ) -> Tensor:
        few = weight[0, 0].numel() < _MIX * len(weight)
        if few or x.untyped_storage().data_ptr() not in self.data or x.dtype.itemsize < 4:
            return self._product(layer, x, layer.weight, layer.bias)
        # The data stays where it is, so that a view of it tells its values.
        view = (x.data_ptr(), x._version, x.shape, x.stride())
        if view not in known:
            known[view] = self._at_corners(layer, x, weight, bias)
        outputs = known[view]
        if outputs is None:
            return self._product(layer, x, layer.weight, layer.bias)
        return synthesize(self.share, outputs.flatten(1)).view(outputs.shape[1:])

    def _at_corners(
        self, layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor | None:
        """Outputs at all corners ``[M, ...]``, or ``None`` where that is too much to keep."""
        biases = bias if bias is not None else [None] * len(weight)
        outputs: Tensor | None = None
        for corner, (w, b) in enumerate(zip(weight, biases, strict=True)):
            y = self._product(layer, x, w, b)
            if outputs is None:
                if len(weight) * y.nbytes > self.left:
                    return None
                outputs = y.new_empty(len(weight), *y.shape)
            outputs[corner] = y
        assert outputs is not None
        self.left -= outputs.nbytes
        return outputs

    def _product(self, layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not isinstance(layer, nn.Linear):
            return layer._conv_forward(x, weight, bias)
        if (
            layer.in_features > _MOST_INPUTS
            or layer.out_features < _FEWEST_OUTPUTS
            or x.numel() * layer.out_features < _FEWEST_PRODUCTS
            or x.device.type != "cpu"
            or x.dtype != torch.float32
            or torch.get_float32_matmul_precision() != "highest"
            or torch.is_autocast_enabled("cpu")
            or not _load.has_kernel("manifold_contract", "cpu")
        ):
            return nn.functional.linear(x, weight, bias)
        return manifold_linear(x, self.one, weight[None], None if bias is None else bias[None])


def _lie_in(network: nn.Module, spec: WeightSpec, row: Tensor) -> bool:
    """Let a network's tensors be views of ``row`` ``[P]``, where each is one; the same as loading it."""
    state = network.state_dict(keep_vars=True)
    # cuDNN wants the weights of recurrent layers where it has put them.
    if row.device.type != "cpu" or any(name not in state for name in spec.shapes):
        return False
    for name, view in spec.unflatten(row).items():
        state[name].data = view
    return True


def _check_data(where: str, inputs: Any, targets: Any, loss: Any, norm_inputs: Any) -> None:
    check_examples(where, "inputs", inputs)
    if loss is None:
        _check.tensor(where, "targets", targets, "[B]", 1)
        if targets.dtype != torch.int64:
            raise TypeError(f"{where}: targets must be int64 classes, not {targets.dtype}")
    else:
        if not callable(loss):
            raise TypeError(
                f"{where}: loss must be a function of outputs and targets, "
                f"not {_check.describe(loss)}"
            )
        _check.tensor(where, "targets", targets, "[B, ...]")
        if targets.dim() == 0:
            raise ValueError(f"{where}: targets must have shape [B, ...], not []")
    _check.size(where, "targets", len(targets), len(inputs), "the batch of inputs")
    _check.same_device(where, "targets", targets, "inputs", inputs)
    if norm_inputs is not None:
        check_examples(where, "norm_inputs", norm_inputs)
        _check.same_device(where, "norm_inputs", norm_inputs, "inputs", inputs)
