"""What a trace found, in tables: where labels come from, what is fixed and why."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import nn

from weightops.spec import WeightSpec
from weightops.tracing.graph import derive


@dataclass(frozen=True)
class Label:
    """A label of a traced spec.

    Attributes:
        size: its length.
        origin: the tensor, axis and kind of module that it is named after.
        occurrences: every ``(tensor, axis)`` that carries it.
    """

    size: int
    origin: str
    occurrences: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Explanation:
    """What :func:`explain` found; ``str()`` shows it as tables.

    Attributes:
        spec: as :func:`weightops.trace` returns it.
        labels: label -> where it stands.
        frozen: (tensor, axis) -> why the axis, or a factor of it, does not permute: what fixed it,
            and at which op of which module. Axes of length 1 are left out.
        unknown: op -> how often an op that tracing does not know fixed all that it reads.
        permutable: share of the weights that lie on at least one axis with a label.
    """

    spec: WeightSpec
    labels: Mapping[str, Label]
    frozen: Mapping[tuple[str, int], str]
    unknown: Mapping[str, int]
    permutable: float

    def __str__(self) -> str:
        labels = Table("label", "size", "from", "tensors", title="Labels")
        for name, label in self.labels.items():
            tensors = ", ".join(f"{tensor}:{axis}" for tensor, axis in label.occurrences)
            labels.add_row(name, str(label.size), label.origin, tensors)
        frozen = Table("tensor", "axis", "length", "why it is fixed", title="Fixed axes")
        for (tensor, axis), reason in self.frozen.items():
            frozen.add_row(tensor, str(axis), str(self.spec.shapes[tensor][axis]), reason)
        # Not a terminal's: the text must be the same wherever it is made.
        console = Console(
            file=io.StringIO(), width=120, force_terminal=False, color_system=None, markup=False
        )
        console.print(labels)
        console.print(frozen)
        for op, count in self.unknown.items():
            console.print(f"unknown op {op} ({count} times): all that it reads is fixed")
        console.print(
            f"{100 * self.permutable:.1f} % of {self.spec.numel:,} weights are permutable, "
            f"by {len(self.labels)} labels"
        )
        text = console.file.getvalue()  # type: ignore[attr-defined]
        return "\n".join(line.rstrip() for line in text.splitlines())


def explain(model: nn.Module, *example_inputs: Any, **kwargs: Any) -> Explanation:
    """Say which label of a traced spec came from where, what is fixed and why.

    Args:
        model: the architecture, as :func:`weightops.trace` takes it.
        example_inputs: what its ``forward`` takes.
        kwargs: further inputs of ``forward`` by name.

    Raises:
        ValueError: ``torch.export`` fails; names the module and line that it failed at.
        TypeError: ``model`` is no module.
    """
    derived = derive("explain", model, example_inputs, kwargs)
    spec = derived.spec
    labels = {}
    for name, size in spec.labels.items():
        part, axis = derived.origins[name]
        module = part.tensor.partition(".parametrizations.")[0].rpartition(".")[0]
        origin = f"{part.name} axis {axis} ({type(model.get_submodule(module)).__name__})"
        labels[name] = Label(size, origin, tuple(spec.occurrences(name)))
    frozen = {
        (part.name, axis): reason
        for part in derived.parts
        for axis, reason in enumerate(part.reasons)
        if reason and part.bounds[axis][1] - part.bounds[axis][0] > 1
    }
    moved = sum(
        prod(shape)
        for name, shape in spec.shapes.items()
        if any(label for axis in range(len(shape)) for label, _ in spec.factors(name, axis))
    )
    return Explanation(spec, labels, frozen, derived.unknown, moved / max(spec.numel, 1))
