"""The first layer of networks that read pairs of tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from weightops import _check, _op
from weightops.ops.token_pair import reference

__all__ = ["token_pair_add", "token_pair_linear", "token_pair_sum"]


def _refuse(pairs: Tensor, tokens: int) -> None:
    if fault := _check.index_fault(pairs, tokens):
        raise RuntimeError(f"pairs{fault}")


def _vmap_of(op: Callable[[], Callable]) -> Callable:
    """Lanes are more networks: ``values [V, M, ...]`` and ``pairs [V, M or 1, B, 2]``."""

    def batched(size: int, dims: Sequence, values: Tensor, pairs: Tensor, *rest: int) -> tuple:
        values = _op.moved_front(values, dims[0], size)
        if dims[1] is not None or pairs.shape[0] != 1:
            pairs = _op.moved_front(pairs, dims[1], size)
            pairs = pairs.expand(size, values.shape[1], *pairs.shape[2:]).flatten(0, 1)
        made = op()(values.flatten(0, 1), pairs, *rest)
        return made.unflatten(0, (size, values.shape[1])), 0

    return batched


# Linear, and each the other's transpose.
token_pair_add: Callable = _op.define(
    "token_pair_add(Tensor tables, Tensor pairs) -> Tensor",
    reference=reference.add,
    fake=lambda tables, pairs: tables.new_empty(tables.shape[0], pairs.shape[1], tables.shape[3]),
    check=lambda tables, pairs: _refuse(pairs, tables.shape[2]),
    vmap=_vmap_of(lambda: token_pair_add),
    backward=lambda args, needs, grad: (token_pair_sum(grad, args[1], args[0].shape[2]), None),
    jvp=lambda args, tables, *_: token_pair_add(tables, args[1]),
)
token_pair_sum: Callable = _op.define(
    "token_pair_sum(Tensor values, Tensor pairs, SymInt tokens) -> Tensor",
    reference=reference.sum,
    fake=lambda values, pairs, tokens: values.new_empty(
        values.shape[0], 2, tokens, values.shape[2]
    ),
    check=lambda values, pairs, tokens: _refuse(pairs, tokens),
    vmap=_vmap_of(lambda: token_pair_sum),
    backward=lambda args, needs, grad: (token_pair_add(grad, args[1]), None, None),
    jvp=lambda args, values, *_: token_pair_sum(values, *args[1:]),
)
_op.serve("token_pair_sum", "cuda", reference.sorted_sum, by="sorted sums (plain torch)")
_tables = _op._exactly(reference.tables)


def token_pair_linear(
    pairs: Tensor, embedding: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Tensor:
    """A linear layer of two tokens' embeddings side by side: ``A[a] + B[b]``.

    ``A = E W_a^T`` and ``B = E W_b^T + bias`` are products of p rows instead of one for each pair. The backward
    pass sums over the pairs of each token, in an order of its own: the same to the bit each time.

    Args:
        pairs: tokens ``(a, b)`` in 0 .. p - 1, int64 or int32 ``[B, 2]``; of M networks ``[B, 2]`` for all or
            ``[M, B, 2]``.
        embedding: ``[p, d]``, or ``[M, p, d]`` of M networks; float32 or float64.
        weight: ``[h, 2 d]`` or ``[M, h, 2 d]``: ``W_a`` and ``W_b`` side by side.
        bias: ``[h]`` or ``[M, h]``.

    Returns:
        ``[B, h]`` or ``[M, B, h]``. Gradients flow to ``embedding``, ``weight`` and ``bias``.

    Raises:
        ValueError: shapes or devices do not fit, d = 0, a token out of range.
        TypeError: an argument has the wrong type or dtype.

    Source: the first layer of Ding et al. 2024, "Survival of the Fittest Representation", arXiv 2405.17420.
    """
    where = "token_pair_linear"
    _check.embedding(where, "embedding", embedding)
    single = embedding.dim() == 2
    front = [] if single else [embedding.shape[0]]
    d = embedding.shape[-1]
    if d == 0:
        raise ValueError(f"{where}: embedding has no dimension (shape {list(embedding.shape)})")
    parts = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
    for name, part in parts.items():
        _check.tensor(where, name, part, "[h, 2 d] or [M, h, 2 d]" if name == "weight" else "[h]")
        if part.dtype != embedding.dtype:
            raise TypeError(f"{where}: {name} is {part.dtype}, but embedding is {embedding.dtype}")
        _check.same_device(where, name, part, "embedding", embedding)
    _check_shape(where, "weight", weight, [*front, "h", 2 * d])
    if bias is not None:
        _check_shape(where, "bias", bias, [*front, weight.shape[-2]])
    _check.tensor(where, "pairs", pairs, "[B, 2] or [M, B, 2]")
    _check.index_dtype(where, "pairs", pairs)
    _check.same_device(where, "pairs", pairs, "embedding", embedding)
    _check_shape(where, "pairs", pairs, [*(front if pairs.dim() == 3 else []), "B", 2])
    if fault := _check.index_fault(pairs, embedding.shape[-2]):
        raise ValueError(f"{where}: pairs{fault}")
    if single:
        embedding, weight = embedding[None], weight[None]
        bias = None if bias is None else bias[None]
    made = token_pair_add(
        _tables(embedding, weight, bias), pairs.long() if pairs.dim() == 3 else pairs.long()[None]
    )
    return made[0] if single else made


def _check_shape(where: str, name: str, value: Tensor, shape: Sequence[int | str]) -> None:
    fits = len(shape) == value.dim() and all(
        isinstance(expected, str) or given == expected
        for given, expected in zip(value.shape, shape, strict=True)
    )
    if not fits:
        text = ", ".join(map(str, shape))
        raise ValueError(f"{where}: {name} must have shape [{text}], not {list(value.shape)}")
