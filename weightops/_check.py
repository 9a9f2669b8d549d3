"""Argument checks. Every message names the argument, what was expected and what was given."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def describe(value: Any) -> str:
    """A value as messages show it."""
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {list(value.shape)} on {value.device}"
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def tensor(where: str, name: str, value: Any, shape: str, dims: int | None = None) -> None:
    """``value`` must be a tensor, with ``dims`` axes where given; ``shape`` is how docs write it."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{where}: {name} must be a tensor {shape}, not {describe(value)}")
    dense(where, name, value)
    if dims is not None and value.dim() != dims:
        raise ValueError(f"{where}: {name} must have shape {shape}, not {list(value.shape)}")


def dense(where: str, name: str, value: Tensor) -> None:
    if value.layout is not torch.strided or value.is_nested:
        layout = "a nested one" if value.is_nested else value.layout
        raise TypeError(f"{where}: {name} must be a dense tensor, not {layout}")


def size(where: str, name: str, given: int, expected: int, of: str) -> None:
    """Length ``given`` must equal ``expected``, which is the size of ``of``."""
    if given != expected:
        raise ValueError(f"{where}: {name} has length {given}, but {of} has size {expected}")


def same_device(where: str, name: str, value: Tensor, other: str, reference: Tensor) -> None:
    if value.device != reference.device:
        raise ValueError(
            f"{where}: {name} is on {value.device}, but {other} is on {reference.device}"
        )


def floating(where: str, name: str, value: Tensor) -> None:
    if not value.is_floating_point():
        raise TypeError(f"{where}: {name} must be floating point, not {value.dtype}")


def embedding(where: str, name: str, value: Any) -> None:
    """``value`` must be ``[p, d]`` or ``[M, p, d]`` of float32 or float64."""
    tensor(where, name, value, "[p, d] or [M, p, d]")
    if value.dim() not in (2, 3):
        raise ValueError(
            f"{where}: {name} must have shape [p, d] or [M, p, d], not {list(value.shape)}"
        )
    if value.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{where}: {name} must be float32 or float64, not {value.dtype}")


def float_dtype(where: str, value: Any) -> None:
    if value is not torch.float32 and value is not torch.float64:
        raise ValueError(f"{where}: dtype must be float32 or float64, not {describe(value)}")


