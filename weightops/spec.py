"""The one data model: what the axes of a network's tensors mean, and how they lie in a flat tensor."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from math import prod
from types import MappingProxyType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from weightops import _check
from weightops._axes import Axis, read_labels, read_tensors
from weightops._git_rebasin import read_dictionary
from weightops._parts import Place, read_places
from weightops._state import read_state

Permutations: TypeAlias = Mapping[str, Tensor]
Model: TypeAlias = nn.Module | Mapping[str, Tensor]


class WeightSpec:
    """The permutation symmetries and the flat layout of one architecture's weights.

    Axes with equal labels permute together, within and across tensors, and have equal lengths::

        spec = WeightSpec(
            {"fc1.weight": ("h", None), "fc1.bias": ("h",), "fc2.weight": (None, "h")},
            {"fc1.weight": (128, 784), "fc1.bias": (128,), "fc2.weight": (10, 128)},
        )

    An axis that is a product of labels is given as a tuple, slowest factor first: ``("head", "dim")``
    for the rows of a query projection, ``("channel", None)`` for a linear layer that reads a
    flattened ``[channel, height, width]`` map (at most one factor may be ``None``).

    A tensor may be a **part** of a model's tensor, named by Python's slices of its leading axes:
    ``"qkv.weight[0:64]"``, ``"conv.weight[:, 64:96]"`` (``:`` for a whole axis, both ends written,
    whole axes at the end left out). Its shape is the slice's, and all parts of one tensor together
    cover it exactly once. So axes that are concatenated have labels of their own.

    Instances are immutable and hashable; equal ones have the same axes, shapes and label sizes.

    Args:
        axes: per tensor one entry per axis: a label, a tuple of labels, or ``None`` (fixed). The
            order of the tensors is their order in the flat layout.
        shapes: per tensor its shape; the same names as ``axes``.
        sizes: sizes of labels that the shapes do not tell, such as ``{"head": 4}`` where ``head``
            stands only in products with another such label.
        unverified: that this is a guess, such as a traced one, which :func:`weightops.verify` has
            not proven yet.

    Raises:
        TypeError: an axis entry is no label, tuple or ``None``; a length is no integer.
        ValueError: names differ between ``axes`` and ``shapes``, ranks differ, one label has two
            sizes, a label's size cannot be told, or the parts of a tensor do not fit together.
    """

    __slots__ = (
        *("_axes", "_cache", "_digest", "_labels", "_numel", "_offsets", "_places", "_shapes"),
        *("_unverified", "_wholes"),
    )

    _axes: dict[str, tuple[Axis, ...]]
    _shapes: dict[str, torch.Size]
    _labels: dict[str, int]
    _offsets: dict[str, int]
    _numel: int
    _places: dict[str, Place]
    _wholes: dict[str, torch.Size]
    _unverified: bool
    _digest: str
    _cache: dict[str, Any]

    def __init__(
        self,
        axes: Mapping[str, Sequence[Axis]],
        shapes: Mapping[str, Sequence[int]],
        *,
        sizes: Mapping[str, int] | None = None,
        unverified: bool = False,
    ) -> None:
        _check.flag("WeightSpec", "unverified", unverified)
        checked_axes, checked_shapes = read_tensors(axes, shapes)
        labels = read_labels(checked_axes, checked_shapes, {} if sizes is None else sizes)
        places, wholes = read_places(checked_shapes)
        *offsets, numel = accumulate(map(prod, checked_shapes.values()), initial=0)
        for attribute, checked in (
            ("_axes", checked_axes),
            ("_shapes", checked_shapes),
            ("_labels", labels),
            ("_offsets", dict(zip(checked_shapes, offsets, strict=True))),
            ("_numel", numel),
            ("_places", places),
            ("_wholes", wholes),
            ("_unverified", unverified),
            ("_cache", {}),
        ):
            object.__setattr__(self, attribute, checked)
        digest = hashlib.sha256(json.dumps(self._content()).encode()).hexdigest()
        object.__setattr__(self, "_digest", digest)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"WeightSpec is immutable; {name} can't be set")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"WeightSpec is immutable; {name} can't be deleted")

    @property
    def axes(self) -> Mapping[str, tuple[Axis, ...]]:
        """Tensor -> one entry per axis, in layout order."""
        return MappingProxyType(self._axes)

    @property
    def shapes(self) -> Mapping[str, torch.Size]:
        """Tensor -> shape, in layout order."""
        return MappingProxyType(self._shapes)

    @property
    def labels(self) -> Mapping[str, int]:
        """Label -> size, in order of first appearance."""
        return MappingProxyType(self._labels)

    @property
    def offsets(self) -> Mapping[str, int]:
        """Tensor -> where it starts in the flat layout."""
        return MappingProxyType(self._offsets)

    @property
    def numel(self) -> int:
        """Number of weights P of one network."""
        return self._numel

    @property
    def digest(self) -> str:
        """A fingerprint of axes, shapes and sizes: equal specs have equal ones, in every process."""
        return self._digest

    @property
    def unverified(self) -> bool:
        """Whether this spec was traced or read from a dictionary, and has not passed :func:`weightops.verify`.

        Kept by JSON, pickle and copies; no part of equality.
        """
        return self._unverified

    def _set_verified(self) -> None:
        object.__setattr__(self, "_unverified", False)

    def factors(self, name: str, axis: int) -> tuple[tuple[str | None, int], ...]:
        """The ``(label, size)`` factors of one axis, slowest first; a fixed one has label ``None``."""
        entry, length = self._axes[name][axis], self._shapes[name][axis]
        if not isinstance(entry, tuple):
            return ((entry, length),)
        known = prod(self._labels[label] for label in entry if label is not None)
        rest = length // known if known else 0
        return tuple((label, rest if label is None else self._labels[label]) for label in entry)

    def occurrences(self, label: str) -> Iterator[tuple[str, int]]:
        """Every ``(tensor, axis)`` that carries ``label``, alone or as a factor."""
        for name, entries in self._axes.items():
            for axis, entry in enumerate(entries):
                if label == entry or (isinstance(entry, tuple) and label in entry):
                    yield name, axis

    def flatten(self, models: Model | Sequence[Model]) -> Tensor:
        """Lay networks out as ``[N, P]``.

        Args:
            models: a module, a state dict, or a list of them. Tensors must share one dtype and
                device. Integer tensors that the spec does not name (step counters) and further names
                of a tensor that it does name (tied weights) are left out.

        Returns:
            ``[N, P]``, N = 1 for a single model; differentiable where the tensors are.

        Raises:
            ValueError: a tensor is missing, has another shape or device, or is not in the spec.
            TypeError: a tensor has another dtype; ``models`` is no model.
        """
        listed = [models] if isinstance(models, (nn.Module, Mapping)) else models
        if not isinstance(listed, Sequence) or isinstance(listed, str) or not listed:
            raise TypeError(
                "flatten: models must be a module, a state dict or a non-empty list of them, "
                f"not {_check.describe(models)}"
            )
        pieces: list[Tensor] = []
        for n, model in enumerate(listed):
            state = self._state("flatten", f"models[{n}]" if listed is models else "models", model)
            first = pieces[0] if pieces else next(iter(state.values()), None)
            for name, tensor in state.items():
                assert first is not None
                if tensor.dtype != first.dtype:
                    raise TypeError(f"flatten: {name} is {tensor.dtype}, others are {first.dtype}")
                _check.same_device("flatten", name, tensor, "others", first)
                pieces.append(tensor.reshape(-1))
        flat = torch.cat(pieces) if pieces else torch.empty(0)
        return flat.view(len(listed), self._numel)

    def unflatten(self, flat: Tensor) -> dict[str, Tensor]:
        """Tensor -> view ``[..., *shape]`` of ``flat`` ``[..., P]``; nothing is copied.

        Raises:
            ValueError: the last axis is not P long.
            TypeError: ``flat`` is no tensor.
        """
        self.check_flat("unflatten", flat)
        return {
            name: flat.narrow(-1, offset, prod(shape)).unflatten(-1, shape)
            if shape
            else flat.select(-1, offset)
            for (name, shape), offset in zip(
                self._shapes.items(), self._offsets.values(), strict=True
            )
        }

    def state_dict(self, flat: Tensor) -> dict[str, Tensor]:
        """Tensor of the model -> ``[..., *shape]``, from ``flat`` ``[..., P]``.

        Views of ``flat`` as :meth:`unflatten` gives them, save for tensors that the spec has by
        parts: these are joined, and so copies. Differentiable.

        Raises:
            ValueError: the last axis is not P long.
            TypeError: ``flat`` is no tensor.
        """
        self.check_flat("state_dict", flat)
        state: dict[str, Tensor] = {}
        for name, view in self.unflatten(flat).items():
            tensor, index = self._places[name]
            if index is None:
                state[tensor] = view
                continue
            if tensor not in state:
                state[tensor] = flat.new_empty(*flat.shape[:-1], *self._wholes[tensor])
            at: tuple = (..., *index)
            state[tensor][at] = view
        return state

    def features(self, flat: Tensor, grads: Tensor | None = None, *extra: Tensor) -> Tensor:
        """Stand networks, their gradients and whatever else is laid out alike side by side.

        Args:
            flat: networks ``[N, P]``, floating point.
            grads: gradients ``[N, P]``, or ``None``.
            extra: further tensors ``[N, P]``, such as momenta.

        Returns:
            ``[N, P, C]``, C the number of tensors given; a view where that is one. Differentiable.

        Raises:
            ValueError: a tensor is not ``[N, P]``, or shapes or devices differ.
            TypeError: a tensor is none, not floating point, or of another dtype than ``flat``.
        """
        tensors = {"flat": flat} if grads is None else {"flat": flat, "grads": grads}
        tensors |= {f"extra[{n}]": each for n, each in enumerate(extra)}
        for name, each in tensors.items():
            self.check_flat("features", each, name, 2)
            _check.floating("features", name, each)
            if each.dtype != flat.dtype:
                raise TypeError(f"features: {name} is {each.dtype}, but flat is {flat.dtype}")
            _check.same_device("features", name, each, "flat", flat)
            _check.size("features", name, each.shape[0], flat.shape[0], "flat")
        return flat[..., None] if len(tensors) == 1 else torch.stack([*tensors.values()], -1)

    @torch.no_grad()
    def load_(self, model: nn.Module, row: Tensor) -> nn.Module:
        """Copy one network, ``row`` ``[P]``, into ``model``'s tensors in place, and return it.

        Raises:
            ValueError: ``row`` is not P long, or the model's tensors are not the spec's.
            TypeError: ``model`` is no module, ``row`` no tensor.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"load_: model must be a module, not {_check.describe(model)}")
        _check.tensor("load_", "row", row, "[P]", 1)
        self.check_flat("load_", row, "row")
        if row.is_meta:
            raise ValueError("load_: row is on meta, where tensors hold no values")
        views = self.unflatten(row)
        state = self._state("load_", "model", model)
        for name, tensor in state.items():
            if tensor.dtype != row.dtype:
                raise TypeError(f"load_: {name} is {tensor.dtype}, but row is {row.dtype}")
        for name, tensor in state.items():
            tensor.copy_(views[name])
        return model

    def random_permutations(
        self, n: int, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Label -> int64 ``[n, size]`` of independent uniform permutations, on the generator's device."""
        self._check_count("random_permutations", n)
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(
                "random_permutations: generator must be a torch.Generator, "
                f"not {_check.describe(generator)}"
            )
        device = generator.device if generator is not None else torch.device("cpu")
        return {
            label: torch.rand(
                n, size, dtype=torch.float64, generator=generator, device=device
            ).argsort(-1)
            for label, size in self._labels.items()
        }

    def identity(self, n: int) -> dict[str, Tensor]:
        """Label -> int64 ``[n, size]``, every row ``0 .. size - 1``."""
        self._check_count("identity", n)
        return {label: torch.arange(size).repeat(n, 1) for label, size in self._labels.items()}

    def compose(self, p: Permutations, q: Permutations) -> dict[str, Tensor]:
        """The permutations that act like ``p`` first, then ``q``: ``compose(p, q)[i] = p[q[i]]``.

        So ``permute(permute(flat, p, spec), q, spec)`` equals ``permute(flat, compose(p, q), spec)``.
        Labels absent from one side are taken as the identity there.
        """
        self.check_permutations("compose", p, name="p")
        self.check_permutations("compose", q, name="q")
        composed: dict[str, Tensor] = {}
        for label in self._labels:
            if label in p and label in q:
                first, then = p[label].long(), q[label].long()
                if first.dim() == then.dim() == 2 and first.shape != then.shape:
                    raise ValueError(
                        f"compose: p[{label!r}] has {first.shape[0]} rows, "
                        f"but q[{label!r}] has {then.shape[0]}"
                    )
                _check.same_device("compose", f"q[{label!r}]", then, f"p[{label!r}]", first)
                first, then = torch.broadcast_tensors(first, then)
                composed[label] = first.gather(-1, then)
            elif label in p or label in q:
                composed[label] = (p[label] if label in p else q[label]).long()
        return composed

    def invert(self, p: Permutations) -> dict[str, Tensor]:
        """Label -> the inverse permutation: ``compose(p, invert(p))`` is the identity."""
        self.check_permutations("invert", p, name="p")
        return {label: index.argsort(-1) for label, index in p.items()}

    def check_permutations(
        self, where: str, perms: Any, *, name: str = "perms", values: bool = True
    ) -> None:
        """Raise unless ``perms`` maps labels of this spec to permutations ``[size]`` or ``[n, size]``.

        With ``values=False`` entries are not looked at, only labels, dtypes and shapes.
        """
        if not isinstance(perms, Mapping):
            raise TypeError(
                f"{where}: {name} must map labels to index tensors, not {_check.describe(perms)}"
            )
        for label, index in perms.items():
            if label not in self._labels:
                raise ValueError(
                    f"{where}: {name} has label {label!r}, the spec has {list(self._labels)}"
                )
            key, size = f"{name}[{label!r}]", self._labels[label]
            _check.tensor(where, key, index, f"[{size}] or [n, {size}]")
            if index.dim() not in (1, 2):
                raise ValueError(
                    f"{where}: {key} must have shape [{size}] or [n, {size}], "
                    f"not {list(index.shape)}"
                )
            _check.index_dtype(where, key, index)
            if index.shape[-1] != size:
                tensor, axis = next(self.occurrences(label))
                raise ValueError(
                    f"{where}: {key} has length {index.shape[-1]}, but label {label!r} "
                    f"has size {size} ({tensor} axis {axis})"
                )
            fault = _check.permutation_fault(index) if values else None
            if fault:
                tensor, axis = next(self.occurrences(label))
                raise ValueError(
                    f"{where}: {key} is no permutation of 0..{size - 1} ({tensor} axis {axis}): "
                    f"{fault}"
                )

    def to_json(self) -> str:
        """The spec as JSON; :meth:`from_json` reads it back."""
        return json.dumps(self._content() | ({"unverified": True} if self._unverified else {}))

    def _content(self) -> dict[str, Any]:
        return {
            "axes": {name: list(entries) for name, entries in self._axes.items()},
            "shapes": {name: list(shape) for name, shape in self._shapes.items()},
            "sizes": self._labels,
        }

    @classmethod
    def from_json(cls, text: str) -> WeightSpec:
        """Read what :meth:`to_json` wrote; ``ValueError`` where it is something else."""
        if not isinstance(text, str):
            raise TypeError(f"from_json: text must be a string, not {_check.describe(text)}")
        try:
            data = json.loads(text)
            axes = {
                name: [tuple(entry) if isinstance(entry, list) else entry for entry in entries]
                for name, entries in data["axes"].items()
            }
            shapes, sizes = data["shapes"], data["sizes"]
            unverified = data.get("unverified", False)
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"from_json: text is not a WeightSpec: {error!r}") from None
        return cls(axes, shapes, sizes=sizes, unverified=unverified)

    @classmethod
    def from_git_rebasin(
        cls,
        permutations: Any,
        shapes: nn.Module | Mapping[str, Tensor] | Mapping[str, Sequence[int]],
    ) -> WeightSpec:
        """The spec that a dictionary of Git Re-Basin (Ainsworth et al., arXiv 2209.04836) means.

        Published dictionaries have faults, so the spec is ``unverified``.

        Args:
            permutations: ``axes_to_perm`` (tensor -> per axis a permutation's name or ``None``),
                ``perm_to_axes`` (permutation -> list of (tensor, axis)), or a ``PermutationSpec``.
            shapes: a module, a state dict, or tensor -> shape; floating tensors that
                ``permutations`` lacks are fixed. The order of the layout.

        A matrix whose axis is a multiple of the permutation's size reads a flattened
        ``[channel, height, width]`` map: the axis becomes ``(permutation, None)``.

        Raises:
            ValueError: a permutation is given for a tensor or an axis that does not exist, or has
                several sizes.
            TypeError: an argument has the wrong type.
        """
        return cls(*read_dictionary(permutations, shapes), unverified=True)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, WeightSpec):
            return NotImplemented
        return self._digest == other._digest

    def __hash__(self) -> int:
        return hash(self._digest)

    def __repr__(self) -> str:
        width = max((len(name) for name in self._shapes), default=0)
        lines = [
            f"  {name:{width}}  {list(self._shapes[name])!s:20} "
            + ", ".join(_axis_text(entry) for entry in entries)
            for name, entries in self._axes.items()
        ]
        labels = ", ".join(f"{label}={size}" for label, size in self._labels.items())
        head = f"WeightSpec({len(self._shapes)} tensors, {self._numel:,} weights, labels: {labels}"
        head += ", unverified" if self._unverified else ""
        return "\n".join([head, *lines]) + ")"

    def __reduce__(self) -> tuple:
        return WeightSpec.from_json, (self.to_json(),)

    def check_flat(
        self, where: str, flat: Any, name: str = "flat", dims: int | None = None
    ) -> None:
        """Raise unless ``flat`` is a tensor of networks of this spec, with ``dims`` axes where given."""
        _check.tensor(where, name, flat, "[N, P]", dims)
        if flat.dim() == 0 or flat.shape[-1] != self._numel:
            raise ValueError(
                f"{where}: {name} has shape {list(flat.shape)}, "
                f"but the spec's networks have {self._numel} weights"
            )

    def _check_count(self, where: str, n: Any) -> None:
        if isinstance(n, bool) or not isinstance(n, int):
            raise TypeError(f"{where}: n must be an integer, not {_check.describe(n)}")
        if n < 0:
            raise ValueError(f"{where}: n must be at least 0, not {n}")

    def _state(self, where: str, name: str, model: Any) -> dict[str, Tensor]:
        return read_state(where, name, model, self._places, self._wholes)


def _axis_text(entry: Axis) -> str:
    if isinstance(entry, tuple):
        return "*".join(_axis_text(factor) for factor in entry)
    return "." if entry is None else entry
