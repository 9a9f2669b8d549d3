"""Readable, unique names of labels, from the tensors whose outputs carry them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import chain
from itertools import count as count_from
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from weightops.tracing.graph import Part

#: modules whose weight is [in, out, ...]
_TRANSPOSED = (
    nn.Embedding,
    nn.EmbeddingBag,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)


def name_labels(
    model: nn.Module, parts: Sequence[Part]
) -> tuple[dict[int, str], dict[str, tuple[Part, int]]]:
    """Label's atom -> name, and name -> the part and axis that it comes from.

    A label is named after the first module whose weight's output axis carries it; failing that, after
    the first tensor whose first axis without a name it is, and then after any axis. ``"fc1"`` for axis 0 of
    ``fc1.weight``; factors of a product are ``"attn.q[0]"`` and ``"attn.q[1]"``.
    """
    names: dict[int, str] = {}
    origins: dict[str, tuple[Part, int]] = {}
    for choose in (_output, _first_unnamed, _all):
        for part in parts:
            for axis in choose(model, part, names):
                factors = part.factors[axis]
                stem = _base(part.tensor) + part.slices(axis + 1)
                stem += f".axis{axis}" if choose is _all else ""
                several = sum(atom is not None for atom, _ in factors) > 1
                for position, (atom, _) in enumerate(factors):
                    if atom is not None and atom not in names:
                        name = f"{stem}[{position}]" if several else stem
                        names[atom] = _unique(name, origins)
                        origins[names[atom]] = part, axis
    return names, origins


def _unique(name: str, taken: Collection[str]) -> str:
    numbered = (f"{name}#{count}" for count in count_from(2))
    return next(each for each in chain([name], numbered) if each not in taken)


def _base(tensor: str) -> str:
    """The module's path for its weight or bias, the tensor's own name otherwise."""
    path = tensor.partition(".parametrizations.")[0]
    for suffix in (".weight", ".bias", "_weight"):
        if path.removesuffix(suffix):
            path = path.removesuffix(suffix)
    return path


def _output(model: nn.Module, part: Part, names: Mapping[int, str]) -> Sequence[int]:
    """The output axis of a module's weight or bias."""
    path = part.tensor.partition(".parametrizations.")[0].rpartition(".")[0]
    if isinstance(model.get_submodule(path), _TRANSPOSED) and len(part.factors) > 1:
        return [1]
    return [0] if part.factors and ("weight" in part.tensor or len(part.factors) == 1) else []


def _first_unnamed(model: nn.Module, part: Part, names: Mapping[int, str]) -> Sequence[int]:
    return [
        axis
        for axis, factors in enumerate(part.factors)
        if any(atom is not None and atom not in names for atom, _ in factors)
    ][:1]


def _all(model: nn.Module, part: Part, names: Mapping[int, str]) -> Sequence[int]:
    return range(len(part.factors))
