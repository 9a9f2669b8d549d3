"""A network as data: its layers in order, each reading values that came before."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod

#: in the order of the numbers that stand for them in csrc/core/population_plan.h
KINDS = (
    "linear",
    "conv",
    "max_pool",
    "average_pool",
    "relu",
    "silu",
    "gelu",
    "gelu_tanh",
    "tanh",
    "batch_norm",
    "group_norm",
    "layer_norm",
    "add",
    "token_pair",
    "sine",
)
TENSORS = 4
SETTINGS = 10


@dataclass(frozen=True)
class Layer:
    """One layer of a :class:`Program`.

    Attributes:
        kind: one of ``KINDS``.
        inputs: the values that it reads (two for ``add``): 0 is the network's input, ``i + 1`` what layer ``i`` makes.
        taken: the shape of one sample that it reads: ``(features,)`` or ``(channels, height, width)``.
        made: the shape that it makes.
        tensors: names of weight and bias, then of running mean and variance, or of ``token_pair``'s embedding;
            fewer where there are none.
        settings: convolutions ``(*kernel, *stride, *padding, *dilation, groups)``; pools ``(*kernel, *stride,
            *padding, *dilation, counts padding)``; ``group_norm`` ``(groups,)``; ``token_pair`` ``(tokens, features)``.
        eps: of norms; of ``sine`` the factor of its argument.
        momentum: of batch norm's running statistics in training; ``None``: they are means over all steps.
    """

    kind: str
    inputs: tuple[int, ...]
    taken: tuple[int, ...]
    made: tuple[int, ...]
    tensors: tuple[str | None, ...] = ()
    settings: tuple[int, ...] = ()
    eps: float = 0.0
    momentum: float | None = 0.1


@dataclass(frozen=True)
class Program:
    """What a network computes: layers in order, of which the last one's value is the output.

    Values are read in the shape that the reader takes: flattening needs no layer. ``token_pair`` reads pairs of
    tokens, which are numbers of the networks' dtype in 0 .. tokens - 1.
    """

    taken: tuple[int, ...]
    layers: tuple[Layer, ...]

    @property
    def tokens(self) -> int:
        """How many tokens a sample's numbers name; 0: they are no tokens."""
        return min(
            (layer.settings[0] for layer in self.layers if layer.kind == "token_pair"), default=0
        )

    @property
    def made(self) -> tuple[int, ...]:
        """The shape of one sample's output."""
        return self.layers[-1].made

    def encode(self, offsets: Mapping[str, int]) -> list[int]:
        """As csrc/core/population_plan.h reads it: the input's numbers, the count of layers, then per layer
        kind, two inputs, what is taken and made (channels, height, width), ``TENSORS`` offsets, ``SETTINGS`` and
        the bits of ``eps`` and ``momentum`` as doubles; -1 stands for what is not there.
        """
        code = [prod(self.taken), len(self.layers)]
        for layer in self.layers:
            places = [-1 if name is None else offsets[name] for name in layer.tensors]
            code += [KINDS.index(layer.kind), *_fill(layer.inputs, 2)]
            code += [*_fill(layer.taken, 3, 1), *_fill(layer.made, 3, 1)]
            code += [*_fill(places, TENSORS), *_fill(layer.settings, SETTINGS)]
            momentum = -1.0 if layer.momentum is None else layer.momentum
            code += struct.unpack("<2q", struct.pack("<2d", layer.eps, momentum))
        return code


RECORD = 3 + 6 + TENSORS + SETTINGS + 2


def _fill(values: tuple[int, ...] | list[int], size: int, value: int = -1) -> list[int]:
    return [*values, *[value] * (size - len(values))]


@lru_cache(maxsize=256)
def _decode(code: tuple[int, ...]) -> tuple[int, list[dict]]:
    layers = []
    for at in range(2, len(code), RECORD):
        record = code[at : at + RECORD]
        eps, momentum = struct.unpack("<2d", struct.pack("<2q", *record[-2:]))
        layers.append(
            {
                "kind": KINDS[record[0]],
                "inputs": [value for value in record[1:3] if value >= 0],
                "taken": record[3:6],
                "made": record[6:9],
                "places": record[9 : 9 + TENSORS],
                "settings": record[9 + TENSORS : 9 + TENSORS + SETTINGS],
                "eps": eps,
                "momentum": None if momentum < 0 else momentum,
            }
        )
    return code[0], layers


def decode(code: Sequence[int]) -> tuple[int, list[dict]]:
    """The input's numbers and per layer what :meth:`Program.encode` wrote, for the reference."""
    return _decode(tuple(code))


# What a list of integers says is a constant, which Dynamo need not trace.
decode._dynamo_marked_constant = True  # type: ignore[attr-defined]
