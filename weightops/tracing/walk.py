"""One walk over a model's graph: every node gets axes, every op's rule ties or fixes them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, fx
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree

from weightops.tracing.export import Weights
from weightops.tracing.labels import Labels
from weightops.tracing.rules import Axes, Rule, Stack, Value, elementwise, find_rule, freeze

#: (node, axis) -> where the axis is cut into segments with labels of their own
Decisions = dict[tuple[fx.Node, int], set[int]]


class Walk:
    """Labels of everything in a graph.

    Attributes:
        labels: the atoms.
        weights: tensor of the spec -> its axes, or a stack of them.
        values: node -> axes.
        live: nodes that the outputs depend on.
        decisions: axes to be seen as stacks; rules add to it, and then the walk is to be done again.
        unknown: op -> number of nodes that no rule knows.
    """

    def __init__(
        self, program: torch.export.ExportedProgram, weights: Weights, decisions: Decisions
    ) -> None:
        self.labels = Labels()
        self.weights: dict[str, Axes | Stack] = {}
        self.values: dict[fx.Node, Value] = {}
        self.decisions = decisions
        self.unknown: dict[str, int] = {}
        self._given = {key: sorted(bounds) for key, bounds in decisions.items()}
        self._symbols: dict[str, int] = {}
        self._program = program
        nodes = list(program.graph.nodes)
        self.live: set[fx.Node] = set()
        for node in reversed(nodes):
            if node.op == "output" or node in self.live:
                self.live.update(node.all_input_nodes)
        self._origins = {
            each.arg.name: each
            for each in program.graph_signature.input_specs
            if hasattr(each.arg, "name")
        }
        self._name_weights(weights, nodes)
        for node in nodes:
            if node.op == "placeholder" or node in self.live:
                self.labels.where = self._where(node)
                self.values[node] = self._visit(node)
            elif node.op == "output":
                self.labels.where = ""
                for each in node.all_input_nodes:
                    for axes in self._all_axes(self.values[each]):
                        for axis in axes:
                            self.labels.fix(axis, "the model's output")

    def _name_weights(self, weights: Weights, nodes: Sequence[fx.Node]) -> None:
        """Axes of all weights, in the order of the spec."""
        self._places: dict[fx.Node, str] = {}
        used: set[str] = set()
        stacked: dict[str, tuple[int, list[int]]] = {}
        for node in nodes:
            target = getattr(self._origins.get(node.name), "target", None)
            if node.op != "placeholder" or target not in weights.names:
                continue
            name = self._places[node] = weights.names[target]
            if node in self.live:
                used.add(name)
            for (decided, dim), bounds in self._given.items():
                if decided is node:
                    stacked[name] = dim, bounds
        buffers = {
            weights.names[each.target]
            for each in self._origins.values()
            if each.kind is InputKind.BUFFER and each.target in weights.names
        }
        for name, shape in weights.shapes.items():
            constant = name in buffers and name not in weights.statistics
            reason = (
                f"memory shared with {weights.overlapping[name]} in another layout"
                if name in weights.overlapping
                else f"the constant buffer {name}"
                if constant
                else None
                if name in used
                else "not used by the model"
            )
            if reason:
                self.weights[name] = tuple(self.labels.fixed(n, reason) for n in shape)
            elif name in stacked:
                dim, bounds = stacked[name]
                lengths = _lengths(bounds, shape[dim])
                self.weights[name] = Stack(
                    dim,
                    tuple(
                        tuple(map(self.labels.new, (*shape[:dim], n, *shape[dim + 1 :])))
                        for n in lengths
                    ),
                )
            else:
                self.weights[name] = tuple(map(self.labels.new, shape))

    def _visit(self, node: fx.Node) -> Value:
        if node.op == "placeholder":
            return self._placeholder(node)
        if node.op == "get_attr":
            return None
        if node.target is operator.getitem:
            source, index = node.args
            value = self.values[source]  # type: ignore[index]
            return value[index] if isinstance(value, list) else value  # type: ignore[index]
        if not self._tensor_values(node):
            return None
        rule = self.rule(node)
        if rule is None:
            name = str(node.target).removesuffix(".default")
            self.unknown[name] = self.unknown.get(name, 0) + 1
            return freeze(self, node, f"unknown op {name}")
        if any(0 in self.shape(tensor) for tensor in self.tensors(node)):
            return freeze(self, node, "an empty tensor")
        return rule(self, node, bind(node))

    def _placeholder(self, node: fx.Node) -> Value:
        if node in self._places:
            return self.weights[self._places[node]]
        value, origin = node.meta.get("val"), self._origins.get(node.name)
        if not isinstance(value, Tensor):
            return None
        shape = self.shape(node)
        if origin is None or origin.kind is InputKind.USER_INPUT:
            return tuple(self.labels.fixed(n, f"the input {node.name}") for n in shape)
        # A constant that never changes may be the same all along an axis.
        constant = self._program.constants.get(origin.target or "")
        return tuple(
            self.labels.free(n)
            if isinstance(constant, Tensor) and _is_uniform(constant, dim)
            else self.labels.fixed(n, f"the constant {origin.target}")
            for dim, n in enumerate(shape)
        )

    def rule(self, node: fx.Node) -> Rule | None:
        target = node.target
        if not isinstance(target, torch._ops.OpOverload):
            return None
        found = find_rule(target)
        if found is None and torch.Tag.pointwise in target.tags:
            return elementwise
        return found

    def name(self, node: fx.Node) -> str:
        """The op's name without namespace and overload."""
        assert isinstance(node.target, torch._ops.OpOverload)
        return node.target._schema.name.partition("::")[2]

    def _where(self, node: fx.Node) -> str:
        if node.op != "call_function":
            return ""
        stack = list(node.meta.get("nn_module_stack", {}).values())
        path = stack[-1][0].removeprefix("L['self'].") if stack else ""
        op = str(node.target).removeprefix("aten.").partition(".")[0]
        return f"{op} in {path}" if path else op

    def tensors(self, node: fx.Node) -> list[fx.Node]:
        """The tensors that an op reads, in order, each as often as it is given."""
        given = pytree.tree_leaves((node.args, node.kwargs))
        return [
            each
            for each in given
            if isinstance(each, fx.Node) and isinstance(each.meta.get("val"), Tensor)
        ]

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        return self.shape_of(node.meta["val"])

    def shape_of(self, value: Tensor) -> tuple[int, ...]:
        """A shape in integers; a length that depends on data stands as a large prime."""
        return tuple(n if isinstance(n, int) else self._stand_in(n) for n in value.shape)

    def _stand_in(self, size: torch.SymInt) -> int:
        expression = size.node.expr
        values = {
            symbol: self._symbols.setdefault(str(symbol), _prime(len(self._symbols)))
            for symbol in expression.free_symbols
        }
        return int(expression.subs(values))

    def axes(self, node: fx.Node) -> Axes:
        """The axes of a tensor, where a stack is taken as one."""
        return self.tie(self.values[node])

    def tie(self, value: Value) -> Axes:
        """A stack's segments, made to carry the same labels."""
        if isinstance(value, Stack):
            first, *others = value.parts
            for part in others:
                for dim, axis in enumerate(part):
                    if dim != value.dim:
                        self.labels.unite(first[dim], axis)
            joined = self.labels.join([part[value.dim] for part in value.parts])
            return (*first[: value.dim], joined, *first[value.dim + 1 :])
        assert isinstance(value, tuple)
        return value

    def cuts(self, node: fx.Node, dim: int, size: int) -> list[int] | None:
        """Lengths of the segments of an axis that was decided to be a stack."""
        bounds = self._given.get((node, dim))
        return _lengths(bounds, size) if bounds else None

    def is_parameter(self, node: fx.Node) -> bool:
        return node in self._places

    def map_shapes(self, node: fx.Node, make: Callable[[Sequence[int]], Axes]) -> Value:
        """``make`` of the result's shape, or of each result's."""
        value = node.meta["val"]
        if isinstance(value, Tensor):
            return make(self.shape_of(value))
        return [make(self.shape_of(v)) if isinstance(v, Tensor) else None for v in value]

    def _tensor_values(self, node: fx.Node) -> list[Tensor]:
        return [v for v in pytree.tree_leaves(node.meta.get("val")) if isinstance(v, Tensor)]

    def _all_axes(self, value: Value) -> Iterable[Axes]:
        if isinstance(value, list):
            for each in value:
                yield from self._all_axes(each)
        elif isinstance(value, Stack):
            yield from value.parts
        elif value is not None:
            yield value


def _lengths(bounds: Iterable[int], size: int) -> list[int]:
    return [stop - start for start, stop in pairwise(sorted({0, *bounds, size}))]


def bind(node: fx.Node) -> SimpleNamespace:
    """An op's arguments by name, defaults filled in."""
    target = node.target
    assert isinstance(target, torch._ops.OpOverload)
    named: dict[str, Any] = {}
    for position, argument in enumerate(target._schema.arguments):
        if position < len(node.args):
            named[argument.name] = node.args[position]
        else:
            default = argument.default_value if argument.has_default_value() else None
            named[argument.name] = node.kwargs.get(argument.name, default)
    return SimpleNamespace(**named)


def _is_uniform(constant: Tensor, dim: int) -> bool:
    return bool((constant == constant.narrow(dim, 0, 1)).all())


def _prime(index: int) -> int:
    """A large prime, another for each index."""
    found, candidate = -1, 1_000_003
    while True:
        if all(candidate % d for d in range(3, int(candidate**0.5) + 1, 2)):
            found += 1
            if found == index:
                return candidate
        candidate += 2
