"""The definition of token_pair_add and token_pair_sum, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def tables(embedding: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What each token adds as the first and as the second of a pair, ``[M, 2, p, h]``.

    Args:
        embedding: ``[M, p, d]``.
        weight: ``[M, h, 2 d]``, of the two embeddings side by side.
        bias: ``[M, h]`` or ``None``; the second token's part has it.
    """
    made = embedding[:, None] @ weight.unflatten(2, (2, -1)).permute(0, 2, 3, 1)
    if bias is None:
        return made
    return torch.stack([made[:, 0], made[:, 1] + bias[:, None]], 1)


def add(tables: Tensor, pairs: Tensor) -> Tensor:
    """``tables`` [M, 2, p, h], ``pairs`` [M or 1, B, 2] -> ``tables[m, 0, a] + tables[m, 1, b]`` [M, B, h]."""
    first, second = _rows(pairs, tables.shape[0], tables.shape[2])
    flat = tables.flatten(0, 2)
    # Faster than indexing, and Inductor (2.13) gets the vmapped derivatives of index_select wrong.
    return F.embedding(first, flat) + F.embedding(second, flat)


def sum(values: Tensor, pairs: Tensor, tokens: int) -> Tensor:
    """``values`` [M, B, h] summed over the pairs that have a token first, and second: [M, 2, tokens, h]."""
    # Not index_add, whose forward derivatives Inductor (2.13) gets wrong.
    zeros = values.new_zeros(values.shape[0], tokens, values.shape[2])
    index = pairs[..., None].expand(values.shape[0], -1, -1, values.shape[2])
    return torch.stack([zeros.scatter_add(1, index[:, :, n], values) for n in (0, 1)], 1)


def sorted_sum(values: Tensor, pairs: Tensor, tokens: int) -> Tensor:
    """:func:`sum` without atomic additions, whose order on a GPU is another each time."""
    networks, width = values.shape[0], values.shape[2]
    rows = torch.stack(_rows(pairs, networks, tokens)).reshape(-1)
    order = rows.argsort(stable=True)
    lengths = torch.bincount(rows, minlength=2 * tokens * networks)
    data = values.flatten(0, 1)[order % (networks * values.shape[1])]
    made = torch.segment_reduce(data, "sum", lengths=lengths, axis=0, unsafe=True)
    return made.view(networks, 2, tokens, width)


def _rows(pairs: Tensor, networks: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Which rows of ``[networks * 2 * tokens, h]`` belong to the firsts, and to the seconds, ``[M, B]`` each."""
    begin = torch.arange(networks, device=pairs.device)[:, None] * (2 * tokens)
    return begin + pairs[..., 0], begin + tokens + pairs[..., 1]
