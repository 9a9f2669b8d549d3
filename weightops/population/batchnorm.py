"""Running statistics of batch norm, of N networks in one pass."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from weightops import _check
from weightops.ops.population import reference
from weightops.population._resolve import resolve
from weightops.spec import WeightSpec
from weightops.tracing.export import read_weights


def population_batchnorm(
    flat: Tensor, spec_or_model: WeightSpec | nn.Module, x: Tensor, *, momentum: float | None = None
) -> Tensor:
    """Re-estimate the batch-norm statistics of every network in one pass over ``x``.

    Every batch norm goes by the statistics of all samples, as in training, so one pass gives those of all
    layers.

    Args:
        flat: the networks ``[N, P]`` in the order of :meth:`WeightSpec.flatten`; not changed.
        spec_or_model: the architecture: a module, whose own weights do not matter, or a spec traced in this process.
        x: samples ``[B, ...]`` for all networks or ``[N, B, ...]``; at least two numbers a channel.
        momentum: of the new statistics against those in ``flat``; ``None``: the new ones alone.

    Returns:
        ``[N, P]``, with means and unbiased variances replaced.

    Raises:
        ValueError: shapes do not fit, the model has no batch norm with running statistics.
        TypeError: wrong types or dtypes.
    """
    where = "population_batchnorm"
    runner, x = resolve(where, flat, spec_or_model, x)
    weight = 1.0
    if momentum is not None:
        _check.number(where, "momentum", momentum, 0, 1)
        weight = float(momentum)
    if (x.shape[0] if runner.shared else x.shape[1]) < 2:
        raise ValueError(f"{where}: x must have two samples at least, not shape {list(x.shape)}")
    if runner.program is not None:
        norms = any(layer.kind == "batch_norm" for layer in runner.program.layers)
    else:
        assert isinstance(spec_or_model, nn.Module)
        norms = any(_runs(module) for module in spec_or_model.modules())
    if not norms:
        raise ValueError(f"{where}: spec_or_model has no batch norm with running statistics")

    def estimate(row: Tensor, x: Tensor) -> Tensor:
        if runner.program is not None:
            return reference.run_training(row, x, runner.code, lambda _: 1.0)[1]
        return _estimate(spec_or_model, row, x)  # type: ignore[arg-type]

    with torch.no_grad():
        found = torch.func.vmap(estimate, (0, None if runner.shared else 0))(flat.detach(), x)
        return flat.detach().lerp(found, weight) if weight < 1 else found


def _runs(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) and module.track_running_stats


def _estimate(model: nn.Module, row: Tensor, x: Tensor) -> Tensor:
    own = copy.deepcopy(model).eval()
    for module in own.modules():
        if _runs(module):
            module.train()
            module.momentum = 1.0  # type: ignore[assignment]
    weights = read_weights(model)
    views = weights.views(row)
    held = {name: views[name].clone() for name in weights.shapes}
    torch.func.functional_call(own, {name: held[of] for name, of in weights.names.items()}, (x,))
    return torch.cat([tensor.flatten() for tensor in held.values()])
