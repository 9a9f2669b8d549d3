"""Partial generation: some layers are generated, the rest is a base network's."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor

from weightops import _check
from weightops.generate._arguments import check_networks
from weightops.spec import WeightSpec


def partial(base: Tensor, generated: Tensor, spec: WeightSpec, names: Sequence[str]) -> Tensor:
    """Networks ``[N, P]`` with the named tensors of ``generated`` and all others of ``base``.

    Args:
        base: one network ``[P]``, or one for each ``[N, P]``.
        generated: ``[N, P]``, of the same dtype.
        spec: layout of both.
        names: tensors (``"fc1.weight"``), or modules whose tensors are meant (``"layer1.0"``).

    Raises:
        ValueError: shapes or devices do not fit; a name is unknown.
        TypeError: an argument has the wrong type or dtype.
    """
    where = "partial"
    check_networks(where, "generated", generated, spec, empty=True, finite=False)
    _check.tensor(where, "base", base, "[P] or [N, P]")
    spec.check_flat(where, base, "base")
    if base.dim() > 2 or (base.dim() == 2 and len(base) != len(generated)):
        raise ValueError(
            f"{where}: base must have shape [P] or {list(generated.shape)} as generated, "
            f"not {list(base.shape)}"
        )
    if base.dtype != generated.dtype:
        raise TypeError(f"{where}: base is {base.dtype}, but generated is {generated.dtype}")
    _check.same_device(where, "base", base, "generated", generated)
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise TypeError(f"{where}: names must be a list of names, not {_check.describe(names)}")
    if not names:
        raise ValueError(f"{where}: names is empty, so nothing would be generated")
    chosen = torch.zeros(spec.numel, dtype=torch.bool, device=base.device)
    views = spec.unflatten(chosen)
    for name in names:
        for tensor in _named(where, name, spec):
            views[tensor].fill_(True)
    return torch.where(chosen, generated, base)


def _named(where: str, name: Any, spec: WeightSpec) -> list[str]:
    """The tensors that ``name`` means: itself, its parts, or all below a module."""
    if not isinstance(name, str):
        raise TypeError(f"{where}: names must hold names, not {_check.describe(name)}")
    found = [t for t in spec.shapes if t == name or t.startswith((f"{name}.", f"{name}["))]
    if not found or not name:
        known = {piece for t in spec.shapes for piece in _prefixes(t)}
        close = get_close_matches(name, sorted(known))
        hint = f"did you mean {close}?" if close else f"the spec has {list(spec.shapes)}"
        raise ValueError(f"{where}: names has {name!r}, which is no tensor or module; {hint}")
    return found


def _prefixes(tensor: str) -> list[str]:
    """A tensor's name and its modules': a.b.weight, a.b, a."""
    pieces = tensor.split("[")[0].split(".")
    return [tensor, *(".".join(pieces[:n]) for n in range(1, len(pieces) + 1))]
