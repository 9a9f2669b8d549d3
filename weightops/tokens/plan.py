"""Which weights make which token."""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterator
from math import prod

import torch
from torch import Tensor

from weightops import _check
from weightops.ops.tokens import reference
from weightops.ops.tokens.plan import Piece, decode, encode
from weightops.spec import WeightSpec
from weightops.tokens._arguments import read_json

KINDS = ("network", "chunk", "layer", "channel")


class TokenPlan:
    """How networks of one architecture are cut into T tokens of D numbers.

    ``"network"``: one token, the whole vector. ``"chunk"``: the whole vector in pieces of D.
    ``"layer"``: each layer's weights in pieces of D. ``"channel"``: one token for each output channel
    of a layer, its row of each of the layer's tensors; longer rows are several tokens (Schürholt et al.
    2024, section 3, where the parameters of a norm are tokens of their own). What does not fill its last
    token is padded with zeros.

    A *layer* is a tensor with the vectors that belong to its channels, such as its bias and the scale,
    shift and running statistics of a norm: vectors that stand behind it in the spec and have its first
    axis, by label (of several such tensors, the last before them) or, without a label, by length (the
    tensor or vectors directly before them). An output channel is an index of the first axis, which in a
    transposed convolution is an input channel.

    Plans are immutable and hashable; equal ones have equal specs and cut them alike.

    Args:
        spec: axes and layout of one network.
        kind: ``"network"``, ``"chunk"``, ``"layer"`` or ``"channel"``.
        size: D. By default the longest that is to be cut, so that nothing is: the whole network, layer
            or row. ``"chunk"`` needs one.

    Raises:
        ValueError: ``kind`` is unknown, or ``size`` is below 1, is missing, or for ``"network"`` below P.
        TypeError: an argument has the wrong type.
    """

    def __init__(self, spec: WeightSpec, kind: str, *, size: int | None = None) -> None:
        where = "TokenPlan"
        if not isinstance(spec, WeightSpec):
            raise TypeError(f"{where}: spec must be a WeightSpec, not {_check.describe(spec)}")
        _check.choice(where, "kind", kind, KINDS)
        if size is not None:
            _check.count(where, "size", size)
            if size >= 2**31:
                raise ValueError(f"{where}: size must be below 2^31, not {size}")
        elif kind == "chunk":
            raise ValueError(f"{where}: kind 'chunk' needs a size")
        self._spec, self._kind = spec, kind
        self._layers = tuple(_layers(spec))
        groups = list(self._groups())
        longest = max((sum(p.width for p in pieces) for _, pieces in groups), default=0)
        self._size = max(longest, 1) if size is None else size
        if kind == "network" and self._size < spec.numel:
            raise ValueError(
                f"{where}: size must be at least {spec.numel}, as the spec's networks have so many "
                f"weights, not {size}"
            )
        self._code = encode(self._size, spec.numel, len(spec.shapes), groups)
        self._decoded = decode(self._code)
        self._digest = hashlib.sha256(f"{spec.digest} {kind} {self._size}".encode()).hexdigest()
        self._cache: dict[str, Tensor] = {}

    @property
    def spec(self) -> WeightSpec:
        """Axes and layout of the networks."""
        return self._spec

    @property
    def kind(self) -> str:
        """``"network"``, ``"chunk"``, ``"layer"`` or ``"channel"``."""
        return self._kind

    @property
    def size(self) -> int:
        """Numbers in a token, D."""
        return self._size

    @property
    def num_tokens(self) -> int:
        """Tokens of a network, T."""
        return self._decoded.tokens

    @property
    def layers(self) -> tuple[tuple[str, ...], ...]:
        """The names of each layer's tensors, in the order of the spec's first ones."""
        return self._layers

    @property
    def mask(self) -> Tensor:
        """Where tokens hold weights: ``[T, D]``, bool; elsewhere is padding."""
        if "mask" not in self._cache:
            weights = torch.ones(1, self._spec.numel, dtype=torch.bool)
            self._cache["mask"] = reference.pack(weights, None, None, self._code)[0]
        return self._cache["mask"]

    @property
    def positions(self) -> Tensor:
        """``[T, 3]``, int64: the number of the token, of its layer, and of the token in its layer.

        A token that spans layers counts for the one that its first weight belongs to.
        """
        if "positions" not in self._cache:
            counts = [0] * len(self._layers)
            rows = []
            for token, layer in enumerate(self._token_layers()):
                rows.append((token, layer, counts[layer]))
                counts[layer] += 1
            self._cache["positions"] = torch.tensor(rows, dtype=torch.int64).view(-1, 3)
        return self._cache["positions"]

    def _groups(self) -> Iterator[tuple[int, list[Piece]]]:
        number = {name: i for i, name in enumerate(self._spec.shapes)}

        def piece(name: str, rows: int) -> Piece:
            weights = prod(self._spec.shapes[name])
            return Piece(number[name], self._spec.offsets[name], weights // max(1, rows))

        if self._kind in ("network", "chunk"):
            yield 1, [piece(name, 1) for name in number]
            return
        for names in self._layers:
            first = self._spec.shapes[names[0]]
            rows = first[0] if first and self._kind == "channel" else 1
            yield rows, [piece(name, rows) for name in names]

    def _token_layers(self) -> Iterator[int]:
        if self._kind in ("layer", "channel"):
            for layer, group in enumerate(self._decoded.groups):
                yield from [layer] * (group.rows * group.tokens)
            return
        of_tensor = {name: layer for layer, names in enumerate(self._layers) for name in names}
        filled = [name for name, shape in self._spec.shapes.items() if prod(shape)]
        starts = [self._spec.offsets[name] for name in filled]
        for token in range(self.num_tokens):
            yield of_tensor[filled[bisect_right(starts, token * self._size) - 1]]

    def to_json(self) -> str:
        """The plan, with its spec, as JSON; :meth:`from_json` reads it back."""
        return json.dumps(
            {"kind": self._kind, "size": self._size, "spec": json.loads(self._spec.to_json())}
        )

    @classmethod
    def from_json(cls, text: str, *, spec: WeightSpec | None = None) -> TokenPlan:
        """Read what :meth:`to_json` wrote.

        Args:
            text: JSON.
            spec: the spec that the plan is to fit, where that is to be checked.

        Raises:
            ValueError: ``text`` is something else, or the plan is of another spec.
            TypeError: an argument has the wrong type.
        """
        data = read_json("TokenPlan.from_json", "a TokenPlan", text, spec)
        try:
            return cls(data["spec"], data["kind"], size=data["size"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"TokenPlan.from_json: text is not a TokenPlan: {error!r}") from None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TokenPlan):
            return NotImplemented
        return self._digest == other._digest

    def __hash__(self) -> int:
        return hash(self._digest)

    def __repr__(self) -> str:
        return (
            f"TokenPlan({self._kind!r}: {self.num_tokens:,} tokens of {self._size:,}, "
            f"{len(self._layers)} layers, {self._spec.numel:,} weights)"
        )

    def __reduce__(self) -> tuple:
        return TokenPlan.from_json, (self.to_json(),)


def _layers(spec: WeightSpec) -> Iterator[tuple[str, ...]]:
    """Names of tensors by layer: vectors join the tensor before them whose channels they belong to."""
    layers: list[list[str]] = []
    channels: list[tuple | None] = []
    for name, shape in spec.shapes.items():
        channel = (spec.axes[name][0], shape[0]) if shape else None
        joined = None
        if len(shape) == 1:
            # A fixed axis has but its length in common with others.
            near = reversed(range(len(layers))) if spec.axes[name][0] else [len(layers) - 1]
            joined = next((i for i in near if i >= 0 and channels[i] == channel), None)
        if joined is None:
            layers.append([name])
            channels.append(channel)
        else:
            layers[joined].append(name)
    return map(tuple, layers)


def code_of(plan: TokenPlan) -> list[int]:
    """The integers of ``plan``."""
    return _code(plan, plan._digest)


def _code(plan: TokenPlan, digest: str) -> list[int]:
    return plan._code


# As for permute's plan: a constant to Dynamo, guarded by the digest, which is read outside.
_code._dynamo_marked_constant = True  # type: ignore[attr-defined]
