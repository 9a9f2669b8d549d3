"""What ``triton.py`` launches by: a layer's sizes, items sorted by context, tiles of programs."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

#: float32_matmul_precision -> how Triton multiplies float32
PRECISION = {"highest": "ieee", "high": "tf32x3", "medium": "tf32"}


# Fewer programs than that leave a GPU idle.
_BUSY = 128
# A multiprocessor of the smallest GPUs has 99 KiB of shared memory.
_SHARED = 96 << 10


class Tile(NamedTuple):
    """What a program makes, the depth it takes at a time, and how it is compiled."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int

    @property
    def options(self) -> dict[str, Any]:
        # Fusion is Triton's default until 3.10 and is to stay.
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}

    def over(self, rows: int, columns: int) -> int:
        return -(-rows // self.rows) * -(-columns // self.columns)


# By kernel and by how it multiplies: as large as registers allow on every architecture, not tuned on any.
_LARGE = {
    "contract_rows": {
        "half": Tile(128, 64, 64, 8, 3),
        "tf32": Tile(128, 64, 16, 8, 3),
        "tf32x3": Tile(64, 64, 16, 8, 3),
        "ieee": Tile(64, 64, 16, 8, 1),
        "double": Tile(64, 64, 16, 8, 1),
    },
    "contract_groups": {
        "half": Tile(128, 128, 32, 8, 3),
        "tf32": Tile(128, 64, 32, 8, 3),
        "tf32x3": Tile(64, 64, 16, 8, 3),
        "ieee": Tile(64, 64, 16, 8, 1),
        "double": Tile(64, 32, 16, 4, 1),
    },
    "outer": {
        "half": Tile(128, 128, 32, 8, 3),
        "tf32": Tile(128, 64, 32, 8, 3),
        "tf32x3": Tile(64, 64, 16, 8, 3),
        "ieee": Tile(128, 64, 16, 8, 1),
        "double": Tile(64, 64, 16, 8, 1),
    },
}
# Where entries are loaded one by one, or are few.
_SMALL = {
    "half": Tile(64, 32, 32, 4, 1),
    "tf32": Tile(64, 32, 16, 4, 1),
    "tf32x3": Tile(64, 32, 32, 8, 2),
    "ieee": Tile(64, 32, 16, 4, 1),
    "double": Tile(32, 32, 16, 4, 1),
}
# For so few rows that weights are all there is to read.
_FEW = {
    "half": Tile(16, 16, 128, 4, 3),
    "tf32": Tile(16, 16, 64, 4, 3),
    "tf32x3": Tile(16, 16, 64, 4, 3),
    "ieee": Tile(16, 16, 32, 4, 3),
    "double": Tile(16, 16, 32, 4, 2),
}


def way(dtype: torch.dtype, precision: str) -> str:
    """How numbers are multiplied."""
    if dtype.itemsize == 2:
        return "half"
    return "double" if dtype == torch.float64 else PRECISION[precision]


def tile_for(kernel: str, way: str, aligned: bool, rows: int, columns: int, times: int) -> Tile:
    """The largest tile of which there are enough for products of ``rows`` by ``columns``, ``times`` over."""
    if kernel == "contract_rows" and rows <= 16:
        return _FEW[way]
    if not aligned:
        return _SMALL[way]
    large = _LARGE[kernel][way]
    enough = large.over(rows, columns) * times >= _BUSY
    # Where rows are aligned copies do not pass through registers, so several can be under way.
    return large if enough else _SMALL[way]._replace(stages=3)


def for_bases(tile: Tile, bases: int, itemsize: int) -> tuple[Tile, bool]:
    """``tile`` where weights are synthesised in it, and whether the loop over bases is unrolled.

    Then every stage has a tile of each basis, and there are as many stages as memory holds.
    """
    if bases > (9 if tile.stages > 1 else 4):
        return tile._replace(stages=1), False
    own = (tile.rows + tile.columns) * tile.depth * itemsize
    stage = (tile.rows + bases * tile.columns) * tile.depth * itemsize
    return tile._replace(stages=min(tile.stages, 1 + (_SHARED - own) // stage)), True


class Layer(NamedTuple):
    """Sizes as kernels take them: what a program reads in items of ``per_item`` rows, and what it writes.

    A grouped convolution's ``depth`` and ``columns`` are those of one of its groups. ``strides`` are those of
    items and rows where they are read; of items, rows and columns where they are written. ``image`` has height
    and width of what is read and width of what is written, steps, paddings and gaps between taps.
    """

    items: int
    per_item: int
    depth: int
    columns: int
    groups: int
    strides: tuple[int, ...]
    image: tuple[int, ...]
    taps: tuple[int, int]
    transposed: bool

    @property
    def rows(self) -> int:
        return self.items * self.per_item

    def aligned(self, itemsize: int) -> bool:
        """Whether entries lie side by side in rows that begin at multiples of 16 bytes."""
        return self.taps == (0, 0) and (self.depth | self.columns) * itemsize % 16 == 0

    @classmethod
    def of(
        cls,
        read: Sequence[int],
        written: Sequence[int],
        weight: Sequence[int],
        geometry: Sequence[int],
        transposed: bool,
    ) -> Layer:
        """The layer from shape ``read`` to shape ``written``; transposed, its gradient by x."""
        items, sizes = read[0], (prod(read[1:]), prod(written[1:]))
        if not geometry:
            rows, depth, columns = read[1], read[2], written[2]
            strides = (sizes[0], depth, sizes[1], columns, 1)
            return cls(items, rows, depth, columns, 1, strides, (1,) * 9, (0, 0), transposed)
        *steps, groups = geometry
        taps = (weight[3], weight[4])
        depth, columns = read[1] // groups * prod(taps), written[1] // groups
        pixels = prod(written[2:])
        strides = (sizes[0], 1, sizes[1], 1, pixels)
        image = (*read[2:], written[3], *steps)
        return cls(items, pixels, depth, columns, groups, strides, image, taps, transposed)


class Contexts(NamedTuple):
    """Items by context: ``order`` unless they are in order, and where each context begins, [G + 1]."""

    order: Tensor | None
    starts: Tensor

    @classmethod
    def of(cls, index: Tensor | None, contexts: int, device: torch.device) -> Contexts:
        """Nothing of it waits for the device."""
        bounds = torch.arange(contexts + 1, device=device)
        if index is None:
            return cls(None, bounds)
        values, order = index.sort(stable=True)
        return cls(order, torch.searchsorted(values, bounds))

    def used(self, coeffs: Tensor) -> Tensor:
        """``coeffs``, zero where no item has the context: it must not spoil a sum by being no number."""
        return coeffs.where(self.starts.diff()[:, None] > 0, 0)

    def tiles(self, layer: Layer, rows: int) -> tuple[Tensor, Tensor]:
        """The context of each tile of ``rows``, and by context what places a tile's number in its rows.

        There are as many tiles as may be needed; those to spare have a context that is none.
        """
        contexts = self.starts.shape[0] - 1
        most = layer.rows + min(contexts, layer.items) * (rows - 1)
        tiles = (self.starts.diff() * layer.per_item + (rows - 1)) // rows
        ends = tiles.cumsum(0)
        numbers = torch.arange(most // rows, device=ends.device)
        offsets = self.starts[:-1] * layer.per_item - (ends - tiles) * rows
        return torch.searchsorted(ends, numbers, right=True), offsets
