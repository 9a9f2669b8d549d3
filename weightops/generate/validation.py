"""Candidates are refused before they are used, where they are not finite, far outside the zoo, or no good."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from weightops import _check
from weightops.generate import _files
from weightops.generate._arguments import check_networks, in_order_of
from weightops.generate.candidates import Scores, networks_at_once, scores_of
from weightops.generate.zoo import Zoo
from weightops.spec import WeightSpec

# Below this share of a zoo's typical weight a tensor is zero: no candidate gets such a one exactly.
_ZERO = 1e-3


@dataclass(frozen=True)
class Span:
    """What a zoo's networks span, tensor by tensor.

    Attributes:
        spec: layout of the networks.
        mean: float64 ``[P]``.
        norms: tensor -> the smallest and the largest L2 norm.
        spreads: tensor -> the root mean square of the networks' L2 distances to ``mean``.
        distances: tensor -> the largest such distance.
    """

    spec: WeightSpec
    mean: Tensor
    norms: Mapping[str, tuple[float, float]]
    spreads: Mapping[str, float]
    distances: Mapping[str, float]


@dataclass(frozen=True)
class Validation:
    """What :func:`weightops.generate.validate` found.

    Attributes:
        accepted: bool ``[N]``.
        reasons: refused candidate -> why, one entry a fault.
        scores: accuracies and losses ``[N]`` on the check set, NaN of candidates that were refused
            before; or ``None`` without a check set.
    """

    accepted: Tensor
    reasons: Mapping[int, tuple[str, ...]]
    scores: Scores | None


def span(zoo: Zoo | Tensor, spec: WeightSpec | None = None) -> Span:
    """Measure what a zoo's networks span, in two passes, for :func:`validate`.

    Args:
        zoo: a zoo, or networks ``[N, P]``; at least one.
        spec: layout of networks that are given as a tensor.

    Raises:
        ValueError: shapes do not fit, a weight is not finite, or there is no network.
        TypeError: an argument has the wrong type, or ``spec`` is missing.
    """
    spec = check_networks("span", "zoo", zoo, spec)
    mean = torch.zeros(spec.numel, dtype=torch.float64)
    for flat in _batches(zoo):
        mean += flat.sum(0)
    mean /= len(zoo)
    found = [_measure(flat, mean, spec) for flat in _batches(zoo)]
    norms, distances = (torch.cat(each) for each in zip(*found))
    names = list(spec.shapes)
    low, high = norms.amin(0).tolist(), norms.amax(0).tolist()
    spreads = distances.square().mean(0).sqrt().tolist()
    return Span(
        spec,
        mean,
        dict(zip(names, zip(low, high))),
        dict(zip(names, spreads)),
        dict(zip(names, distances.amax(0).tolist())),
    )


def _batches(zoo: Zoo | Tensor) -> Iterator[Tensor]:
    """Float64 networks ``[n, P]`` on the CPU."""
    size = networks_at_once(zoo[:1].shape[1])
    for start in range(0, len(zoo), size):
        yield zoo[start : start + size].detach().cpu().double()


def _measure(flat: Tensor, mean: Tensor, spec: WeightSpec) -> tuple[Tensor, Tensor]:
    """Norms of networks' tensors and their distances to the mean's, ``[n, tensors]``."""
    sizes = [shape.numel() for shape in spec.shapes.values()]
    norms, distances = (
        torch.stack([each.norm(dim=1) for each in rows.split(sizes, 1)], 1)
        for rows in (flat, flat - mean)
    )
    return norms, distances


@torch.no_grad()
def validate(
    flat: Tensor,
    span: Span,
    *,
    margin: float = 0.5,
    model: nn.Module | None = None,
    x: Tensor | None = None,
    targets: Tensor | None = None,
    floor: float | None = None,
) -> Validation:
    """Refuse candidates that should not be used, and say why.

    A candidate is refused where

    - a weight is not finite;
    - a tensor's norm is below ``1 - margin`` times the zoo's smallest or above ``1 + margin`` times
      its largest, or its distance to the zoo's mean is above ``1 + margin`` times the zoo's largest
      (a thousandth of the zoo's typical weight is allowed besides: some tensors are zero in all of it);
    - on the check set, where one is given, its loss is not finite or its accuracy below ``floor``.

    Args:
        flat: candidates ``[N, P]``.
        span: of the zoo, by :func:`span`.
        margin: in [0, 1).
        model: the architecture; with it come ``x`` ``[B, ...]``, int64 ``targets`` ``[B]`` and ``floor``.
        floor: the least accuracy, from 0 to 1.

    Raises:
        ValueError: shapes do not fit, a number or a target is out of range.
        TypeError: an argument has the wrong type; a part of the check set is missing.
    """
    where = "validate"
    if not isinstance(span, Span):
        raise TypeError(f"{where}: span must be a Span, not {_check.describe(span)}")
    check_networks(where, "flat", flat, span.spec, empty=True, finite=False)
    _check.number(where, "margin", margin, 0, 1)
    checks = {"model": model, "x": x, "targets": targets, "floor": floor}
    missing = [name for name, value in checks.items() if value is None]
    if missing and len(missing) < len(checks):
        raise TypeError(
            f"{where}: a check set needs model, x, targets and floor, not {missing} None"
        )
    reasons: dict[int, list[str]] = {n: [] for n in range(len(flat))}
    for n in (~flat.isfinite().all(1)).nonzero()[:, 0].tolist():
        fault = _files.finite_fault(flat[n : n + 1], span.spec)
        assert fault is not None
        reasons[n].append(f"is not finite: {fault[1]}")
    finite = [n for n, found in reasons.items() if not found]
    norms, distances = _measure(flat[finite].cpu().double(), span.mean, span.spec)
    for n, *measured in zip(finite, norms.tolist(), distances.tolist()):
        reasons[n] += _outside(span, margin, *measured)
    scores = None
    if not missing:
        assert model is not None
        assert floor is not None
        in_order = in_order_of(where, model, span.spec, flat)
        _check.number(where, "floor", floor, 0, 1 + 1e-9)
        inside = [n for n, found in reasons.items() if not found]
        accuracy, loss = flat.new_full((2, len(flat)), torch.nan)
        accuracy[inside], loss[inside] = scores_of(where, in_order[inside], model, x, targets)
        for n in inside:
            if not loss[n].isfinite():
                reasons[n].append(f"loss on the check set is {loss[n].item()}")
            elif accuracy[n] < floor:
                reasons[n].append(f"accuracy on the check set is {accuracy[n]:.4g}, below {floor}")
        scores = Scores(accuracy, loss)
    refused = {n: tuple(found) for n, found in reasons.items() if found}
    accepted = torch.tensor([n not in refused for n in range(len(flat))], dtype=torch.bool)
    return Validation(accepted, refused, scores)


def _outside(span: Span, margin: float, norms: Sequence[float], distances: Sequence[float]) -> list:
    """Why a network with these norms and distances, one a tensor, is far outside the zoo."""
    found = []
    typical = (sum(high**2 for _, high in span.norms.values()) / max(span.spec.numel, 1)) ** 0.5
    for (name, shape), norm, distance in zip(span.spec.shapes.items(), norms, distances):
        zero = _ZERO * typical * shape.numel() ** 0.5
        low, high = span.norms[name]
        if not (1 - margin) * low - zero <= norm <= (1 + margin) * high + zero:
            found.append(
                f"{name} is far outside the zoo: its norm is {norm:.4g}, the zoo's {low:.4g} to {high:.4g}"
            )
        elif distance > (1 + margin) * span.distances[name] + zero:
            spread = max(span.spreads[name], zero)
            found.append(
                f"{name} is far outside the zoo: its distance to the zoo's mean is "
                f"{distance / spread:.4g} times the spread, the zoo's up to "
                f"{span.distances[name] / spread:.4g}"
            )
    return found
