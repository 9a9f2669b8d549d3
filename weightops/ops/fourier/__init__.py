"""How much of each frequency an embedding of cyclic tokens has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from weightops import _check, _op
from weightops.ops.fourier import reference

__all__ = ["fourier_signal", "fourier_transform"]

_product = _op._exactly(torch.matmul)


def _vmap(size: int, dims: Sequence, embedding: Tensor, matrix: Tensor) -> tuple[Tensor, int]:
    if dims[1] is not None:
        return torch.vmap(reference.signal, tuple(dims))(embedding, matrix), 0
    embedding = _op.moved_front(embedding, dims[0], size)
    return _signal(embedding.flatten(0, 1), matrix).unflatten(0, (size, embedding.shape[1])), 0


def _directions(embedding: Tensor, matrix: Tensor) -> Tensor:
    """The rows of the transform over their norms, ``[M, 2, K, d]``; zero where there is no signal."""
    rows = _product(matrix, embedding[:, None])
    norms = _signal(embedding, matrix)[:, None, :, None]
    present = norms > 0
    return torch.where(present, rows / torch.where(present, norms, 1), 0)


def _backward(args: Sequence, needs: Sequence[bool], grad: Tensor) -> tuple[Tensor, None]:
    embedding, matrix = args
    along = _directions(embedding, matrix) * grad[:, None, :, None]
    return _product(matrix.mT, along).sum(1), None


def _jvp(args: Sequence, embedding: Tensor, *_: None) -> Tensor:
    return (_directions(*args) * _product(args[1], embedding[:, None])).sum((1, 3))


# The matrix is data: nothing is differentiated by it.
_signal: Callable = _op.define(
    "fourier_signal(Tensor embedding, Tensor matrix) -> Tensor",
    reference=reference.signal,
    fake=lambda embedding, matrix: embedding.new_empty(embedding.shape[0], matrix.shape[1]),
    vmap=_vmap,
    backward=_backward,
    jvp=_jvp,
)


@lru_cache(maxsize=8)
def _kept_matrix(p: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return reference.transform(p, dtype, device)


def _matrix(p: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The transform, made once where nothing wraps what is made."""
    traced = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0
    make = reference.transform if traced or _op._transforms_active() else _kept_matrix
    return make(p, dtype, device)


def _by_fft(embedding: Tensor) -> bool:
    """Whether torch's own transform is the faster one: of one dimension, and from some length on (measured)."""
    p, d = embedding.shape[-2:]
    return embedding.device.type == "cpu" and (d == 1 or p * embedding.dtype.itemsize >= 4096)


def fourier_transform(p: int) -> Tensor:
    """The discrete Fourier transform of length p as a matrix, each frequency once and without the mean.

    Returns:
        ``[2, K, p]`` with K = (p - 1) // 2, float64: ``cos(2 pi k n / p)`` and ``-sin(2 pi k n / p)`` for
        k = 1 .. K, as the rows of ``torch.fft.fft``. Of an even p the frequency p / 2, which is no circle, is
        left out.

    Raises:
        ValueError: p < 3.
        TypeError: p is no integer.
    """
    _check.count("fourier_transform", "p", p, 3)
    return reference.transform(p, torch.float64, torch.device("cpu"))


def fourier_signal(embedding: Tensor) -> Tensor:
    """The signal of each frequency: ``s_k = || row k of the Fourier transform over the tokens ||``.

    Args:
        embedding: ``[p, d]``, or ``[M, p, d]`` of M networks; float32 or float64, any p of at least 3.

    Returns:
        ``[K]`` or ``[M, K]``, K = (p - 1) // 2, of ``embedding``'s dtype, for k = 1 .. K. Differentiable; where a
        signal is zero, its gradient is.

    Raises:
        ValueError: p < 3 or d = 0.
        TypeError: an argument has the wrong type or dtype.

    Source: Ding et al. 2024, "Survival of the Fittest Representation", arXiv 2405.17420, section 3.
    """
    where = "fourier_signal"
    _check.embedding(where, "embedding", embedding)
    p, d = embedding.shape[-2:]
    if p < 3 or d < 1:
        raise ValueError(
            f"{where}: embedding must have p >= 3 tokens of d >= 1 dimensions, not shape "
            f"{list(embedding.shape)}"
        )
    if _by_fft(embedding):
        rows = torch.fft.rfft(embedding, dim=-2)[..., 1 : (p + 1) // 2, :]
        return torch.linalg.vector_norm(rows, dim=-1)
    matrix = _matrix(p, embedding.dtype, embedding.device)
    if embedding.dim() == 3:
        return _signal(embedding, matrix)
    return _signal(embedding[None], matrix)[0]
