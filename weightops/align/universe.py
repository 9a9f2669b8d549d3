"""Frank-Wolfe over doubly stochastic matrices, for many networks at once.

The objective ``f(X) = sum_{i<j} <X_i W_i, X_j W_j>``, where X_i acts on every labelled axis, equals
``(|S|^2 - sum_i |X_i W_i|^2) / 2`` with ``S = sum_j X_j W_j``: neither it nor its gradient needs pairs.
A step goes towards permutations, and a moved tensor is linear in X at each place, so tensors moved on
every subset of their places follow a step by gathers alone.

Source: Crisostomi et al. 2024 (arXiv 2405.17897), section 3, with its sums over pairs taken apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement
from math import prod

import torch
from numpy.polynomial import Polynomial
from torch import Tensor

from weightops._progress import track
from weightops.ops.assign import assign
from weightops.ops.permute import permute_axes
from weightops.spec import WeightSpec


@dataclass(frozen=True)
class Moved:
    """One tensor of all networks, moved by X on each subset of the places where a label stands.

    Attributes:
        places: per place its label and its axis in ``[N, *factors]``.
        on: ``2^k`` tensors ``[N, *factors]``; bit b of the position: moved on place b.
    """

    places: tuple[tuple[str, int], ...]
    on: list[Tensor]

    def path(self, target: Mapping[str, Tensor], subset: int) -> list[Tensor]:
        """``M_0 .. M_K``: at ``X + t (Y - X)`` it is ``sum_k t^k (1 - t)^(K - k) M_k`` on ``subset``.

        M_k sums, over all k of those K places, the tensor moved by the permutations Y there and by X
        on the others.
        """
        sums = {0: self.on[subset]}
        part = subset
        while part:
            perms: list[Tensor | None] = [None] * (self.on[0].dim() - 1)
            for bit, (label, axis) in enumerate(self.places):
                if part >> bit & 1:
                    perms[axis - 1] = target[label]
            corner, k = permute_axes(self.on[subset ^ part], perms), part.bit_count()
            sums[k] = sums[k].add_(corner) if k in sums else corner
            part = (part - 1) & subset
        return [sums[k] for k in range(len(sums))]


class Universe:
    """The matrices X of N networks, and the networks moved by them.

    Args:
        spec: axes and layout of one network.
        flat: networks ``[N, P]``, float32 or float64.
        counted: names of the tensors that count.

    Attributes:
        matrices: label -> doubly stochastic ``[N, size, size]``; ``X[n, i, j]`` is the share of unit j
            of network n at place i. At first the identity.
        tensors: the counted tensors.
    """

    def __init__(self, spec: WeightSpec, flat: Tensor, counted: Sequence[str]) -> None:
        self.matrices = {
            label: torch.eye(size, dtype=flat.dtype, device=flat.device).repeat(len(flat), 1, 1)
            for label, size in spec.labels.items()
        }
        self.tensors = []
        views = spec.unflatten(flat)
        for name in counted:
            factors = [
                f for axis in range(len(spec.shapes[name])) for f in spec.factors(name, axis)
            ]
            places = tuple((label, i) for i, (label, _) in enumerate(factors, 1) if label)
            tensor = views[name].reshape(len(flat), *(size for _, size in factors))
            self.tensors.append(Moved(places, [tensor] * 2 ** len(places)))

    def objective(self) -> float:
        return pairs(tensor.on[-1] for tensor in self.tensors)

    def gradient(self) -> dict[str, Tensor]:
        """Label -> ``[N, size, size]``, the gradient of the objective by the matrices."""
        found = {label: torch.zeros_like(x) for label, x in self.matrices.items()}
        for tensor in self.tensors:
            moved = tensor.on[-1]
            others = moved.sum(0) - moved
            for bit, (label, axis) in enumerate(tensor.places):
                rest = tensor.on[-1 - (1 << bit)]
                found[label].baddbmm_(_rows(others, axis), _rows(rest, axis).mT)
        return found

    def along(self, target: Mapping[str, Tensor]) -> Polynomial:
        """The objective at ``X + t (Y - X)`` as a polynomial in t, for permutations Y ``[N, size]``."""
        total, t = Polynomial([0.0]), Polynomial([0.0, 1.0])
        for tensor in self.tensors:
            path = tensor.path(target, len(tensor.on) - 1)
            sums = [each.sum(0) for each in path]
            degree = 2 * (len(path) - 1)
            for a, b in combinations_with_replacement(range(len(path)), 2):
                both = _inner(sums[a], sums[b]) - _inner(path[a], path[b])
                weight = both / 2 if a == b else both
                total += weight * t ** (a + b) * (1 - t) ** (degree - a - b)
        return total

    def step(self, target: Mapping[str, Tensor], t: float) -> None:
        """Go to ``X + t (Y - X)``."""
        for label, x in self.matrices.items():
            index = target[label][..., None]
            x.mul_(1 - t).scatter_add_(2, index, x.new_full((), t).expand(index.shape))
        for tensor in self.tensors:
            # Larger subsets first: a path takes the tensors on smaller ones as they were.
            for subset in reversed(range(1, len(tensor.on))):
                path = tensor.path(target, subset)
                degree = len(path) - 1
                moved = path[0] * (1 - t) ** degree
                for k in range(1, degree + 1):
                    moved.add_(path[k], alpha=t**k * (1 - t) ** (degree - k))
                tensor.on[subset] = moved


def frank_wolfe(
    spec: WeightSpec,
    flat: Tensor,
    counted: Sequence[str],
    max_sweeps: int,
    tolerance: float,
    progress: bool,
) -> tuple[dict[str, Tensor], list[float]]:
    """Climb from the identity; the permutations ``[N, size]`` nearest to the end, and f at each step."""
    universe = Universe(spec, flat, counted)
    duals: dict[str, Tensor] = {}
    history = [universe.objective()]
    for _ in track(range(max_sweeps), "match_all: universe", enabled=progress):
        target = {}
        for label, score in universe.gradient().items():
            target[label], duals[label] = assign(score, duals=duals.get(label), return_duals=True)
        polynomial = universe.along(target)
        t = maximum(polynomial)
        universe.step(target, t)
        history.append(max(float(polynomial(t)), history[-1]))
        if history[-1] - history[-2] <= tolerance * abs(history[-1]):
            break
    return {label: assign(x) for label, x in universe.matrices.items()}, history


def maximum(polynomial: Polynomial) -> float:
    """Where ``polynomial`` is largest on [0, 1]."""
    roots = polynomial.deriv().roots().real
    return max((0.0, 1.0, *roots[(roots > 0) & (roots < 1)].tolist()), key=polynomial)


def pairs(tensors: Iterable[Tensor]) -> float:
    """``sum_{i<j} <T_i, T_j>`` over the rows of each tensor ``[N, ...]``, added up."""
    total = 0.0
    for tensor in tensors:
        whole = tensor.sum(0)
        total += (_inner(whole, whole) - _inner(tensor, tensor)) / 2
    return total


def _inner(first: Tensor, second: Tensor) -> float:
    # Rows are added in their own dtype, which torch does in a cascade: 2e-10 off, four times faster.
    return (first * second).sum(-1).sum(dtype=torch.float64).item()


def _rows(tensor: Tensor, axis: int) -> Tensor:
    """``[N, size, others]`` with ``axis`` in front."""
    moved = tensor.movedim(axis, 1)
    return moved.reshape(*moved.shape[:2], prod(moved.shape[2:]))
