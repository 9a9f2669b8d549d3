"""Zoos: data sets of trained networks of one architecture."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from weightops import _check
from weightops._checkpoints import CheckpointError
from weightops.generate import _files
from weightops.generate._files import CHECKSUM, FLAT
from weightops.spec import WeightSpec


class Zoo:
    """A zoo on disk: N networks ``[N, P]`` of one architecture, and what is known about each.

    Opening it reads metadata only; networks are read from mapped memory as they are asked for::

        zoo = Zoo("zoo")
        zoo[3]                          # one network [P]
        zoo[:10], zoo[index]            # several [n, P], as copies
        zoo.metadata["task"]            # [N]
        zoo.select(task=4)              # a zoo of these networks only

    A network's checksum is compared when it is read for the first time, so that going through
    :meth:`batches` once proves a zoo whole. :class:`weightops.generate.ZooWriter` writes zoos.

    Attributes:
        spec: the networks' :class:`weightops.WeightSpec`.
        metadata: key -> tensor ``[N, ...]``.
        classes: metadata key -> number of classes, where that was declared.
        about: facts of the whole zoo, as given to the writer.
        dtype: of the networks.

    Raises:
        CheckpointError: a file is missing, truncated, corrupt, or not of the zoo; the message names
            file, tensor and reason (a ``ValueError`` too).
        TypeError: ``path`` is no path.
    """

    spec: WeightSpec
    metadata: Mapping[str, Tensor]
    classes: Mapping[str, int]
    about: Mapping[str, Any]
    dtype: torch.dtype

    def __init__(self, path: str | os.PathLike[str]) -> None:
        where = "Zoo"
        directory = _check.path(where, "path", path)
        manifest = _files.read_manifest(where, directory)
        self.spec = manifest.spec
        self.about = MappingProxyType(dict(manifest.about))
        self.classes = MappingProxyType(
            {key: number for key, number in manifest.metadata.items() if number is not None}
        )
        shards = [_files.open_shard(where, directory, manifest, each) for each in manifest.shards]
        self._directory = directory
        self._files = [directory / each.file for each in manifest.shards]
        for key in (FLAT, *manifest.metadata):
            forms = [(shard[key].dtype, shard[key].shape[1:]) for shard in shards]
            for file, form in zip(self._files, forms):
                if form != forms[0]:
                    raise CheckpointError(
                        f"{where}: {file}: {key} is {form[0]} {list(form[1])} a network, "
                        f"but {forms[0][0]} {list(forms[0][1])} in {self._files[0].name}"
                    )
        self.dtype = shards[0][FLAT].dtype
        self.metadata = MappingProxyType(
            {key: torch.cat([shard[key] for shard in shards]) for key in manifest.metadata}
        )
        self._flats = [shard[FLAT] for shard in shards]
        self._checksums = [shard[CHECKSUM] for shard in shards]
        self._ends = torch.tensor([len(flat) for flat in self._flats]).cumsum(0)
        #: which networks have been compared with their checksums
        self._checked = [torch.zeros(len(flat), dtype=torch.bool) for flat in self._flats]
        #: where this zoo's networks are among those on disk
        self._rows = torch.arange(int(self._ends[-1]))

    def __len__(self) -> int:
        return len(self._rows)

    def __repr__(self) -> str:
        return (
            f"Zoo({str(self._directory)!r}, {len(self):,} networks of {self.spec.numel:,} weights, "
            f"{self.dtype}, metadata: {', '.join(self.metadata) or 'none'})"
        )

    def __getitem__(self, index: int | slice | Sequence[int] | Tensor) -> Tensor:
        """One network ``[P]`` by a number; ``[n, P]`` by a slice, a list, or an index or mask tensor.

        Raises:
            IndexError: there is no such network.
            TypeError: ``index`` is none of these.
            CheckpointError: a network that is read is corrupt (a ``ValueError`` too).
        """
        if isinstance(index, int) and not isinstance(index, bool):
            if not -len(self) <= index < len(self):
                raise IndexError(f"Zoo: there is no network {index} among {len(self)}")
            return self._read(self._rows[index : index + 1 or None])[0]
        return self._read(self._rows[self._index(index)])

    def _index(self, index: Any) -> Tensor:
        if isinstance(index, slice):
            return torch.tensor(range(len(self))[index], dtype=torch.int64)
        if isinstance(index, list):
            index = torch.tensor(index) if index else torch.empty(0, dtype=torch.int64)
        _check.tensor("Zoo", "index", index, "[n]")
        if index.dim() != 1:
            raise TypeError(f"Zoo: index must have shape [n], not {list(index.shape)}")
        index = index.cpu()
        if index.dtype == torch.bool:
            if len(index) != len(self):
                raise IndexError(f"Zoo: a mask of {len(index)} does not fit {len(self)} networks")
            return index.nonzero()[:, 0]
        _check.index_dtype("Zoo", "index", index)
        outside = (index < -len(self)) | (index >= len(self))
        if outside.any():
            raise IndexError(
                f"Zoo: there is no network {index[outside][0].item()} among {len(self)}"
            )
        return index

    def _read(self, rows: Tensor) -> Tensor:
        """Networks ``[n, P]`` by their places among those on disk."""
        flat = torch.empty(len(rows), self.spec.numel, dtype=self.dtype)
        shards = torch.bucketize(rows, self._ends, right=True)
        for shard in shards.unique().tolist():
            here = (shards == shard).nonzero()[:, 0]
            mapped = self._flats[shard]
            local = rows[here] - (self._ends[shard] - len(mapped))
            found = mapped[local]
            self._check(shard, local, found)
            flat[here] = found
        return flat

    def _check(self, shard: int, local: Tensor, found: Tensor) -> None:
        new = ~self._checked[shard][local]
        local, found = local[new], found[new]
        wrong = (_files.checksums(found) != self._checksums[shard][local]).nonzero()
        path = self._files[shard]
        if len(wrong):
            raise CheckpointError(
                f"Zoo: {path}: flat[{local[wrong[0, 0]]}] is corrupt: its checksum is wrong"
            )
        fault = _files.finite_fault(found, self.spec)
        if fault:
            raise CheckpointError(f"Zoo: {path}: flat[{local[fault[0]]}]: {fault[1]}")
        self._checked[shard][local] = True

    def batches(
        self, size: int, *, shuffle: int | None = None
    ) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """All networks, ``size`` at a time: ``flat`` ``[size, P]`` and their metadata; the last may be fewer.

        Args:
            size: networks in a batch; no more are in memory at a time.
            shuffle: the seed of a random order; by default they come as they lie.

        Raises:
            ValueError: ``size`` is less than 1, ``shuffle`` no seed.
            TypeError: an argument is no integer.
        """
        _check.count("batches", "size", size)
        order = torch.arange(len(self))
        if shuffle is not None:
            _check.count("batches", "shuffle", shuffle, 0)
            if shuffle >= 2**64:
                raise ValueError(f"batches: shuffle must be below 2^64, not {shuffle}")
            order = torch.randperm(len(self), generator=torch.Generator().manual_seed(shuffle))
        return (
            (self[index], {key: values[index] for key, values in self.metadata.items()})
            for index in order.split(min(size, len(self)))
        )

    def select(self, **metadata: Any) -> Zoo:
        """The zoo of those networks whose metadata equal the given values, or one of a list of them.

        Nothing is read or copied; ``zoo.select(task=[0, 3], seed=1)``.

        Raises:
            ValueError: there is no such key, it has several numbers a network, or no network fits.
            TypeError: a value is no number, list of numbers or tensor.
        """
        fits = torch.ones(len(self), dtype=torch.bool)
        for key, value in metadata.items():
            if key not in self.metadata:
                raise ValueError(
                    f"Zoo.select: the zoo has metadata {list(self.metadata)}, not {key!r}"
                )
            held = self.metadata[key]
            if held.dim() != 1:
                raise ValueError(f"Zoo.select: {key} has shape {list(held.shape)}, not [N]")
            # A number of Python's would become float32, which equals few numbers of float64.
            dtype = held.dtype if held.is_floating_point() else None
            wanted = _files.as_tensor("Zoo.select", key, value, dtype).cpu()
            try:
                fits &= torch.isin(held, wanted)
            except RuntimeError as error:
                raise TypeError(
                    f"Zoo.select: {key} can't be compared with {_check.describe(wanted)}: {error}"
                ) from None
        if not fits.any():
            raise ValueError(f"Zoo.select: no network of the zoo has {metadata}")
        part = copy.copy(self)
        part._rows = self._rows[fits]
        part.metadata = MappingProxyType({k: held[fits] for k, held in self.metadata.items()})
        return part
