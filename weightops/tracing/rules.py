"""What an op means for the axes of what it reads and returns. Each rule is registered under its aten names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import fx

from weightops.tracing.labels import Axis

if TYPE_CHECKING:
    from weightops.tracing.walk import Walk

Axes: TypeAlias = tuple[Axis, ...]


@dataclass(frozen=True)
class Stack:
    """A tensor whose segments along one axis carry labels of their own: fused queries, keys and values.

    Attributes:
        dim: the axis.
        parts: the axes of each segment, in order.
    """

    dim: int
    parts: tuple[Axes, ...]


#: what a node of the graph is: axes, a stack, several of them, or ``None`` for what is no tensor
Value: TypeAlias = "Axes | Stack | list[Any] | None"
Rule: TypeAlias = Callable[["Walk", fx.Node, SimpleNamespace], Value]

RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for aten ops, ``"conv2d"`` for all overloads or ``"conv2d.padding"`` for one.

    A rule gets the walk, the node, and its arguments by the names of the op's schema.
    """

    def register(function: Rule) -> Rule:
        for name in names:
            assert name not in RULES, name
            RULES[name] = function
        return function

    return register


def find_rule(target: Any) -> Rule | None:
    """The rule for an op overload, if there is one."""
    namespace, _, name = target._schema.name.partition("::")
    if namespace != "aten":
        return None
    return RULES.get(f"{name}.{target._overloadname}") or RULES.get(name)


def replace(axes: Sequence[Axis], dim: int, *axis: Axis) -> Axes:
    """``axes`` with others, or none, in place of one."""
    dim %= len(axes)
    return (*axes[:dim], *axis, *axes[dim + 1 :])


def dims_of(dims: Any, rank: int) -> list[int]:
    """Dimensions as ops take them (an integer, a list, or all) as a list of positions."""
    if dims is None or dims == []:
        return list(range(rank))
    return [dim % rank for dim in (dims if isinstance(dims, Iterable) else [dims])] if rank else []


def broadcast(walk: Walk, rank: int, operands: Iterable[Axes]) -> Axes:
    """The axes of an elementwise result, of operands aligned at their last axis."""
    result: list[Axis] = [()] * rank
    for axes in operands:
        for position, axis in enumerate(axes, rank - len(axes)):
            if walk.labels.atoms(axis):
                known = result[position]
                result[position] = walk.labels.meet(known, axis) if known else axis
    return tuple(result)


def elementwise(walk: Walk, node: fx.Node, args: SimpleNamespace) -> Value:
    """Every entry of the result is a function of the entries at its place."""
    values = [walk.values[each] for each in walk.tensors(node)]
    rank = len(walk.shape(node))
    stacks = [value for value in values if isinstance(value, Stack)]
    plain = [value for value in values if isinstance(value, tuple)]
    if stacks and _stackable(walk, stacks, plain):
        first = stacks[0]
        parts = [
            broadcast(walk, rank, [*(stack.parts[i] for stack in stacks), *plain])
            for i in range(len(first.parts))
        ]
        return Stack(rank + first.dim - len(first.parts[0]), tuple(parts))
    return broadcast(walk, rank, map(walk.tie, values))


def _stackable(walk: Walk, stacks: Sequence[Stack], plain: Sequence[Axes]) -> bool:
    """Whether stacks are cut alike, and all else is of length 1 along their axis."""
    dims = {stack.dim - len(stack.parts[0]) for stack in stacks}
    if len(dims) > 1:
        return False
    [dim] = dims
    cuts = {
        tuple(walk.labels.length(walk.labels.atoms(part[dim])) for part in stack.parts)
        for stack in stacks
    }
    return len(cuts) == 1 and not any(
        walk.labels.atoms(axes[dim]) for axes in plain if len(axes) >= -dim
    )


@rule(
    "clone",
    "alias",
    "detach",
    "contiguous",
    "_to_copy",
    "to",
    "lift_fresh_copy",
    "dropout",
    "alpha_dropout",
    "feature_dropout",
    "type_as",
)
def identity(walk: Walk, node: fx.Node, args: SimpleNamespace) -> Value:
    return walk.values[walk.tensors(node)[0]]


@rule("where.self", "masked_fill", "bernoulli.p")
def _pointwise(walk: Walk, node: fx.Node, args: SimpleNamespace) -> Value:
    return elementwise(walk, node, args)


@rule("copy")
def _copy(walk: Walk, node: fx.Node, args: SimpleNamespace) -> Value:
    shape = walk.shape(node)
    source = broadcast(walk, len(shape), [walk.axes(args.src)])
    return tuple(
        axis if walk.labels.length(walk.labels.atoms(axis)) == n else walk.labels.free(n)
        for axis, n in zip(source, shape, strict=True)
    )


