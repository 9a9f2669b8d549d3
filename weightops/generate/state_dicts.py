"""Zoos made of checkpoints."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weightops import _check, _checkpoints
from weightops._checkpoints import CheckpointError
from weightops._progress import track
from weightops.generate import _files
from weightops.generate._files import DTYPES
from weightops.generate.writer import ZooWriter
from weightops.generate.zoo import Zoo
from weightops.spec import WeightSpec


def import_state_dicts(
    paths: Sequence[str | os.PathLike[str]],
    spec: WeightSpec,
    out: str | os.PathLike[str],
    *,
    metadata: Mapping[str, Any] | None = None,
    classes: Mapping[str, int] | None = None,
    about: Mapping[str, Any] | None = None,
    shard_size: int = 1024,
    progress: bool = True,
) -> Zoo:
    """Write a zoo of checkpoints, one network a file, and open it.

    Args:
        paths: ``.safetensors``, ``.pt`` or ``.pth`` files of state dicts, in the zoo's order.
            Integer tensors that ``spec`` does not name (step counters) are left out.
        spec: layout of the networks.
        out: the zoo's directory; written whole or not at all.
        metadata: key -> one entry a file.
        classes, about, shard_size: as for :class:`ZooWriter`.
        progress: show a bar.

    Raises:
        ValueError: no paths; metadata of another length, or out of range.
        TypeError: an argument has the wrong type.
        CheckpointError: a file can't be read, is no finite state dict, or is not of the
            architecture or the dtype of ``spec`` and the first file (a ``ValueError`` too).
    """
    where = "import_state_dicts"
    if isinstance(paths, (str, bytes)) or not isinstance(paths, Sequence):
        raise TypeError(f"{where}: paths must be a list of paths, not {_check.describe(paths)}")
    files = [_check.path(where, f"paths[{n}]", path) for n, path in enumerate(paths)]
    if not files:
        raise ValueError(f"{where}: paths is empty, so that the zoo would be, too")
    _check.flag(where, "progress", progress)
    out = _check.path(where, "out", out)
    with _named(where):
        writer = ZooWriter(out, spec, shard_size=shard_size, classes=classes, about=about)
    if metadata is not None and not isinstance(metadata, Mapping):
        raise TypeError(
            f"{where}: metadata must map keys to values, not {_check.describe(metadata)}"
        )
    values = {
        key: _files.as_tensor(where, str(key), each) for key, each in (metadata or {}).items()
    }
    for key, each in values.items():
        if not isinstance(key, str):
            raise TypeError(f"{where}: metadata must have names, not {_check.describe(key)}")
        length = len(each) if each.dim() else 1
        _check.size(where, f"metadata[{key!r}]", length, len(files), "paths")
        values[key] = each.reshape(length, *each.shape[1:])
    first: torch.dtype | None = None
    with _named(where), writer:
        for n, path in enumerate(track(files, where, enabled=progress)):
            flat = _read_network(where, path, spec)
            first = first or flat.dtype
            if flat.dtype != first:
                raise CheckpointError(
                    f"{where}: {path}: its tensors are {flat.dtype}, but {first} in {files[0]}"
                )
            writer.add(flat[None], **{key: each[n : n + 1] for key, each in values.items()})
    return Zoo(out)


def _read_network(where: str, path: Path, spec: WeightSpec) -> Tensor:
    try:
        file = _checkpoints.read(path)
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from None
    try:
        state = spec._state(f"{where}: {path}", "it", file)
    except (TypeError, ValueError) as error:
        raise CheckpointError(str(error)) from None
    dtypes = {tensor.dtype for tensor in state.values()}
    for name, tensor in state.items():
        if tensor.dtype not in DTYPES or len(dtypes) > 1:
            others = f", others are {(dtypes - {tensor.dtype}).pop()}" if len(dtypes) > 1 else ""
            raise CheckpointError(f"{where}: {path}: {name} is {tensor.dtype}{others}")
    return torch.cat([tensor.reshape(-1) for tensor in state.values()])


@contextmanager
def _named(where: str) -> Iterator[None]:
    """Errors of the writer are the caller's."""
    try:
        yield
    except (TypeError, ValueError) as error:
        message = str(error).removeprefix("ZooWriter: ").removeprefix("add: ")
        if message.startswith(f"{where}: "):
            raise
        raise type(error)(f"{where}: {message}") from error.__cause__
