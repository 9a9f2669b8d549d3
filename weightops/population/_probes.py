"""What is looked at during a training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from weightops import _check
from weightops.ops.population import training_reference
from weightops.spec import WeightSpec


@dataclass(frozen=True)
class SignalProbe:
    """A probe of :func:`population_train`: the :func:`weightops.fourier_signal` of an embedding.

    Args:
        spec: the layout of the networks.
        name: of an embedding ``[p, d]`` in it, p >= 3.

    Called with ``flat`` ``[N, P]`` it gives ``[N, (p - 1) // 2]``.

    Raises:
        ValueError: the layout has no such embedding.
        TypeError: wrong types.
    """

    spec: WeightSpec
    name: str

    def __post_init__(self) -> None:
        where = "SignalProbe"
        if not isinstance(self.spec, WeightSpec):
            raise TypeError(f"{where}: spec must be a WeightSpec, not {_check.describe(self.spec)}")
        _check.choice(where, "name", self.name, tuple(self.spec.shapes))
        shape = list(self.spec.shapes[self.name])
        if len(shape) != 2 or shape[0] < 3:
            raise ValueError(
                f"{where}: name must be of an embedding [p, d], p >= 3, but {self.name} has shape {shape}"
            )

    @property
    def place(self) -> tuple[int, int, int]:
        """Where in a row the embedding begins, p and d."""
        p, d = self.spec.shapes[self.name]
        return self.spec.offsets[self.name], p, d

    def __call__(self, flat: Tensor) -> Tensor:
        self.spec.check_flat("SignalProbe", flat, dims=2)
        return training_reference.signals(flat, *self.place)


def checked(where: str, probes: Any) -> dict[str, Callable[[Tensor], Tensor]]:
    if probes is None:
        return {}
    if not isinstance(probes, Mapping) or not all(callable(probe) for probe in probes.values()):
        raise TypeError(
            f"{where}: probes must be a mapping of names to functions, not {_check.describe(probes)}"
        )
    return dict(probes)


def call(where: str, name: str, probe: Callable[[Tensor], Tensor], flat: Tensor) -> Tensor:
    made = probe(flat)
    if not isinstance(made, Tensor):
        raise TypeError(
            f"{where}: probes[{name!r}] must return a tensor, not {_check.describe(made)}"
        )
    return made.detach().clone()
