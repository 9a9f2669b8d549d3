"""How large a basis is, before it is built."""

from __future__ import annotations

import os
from collections import Counter
from functools import cache
from math import comb, prod

import torch

from weightops.spec import WeightSpec

#: above this many terms a plan is refused before its terms are listed
MOST_TERMS = 50_000_000
_SHRINK = 'terms= ("local", "mpnn" or a predicate) or rank= shrink it'


@cache
def bell(n: int) -> int:
    """Number of set partitions of n things."""
    return 1 if n == 0 else sum(comb(n - 1, k) * bell(k) for k in range(n))


def _kinds(spec: WeightSpec, fixed: str, side: str) -> Counter:
    """How many parts there are with each multiset of labels."""
    found: Counter = Counter()
    for name, shape in spec.shapes.items():
        labels: Counter = Counter()
        count = 1
        for axis in range(len(shape)):
            for factor, (label, size) in enumerate(spec.factors(name, axis)):
                if label is not None:
                    labels[label] += 1
                elif fixed == "permute":
                    labels[side, name, axis, factor] += 1
                else:
                    count *= size
        found[frozenset(labels.items())] += count
    return found


def count_terms(
    spec: WeightSpec, spec_out: WeightSpec, fixed: str, within_parts: bool = False
) -> int:
    """Number of terms of the full basis, or of those from a part to itself."""
    into = _kinds(spec, fixed, "")
    if within_parts and spec == spec_out:
        return sum(n * prod(bell(2 * c) for _, c in labels) for labels, n in into.items())
    out = into if spec == spec_out else _kinds(spec_out, fixed, "out")
    total = 0
    for labels, n in into.items():
        counts = dict(labels)
        for others, m in out.items():
            both = Counter(counts)
            both.update(dict(others))
            total += n * m * prod(bell(c) for c in both.values())
    return total


def check_count(where: str, terms: int, fixed: str) -> None:
    """Raise ``ValueError`` where a basis has too many terms to list."""
    if terms > MOST_TERMS:
        # A predicate would have to be asked about every term, and a rank needs them listed too.
        hint = ' or fixed="permute" shrinks it' if fixed != "permute" else " shrinks it"
        raise ValueError(
            f"{where}: the basis has {terms:,} terms with fixed={fixed!r}: one number for each takes "
            f'{_gib(4 * terms)} in float32; terms="local"{hint}'
        )


def check_memory(
    where: str, terms: int, in_channels: int, out_channels: int, dtype: torch.dtype
) -> None:
    """Raise ``ValueError`` where ``theta`` is larger than this machine's memory."""
    needed = terms * in_channels * out_channels * dtype.itemsize
    held = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > held:
        raise ValueError(
            f"{where}: theta of {terms:,} terms, {in_channels} to {out_channels} channels, in {dtype} "
            f"takes {_gib(needed)}, this machine has {_gib(held)}; {_SHRINK}"
        )


def _gib(n: int) -> str:
    return f"{n / 2**30:,.3g} GiB"
