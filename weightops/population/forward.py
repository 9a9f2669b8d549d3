"""N networks of one architecture on the same samples, or on their own: outputs, losses, errors."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from weightops import _check
from weightops.ops.population import population_eval, reference, training
from weightops.population._resolve import Runner, resolve
from weightops.spec import WeightSpec

REDUCTIONS = ("logits", "loss", "accuracy", "errors")


def population_forward(
    flat: Tensor,
    spec_or_model: WeightSpec | nn.Module,
    x: Tensor,
    *,
    reduce: Literal["logits", "loss", "accuracy", "errors"] = "logits",
    targets: Tensor | None = None,
) -> Tensor:
    """Run a population on samples, reducing inside, in eval mode.

    Sequential and residual models of linear layers, 2-D convolutions, max and average pools, ReLU, SiLU,
    GELU, tanh, sine and batch, layer and group norms run in one kernel; other models are mapped over networks
    with ``torch.func`` (``weightops.info.population`` says which and why).

    Args:
        flat: the networks ``[N, P]`` in the order of :meth:`WeightSpec.flatten`, float32 or float64.
        spec_or_model: the architecture: a module, whose own weights do not matter, or a spec that
            :func:`weightops.trace` made in this process.
        x: samples ``[B, ...]`` for all networks if the model takes them so, else ``[N, B, ...]``, every
            network's own.
        reduce: ``"logits"``: outputs ``[N, B, K]``, differentiable. With targets: ``"loss"``: mean losses
            ``[N]``; ``"accuracy"``: shares of right predictions ``[N]``; ``"errors"``: bool ``[N, B]``, true
            where the largest output is not the target.
        targets: classes, int64 ``[B]`` or ``[N, B]``; for ``"loss"`` also values ``[B, K]`` or ``[N, B, K]``
            of a mean squared error.

    Raises:
        ValueError: shapes do not fit, classes out of range, a spec without layers, a model that does
            not export.
        TypeError: wrong types or dtypes.
    """
    where = "population_forward"
    _check.choice(where, "reduce", reduce, REDUCTIONS)
    runner, x = resolve(where, flat, spec_or_model, x)
    if reduce == "logits":
        if targets is not None:
            raise ValueError(f"{where}: targets are for reduce='loss', 'accuracy' or 'errors'")
        return runner.logits(flat, x)
    checked = check_targets(where, runner, flat, x, targets, values=reduce == "loss")
    if reduce == "loss" and _differentiates(flat, x):
        return _losses(runner, flat, x, checked)
    return _evaluated(runner, flat, x, checked, reduce)


def loss_and_accuracy(
    flat: Tensor, spec_or_model: WeightSpec | nn.Module, x: Tensor, targets: Tensor
) -> Tensor:
    """Mean losses and accuracies ``[N, 2]`` of one pass; not differentiable, else as :func:`population_forward`."""
    where = "population_forward"
    runner, x = resolve(where, flat, spec_or_model, x)
    checked = check_targets(where, runner, flat, x, targets, values=False)
    return _evaluated(runner, flat, x, checked, "scores")


def _evaluated(runner: Runner, flat: Tensor, x: Tensor, checked: Tensor, reduce: str) -> Tensor:
    if runner.by_products(flat, x) and len(flat):
        # Reduced as they come, so that no [N, B, K] is held.
        each = reference.for_each(checked, len(flat))
        groups = runner.products(flat, x)
        return torch.cat([reference.reduce(made, each[group], reduce) for group, made in groups])
    if runner.program is not None:
        return population_eval(flat, x, checked, runner.code, runner.shared, reduce)
    return _reduced(runner, flat, x, checked, reduce)


def population_loss(
    flat: Tensor, spec_or_model: WeightSpec | nn.Module, x: Tensor, targets: Tensor
) -> Tensor:
    """Mean losses ``[N]`` of a population, differentiable in the weights and the samples.

    As ``population_forward(..., reduce="loss")``: cross-entropy of classes, mean squared error of values.
    """
    where = "population_loss"
    runner, x = resolve(where, flat, spec_or_model, x)
    return _losses(runner, flat, x, check_targets(where, runner, flat, x, targets))


def overlap(errors: Tensor) -> Tensor:
    """How much the wrong predictions of all pairs of networks overlap.

    Args:
        errors: bool ``[N, B]``, from ``population_forward(..., reduce="errors")``.

    Returns:
        The intersection over the union ``[N, N]`` float32, 1 between networks without errors.

    Source: wrong-prediction similarity as in Wang et al., "Neural Network Diffusion", arXiv 2402.13144.
    """
    _check.tensor("overlap", "errors", errors, "[N, B]", 2)
    if errors.dtype != torch.bool:
        raise TypeError(f"overlap: errors must be bool, not {errors.dtype}")
    # Counts below 2^24 are exact in a float32 product, which is faster than popcounts from here.
    wrong = errors.float()
    both = wrong @ wrong.T
    counts = both.diagonal()
    either = counts[:, None] + counts - both
    return torch.where(either == 0, 1.0, both / either)


def _differentiates(*tensors: Tensor) -> bool:
    return torch._C._are_functorch_transforms_active() or (
        torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    )


def _losses(runner: Runner, flat: Tensor, x: Tensor, targets: Tensor) -> Tensor:
    if runner.program is None:
        return _reduced(runner, flat, x, targets, "loss")
    return training.population_loss(flat, x, targets, runner.code, runner.shared)


def _reduced(runner: Runner, flat: Tensor, x: Tensor, targets: Tensor, to: str) -> Tensor:
    logits = runner.logits(flat, x)
    return reference.reduce(logits, reference.for_each(targets, len(flat)), to)


def check_targets(
    where: str,
    runner: Runner,
    flat: Tensor,
    x: Tensor,
    targets: Tensor | None,
    values: bool = True,
) -> Tensor:
    """Targets that fit the samples and the outputs."""
    shapes = "[B], [N, B]" + (", [B, K] or [N, B, K]" if values else "")
    _check.tensor(where, "targets", targets, shapes)
    assert targets is not None
    _check.same_device(where, "targets", targets, "flat", flat)
    regresses = values and targets.is_floating_point()
    if regresses and targets.dtype != flat.dtype:
        raise TypeError(f"{where}: targets must be {flat.dtype} as flat, not {targets.dtype}")
    if not regresses and targets.dtype != torch.int64:
        raise TypeError(f"{where}: targets must be classes of dtype int64, not {targets.dtype}")
    samples = x.shape[0] if runner.shared else x.shape[1]
    if samples == 0:
        raise ValueError(f"{where}: x holds no sample (shape {list(x.shape)})")
    outputs = runner.outputs
    ends = [samples, outputs] if regresses else [samples]
    if list(targets.shape) not in (ends, [len(flat), *ends]):
        raise ValueError(
            f"{where}: targets must have shape {ends} or {[len(flat), *ends]}, not {list(targets.shape)}"
        )
    if not regresses and targets.numel() and not targets.is_meta:
        low, high = (int(each) for each in targets.aminmax())
        if low < 0 or high >= outputs:
            raise ValueError(
                f"{where}: targets must lie in 0..{outputs - 1}, given {low} to {high}"
            )
    return targets
