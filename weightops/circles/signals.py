"""What an embedding's frequencies are: which are alive, how circular they are, and what each is worth alone."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from weightops import _check
from weightops.circles.model import check_networks, pair_accuracy
from weightops.ops.fourier import fourier_transform
from weightops.spec import WeightSpec


def alive(signals: Tensor, *, by: Literal["mean", "level"] = "mean", level: float = 10.0) -> Tensor:
    """Which frequencies are circles.

    Args:
        signals: ``[..., K]``, from :func:`weightops.fourier_signal`.
        by: ``"mean"``: those above twice the mean of all, or ``"level"``: those above ``level``. The mean is
            over the frequencies k and p - k, whose signals are equal.

    Returns:
        bool ``[..., K]``; of signals that are not finite ``False``.

    Source: Ding et al. 2024, arXiv 2405.17420, section 3.
    """
    return _alive("alive", signals, by, level)


def _alive(where: str, signals: Tensor, by: str, level: float) -> Tensor:
    check_signals(where, signals, "[..., K]", 1)
    _check.choice(where, "by", by, ("mean", "level"))
    _check.number(where, "level", level, 0, sys.float_info.max)
    if by == "level":
        return (signals > level) & signals.isfinite()
    return signals > 2 * signals.mean(-1, keepdim=True)


def count_circles(
    signals: Tensor, *, by: Literal["mean", "level"] = "mean", level: float = 10.0
) -> Tensor:
    """How many frequencies are :func:`alive`, int64 ``[...]``."""
    return _alive("count_circles", signals, by, level).sum(-1)


def frequency_gradients(signals: Tensor, *, step: int = 4) -> Tensor:
    """How much each signal grows in the first steps, over its start: ``(s(step) - s(0)) / s(0)``, ``[..., K]``.

    Args:
        signals: ``[R, ..., K]`` of every step from the first on, as :func:`train` records them.
    """
    where = "frequency_gradients"
    check_signals(where, signals, "[R, ..., K]", 2)
    _check.count(where, "step", step)
    if len(signals) <= step:
        raise ValueError(f"{where}: step is {step}, but signals has {len(signals)} steps")
    return (signals[step] - signals[0]) / signals[0]


def isolate(embedding: Tensor, frequencies: Tensor, *, mean: bool = False) -> Tensor:
    """What of an embedding has the given frequencies; differentiable.

    Args:
        embedding: ``[p, d]`` or ``[M, p, d]``.
        frequencies: bool ``[K]`` or ``[M, K]``, of k = 1 .. K.
        mean: keep the mean over the tokens, too.
    """
    where = "isolate"
    _check_embedding(where, embedding)
    p = embedding.shape[-2]
    _check.tensor(where, "frequencies", frequencies, "[K] or [M, K]")
    _check.flag(where, "mean", mean)
    if frequencies.dtype != torch.bool:
        raise TypeError(f"{where}: frequencies must be bool, not {frequencies.dtype}")
    _check.same_device(where, "frequencies", frequencies, "embedding", embedding)
    shapes = [[(p - 1) // 2], [*embedding.shape[:-2], (p - 1) // 2]]
    if list(frequencies.shape) not in shapes:
        raise ValueError(
            f"{where}: frequencies must have shape {' or '.join(map(str, shapes))}, "
            f"not {list(frequencies.shape)}"
        )
    rows = _rows(embedding) * frequencies[..., None, :, None]
    made = _from_rows(rows, p)
    return made + embedding.mean(-2, keepdim=True) if mean else made


def circularity(embedding: Tensor) -> Tensor:
    """How much of an embedding, seen along a frequency's plane, has that frequency: ``[K]`` or ``[M, K]``, 0 to 1.

    The embedding is projected on the directions of the real and of the imaginary part of row k of its Fourier
    transform; the result is the mean of the two shares of the squares that have frequency k. It is 1 for all
    frequencies whose planes are orthogonal to those of the others, 0 where there is no such frequency.

    Source: the analysis code of Ding et al. 2024, arXiv 2405.17420.
    """
    _check_embedding("circularity", embedding)
    p = embedding.shape[-2]
    rows = _rows(embedding)
    seen = embedding[..., None, None, :, :] @ rows[..., None]  # [..., 2, K, p, 1]
    of_k = fourier_transform(p).to(embedding).transpose(0, 1)
    along = of_k @ seen  # [..., 2, K, 2, 1]
    squares = seen.square().sum((-2, -1))
    shares = 2 / p * along.square().sum((-2, -1)) / squares
    return torch.where(squares > 0, shares, 0).mean(-2)


def single_circle_accuracy(
    flat: Tensor, spec: WeightSpec, pairs: Tensor, *, mean: bool = False
) -> Tensor:
    """Accuracies ``[M, K]`` of networks of whose embedding one frequency alone is left; else as :func:`pair_accuracy`.

    Args:
        flat, spec, pairs: as for :func:`pair_accuracy`.
        mean: keep the mean of the embedding, too.
    """
    where = "single_circle_accuracy"
    p, *_ = check_networks(where, flat, spec)
    _check.flag(where, "mean", mean)
    flat = flat.detach().clone()
    part = spec.unflatten(flat)["embedding.weight"]
    whole, found = part.clone(), []
    for frequency in torch.eye((p - 1) // 2, dtype=torch.bool, device=flat.device):
        part.copy_(isolate(whole, frequency, mean=mean))
        try:
            found.append(pair_accuracy(flat, spec, pairs))
        except (TypeError, ValueError) as error:
            text = str(error).removeprefix("pair_accuracy: ")
            raise type(error)(f"{where}: {text}") from None
    return torch.stack(found, 1)


def construct(
    p: int,
    d: int,
    frequencies: Sequence[Sequence[int]],
    signals: Sequence[Sequence[float]],
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Random embeddings ``[M, p, d]`` that have the given frequencies with the given signals, and no others.

    The start of a competition: ``train(M, p, d, embedding=construct(p, d, [(3, 7)] * M, [(60.0, 90.0)] * M))``.

    Args:
        p, d: tokens and dimensions.
        frequencies: per embedding those that it has, of 1 .. (p - 1) // 2.
        signals: per embedding the norm of each.
        seed: of the directions, which are random.

    Raises:
        ValueError: p < 3, d < 1, frequencies out of range or twice, lengths that do not fit.
        TypeError: wrong types.
    """
    where = "construct"
    _check.count(where, "p", p, 3)
    _check.count(where, "d", d)
    _check.seed(where, seed)
    _check.float_dtype(where, dtype)
    count = (p - 1) // 2
    norms = _table(where, frequencies, signals, count)
    generator = torch.Generator().manual_seed(seed)
    shape = len(norms), 2, count, d
    rows = torch.randn(shape, generator=generator, dtype=torch.float64)
    rows *= (norms / torch.linalg.vector_norm(rows, dim=(1, 3)))[:, None, :, None]
    return _from_rows(rows, p).to(dtype)


