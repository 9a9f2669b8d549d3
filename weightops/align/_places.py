"""Where a forward pass of a model shows the units that a spec's labels permute."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from weightops._parts import parse
from weightops.spec import WeightSpec


@dataclass(frozen=True)
class Place:
    """An axis of a module's input or output, or a stretch of it, that carries labels.

    Attributes:
        module: its path in the model.
        reads: whether the module contracts this axis with its weights, so that the units are seen
            behind all nonlinearities; otherwise the module has just written them.
        output: where it is seen, at the module's output or its (first) input.
        axis: of that tensor; negative but for norms over channels, whose inputs have any rank.
        start: the first unit along it.
        factors: ``(label, size)`` of the axis, slowest first; at least one has a label.
    """

    module: str
    reads: bool
    output: bool
    axis: int
    start: int
    factors: tuple[tuple[str | None, int], ...]

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(label for label, _ in self.factors if label is not None)

    def units(self, seen: Tensor) -> Tensor:
        """``[samples, units]``, a copy: a fixed factor counts as samples, as positions do."""
        sizes = [size for _, size in self.factors]
        x = seen.detach().movedim(self.axis, -1)
        x = x.narrow(-1, self.start, prod(sizes)).reshape(-1, *sizes)
        fixed = [i for i, (label, _) in enumerate(self.factors, 1) if label is None]
        x = x.movedim(fixed, list(range(1, len(fixed) + 1)))
        units = prod(size for label, size in self.factors if label is not None)
        return x.reshape(-1, units).to(torch.promote_types(x.dtype, torch.float32), copy=True)


def places(spec: WeightSpec, model: nn.Module) -> list[Place]:
    """Every place that a label is known to have from the type of a module and its parameters' axes."""
    modules = dict(model.named_modules())
    found: dict[Place, None] = {}
    for name, shape in spec.shapes.items():
        tensor, index = parse(name)
        path, parameter = _owner(tensor)
        if path not in modules:
            continue
        for axis in range(len(shape)):
            factors = spec.factors(name, axis)
            if all(label is None for label, _ in factors):
                continue
            cut = index[axis].start or 0 if index and axis < len(index) else 0
            for reads, output, at, start in _seen_at(modules[path], parameter, axis):
                found[Place(path, reads, output, at, start + cut, factors)] = None
    return list(found)


def _owner(tensor: str) -> tuple[str, str]:
    """The module and the parameter of it that ``tensor`` is, or is a parametrization of."""
    path, parametrized, rest = tensor.partition("parametrizations.")
    if parametrized:
        return path.removesuffix("."), rest.partition(".")[0]
    path, _, parameter = tensor.rpartition(".")
    return path, parameter.removesuffix("_g").removesuffix("_v")  # torch.nn.utils.weight_norm


def _seen_at(module: nn.Module, parameter: str, axis: int) -> Iterator[tuple[bool, bool, int, int]]:
    """``(reads, output, axis, start)`` of what the units along a parameter's axis compute."""
    writes = False, True
    if isinstance(module, _ConvNd):
        channels = -1 - len(module.kernel_size)
        reading, writing = (0, 1) if module.transposed else (1, 0)
        plain = module.groups == 1
        if parameter == "bias" or (axis == writing and (plain or not module.transposed)):
            yield *writes, channels, 0
        elif axis == reading and plain:
            yield True, False, channels, 0
    elif isinstance(module, (nn.Linear, nn.Bilinear)):
        if axis == 0:
            yield *writes, -1, 0
        elif isinstance(module, nn.Linear):
            yield True, False, -1, 0
    elif isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        if axis == 1:
            yield *writes, -1, 0
    elif isinstance(module, (nn.GroupNorm, _NormBase)):
        yield *writes, 1, 0
    elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        yield *writes, axis - len(module.normalized_shape), 0
    elif isinstance(module, nn.MultiheadAttention):
        if axis == 1 and parameter in ("in_proj_weight", "q_proj_weight"):
            yield True, False, -1, 0
    elif isinstance(module, (nn.RNNBase, nn.RNNCellBase)) and axis == 1:
        last = f"weight_hh_l{getattr(module, 'num_layers', 1) - 1}"
        if parameter in ("weight_ih", "weight_ih_l0", "weight_ih_l0_reverse"):
            yield True, False, -1, 0
        elif parameter in ("weight_hh", last):
            yield True, True, -1, 0
        elif parameter == f"{last}_reverse":
            yield True, True, -1, getattr(module, "proj_size", 0) or module.hidden_size


class Recorder:
    """Runs networks of one architecture on a copy of the model, and keeps what places showed."""

    def __init__(self, spec: WeightSpec, model: nn.Module, watched: Iterable[Place]) -> None:
        self._spec = spec
        self._network = copy.deepcopy(model).eval()
        self._seen: dict[Place, list[Tensor]] = {}
        modules = dict(self._network.named_modules())
        for place in watched:
            if place.output:
                modules[place.module].register_forward_hook(
                    lambda _, args, output, place=place: self._record(place, output)
                )
            else:
                modules[place.module].register_forward_pre_hook(
                    lambda _, args, kwargs, place=place: self._record(
                        place, args or tuple(kwargs.values())
                    ),
                    with_kwargs=True,
                )

    def run(self, row: Tensor, batch: Sequence[Tensor]) -> dict[Place, Tensor]:
        """Place -> ``[samples, units]``, for the places that the network ``row`` ``[P]`` passed by."""
        self._seen = {}
        self._spec.load_(self._network, row)
        self._network(*batch)
        shown = {place: torch.cat(calls) for place, calls in self._seen.items()}
        return {place: units for place, units in shown.items() if len(units)}

    def _record(self, place: Place, seen: Any) -> None:
        x = seen[0] if isinstance(seen, (tuple, list)) and seen else seen
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return
        length = place.start + prod(size for _, size in place.factors)
        if -x.dim() <= place.axis < x.dim() and x.shape[place.axis] >= length:
            self._seen.setdefault(place, []).append(place.units(x))


def distinct(shown: dict[Place, Tensor]) -> list[Place]:
    """The places to use, of those that one forward pass ``shown``.

    Where a label is read somewhere, places that only write it are left out: they come before the
    nonlinearity. Of places that show the same (three projections of one input), one is kept.
    """
    read = {label for place in shown if place.reads for label in place.labels}
    kept: list[Place] = []
    for place, units in shown.items():
        alike = (other for other in kept if other.factors == place.factors)
        if (place.reads or not read.issuperset(place.labels)) and not any(
            torch.equal(units, shown[other]) for other in alike
        ):
            kept.append(place)
    return kept
