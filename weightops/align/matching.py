"""Permutations that bring networks close to a reference network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from weightops import _check
from weightops.align._arguments import check_names, check_spec
from weightops.align.activation import match_activations
from weightops.align.learned import match_sinkhorn, match_straight_through
from weightops.align.weights import Match, match_by_weights, objective, weights_of
from weightops.spec import WeightSpec

METHODS = ("weight", "activation", "straight-through", "sinkhorn")
LEARNED = {"straight-through": match_straight_through, "sinkhorn": match_sinkhorn}
OPTIONS = {
    "weight": (),
    "activation": ("statistic", "batch_size", "progress"),
    **dict.fromkeys(LEARNED, ("steps", "learning_rate", "batch_size", "loss", "progress")),
}


def match(
    spec: WeightSpec,
    reference: Tensor,
    flat: Tensor,
    *,
    method: str = "weight",
    seed: int = 0,
    tensors: Sequence[str] | None = None,
    max_sweeps: int = 100,
    model: nn.Module | None = None,
    inputs: Tensor | tuple[Tensor, ...] | None = None,
    targets: Tensor | None = None,
    **options: Any,
) -> Match:
    """Permute networks towards a reference network.

    ``"weight"`` maximises ``<reference, P(flat[n])>`` for each n by coordinate descent (Git Re-Basin,
    algorithm 1): label by label, in random order, the best permutation given all others is a linear
    assignment on a sum of Gram matrices. All networks are matched in one call. Ends at a local
    optimum, when a sweep changes nothing.

    ``"activation"`` matches units that do the same on ``inputs``
    (:func:`weightops.align.activation.match_activations`: ``statistic``, ``batch_size``).
    ``"straight-through"`` and ``"sinkhorn"`` start from the weights' match and lower the loss half way
    to the reference (:mod:`weightops.align.learned`: ``steps``, ``learning_rate``, ``batch_size``,
    ``loss``). All three take ``progress``.

    Args:
        spec: axes and layout of one network. A traced spec that was not verified gives a warning.
        reference: the network ``[P]`` to align to; or, except for learned methods, T networks
            ``[T, P]``, such as the checkpoints of one training.
        flat: networks ``[N, P]`` to align, of the same floating dtype; with ``[T, P]`` references
            ``[N, T, P]``, whose T networks get one permutation, at the best sum over all T.
        method: ``"weight"``, ``"activation"``, ``"straight-through"`` or ``"sinkhorn"``.
        seed: of the order in which labels are visited, and of batches.
        tensors: names that count in the objective; by default all but batch norm's running
            statistics, whose size has nothing to do with the weights'. For ``"weight"``.
        max_sweeps: give up after so many sweeps over the labels. For ``"weight"``.
        model: the architecture, for all other methods; it is copied and does not change.
        inputs: its inputs ``[B, ...]``, or a tuple of such tensors.
        targets: ``[B, ...]``, for learned methods.
        options: of the method, as above.

    Raises:
        ValueError: shapes, devices or names do not fit, or a weight is not finite.
        TypeError: an argument has the wrong type or dtype, is missing, or is not the method's.
    """
    counted = _check_arguments(spec, reference, flat, method, seed, tensors, max_sweeps)
    _check_method(method, tensors, model, inputs, targets, options)
    if method == "weight":
        return match_by_weights(
            spec, reference, flat, seed=seed, counted=counted, max_sweeps=max_sweeps
        )
    _check.finite("match", "reference", reference)
    _check.finite("match", "flat", flat)
    assert model is not None
    assert inputs is not None
    reference, flat = reference.detach(), flat.detach()
    if method == "activation":
        perms = match_activations(spec, reference, flat, model, inputs, seed=seed, **options)
        ends = [objective(spec, reference, flat, each, counted) for each in ({}, perms)]
        return Match(perms, ends[1], torch.stack(ends))
    if reference.dim() != 1:
        raise ValueError(
            f"match: reference must have shape [P] for method {method!r}, not {list(reference.shape)}"
        )
    if not any(size > 1 for size in spec.labels.values()):
        raise ValueError(
            f"match: method {method!r} has nothing to learn, as no label of spec is longer than 1"
        )
    if torch.is_inference_mode_enabled():
        raise ValueError(f"match: method {method!r} needs gradients, which inference mode has not")
    if reference.dtype == torch.float16:
        raise TypeError(f"match: method {method!r} can't train weights of torch.float16")
    assert targets is not None
    perms, losses = LEARNED[method](
        spec, reference, flat, model, inputs, targets, seed=seed, **options
    )
    return Match(perms, objective(spec, reference, flat, perms, counted), losses)


def _check_method(
    method: str,
    tensors: Sequence[str] | None,
    model: Any,
    inputs: Any,
    targets: Any,
    options: dict[str, Any],
) -> None:
    needed = {"weight": (), "activation": ("model", "inputs")}.get(
        method, ("model", "inputs", "targets")
    )
    for name, value in (("model", model), ("inputs", inputs), ("targets", targets)):
        if name in needed and value is None:
            raise TypeError(f"match: method {method!r} needs {name}")
        if name not in needed and value is not None:
            raise TypeError(f"match: method {method!r} takes no {name}")
    if tensors is not None and method != "weight":
        raise TypeError(f"match: method {method!r} takes no tensors")
    for name in options:
        if name not in OPTIONS[method]:
            raise TypeError(
                f"match: method {method!r} has options {list(OPTIONS[method])}, not {name!r}"
            )


def _check_arguments(
    spec: WeightSpec,
    reference: Tensor,
    flat: Tensor,
    method: str,
    seed: int,
    tensors: Sequence[str] | None,
    max_sweeps: int,
) -> list[str]:
    """The names of the tensors that count."""
    check_spec("match", spec, depth=2)
    _check.tensor("match", "reference", reference, "[P] or [T, P]")
    spec.check_flat("match", reference, "reference")
    if reference.dim() > 2:
        raise ValueError(
            f"match: reference must have shape [P] or [T, P], not {list(reference.shape)}"
        )
    shape = "[N, P]" if reference.dim() == 1 else "[N, T, P]"
    _check.tensor("match", "flat", flat, shape, reference.dim() + 1)
    spec.check_flat("match", flat)
    if reference.dim() == 2:
        if not len(reference):
            raise ValueError("match: reference holds no network")
        _check.size("match", "flat axis 1", flat.shape[1], reference.shape[0], "reference's axis 0")
    _check.floating("match", "reference", reference)
    if flat.dtype != reference.dtype:
        raise TypeError(f"match: flat is {flat.dtype}, but reference is {reference.dtype}")
    _check.same_device("match", "flat", flat, "reference", reference)
    _check.choice("match", "method", method, METHODS)
    _check.count("match", "max_sweeps", max_sweeps)
    _check.seed("match", seed)
    if tensors is None:
        return weights_of(spec)
    check_names("match", tensors, spec)
    return list(tensors)