def _table(where: str, frequencies: Any, signals: Any, count: int) -> Tensor:
    """The signals of all frequencies, ``[M, count]``."""
    for name, value in (("frequencies", frequencies), ("signals", signals)):
        if not isinstance(value, (list, tuple)) or not all(
            isinstance(each, (list, tuple)) for each in value
        ):
            raise TypeError(f"{where}: {name} must list a sequence per embedding")
    if [len(each) for each in frequencies] != [len(each) for each in signals]:
        raise ValueError(f"{where}: signals must have one number for each of frequencies")
    norms = torch.zeros(len(frequencies), count, dtype=torch.float64)
    for n, (ks, values) in enumerate(zip(frequencies, signals, strict=True)):
        for k, value in zip(ks, values, strict=True):
            _check.count(where, f"frequencies[{n}]", k)
            if k > count or norms[n, k - 1]:
                raise ValueError(
                    f"{where}: frequencies[{n}] must be different ones of 1..{count}, not {list(ks)}"
                )
            _check.number(where, f"signals[{n}]", value, 0, sys.float_info.max)
            norms[n, k - 1] = value
    return norms


def _rows(embedding: Tensor) -> Tensor:
    """The Fourier transform over the tokens, real and imaginary parts ``[..., 2, K, d]``."""
    return fourier_transform(embedding.shape[-2]).to(embedding) @ embedding[..., None, :, :]


def _from_rows(rows: Tensor, p: int) -> Tensor:
    """The embedding ``[..., p, d]`` that has these rows, and no others."""
    return 2 / p * (fourier_transform(p).to(rows).mT @ rows).sum(-3)


def check_signals(where: str, signals: Any, shape: str, least: int) -> None:
    _check.tensor(where, "signals", signals, shape)
    if signals.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{where}: signals must be float32 or float64, not {signals.dtype}")
    if signals.dim() < least:
        raise ValueError(f"{where}: signals must have shape {shape}, not {list(signals.shape)}")


def _check_embedding(where: str, embedding: Any) -> None:
    _check.embedding(where, "embedding", embedding)
    if embedding.shape[-2] < 3:
        raise ValueError(
            f"{where}: embedding must have 3 tokens at least, not shape {list(embedding.shape)}"
        )
