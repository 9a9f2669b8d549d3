"""Where weights lie in tokens, as the integers that the kernels read.

A *group* is a number of rows. Row r is its *pieces* side by side, piece after piece a run of ``width``
weights that starts at ``offset + r * width`` of the network; then zeros, up to whole tokens. Rows and
groups stand one behind the other. The pieces of a plan cover each weight exactly once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Piece(NamedTuple):
    """One tensor's part of each row of a group; ``tensor`` numbers its statistics."""

    tensor: int
    offset: int
    width: int


class Group(NamedTuple):
    """Rows of pieces, each padded to ``tokens`` whole tokens."""

    rows: int
    length: int
    tokens: int
    pieces: tuple[Piece, ...]


class Decoded(NamedTuple):
    """A plan's integers, read back; ``tokens`` is T, ``size`` D, ``numel`` P."""

    size: int
    numel: int
    tensors: int
    tokens: int
    groups: list[Group]


def encode(
    size: int, numel: int, tensors: int, groups: Sequence[tuple[int, Sequence[Piece]]]
) -> list[int]:
    """Token size, weights and tensors of a network, then the groups ``(rows, pieces)``, each list behind its length."""
    code = [size, numel, tensors, len(groups)]
    for rows, pieces in groups:
        code += [rows, len(pieces)]
        code += [value for piece in pieces for value in piece]
    return code


def decode(code: Sequence[int]) -> Decoded:
    """Read a plan's integers back, as the compiled kernels do."""
    values = iter(code)
    size, numel, tensors = next(values), next(values), next(values)
    groups = []
    for _ in range(next(values)):
        rows, count = next(values), next(values)
        pieces = tuple(Piece(next(values), next(values), next(values)) for _ in range(count))
        length = sum(piece.width for piece in pieces)
        groups.append(Group(rows, length, -(-length // size), pieces))
    total = sum(group.rows * group.tokens for group in groups)
    return Decoded(size, numel, tensors, total, groups)
