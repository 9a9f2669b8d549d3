"""Proof by experiment that a spec's permutations leave a model's function as it is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from weightops import _check
from weightops.ops.permute import permute
from weightops.spec import WeightSpec
from weightops.tracing._faults import Fault, find_fault
from weightops.tracing._probe import Network, Probe

# Random permutations of so many units are not the same by chance.
_SHORT = 8
# Draws behind the trials, while rectifiers that are dead hide weights.
_MORE = 8


class VerificationError(ValueError):
    """A spec's permutations change the model's function.

    Attributes:
        label: the label at fault, ``None`` where no label alone is.
        tensor: the tensor at fault, ``None`` where no change of a single one mends it.
        axis: its axis.
    """

    def __init__(self, fault: Fault) -> None:
        super().__init__(f"verify: {fault.text}")
        self.label, self.tensor, self.axis = fault.label, fault.tensor, fault.axis


@dataclass(frozen=True)
class Verification:
    """What :func:`verify` saw.

    Attributes:
        moved: share of the weights that a permutation moved.
        error: the largest change of an output or gradient, relative to the largest entry.
        labels: how many labels were permuted (those longer than one).
    """

    moved: float
    error: float
    labels: int


def verify(
    spec: WeightSpec,
    model: nn.Module,
    *inputs: Any,
    kwargs: Mapping[str, Any] | None = None,
    seed: int = 0,
    trials: int = 2,
    rtol: float = 1e-9,
) -> Verification:
    """Show that permuting a model's weights as ``spec`` says changes nothing but their order.

    A float64 copy of the model runs in eval mode at random permutations of all labels at once, and
    of some short ones without the others: every floating output must stay as it is, and the gradients of a random functional of the outputs must
    be permuted like the weights. The weights of the copy get noise of a tenth of their size first,
    and zeros become small numbers: at initialisation biases are all zero and norms all one, where
    a wrong spec could not show. Buffers get it too where all their entries are equal; other buffers
    (tables of constants) are taken as they are. Casts to a lower precision inside the model are
    left out. Success clears ``spec.unverified``.

    Args:
        spec: the spec to prove.
        model: the architecture; it is copied, and neither its weights nor its mode change.
        inputs: the model's inputs; floating ones are cast to float64.
        kwargs: further inputs by name.
        seed: of the noise and of the permutations.
        trials: random draws of both; further ones follow while no output depends on some label.
        rtol: largest change that passes, relative to the largest entry of an output, or of the
            gradient.

    Raises:
        VerificationError: the function changes; names the label and, where one change of the spec
            mends it, the tensor and axis at fault.
        ValueError: the spec has no label longer than one, is not one of this model, or moves weights
            that no output depends on at these inputs (an expert that none is routed to); the model
            does not run, is random, or has no floating, finite output that depends on its weights.
        TypeError: an argument has the wrong type.
    """
    if not isinstance(spec, WeightSpec):
        raise TypeError(f"verify: spec must be a WeightSpec, not {_check.describe(spec)}")
    if not isinstance(model, nn.Module):
        raise TypeError(f"verify: model must be a module, not {_check.describe(model)}")
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise TypeError(f"verify: kwargs must map names to inputs, not {_check.describe(kwargs)}")
    _check.count("verify", "trials", trials)
    _check.seed("verify", seed)
    _check.number("verify", "rtol", rtol, 0, 1)
    labels = {label: size for label, size in spec.labels.items() if size > 1}
    if not labels:
        raise ValueError("verify: the spec has no permutable axis, so there is nothing to prove")

    generator = torch.Generator().manual_seed(seed)
    network = Network(spec, model, inputs, kwargs or {})
    moved = torch.zeros(spec.numel, dtype=torch.bool, device=network.row.device)
    unseen = {
        name
        for label in labels
        for name, _ in spec.occurrences(label)
        if spec._places[name][0] in network.parameters
    }
    worst = 0.0
    found = True
    for trial in range(trials + _MORE):
        if trial >= trials and not (_hidden(spec, labels, unseen) or (unseen and found)):
            break
        probe = Probe(network, network.generic_row(generator))
        if not trial and (again := probe.error_at(probe.row, spec, {}, gradients=False)) > rtol:
            raise ValueError(
                f"verify: model is random in eval mode: run twice, it differs by {again:.1e}"
            )
        perms = {
            label: random_permutation(size, generator).to(probe.row.device)
            for label, size in labels.items()
        }
        for still in [set(), *([] if trial else _apart(labels))]:
            some = {label: index for label, index in perms.items() if label not in still}
            row = permute(probe.row[None], some, spec)[0]
            error = probe.error_at(row, spec, some)
            if error > rtol:
                raise VerificationError(find_fault(probe, spec, perms, rtol, error))
            worst = max(worst, error)
            moves = row != probe.row
            moved |= moves
            views = spec.unflatten(moves & (probe.grads != 0))
            seen = {name for name in unseen if views[name].any()}
            found = bool(seen)
            unseen -= seen
    if hidden := _hidden(spec, labels, unseen):
        raise ValueError(
            "verify: no output of the model depends on a weight that the spec moves by "
            f"{hidden}; pass inputs that reach these tensors, or leave their axes fixed"
        )
    spec._set_verified()
    return Verification(moved.sum().item() / spec.numel, worst, len(labels))


def _hidden(spec: WeightSpec, labels: Iterable[str], unseen: set[str]) -> list[str]:
    """Labels of ``unseen`` tensors alone."""
    return [label for label in labels if all(name in unseen for name, _ in spec.occurrences(label))]


def _apart(labels: Mapping[str, int]) -> list[set[str]]:
    """Labels that stay still, round by round, so that of any two short ones one moves without the other.

    Permutations of short labels are often the same (of two units always), so that moving all at
    once takes labels that must be one for proven.
    """
    short = [label for label, size in labels.items() if size < _SHORT]
    bits = len(short).bit_length() if len(short) > 1 else 0
    return [
        {label for code, label in enumerate(short, 1) if not code >> bit & 1} for bit in range(bits)
    ]


def random_permutation(size: int, generator: torch.Generator) -> Tensor:
    """A uniform permutation ``[size]`` other than the identity; ``size`` is at least 2."""
    while True:
        index = torch.randperm(size, generator=generator)
        if not torch.equal(index, torch.arange(size)):
            return index
