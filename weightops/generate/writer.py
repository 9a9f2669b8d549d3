"""Zoos written to disk, whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from weightops import _check
from weightops._checkpoints import CheckpointError
from weightops.generate import _files
from weightops.generate._files import CHECKSUM, DTYPES, FLAT, MANIFEST, PART, SHARD, Manifest, Shard
from weightops.spec import WeightSpec


class ZooWriter:
    """Writes a zoo, whole or not at all::

        with ZooWriter("zoo", spec, classes={"task": 20}) as writer:
            writer.add(flat, task=task, accuracy=accuracy)

    Shards are written under temporary names; at the end of the ``with`` statement they get their
    names, and ``zoo.json`` comes last. Where that is not reached, a zoo that was there before stays
    as it was. One writer at a time may write to a directory.

    Args:
        path: the zoo's directory; made where it does not exist. A zoo in it is replaced.
        spec: layout of the networks.
        shard_size: networks in a file.
        classes: metadata key -> number of classes; its labels must be ``0 .. classes - 1``.
        about: facts of the whole zoo that JSON can hold.

    Raises:
        ValueError: an option is out of range.
        TypeError: an argument has the wrong type.
        CheckpointError: a file can't be written (a ``ValueError`` too).
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        spec: WeightSpec,
        *,
        shard_size: int = 1024,
        classes: Mapping[str, int] | None = None,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        where = "ZooWriter"
        self._path = _check.path(where, "path", path)
        if not isinstance(spec, WeightSpec):
            raise TypeError(f"{where}: spec must be a WeightSpec, not {_check.describe(spec)}")
        _check.count(where, "shard_size", shard_size)
        self._spec, self._size = spec, shard_size
        self._classes = _read_classes(where, classes)
        self._about = _read_about(where, about)
        self._open = False

    def __enter__(self) -> ZooWriter:
        self._open = True
        #: tensors of networks that are in no file yet
        self._pending: list[dict[str, Tensor]] = []
        self._forms: dict[str, tuple[torch.dtype, torch.Size]] = {}
        self._parts: dict[Path, Shard] = {}
        self._made: list[Path] = []
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._open = False
            # What has not become part of a zoo goes.
            for part in self._parts:
                part.unlink(missing_ok=True)
            for directory in self._made:
                with contextlib.suppress(OSError):
                    directory.rmdir()

    def add(self, flat: Tensor, **metadata: Any) -> None:
        """Add networks ``[n, P]``, or one ``[P]``; they are copied.

        Args:
            flat: float16, bfloat16, float32 or float64, the same in every call.
            metadata: per network a number or a tensor: ``[n, ...]``, or a number for all. Each call
                has the same keys, dtypes and trailing shapes.

        Raises:
            ValueError: a weight is not finite, a key is missing or new, a length is not n, a label
                is out of range; or the writer is not open.
            TypeError: an argument has the wrong type or dtype.
        """
        where = "add"
        if not self._open:
            raise ValueError(f"{where}: the writer is not open; use it in a with statement")
        _check.tensor(where, FLAT, flat, "[n, P] or [P]")
        self._spec.check_flat(where, flat)
        if flat.dim() > 2:
            raise ValueError(f"{where}: flat must have shape [n, P] or [P], not {list(flat.shape)}")
        if flat.dtype not in DTYPES:
            raise TypeError(
                f"{where}: flat must be float16, bfloat16, float32 or float64, not {flat.dtype}"
            )
        if flat.is_meta:
            raise ValueError(f"{where}: flat is on meta, where tensors hold no values")
        rows = flat.detach().reshape(-1, self._spec.numel)
        fault = _files.finite_fault(rows, self._spec)
        if fault:
            raise ValueError(f"{where}: flat[{fault[0]}]: {fault[1]}")
        if CHECKSUM in metadata:
            raise ValueError(f"{where}: {CHECKSUM} is a name of the zoo's own, and no metadata")
        known = (self._forms or self._classes | metadata).keys() - {FLAT}
        for key in sorted(metadata.keys() ^ known):
            state = "is missing" if key in known else "is not in the zoo's metadata"
            raise ValueError(f"{where}: {key} {state}; it has {sorted(known)}")
        tensors = {FLAT: rows} | {
            key: self._read(where, key, value, len(rows)) for key, value in metadata.items()
        }
        forms = {key: (tensor.dtype, tensor.shape[1:]) for key, tensor in tensors.items()}
        for key, form in self._forms.items():
            if forms[key] != form:
                raise TypeError(
                    f"{where}: {key} is {_form(*forms[key])}, but {_form(*form)} in earlier calls"
                )
        if len(rows):
            self._forms = forms
            self._pending.append({key: t.cpu().clone() for key, t in tensors.items()})
        if sum(len(tensors[FLAT]) for tensors in self._pending) >= self._size:
            self._write_shards(self._size)

    def _read(self, where: str, key: str, value: Any, n: int) -> Tensor:
        """The metadata of ``n`` networks, ``[n, ...]``."""
        tensor = _files.as_tensor(where, key, value)
        if tensor.dim() == 0:
            tensor = tensor.expand(n)
        _check.size(where, key, len(tensor), n, "the number of networks")
        fault = _files.class_fault(tensor, self._classes.get(key))
        if fault:
            raise ValueError(f"{where}: {key}{fault}")
        return tensor

    def _write_shards(self, least: int) -> None:
        """Write what is pending, but for a rest of fewer than ``least`` networks."""
        if not self._pending:
            return
        tensors = {
            key: torch.cat([each[key] for each in self._pending]) for key in self._pending[0]
        }
        self._pending = []
        for start in range(0, len(tensors[FLAT]), self._size):
            piece = {key: t[start : start + self._size] for key, t in tensors.items()}
            if len(piece[FLAT]) < least:
                self._pending = [{key: tensor.clone() for key, tensor in piece.items()}]
            else:
                self._write_shard(piece)

    def _write_shard(self, tensors: dict[str, Tensor]) -> None:
        from safetensors.torch import save_file

        with self._writing():
            if not self._made:
                self._made = [p for p in (self._path, *self._path.parents) if not p.exists()]
            self._path.mkdir(parents=True, exist_ok=True)
            tensors = tensors | {CHECKSUM: _files.checksums(tensors[FLAT])}
            # Numbers that no shard has yet, so that a zoo which is there stays whole until the end.
            taken = [
                int(found[1]) for p in self._path.iterdir() if (found := SHARD.fullmatch(p.name))
            ]
            number = max(taken, default=-1) + 1 + len(self._parts)
            name = f"networks-{number:05}.safetensors"
            part = self._path / f".{name}.{os.getpid()}.part"
            self._parts[part] = Shard(name, len(tensors[FLAT]), _files.checksum_of_rest(tensors))
            save_file({key: t.contiguous() for key, t in tensors.items()}, part)
            _sync(part)

    def _finish(self) -> None:
        """Write the rest, give all files their names, and remove what the zoo no longer needs."""
        if not self._open:
            raise ValueError("ZooWriter: a shard could not be written, so that no zoo was")
        self._write_shards(1)
        if not self._parts:
            raise ValueError("ZooWriter: no network was added, so that the zoo would be empty")
        metadata = {key: self._classes.get(key) for key in sorted(self._forms.keys() - {FLAT})}
        shards = dict(self._parts)
        manifest = Manifest(self._spec, metadata, self._about, list(shards.values()))
        part = self._path / f".{MANIFEST}.{os.getpid()}.part"
        names = {each: self._path / shard.file for each, shard in shards.items()}
        with self._writing():
            self._parts[part] = Shard(MANIFEST, 0, 0)
            part.write_text(manifest.to_json(), encoding="utf-8")
            _sync(part)
            try:
                for each, path in names.items():
                    os.replace(each, path)
                _sync(self._path)
                os.replace(part, self._path / MANIFEST)
            except BaseException:
                # As long as it has not got its name, zoo.json is the one from before, or none.
                if part.exists():
                    for path in names.values():
                        path.unlink(missing_ok=True)
                raise
            _sync(self._path)
        self._made = []
        for path in self._path.iterdir():
            stale = SHARD.fullmatch(path.name) and path not in names.values()
            if stale or PART.fullmatch(path.name):
                path.unlink(missing_ok=True)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # safetensors has errors of its own for a full disk
            self._open = False
            reason = getattr(error, "strerror", None) or error
            raise CheckpointError(f"ZooWriter: {self._path}: can't be written: {reason}") from error


def _form(dtype: torch.dtype, shape: torch.Size) -> str:
    return f"{dtype} {['n', *shape]}".replace("'", "")


def _read_classes(where: str, classes: Any) -> dict[str, int]:
    if classes is None:
        return {}
    if not isinstance(classes, Mapping):
        raise TypeError(
            f"{where}: classes must map metadata to numbers of classes, "
            f"not {_check.describe(classes)}"
        )
    for key, number in classes.items():
        if not isinstance(key, str):
            raise TypeError(f"{where}: classes must have names, not {_check.describe(key)}")
        _check.count(where, f"classes[{key!r}]", number)
    return dict(classes)


def _read_about(where: str, about: Any) -> dict[str, Any]:
    if about is None:
        return {}
    if not isinstance(about, Mapping):
        raise TypeError(f"{where}: about must map names to facts, not {_check.describe(about)}")
    try:
        return json.loads(json.dumps(dict(about), allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise TypeError(f"{where}: about must be what JSON can hold: {error}") from None


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
