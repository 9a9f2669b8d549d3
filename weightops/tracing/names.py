"""Readable, unique names of labels, from the tensors whose outputs carry them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from weightops.tracing.graph import Part

#: modules whose weight is [in, out, ...]
_TRANSPOSED = (nn.Embedding, nn.EmbeddingBag, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def name_labels(model: nn.Module, parts: Sequence[Part]) -> dict[int, str]:
    """Label's atom -> name: of the first tensor whose output axis carries it, else of any that does.

    ``"fc1"`` for axis 0 of ``fc1.weight``; factors of a product are ``"attn.q[0]"``, ``"attn.q[1]"``.
    """
    names: dict[int, str] = {}
    taken: set[str] = set()
    for only_outputs in (True, False):
        for part in parts:
            for axis in _axes(model, part) if only_outputs else range(len(part.factors)):
                factors, cut = part.factors[axis], part.slice(axis)
                base = _base(part.tensor) + (f"[{cut}]" if cut else "")
                several = sum(atom is not None for atom, _ in factors) > 1
                for position, (atom, _) in enumerate(factors):
                    if atom is None or atom in names:
                        continue
                    stem = base if only_outputs else f"{base}.axis{axis}"
                    name = stem = f"{stem}[{position}]" if several else stem
                    count = 1
                    while name in taken:
                        count += 1
                        name = f"{stem}#{count}"
                    names[atom] = name
                    taken.add(name)
    return names


def _base(tensor: str) -> str:
    """The module's path for its weight or bias, the tensor's own name otherwise."""
    path = tensor.partition(".parametrizations.")[0]
    for suffix in (".weight", ".bias", "_weight"):
        if path.removesuffix(suffix):
            path = path.removesuffix(suffix)
    return path


def _axes(model: nn.Module, part: Part) -> Iterator[int]:
    """The output axis of a module's weight; of a parameter by itself the first that has a label."""
    path = part.tensor.partition(".parametrizations.")[0].rpartition(".")[0]
    owner = model.get_submodule(path)
    if isinstance(owner, _TRANSPOSED) and len(part.factors) > 1:
        yield 1
    elif "weight" in part.tensor or len(part.factors) == 1:
        yield 0
    else:
        labelled = (
            axis
            for axis, factors in enumerate(part.factors)
            if any(atom is not None for atom, _ in factors)
        )
        yield from list(labelled)[:1]