def flag(where: str, name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{where}: {name} must be True or False, not {describe(value)}")


def count(where: str, name: str, value: Any, least: int = 1) -> None:
    """``value`` must be an integer of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{where}: {name} must be an integer, not {describe(value)}")
    if value < least:
        raise ValueError(f"{where}: {name} must be at least {least}, not {value}")


def seed(where: str, value: Any) -> None:
    """``seed`` must be one that torch's generators take."""
    count(where, "seed", value, 0)
    if value >= 2**64:
        raise ValueError(f"{where}: seed must be below 2^64, not {value}")


def number(where: str, name: str, value: Any, low: float, high: float) -> None:
    """``value`` must be a number with ``low <= value < high``."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{where}: {name} must be a number, not {describe(value)}")
    if not low <= value < high:
        raise ValueError(f"{where}: {name} must be in [{low}, {high}), not {value}")


def choice(
    where: str, name: str, value: Any, choices: Sequence[str], or_else: str | None = None
) -> None:
    if not isinstance(value, str):
        expected = " or ".join(filter(None, ["a string", or_else]))
        raise TypeError(f"{where}: {name} must be {expected}, not {describe(value)}")
    if value not in choices:
        expected = ", ".join(map(repr, choices)) + (f" or {or_else}" if or_else else "")
        raise ValueError(f"{where}: {name} must be one of {expected}, not {value!r}")


def path(where: str, name: str, value: Any) -> Path:
    """``value`` as a path, which it must be."""
    if not isinstance(value, (str, os.PathLike)) or isinstance(os.fspath(value), bytes):
        raise TypeError(f"{where}: {name} must be a path, not {describe(value)}")
    if "\0" in os.fspath(value):
        raise ValueError(f"{where}: {name} must be a path, which has no null character")
    return Path(value)


def index_dtype(where: str, name: str, value: Tensor) -> None:
    if value.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{where}: {name} must be int64 or int32, not {value.dtype}")


def finite(where: str, name: str, value: Tensor) -> None:
    bad = ~torch.isfinite(value)
    if bad.any():
        at = bad.nonzero()[0].tolist()
        raise ValueError(
            f"{where}: {name} must be finite, but {name}{at} is {value[tuple(at)].item()}"
        )


def permutation_fault(index: Tensor) -> str | None:
    """What keeps a row of ``index`` [..., n] from being a permutation of 0 .. n - 1, or ``None``."""
    if index.is_meta:
        return None
    # Looking at values waits for a GPU, so there a tensor is looked at once, until it is written to.
    remembers = index.is_cuda and not index.is_inference()
    if remembers and getattr(index, "_weightops_checked", None) == index._version:
        return None
    n = index.shape[-1]
    outside = (index < 0) | (index >= n)
    if outside.any():
        at = outside.nonzero()[0].tolist()
        return f"entry {at} is {index[tuple(at)].item()}, outside 0..{n - 1}"
    counts = torch.zeros(index.shape, dtype=torch.int64, device=index.device)
    counts.scatter_add_(-1, index.long(), torch.ones_like(counts))
    twice = counts > 1
    if twice.any():
        at = twice.nonzero()[0].tolist()
        *row, value = at
        where = f" in row {row[0] if len(row) == 1 else row}" if row else ""
        return f"{value} stands {counts[tuple(at)].item()} times{where}"
    if remembers:
        index._weightops_checked = index._version  # type: ignore[attr-defined]
    return None


def index_fault(index: Tensor, count: int) -> str | None:
    """Which entry of ``index`` is not in 0 .. count - 1, or ``None``."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return None  # tracing, where there are no values
    while torch._C._functorch.is_functorch_wrapped_tensor(index):
        # Of a batched tensor the values of all lanes are looked at.
        index = torch._C._functorch.get_unwrapped(index)
    if index.is_meta or not index.numel():
        return None
    if index.is_cuda and torch.cuda.is_current_stream_capturing():
        return None
    # As above: a GPU is waited for once, until the tensor is written to.
    remembers = index.is_cuda and not index.is_inference()
    if remembers and getattr(index, "_weightops_below", None) == (index._version, count):
        return None
    low, high = index.aminmax()
    if low.item() < 0 or high.item() >= count:
        at = ((index < 0) | (index >= count)).nonzero()[0].tolist()
        return f"{at} is {index[tuple(at)].item()}, outside 0..{count - 1}"
    if remembers:
        index._weightops_below = (index._version, count)  # type: ignore[attr-defined]
    return None


def out_buffer(
    where: str, out: Any, shape: Sequence[int], like: Tensor, inputs: Sequence[Tensor]
) -> None:
    """``out`` must be able to take a result of ``shape`` and of ``like``'s dtype and device."""
    if not isinstance(out, Tensor):
        raise TypeError(f"{where}: out must be a tensor, not {describe(out)}")
    dense(where, "out", out)
    if list(out.shape) != list(shape):
        raise ValueError(f"{where}: out must have shape {list(shape)}, not {list(out.shape)}")
    if out.dtype != like.dtype:
        raise TypeError(f"{where}: out must be {like.dtype}, not {out.dtype}")
    same_device(where, "out", out, "the input", like)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (*inputs, out)):
        raise ValueError(
            f"{where}: out= does not record gradients; call without out, or under torch.no_grad()"
        )
    writable(where, "out", out, inputs)


def writable(where: str, name: str, value: Tensor, inputs: Sequence[Tensor]) -> None:
    """Each entry of ``value`` must have memory of its own, which no input shares."""
    if torch.compiler.is_compiling() or value.is_meta or value.numel() == 0:
        return
    sizes = zip(value.shape, value.stride(), strict=True)
    if not value.is_contiguous() and any(n > 1 and not s for n, s in sizes):
        raise ValueError(
            f"{where}: {name} must not be an expanded tensor (strides {value.stride()})"
        )
    if value.is_conj() or value.is_neg():
        raise ValueError(f"{where}: {name} must not be a conjugate or negative view")
    begin, end = _extent(value)
    for other in inputs:
        if other.numel() and other.device == value.device:
            first, last = _extent(other)
            if first < end and begin < last:
                raise ValueError(f"{where}: {name} shares memory with an input")


def _extent(value: Tensor) -> tuple[int, int]:
    if value.is_contiguous():
        return value.data_ptr(), value.data_ptr() + value.nbytes
    span = sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True)) + 1
    begin = value.data_ptr()
    return begin, begin + span * value.element_size()
