"""The files of a zoo: ``zoo.json`` and shards in safetensors. How they are read, and what is wrong with them."""

from __future__ import annotations

import json
import re
import warnings
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from weightops import _check
from weightops._checkpoints import CheckpointError, read_tensors
from weightops.spec import WeightSpec

MANIFEST = "zoo.json"
SHARD = re.compile(r"networks-(\d{5,})\.safetensors")
#: names of files that are being written
PART = re.compile(r"\.(networks-\d{5,}\.safetensors|zoo\.json)\.\d+\.part")
FORMAT, VERSION = "weightops zoo", 1
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
#: tensors of every shard; what else it holds is metadata
FLAT, CHECKSUM = "flat", "checksum"


@dataclass(frozen=True)
class Shard:
    """One file: its name, how many networks it holds, and the checksum of all tensors but ``flat``."""

    file: str
    networks: int
    checksum: int


@dataclass(frozen=True)
class Manifest:
    """What ``zoo.json`` says. ``metadata`` maps each key to its number of classes, or ``None``."""

    spec: WeightSpec
    metadata: Mapping[str, int | None]
    about: Mapping[str, Any]
    shards: Sequence[Shard]

    def to_json(self) -> str:
        content = {
            "format": FORMAT,
            "version": VERSION,
            "networks": sum(shard.networks for shard in self.shards),
            "shards": [vars(shard) for shard in self.shards],
            "metadata": dict(self.metadata),
            "about": dict(self.about),
            "spec": json.loads(self.spec.to_json()),
        }
        return json.dumps(content | {"checksum": _checksum_of(content)}, indent=1)


def _checksum_of(content: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(content).encode())


def read_manifest(where: str, directory: Path) -> Manifest:
    """What ``directory``'s ``zoo.json`` says; :class:`CheckpointError` where it can't be relied on."""
    path = directory / MANIFEST
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{where}: {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: {path}: is truncated or no JSON: {error}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{where}: {path}: is not of a zoo")
    if content.get("version") != VERSION:
        raise CheckpointError(
            f"{where}: {path}: has version {content.get('version')!r} of the format, "
            f"this library reads {VERSION}"
        )
    checksum = content.pop("checksum", None)
    if checksum != _checksum_of(content):
        raise CheckpointError(
            f"{where}: {path}: its checksum is wrong; it is corrupt or was edited"
        )
    try:
        shards = [Shard(**shard) for shard in content["shards"]]
        found = Manifest(
            WeightSpec.from_json(json.dumps(content["spec"])),
            content["metadata"],
            content["about"],
            shards,
        )
        networks = content["networks"]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{where}: {path}: is not of a zoo: {error!r}") from None
    for shard in shards:
        if not SHARD.fullmatch(shard.file):
            raise CheckpointError(f"{where}: {path}: {shard.file!r} is no name of a shard")
    if networks != sum(shard.networks for shard in shards):
        raise CheckpointError(
            f"{where}: {path}: says {networks} networks, "
            f"but its shards hold {sum(shard.networks for shard in shards)}"
        )
    if not networks:
        raise CheckpointError(f"{where}: {path}: the zoo is empty")
    return found


def open_shard(where: str, directory: Path, manifest: Manifest, shard: Shard) -> dict[str, Tensor]:
    """All tensors of a shard; ``flat`` lies in mapped memory, and nothing of it is read."""
    path = directory / shard.file
    tensors, _ = read_tensors(where, path)
    expected = {FLAT, CHECKSUM, *manifest.metadata}
    for name in sorted(expected - tensors.keys()):
        raise CheckpointError(f"{where}: {path}: {name} is missing")
    for name in sorted(tensors.keys() - expected):
        raise CheckpointError(f"{where}: {path}: {name} is not in {MANIFEST}")
    for name, tensor in tensors.items():
        length = tensor.shape[0] if tensor.dim() else None
        if length != shard.networks:
            raise CheckpointError(
                f"{where}: {path}: {name} has shape {list(tensor.shape)}, "
                f"but {MANIFEST} says {shard.networks} networks"
            )
    flat = tensors[FLAT]
    if flat.dim() != 2 or flat.shape[1] != manifest.spec.numel:
        raise CheckpointError(
            f"{where}: {path}: flat has shape {list(flat.shape)}, "
            f"but the spec's networks have {manifest.spec.numel} weights"
        )
    if flat.dtype not in DTYPES:
        raise CheckpointError(
            f"{where}: {path}: flat is {flat.dtype}, which is no dtype of weights"
        )
    for name, classes in manifest.metadata.items():
        fault = class_fault(tensors[name], classes)
        if fault:
            raise CheckpointError(f"{where}: {path}: {name}{fault}")
    if checksum_of_rest(tensors) != shard.checksum:
        raise CheckpointError(
            f"{where}: {path}: the checksum of its metadata is wrong; it is corrupt"
        )
    return tensors


def as_tensor(where: str, key: str, value: Any, dtype: torch.dtype | None = None) -> Tensor:
    """Metadata, as numbers, lists or arrays of them or a tensor."""
    if not isinstance(value, (Tensor, int, float, list, tuple, np.ndarray, np.generic)):
        raise TypeError(f"{where}: {key} must be numbers or a tensor, not {_check.describe(value)}")
    try:
        with warnings.catch_warnings():
            # Of lists of arrays, which torch finds slow.
            warnings.simplefilter("ignore", UserWarning)
            tensor = torch.as_tensor(value, dtype=dtype).detach()
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise TypeError(f"{where}: {key} is no metadata: {error}") from None
    _check.dense(where, key, tensor)
    if tensor.is_meta or tensor.is_complex() or tensor.is_quantized:
        raise TypeError(f"{where}: {key} can't be {_check.describe(tensor)}")
    return tensor


def class_fault(labels: Tensor, classes: int | None) -> str | None:
    """What keeps ``labels`` from being classes ``0 .. classes - 1``, or ``None``."""
    if classes is None:
        return None
    if labels.dtype not in (torch.int64, torch.int32):
        return f" must be int64 or int32, as it has {classes} classes, not {labels.dtype}"
    fault = _check.index_fault(labels, classes)
    return None if fault is None else f"{fault} ({classes} classes)"


def checksums(flat: Tensor) -> Tensor:
    """CRC-32 of each row's bytes, int64 ``[n]``."""
    rows = flat.contiguous().view(torch.uint8).numpy()
    return torch.tensor([zlib.crc32(row) for row in rows], dtype=torch.int64)


def checksum_of_rest(tensors: Mapping[str, Tensor]) -> int:
    """CRC-32 of all tensors but ``flat``: their names, dtypes, shapes and bytes."""
    found = 0
    for name, tensor in sorted(tensors.items()):
        if name != FLAT:
            found = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), found)
            found = zlib.crc32(tensor.contiguous().view(-1).view(torch.uint8).numpy().data, found)
    return found


def finite_fault(flat: Tensor, spec: WeightSpec) -> tuple[int, str] | None:
    """The first row of ``flat`` with a weight that is not finite, and which weight that is; or ``None``."""
    bad = ~flat.isfinite()
    if not bad.any():
        return None
    row, column = bad.nonzero()[0].tolist()
    for name, offset in spec.offsets.items():
        shape = spec.shapes[name]
        if offset <= column < offset + prod(shape):
            at = (torch.arange(prod(shape)).view(shape) == column - offset).nonzero()[0].tolist()
            return row, f"{name}{at or ''} is {flat[row, column].item()}"
    raise AssertionError
