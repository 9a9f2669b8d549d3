"""Networks that add, trained into a folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from rich.progress import Progress
from torch import Tensor

import weightops
from weightops import WeightSpec
from weightops.circles import alive, pair_accuracy, sweep, train


@dataclass(frozen=True)
class Networks:
    """M trained networks.

    Attributes:
        spec: their layout.
        flat: ``[M, P]``.
        signals: ``[R, M, K]`` before each of R recorded steps.
        held_out: pairs that no network of its seed was trained on, ``[M, B, 2]``.
    """

    spec: WeightSpec
    flat: Tensor
    signals: Tensor
    held_out: Tensor

    @property
    def embedding(self) -> Tensor:
        return self.spec.unflatten(self.flat)["embedding.weight"]

    @cached_property
    def end(self) -> Tensor:
        """The signals when training is over, ``[M, K]``."""
        return weightops.fourier_signal(self.embedding)

    @cached_property
    def alive(self) -> Tensor:
        """Which frequencies are circles then, bool ``[M, K]``."""
        return alive(self.end)

    def accuracy(self, embedding: Tensor | None = None) -> Tensor:
        """On pairs that are held out, also with other embeddings ``[M, p, d]`` than their own: ``[M]``."""
        flat = self.flat.clone()
        if embedding is not None:
            self.spec.unflatten(flat)["embedding.weight"].copy_(embedding)
        return pair_accuracy(flat, self.spec, self.held_out)


class Trainer:
    """Trains networks, those of each study in a folder of their own, which are read where they are done."""

    def __init__(self, folder: Path, progress: Progress, batch: int) -> None:
        self.folder, self.progress, self.batch = folder, progress, batch

    def __call__(
        self,
        name: str,
        seeds: Sequence[int],
        p: int,
        d: int,
        steps: int,
        *,
        every: int = 1,
        embedding: Tensor | None = None,
    ) -> Networks:
        """As :func:`weightops.circles.train`, with a bar called ``name``."""
        bar = self.progress.add_task(f"{name}: {len(seeds)} networks", total=len(seeds))
        found = []
        for batch in sweep(
            self.folder / name.replace(" ", "-"),
            *(seeds, p, d),
            steps=steps,
            batch=self.batch,
            every=every,
            embedding=embedding,
        ):
            found.append(batch)
            self.progress.advance(bar, len(batch["seeds"]))
        start = train(len(seeds), p, d, steps=0, seed=seeds)
        flat = torch.cat([batch["flat"] for batch in found])
        signals = torch.cat([batch["signals"] for batch in found], 1)
        return Networks(start.spec, flat, signals, start.held_out)
