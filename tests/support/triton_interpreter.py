"""Triton's interpreter, stricter, faster, and right where it is not; for processes that have chosen it."""

from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


class Guarded:
    """A kernel which may touch nothing but its own tensors."""

    extents: Sequence[tuple[int, int]] = ()

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **options: Any) -> None:
            Guarded.extents = [
                (at.data_ptr(), at.data_ptr() + reach(at) * at.itemsize)
                for at in args
                if isinstance(at, Tensor)
            ]
            self.kernel[grid](*args, **options)

        return launch


def reach(at: Tensor) -> int:
    return 1 + sum((n - 1) * step for n, step in zip(at.shape, at.stride())) if at.numel() else 0


def check_pointers(pointers: TensorHandle, mask: TensorHandle) -> None:
    used = pointers.data[np.broadcast_to(mask.data, pointers.data.shape).astype(bool)]
    if used.size:
        low, high = int(used.min()), int(used.max())
        assert any(begin <= low and high < end for begin, end in Guarded.extents)


def unpacked(values: TensorHandle) -> TensorHandle:
    """The interpreter has the bits of bfloat16, and would multiply those."""
    if values.dtype.scalar != tl.bfloat16:
        return values
    return TensorHandle((values.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


patched: set[str] = set()


def guard(patch: pytest.MonkeyPatch, kernels: Mapping[ModuleType, Sequence[str]]) -> None:
    """Let the ``kernels`` of some modules touch only what they are launched with, and multiply one dtype."""
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    dot = InterpreterBuilder.create_dot

    def guarded_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        check_pointers(pointers, mask)
        return load(self, pointers, mask, *rest)

    def guarded_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        check_pointers(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def right_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        assert a.dtype.scalar == b.dtype.scalar
        return dot(self, unpacked(a), unpacked(b), *rest)

    def called(self: Any, *args: Any, **options: Any) -> Any:
        if self.fn.__module__ not in patched:
            patched.add(self.fn.__module__)
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **options)

    # Triton would patch its language anew for every call within a kernel, for a third of the time.
    patch.setattr(interpreter.InterpretedFunction, "__call__", called)
    patch.setattr(InterpreterBuilder, "create_masked_load", guarded_load)
    patch.setattr(InterpreterBuilder, "create_masked_store", guarded_store)
    patch.setattr(InterpreterBuilder, "create_dot", right_dot)
    for module, names in kernels.items():
        for name in names:
            patch.setattr(module, name, Guarded(getattr(module, name)))