def _dim(args: SimpleNamespace) -> Any:
    return getattr(args, "dim", getattr(args, "axis", None))


@rule(
    "sum",
    "mean",
    "var",
    "std",
    "amax",
    "amin",
    "prod",
    "any",
    "all",
    "logsumexp",
    "norm",
    "linalg_vector_norm",
    "var_mean",
    "std_mean",
    "max",
    "min",
    "aminmax",
    "nansum",
    "count_nonzero",
)
def _reduce(walk: Walk, node: fx.Node, args: SimpleNamespace) -> Value:
    """Reductions do not mind the order of what they reduce."""
    tensors = walk.tensors(node)
    if len(tensors) > 1:  # max and min of two tensors
        return elementwise(walk, node, args)
    axes = walk.axes(tensors[0])
    dims = dims_of(_dim(args), len(axes))
    keep = bool(getattr(args, "keepdim", False))
    kept = tuple(
        () if dim in dims else axis for dim, axis in enumerate(axes) if keep or dim not in dims
    )
    value = node.meta["val"]
    return kept if not isinstance(value, (tuple, list)) else [kept for _ in value]


@rule("max.dim", "min.dim", "median.dim", "mode", "kthvalue")
def _extremum(walk: Walk, node: fx.Node, args: SimpleNamespace) -> Value:
    """As a reduction, unless somebody reads where the extremum stands."""
    if any(user.args[1] == 1 for user in node.users if user in walk.live):
        walk.labels.fix(walk.axes(args.self)[args.dim], "its indices are read")
    return _reduce(walk, node, args)


@rule("softmax", "_softmax", "log_softmax", "_log_softmax", "_safe_softmax")
def _softmax(walk: Walk, node: fx.Node, args: SimpleNamespace) -> Value:
    """Commutes with permutations of the axis it normalises."""
    return walk.axes(args.self)


@rule(
    "cumsum",
    "cumprod",
    "cummax",
    "cummin",
    "logcumsumexp",
    "sort",
    "argsort",
    "topk",
    "argmax",
    "argmin",
    "flip",
    "roll",
    "triu",
    "tril",
    "diagonal",
    "unfold",
    "renorm",
    "fft_fft",
    "fft_rfft",
)
def _ordered(walk: Walk, node: fx.Node, args: SimpleNamespace) -> Value:
    """Ops for which the order along an axis counts: cumulative ones, sorting, shifting, triangles."""
    axes = walk.axes(walk.tensors(node)[0])
    name = walk.name(node)
    if name in ("tril", "triu"):
        dims = [len(axes) - 2, len(axes) - 1]
    elif name == "diagonal":
        dims = dims_of([args.dim1, args.dim2], len(axes))
    else:
        given = getattr(args, "dims", None) if name in ("flip", "roll") else _dim(args)
        dims = dims_of(getattr(args, "dimension", given), len(axes))
    for dim in dims:
        walk.labels.fix(axes[dim], "its order counts")

    def result(shape: Sequence[int]) -> Axes:
        kept = [None if dim in dims else axis for dim, axis in enumerate(axes)]
        if name == "diagonal":
            kept = [axis for axis in kept if axis is not None]
        kept += [None] * (len(shape) - len(kept))
        return tuple(
            walk.labels.fixed(n, "its order counts") if axis is None else axis
            for axis, n in zip(kept, shape, strict=True)
        )

    return walk.map_shapes(node, result)


@rule(
    "full",
    "zeros",
    "ones",
    "empty",
    "full_like",
    "zeros_like",
    "ones_like",
    "empty_like",
    "new_full",
    "new_zeros",
    "new_ones",
    "new_empty",
    "scalar_tensor",
    "empty_permuted",
    "fill",
)
def _uniform(walk: Walk, node: fx.Node, args: SimpleNamespace) -> Value:
    """One value everywhere."""
    return tuple(map(walk.labels.free, walk.shape(node)))


@rule(
    "arange",
    "linspace",
    "logspace",
    "eye",
    "rand",
    "randn",
    "randint",
    "randperm",
    "rand_like",
    "randn_like",
    "tril_indices",
    "triu_indices",
)
def _varying(walk: Walk, node: fx.Node, args: SimpleNamespace) -> Value:
    """A constant that no weight changes."""
    return tuple(walk.labels.fixed(n, f"a constant ({walk.name(node)})") for n in walk.shape(node))


def freeze(walk: Walk, node: fx.Node, reason: str) -> Value:
    """For an op that nothing is known of: what it reads and returns does not permute."""
    for tensor in walk.tensors(node):
        for axis in walk.axes(tensor):
            walk.labels.fix(axis, reason)
    return walk.map_shapes(node, lambda shape: tuple(walk.labels.fixed(n, reason) for n in shape))
