"""Which rows each network takes at each step: a function of its seed and the step alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from weightops import _check


class Batches:
    """Mini-batches from one permutation of the rows per network and epoch."""

    def __init__(self, rows: int, batch_size: int | None, seeds: Sequence[int]) -> None:
        self.count, self.size, self.seeds = rows, batch_size, seeds
        self.epoch = -1
        self.permutations = torch.empty(0, dtype=torch.int64)

    def rows(self, begin: int, end: int) -> Tensor:
        """Rows of steps ``begin .. end - 1``, int64 ``[S, N, batch_size]``; none where all are taken."""
        if self.size is None:
            return torch.empty(end - begin, len(self.seeds), 0, dtype=torch.int64)
        each = self.count // self.size
        parts = []
        while begin < end:
            epoch, at = divmod(begin, each)
            stop = min(each, at + end - begin)
            if epoch != self.epoch:
                self.epoch, self.permutations = epoch, self._permute(epoch)
            taken = self.permutations[:, at * self.size : stop * self.size]
            parts.append(taken.unflatten(1, (stop - at, self.size)).transpose(0, 1))
            begin += stop - at
        return torch.cat(parts)

    def _permute(self, epoch: int) -> Tensor:
        generator = torch.Generator()
        permutations = torch.empty(len(self.seeds), self.count, dtype=torch.int64)
        for seed, row in zip(self.seeds, permutations, strict=True):
            generator.manual_seed(_mix(seed, epoch))
            torch.randperm(self.count, generator=generator, out=row)
        return permutations


def network_seeds(where: str, seed: int | Sequence[int], networks: int) -> list[int]:
    """One seed per network, of which no two are alike by chance."""
    if isinstance(seed, Sequence) and not isinstance(seed, str):
        _check.size(where, "seed", len(seed), networks, "the population")
        for each in seed:
            _check.seed(where, each)
        return list(seed)
    _check.seed(where, seed)
    return [_mix(seed, network) for network in range(networks)]


def _mix(seed: int, stream: int) -> int:
    """A seed for one of many streams, by SplitMix64 (Steele et al. 2014)."""
    mixed = (seed + (stream + 1) * 0x9E3779B97F4A7C15) % 2**64
    mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB % 2**64
    return mixed ^ (mixed >> 31)
