"""Models as programs that the population kernels run: what torch.export traced, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from weightops.ops.population.program import Layer, Program

_aten = torch.ops.aten
#: where a traced spec keeps what :func:`compile_or_reason` gave
PROGRAM = "program"
#: up to which float32 has all integers
_WHOLE = 1 << 24


class Unsupported(Exception):
    """A model has a layer that no program has; the message names it."""


def compile_graph(
    exported: torch.export.ExportedProgram, model: nn.Module, names: Mapping[str, str]
) -> Program:
    """The program of an exported model in eval mode, of one input with the samples in front.

    Args:
        exported: not decomposed.
        model: what was exported.
        names: of tensors in the state dict -> the name that the flat layout has for them.

    Raises:
        Unsupported: a layer, or the way it is used, is in no program.
    """
    return _Reader(exported, model, names).program


def compile_or_reason(
    exported: torch.export.ExportedProgram, model: nn.Module, names: Mapping[str, str]
) -> Program | str:
    """The program, or what of the model is in none."""
    try:
        return compile_graph(exported, model, names)
    except Unsupported as reason:
        return str(reason)


class _Reader:
    def __init__(
        self, exported: torch.export.ExportedProgram, model: nn.Module, names: Mapping[str, str]
    ) -> None:
        signature = exported.graph_signature
        held = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        if len(signature.user_inputs) != 1 or len(signature.user_outputs) != 1:
            raise Unsupported("more than one input or output")
        if signature.buffers_to_mutate:
            raise Unsupported("buffers that forward changes")
        # In eval mode norms that average all steps look like those that never move.
        self.averaged = {
            names[f"{name}.running_mean".lstrip(".")]
            for name, module in model.named_modules()
            if isinstance(module, _BatchNorm) and module.momentum is None
            if module.running_mean is not None
        }
        self.names: dict[fx.Node, str] = {}
        self.values: dict[fx.Node, int] = {}
        # Arguments of sines: what is multiplied, its value then, the factor.
        self.scaled: dict[fx.Node, tuple[fx.Node, int, float]] = {}
        # Tokens and the table of which these are the rows.
        self.embedded: dict[fx.Node, tuple[fx.Node, fx.Node]] = {}
        self.layers: list[Layer] = []
        for node in exported.graph.nodes:
            if node.op == "placeholder" and node.name in held:
                self.names[node] = names.get(held[node.name], held[node.name])
            elif node.op == "placeholder":
                self.samples, *taken = node.meta["val"].shape
                self.values[node] = 0
                self.taken = tuple(taken)
            elif node.op == "call_function":
                self.read(node)
            elif node.op == "output":
                (made,) = node.args[0]
                if self.values.get(made) != len(self.layers):
                    raise Unsupported("an output that the last layer does not make")
        if not self.layers:
            raise Unsupported("a model without layers")
        self.program = Program(self.taken, tuple(self.layers))

    def read(self, node: fx.Node) -> None:
        if node.target is _aten.embedding.default:
            return self.embed(node, *node.args, **node.kwargs)
        if node.target is _aten.mul.Tensor and isinstance(node.args[1], (int, float)):
            x: Any = node.args[0]
            self.scaled[node] = x, self.values.get(x, -1), float(node.args[1])
            return None
        if node.target in _SAME:
            source: Any = node.args[0]
            if source in self.embedded and _shape(node)[0] == self.samples:
                self.embedded[node] = self.embedded[source]
                return
            if source not in self.values or _shape(node)[0] != self.samples:
                raise Unsupported(f"{node.target} of something else than samples")
            self.values[node] = self.values[source]
            return
        rule = _RULES.get(node.target)
        if rule is None:
            raise Unsupported(f"{node.target}")
        rule(self, node, *node.args, **node.kwargs)
        made = self.values[node] = len(self.layers)
        if node.target in _IN_PLACE:
            # Whatever shares the memory reads what was written.
            written: Any = node.args[0]
            before = self.values[written]
            for other, value in self.values.items():
                if value == before:
                    self.values[other] = made

    def embed(
        self, node: fx.Node, table: Any, tokens: Any, padding: Any = -1, by_frequency: Any = False,
        sparse: Any = False,
    ) -> None:  # fmt: skip
        if self.values.get(tokens) != 0 or self.taken != (2,):
            raise Unsupported("embeddings of something else than pairs of tokens")
        if _shape(table)[0] > _WHOLE:
            raise Unsupported("tokens that are no numbers of float32")
        if padding != -1 or by_frequency:
            raise Unsupported("embeddings with gradients of their own")
        self.embedded[node] = tokens, table

    def add(
        self,
        kind: str,
        node: fx.Node,
        inputs: Sequence[Any],
        tensors: Sequence[Any] = (),
        settings: Sequence[int] = (),
        eps: float = 0.0,
        momentum: float | None = 0.1,
    ) -> None:
        if any(value in self.scaled for value in inputs):
            raise Unsupported(f"{_aten.mul.Tensor} but in a sine")
        if any(value not in self.values for value in inputs):
            raise Unsupported(f"{node.target} of constants or weights")
        named = tuple(None if each is None else self.names.get(each) for each in tensors)
        if any(
            each is not None and name is None for each, name in zip(tensors, named, strict=True)
        ):
            raise Unsupported(f"{node.target} with weights that are computed")
        taken, made = _shape(inputs[0], tokens=kind == "token_pair"), _shape(node)
        if taken[0] != self.samples or made[0] != self.samples:
            raise Unsupported(f"{node.target} across samples")
        if any(tuple(value.meta["val"].shape) != taken for value in inputs):
            raise Unsupported(f"{node.target} of unequal shapes")
        shapes = self.check_shape(taken[1:]), self.check_shape(made[1:])
        values = tuple(self.values[value] for value in inputs)
        self.layers.append(Layer(kind, values, *shapes, named, tuple(settings), eps, momentum))

    @staticmethod
    def check_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
        if len(shape) not in (1, 3):
            raise Unsupported(f"samples of shape {list(shape)}")
        return shape


def _shape(node: Any, tokens: bool = False) -> tuple[int, ...]:
    value = node.meta["val"]
    if not isinstance(value, Tensor) or value.is_floating_point() == tokens:
        raise Unsupported(f"{node.target} of no floating tensor")
    return tuple(value.shape)


def _pair(value: Any) -> list[int]:
    listed = [value] if isinstance(value, int) else list(value)
    return listed * 2 if len(listed) == 1 else listed


def _activation(kind: str) -> Callable:
    return lambda reader, node, x: reader.add(kind, node, [x])


def _sine(reader: _Reader, node: fx.Node, x: Any) -> None:
    x, value, factor = reader.scaled.get(x, (x, reader.values.get(x, -1), 1.0))
    if reader.values.get(x) != value:
        raise Unsupported("a sine of what was written over")
    reader.add("sine", node, [x], eps=factor)


def _linear(reader: _Reader, node: fx.Node, x: Any, weight: Any, bias: Any = None) -> None:
    if len(_shape(x)) != 2:
        raise Unsupported("linear layers of sequences")
    if x in reader.embedded:
        pairs, table = reader.embedded[x]
        return reader.add("token_pair", node, [pairs], [weight, bias, table], _shape(table))
    reader.add("linear", node, [x], [weight, bias])


def _conv(
    reader: _Reader, node: fx.Node, x: Any, weight: Any, bias: Any = None, stride: Any = 1,
    padding: Any = 0, dilation: Any = 1, groups: int = 1,
) -> None:  # fmt: skip
    kernel, dilation = _shape(weight)[2:], _pair(dilation)
    if padding == "valid":
        padding = 0
    elif padding == "same":
        spans = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        if any(span % 2 for span in spans):
            raise Unsupported("uneven padding")
        padding = [span // 2 for span in spans]
    settings = [*kernel, *_pair(stride), *_pair(padding), *dilation, groups]
    reader.add("conv", node, [x], [weight, bias], settings)


def _max_pool(
    reader: _Reader, node: fx.Node, x: Any, kernel: Any, stride: Any = (), padding: Any = 0,
    dilation: Any = 1, ceil: bool = False,
) -> None:  # fmt: skip
    if ceil:
        raise Unsupported("pools that round up")
    settings = [*_pair(kernel), *_pair(stride or kernel), *_pair(padding), *_pair(dilation)]
    reader.add("max_pool", node, [x], (), settings)


def _average_pool(
    reader: _Reader, node: fx.Node, x: Any, kernel: Any, stride: Any = (), padding: Any = 0,
    ceil: bool = False, count_include_pad: bool = True, divisor: int | None = None,
) -> None:  # fmt: skip
    if ceil or divisor is not None:
        raise Unsupported("pools that round up or have a divisor")
    settings = [*_pair(kernel), *_pair(stride or kernel), *_pair(padding), 1, 1]
    reader.add("average_pool", node, [x], (), [*settings, int(count_include_pad)])


def _adaptive_pool(reader: _Reader, node: fx.Node, x: Any, size: Any) -> None:
    taken, made = _shape(x)[-2:], _shape(node)[-2:]
    if any(a % b for a, b in zip(taken, made, strict=True)):
        raise Unsupported("adaptive pools of uneven windows")
    kernel = [a // b for a, b in zip(taken, made, strict=True)]
    reader.add("average_pool", node, [x], (), [*kernel, *kernel, 0, 0, 1, 1, 1])


def _mean(reader: _Reader, node: fx.Node, x: Any, dims: Any, *rest: Any, **others: Any) -> None:
    shape = _shape(x)
    if len(shape) != 4 or sorted(d % 4 for d in dims) != [2, 3]:
        raise Unsupported("means over something else than all pixels")
    kernel = list(shape[2:])
    reader.add("average_pool", node, [x], (), [*kernel, *kernel, 0, 0, 1, 1, 1])


def _batch_norm(
    reader: _Reader, node: fx.Node, x: Any, weight: Any, bias: Any, mean: Any, variance: Any,
    training: bool, momentum: float, eps: float, cudnn: bool,
) -> None:  # fmt: skip
    if training or mean is None:
        raise Unsupported("batch norm by the batch's own statistics")
    share = None if reader.names.get(mean) in reader.averaged else momentum
    reader.add("batch_norm", node, [x], [weight, bias, mean, variance], (), eps, share)


def _group_norm(
    reader: _Reader, node: fx.Node, x: Any, groups: int, weight: Any = None, bias: Any = None,
    eps: float = 1e-5, cudnn: bool = True,
) -> None:  # fmt: skip
    reader.add("group_norm", node, [x], [weight, bias], [groups], eps)


def _layer_norm(
    reader: _Reader, node: fx.Node, x: Any, shape: Any, weight: Any = None, bias: Any = None,
    eps: float = 1e-5, cudnn: bool = True,
) -> None:  # fmt: skip
    if tuple(shape) != _shape(x)[1:]:
        raise Unsupported("layer norm over a part of a sample")
    reader.add("layer_norm", node, [x], [weight, bias], (), eps)


def _gelu(reader: _Reader, node: fx.Node, x: Any, approximate: str = "none") -> None:
    reader.add("gelu" if approximate == "none" else "gelu_tanh", node, [x])


def _add(reader: _Reader, node: fx.Node, x: Any, other: Any, alpha: float = 1) -> None:
    if alpha != 1 or not isinstance(other, fx.Node):
        raise Unsupported("sums with factors or constants")
    reader.add("add", node, [x, other])


def _each(*ops: Any, rule: Callable) -> dict[Any, Callable]:
    return dict.fromkeys(ops, rule)


#: values in another shape, of which the layers that read them take their own; and nothing in eval mode
_SAME = frozenset(
    (
        *(_aten.view.default, _aten.reshape.default, _aten.flatten.using_ints),
        *(_aten.unflatten.int, _aten.squeeze.dims, _aten.squeeze.dim, _aten.unsqueeze.default),
        *(_aten.dropout.default, _aten.dropout_.default, _aten.feature_dropout.default),
        *(_aten.alias.default, _aten.contiguous.default, _aten.detach.default),
    )
)
_IN_PLACE = frozenset(
    (_aten.relu_.default, _aten.silu_.default, _aten.tanh_.default, _aten.add_.Tensor)
)
_RULES: dict[Any, Callable] = {
    _aten.linear.default: _linear,
    **_each(_aten.conv2d.default, _aten.conv2d.padding, rule=_conv),
    _aten.max_pool2d.default: _max_pool,
    _aten.avg_pool2d.default: _average_pool,
    _aten.adaptive_avg_pool2d.default: _adaptive_pool,
    _aten.mean.dim: _mean,
    _aten.batch_norm.default: _batch_norm,
    _aten.group_norm.default: _group_norm,
    _aten.layer_norm.default: _layer_norm,
    **_each(_aten.relu.default, _aten.relu_.default, rule=_activation("relu")),
    **_each(_aten.silu.default, _aten.silu_.default, rule=_activation("silu")),
    **_each(_aten.tanh.default, _aten.tanh_.default, rule=_activation("tanh")),
    _aten.sin.default: _sine,
    _aten.gelu.default: _gelu,
    **_each(_aten.add.Tensor, _aten.add_.Tensor, rule=_add),
}
