"""Matching by activations: units that do the same on the same inputs belong together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn

from weightops import _check
from weightops._progress import track
from weightops.align._places import Recorder, distinct, places
from weightops.align.weights import match_by_weights
from weightops.ops.assign import assign
from weightops.ops.permute import permute, permute_axes
from weightops.spec import WeightSpec

STATISTICS = ("correlation", "gram")
#: labels of an axis -> ``[N, units, units]``: how well units of the reference and of network n agree
Scores: TypeAlias = dict[tuple[str, ...], Tensor]


@torch.no_grad()
def match_activations(
    spec: WeightSpec,
    reference: Tensor,
    flat: Tensor,
    model: nn.Module,
    inputs: Tensor | tuple[Tensor, ...],
    *,
    statistic: str = "correlation",
    batch_size: int = 1000,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Tensor]:
    """Permute networks towards a reference by what their units do: ``max_p sum_i s[i, p[i]]``.

    ``s`` is the correlation over all samples (and positions) of unit i of the reference and unit j
    of a network, or their inner product. The inputs are passed once; of the activations only sums
    are kept, and those of two networks on one batch.

    Activations are seen where modules read them (linear, convolution, recurrent and attention layers:
    their inputs, and the states that recurrent layers feed back), so behind nonlinearities and
    norms. A label that no module reads, such as the dimensions of queries and keys, is seen where
    modules write it. With several such places their scores are added, inner products after scaling
    to cosines. An axis that is a product of labels (head, dimension) has one score for pairs of
    pairs; its labels are found one after the other, the first by the best that the others could
    still reach, and then by coordinate ascent.

    Labels that are seen nowhere are matched by weights, given the others: those of tensors that
    belong to no module of torch.nn (parameters of the user's own modules), of inner layers of a
    multi-layer recurrent module, of packed attention, and of modules that saw a different number of
    samples in two networks (experts behind a router).

    Args:
        spec: axes and layout of one network.
        reference: the network ``[P]`` to align to, or ``[T, P]``: T checkpoints of it.
        flat: networks ``[N, P]`` to align, or ``[N, T, P]``; then one permutation serves T.
        model: the architecture; it is copied, evaluated in eval mode, and does not change.
        inputs: ``[B, ...]``, or a tuple of such tensors, the arguments of ``model``.
        statistic: ``"correlation"`` or ``"gram"``.
        batch_size: inputs evaluated at once.
        seed: of the weight matching of unseen labels.
        progress: show a progress bar on a terminal.

    Returns:
        Label -> int64 ``[N, size]``.

    Source: Li et al. 2015 (arXiv 1511.07543), section 3.1 for correlations; Ainsworth et al. 2022
    (arXiv 2209.04836), section 3.1 for inner products; sums by Chan, Golub and LeVeque 1979.

    Raises:
        ValueError: inputs do not fit, or an activation is not finite.
        TypeError: an argument has the wrong type.
    """
    listed = check_inputs(model, inputs)
    _check.choice("match", "statistic", statistic, STATISTICS)
    _check.count("match", "batch_size", batch_size)
    _check.flag("match", "progress", progress)
    if not len(flat):
        return {label: p.to(flat.device) for label, p in spec.identity(0).items()}
    references = reference if reference.dim() == 2 else reference[None]
    checkpoints = flat if flat.dim() == 3 else flat[:, None]
    scores = activation_scores(
        spec, references, checkpoints, model, listed, statistic, batch_size, progress
    )
    perms = assign_factors(spec.labels, scores)
    missing = [label for label in spec.labels if label not in perms]
    if missing:
        # One axis is matched by one method: who shares a product with a missing label is missing too.
        rest = _only(spec, missing)
        perms = {label: p for label, p in perms.items() if label not in rest.labels}
        rows = {label: p.repeat_interleave(checkpoints.shape[1], 0) for label, p in perms.items()}
        moved = permute(checkpoints.flatten(0, 1), rows, spec).view(flat.shape)
        perms |= match_by_weights(rest, reference, moved, seed=seed).perms
    return {label: perms[label].to(flat.device) for label in spec.labels}


def activation_scores(
    spec: WeightSpec,
    reference: Tensor,
    flat: Tensor,
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    statistic: str,
    batch_size: int,
    progress: bool,
) -> Scores:
    """Scores of ``flat`` ``[N, T, P]`` against ``reference`` ``[T, P]``, added over places and over T."""
    batches = list(zip(*(each.split(batch_size) for each in inputs), strict=True))
    centred = statistic == "correlation"
    probe = [each[:8] for each in batches[0]]
    watched = distinct(Recorder(spec, model, places(spec, model)).run(reference[0], probe))
    recorder = Recorder(spec, model, watched)
    pairs = [(n, t) for n in range(len(flat)) for t in range(len(reference))]
    moments = {place: {pair: _Moments() for pair in pairs} for place in watched}
    for batch in track(batches, "activations", enabled=progress):
        ours = [
            {place: _Batch.of(x, centred) for place, x in recorder.run(row, batch).items()}
            for row in reference
        ]
        for n, t in pairs:
            theirs = recorder.run(flat[n, t], batch)
            for place in list(moments):
                mine, other = ours[t].get(place), theirs.get(place)
                if mine is None or other is None or mine.units.shape != other.shape:
                    del moments[place]
                else:
                    moments[place][n, t].add(mine, _Batch.of(other, centred))
    scores: Scores = {}
    for place, of in moments.items():
        for (n, _), sums in of.items():
            if not torch.isfinite(sums.cross).all():
                raise ValueError(
                    f"match: activations at {place.module!r} ({', '.join(place.labels)}) must be "
                    f"finite, but are not in flat[{n}] or the reference"
                )
            score = sums.correlation() if centred else sums.cosine()
            if place.labels not in scores:
                scores[place.labels] = score.new_zeros(len(flat), *score.shape)
            scores[place.labels][n] += score
    return scores


@dataclass
class _Batch:
    """One network's units ``[samples, units]`` less their means ``[units]``, and sums of squares."""

    units: Tensor
    mean: Tensor
    square: Tensor

    @classmethod
    def of(cls, units: Tensor, centred: bool) -> _Batch:
        mean = units.mean(0) if centred else units.new_zeros(units.shape[1])
        if centred:
            units -= mean
        return cls(units, mean.double(), units.square().sum(0).double())


class _Moments:
    """Joint moments of two networks' units at a place, merged batch by batch."""

    def __init__(self) -> None:
        self.count = 0
        self.cross = self.means = self.squares = torch.zeros(())

    def add(self, ours: _Batch, theirs: _Batch) -> None:
        samples = len(ours.units)
        weight = self.count * samples / (self.count + samples)
        steps = torch.stack([ours.mean, theirs.mean]) - self.means
        self.cross = self.cross + ours.units.T @ theirs.units
        self.cross += weight * torch.outer(*steps)
        self.squares = self.squares + torch.stack([ours.square, theirs.square]) + weight * steps**2
        self.count += samples
        self.means = self.means + steps * (samples / self.count)

    def correlation(self) -> Tensor:
        """``[units, units]``; 0 with a unit that does not vary beyond rounding."""
        rounding = self.count * (4 * torch.finfo(self.cross.dtype).eps * self.means) ** 2
        scales = torch.where(self.squares > rounding, self.squares.rsqrt(), 0)
        return self.cross * torch.outer(*scales).to(self.cross.dtype)

    def cosine(self) -> Tensor:
        """The Gram matrix ``[units, units]`` over the two networks' norms."""
        scale = self.squares.sum(1).prod().rsqrt()
        return self.cross * torch.where(scale.isfinite(), scale, 0).to(self.cross.dtype)


def assign_factors(sizes: Mapping[str, int], scores: Scores) -> dict[str, Tensor]:
    """The permutations of all labels in ``scores``, whose axes may be products of several."""
    perms: dict[str, Tensor] = {}
    # A label that stands alone is exact at once, and small factors leave fewest problems open.
    alone = {labels[0] for labels in scores if len(labels) == 1}
    seen = {label for labels in scores for label in labels}
    for label in sorted(seen, key=lambda each: (each not in alone, sizes[each], each)):
        perms[label] = assign(_gain(label, sizes, scores, perms))
    joined = sorted({label for labels in scores if len(labels) > 1 for label in labels})
    improved = bool(joined)
    while improved:
        improved = False
        for label in joined:
            gain = _gain(label, sizes, scores, perms)
            move = assign(gain)
            reached, held = (gain.gather(2, p[..., None]).sum((1, 2)) for p in (move, perms[label]))
            better = reached > held + 1e-6 * held.abs()
            perms[label] = torch.where(better[:, None], move, perms[label])
            improved = improved or bool(better.any())
    return perms


def _gain(
    label: str, sizes: Mapping[str, int], scores: Scores, perms: Mapping[str, Tensor]
) -> Tensor:
    """``[N, n, n]``: what unit i of the reference gains from unit j, given the labels in ``perms``.

    Labels of the same product that are still open count with the best they could reach for i and j.
    """
    total: Tensor | float = 0.0
    for labels, score in scores.items():
        lengths = [sizes[each] for each in labels]
        networks, units = score.shape[:2]
        for own in (i for i, each in enumerate(labels) if each == label):
            held = [i for i, each in enumerate(labels) if each in perms and i != own]
            left = [i for i in range(len(labels)) if i not in held and i != own]
            chosen = [perms[labels[i]] if i in held else None for i in range(len(labels))]
            moved = permute_axes(score.view(networks, units, *lengths), [None, *chosen])
            rows = "".join(chr(ord("a") + i) for i in range(len(labels)))
            cols = "".join(chr(ord("a" if i in held else "A") + i) for i in range(len(labels)))
            out = [rows[own], cols[own], *(rows[i] for i in left), *(cols[i] for i in left)]
            gain = torch.einsum(
                f"...{rows}{cols}->...{''.join(out)}", moved.view(networks, *lengths, *lengths)
            )
            if left:
                rest = gain.flatten(3, 2 + len(left)).flatten(4).flatten(0, 2)
                best = rest.gather(2, assign(rest)[..., None]).sum((1, 2))
                gain = best.view(gain.shape[:3])
            total = total + gain
    assert isinstance(total, Tensor)
    return total


def _only(spec: WeightSpec, labels: list[str]) -> WeightSpec:
    """The spec with ``labels`` and all that share a product with them; other axes are fixed."""
    products = [
        {factor for factor in entry if factor is not None}
        for entries in spec.axes.values()
        for entry in entries
        if isinstance(entry, tuple)
    ]
    kept: set[str] = set(labels)
    while grown := [product for product in products if product & kept and not product <= kept]:
        kept = kept.union(*grown)

    def fixed(entry: object) -> bool:
        return not kept.intersection(entry if isinstance(entry, tuple) else (entry,))

    axes = {
        name: tuple(None if fixed(entry) else entry for entry in entries)
        for name, entries in spec.axes.items()
    }
    return WeightSpec(axes, spec.shapes, sizes={each: spec.labels[each] for each in kept})


def check_inputs(model: nn.Module, inputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The arguments of ``model``, which must hold equally many examples."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"match: model must be a module, not {_check.describe(model)}")
    listed = inputs if isinstance(inputs, tuple) else (inputs,)
    if not listed:
        raise ValueError("match: inputs is an empty tuple")
    for i, each in enumerate(listed):
        name = f"inputs[{i}]" if isinstance(inputs, tuple) else "inputs"
        _check.tensor("match", name, each, "[B, ...]")
        if each.dim() == 0 or len(each) == 0:
            raise ValueError(f"match: {name} must hold examples, not shape {list(each.shape)}")
        _check.size("match", name, len(each), len(listed[0]), "the batch of inputs[0]")
    return listed
