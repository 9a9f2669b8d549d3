"""Specs of common architectures, and random ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod

import torch

from weightops.spec import Axis, WeightSpec


def mlp_spec(*widths: int) -> WeightSpec:
    """Linear layers ``fc1``, ``fc2``, ... with biases; all but the first and last axis permutable."""
    axes: dict[str, tuple[Axis, ...]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    labels = [None, *(f"h{i}" for i in range(1, len(widths) - 1)), None]
    for i in range(1, len(widths)):
        axes[f"fc{i}.weight"] = (labels[i], labels[i - 1])
        axes[f"fc{i}.bias"] = (labels[i],)
        shapes[f"fc{i}.weight"] = (widths[i], widths[i - 1])
        shapes[f"fc{i}.bias"] = (widths[i],)
    return WeightSpec(axes, shapes)


def matrices_spec(count: int, size: int) -> WeightSpec:
    """``count`` square matrices whose axes all carry labels of their own."""
    names = [f"weight{i}" for i in range(count)]
    return WeightSpec(
        {name: (f"{name}.out", f"{name}.in") for name in names},
        dict.fromkeys(names, (size, size)),
    )


_NORM = ("weight", "bias", "running_mean", "running_var")


class _ConvBuilder:
    def __init__(self) -> None:
        self.axes: dict[str, tuple[Axis, ...]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}

    def conv(
        self, name: str, out: tuple[str | None, int], into: tuple[str | None, int], k: int
    ) -> None:
        self.axes[f"{name}.weight"] = (out[0], into[0], None, None)
        self.shapes[f"{name}.weight"] = (out[1], into[1], k, k)

    def vector(self, name: str, out: tuple[str | None, int]) -> None:
        self.axes[name], self.shapes[name] = (out[0],), (out[1],)

    def norm(self, name: str, out: tuple[str | None, int]) -> None:
        for each in _NORM:
            self.vector(f"{name}.{each}", out)


def vgg16_spec(classes: int = 10) -> WeightSpec:
    """VGG-16 for 32 x 32 images without its hidden linear layers: 13 convolutions, batch norms, 1 linear.

    54 tensors with the norms' scale and shift and the convolutions' biases (14.7 million weights).
    """
    build = _ConvBuilder()
    into: tuple[str | None, int] = (None, 3)
    for i, width in enumerate((64, 64, 128, 128, *[256] * 3, *[512] * 6)):
        out = (f"c{i}", width)
        build.conv(f"conv{i}", out, into, 3)
        build.vector(f"conv{i}.bias", out)
        build.vector(f"norm{i}.weight", out)
        build.vector(f"norm{i}.bias", out)
        into = out
    build.axes["fc.weight"], build.shapes["fc.weight"] = (None, into[0]), (classes, into[1])
    build.vector("fc.bias", (None, classes))
    return WeightSpec(build.axes, build.shapes)


def resnet20_spec(classes: int = 10) -> WeightSpec:
    """ResNet-20 for 32 x 32 images, projection shortcuts: each stage's residual stream is one label.

    65 tensors with the norms' scale and shift (0.27 million weights).
    """
    build = _ConvBuilder()
    into: tuple[str | None, int] = ("stage0", 16)
    build.conv("conv", into, (None, 3), 3)
    for each in _NORM[:2]:
        build.vector(f"norm.{each}", into)
    for stage, width in enumerate((16, 32, 64)):
        out = (f"stage{stage}", width)
        for i in range(3):
            name, inner = f"layer{stage}.{i}", (f"layer{stage}.{i}.inner", width)
            build.conv(f"{name}.conv1", inner, into, 3)
            build.conv(f"{name}.conv2", out, inner, 3)
            for norm, label in (("norm1", inner), ("norm2", out)):
                for each in _NORM[:2]:
                    build.vector(f"{name}.{norm}.{each}", label)
            if into != out:
                build.conv(f"{name}.shortcut", out, into, 1)
                for each in _NORM[:2]:
                    build.vector(f"{name}.shortcut_norm.{each}", out)
            into = out
    build.axes["fc.weight"], build.shapes["fc.weight"] = (None, into[0]), (classes, into[1])
    build.vector("fc.bias", (None, classes))
    return WeightSpec(build.axes, build.shapes)


def random_spec(generator: torch.Generator, *, tensors: int = 5, max_rank: int = 4) -> WeightSpec:
    """A small spec with fixed axes, shared and repeated labels, products, scalars and empty tensors."""

    def pick(n: int) -> int:
        return int(torch.randint(n, (1,), generator=generator))

    labels = {f"l{i}": (1, 2, 3, 5, 7)[pick(5)] for i in range(3)}
    names = list(labels)
    axes: dict[str, tuple[Axis, ...]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for t in range(tensors):
        entries: list[Axis] = []
        sizes: list[int] = []
        for _ in range(pick(max_rank + 1)):
            kind, label, other = pick(6), names[pick(3)], names[pick(3)]
            if kind == 0:
                entries.append(None)
                sizes.append((0, 1, 2, 9)[pick(4)])
            elif kind == 1:
                entries.append((label, other))
                sizes.append(labels[label] * labels[other])
            elif kind == 2:
                entries.append((None, label) if pick(2) else (label, None))
                sizes.append(labels[label] * (1 + pick(3)))
            else:
                entries.append(label)
                sizes.append(labels[label])
        axes[f"t{t}"], shapes[f"t{t}"] = tuple(entries), tuple(sizes)
    used = {
        label
        for entries_ in axes.values()
        for entry in entries_
        for label in (entry if isinstance(entry, tuple) else (entry,))
    }
    return WeightSpec(
        axes, shapes, sizes={label: size for label, size in labels.items() if label in used}
    )


def _permutable(axes: Mapping[str, Sequence[Axis]], sizes: Mapping[str, int]) -> WeightSpec:
    """A spec from the sizes of its labels."""
    shapes = {
        name: [
            prod(sizes[f] for f in (entry if isinstance(entry, tuple) else (entry,)) if f)
            for entry in entries
        ]
        for name, entries in axes.items()
    }
    used = {
        label
        for entries in axes.values()
        for entry in entries
        for label in (entry if isinstance(entry, tuple) else (entry,))
    }
    return WeightSpec(axes, shapes, sizes={k: size for k, size in sizes.items() if k in used})


def labelled_mlp_spec(*widths: int) -> WeightSpec:
    """An MLP whose inputs and outputs are permutable too (as in arXiv 2402.05232)."""
    axes: dict[str, tuple[Axis, ...]] = {}
    for i in range(1, len(widths)):
        axes[f"fc{i}.weight"] = (f"n{i}", f"n{i - 1}")
        axes[f"fc{i}.bias"] = (f"n{i}",)
    return _permutable(axes, {f"n{i}": width for i, width in enumerate(widths)})


def cnn_spec(*channels: int, classes: int = 10, kernel: int = 3) -> WeightSpec:
    """Convolutions with biases and a linear layer; every spatial axis has a label of its own."""
    axes: dict[str, tuple[Axis, ...]] = {}
    sizes = {"out": classes, **{f"n{i}": width for i, width in enumerate(channels)}}
    for i in range(1, len(channels)):
        sizes[f"h{i}"] = sizes[f"w{i}"] = kernel
        axes[f"conv{i}.weight"] = (f"n{i}", f"n{i - 1}", f"h{i}", f"w{i}")
        axes[f"conv{i}.bias"] = (f"n{i}",)
    axes["fc.weight"], axes["fc.bias"] = ("out", f"n{len(channels) - 1}"), ("out",)
    return _permutable(axes, sizes)


def rnn_spec(inputs: int = 32, hidden: int = 128, outputs: int = 32) -> WeightSpec:
    """A recurrent network: 5 tensors, one of which carries a label twice."""
    axes: dict[str, tuple[Axis, ...]] = {
        "ih.weight": ("h", "i"),
        "hh.weight": ("h", "h"),
        "h.bias": ("h",),
        "ho.weight": ("o", "h"),
        "o.bias": ("o",),
    }
    return _permutable(axes, {"i": inputs, "h": hidden, "o": outputs})


def transformer_spec(
    blocks: int = 1, *, dim: int = 64, hidden: int = 256, heads: int | None = None
) -> WeightSpec:
    """Transformer blocks that share a residual stream, 16 tensors each: projections with biases, two norms.

    With ``heads`` an attention axis is the product of heads and their dimensions, where those of values
    are apart from those of queries and keys.
    """
    axes: dict[str, tuple[Axis, ...]] = {}
    sizes = {"residual": dim}
    for b in range(blocks):
        match: Axis = f"attention{b}"
        value: Axis = match
        if heads is None:
            sizes[f"attention{b}"] = dim
        else:
            match, value = (f"head{b}", f"match{b}"), (f"head{b}", f"value{b}")
            sizes |= {f"head{b}": heads, f"match{b}": dim // heads, f"value{b}": dim // heads}
        sizes[f"hidden{b}"] = hidden
        layers: list[tuple[str, Axis, Axis]] = [
            (f"{b}.query", match, "residual"),
            (f"{b}.key", match, "residual"),
            (f"{b}.value", value, "residual"),
            (f"{b}.out", "residual", value),
            (f"{b}.up", f"hidden{b}", "residual"),
            (f"{b}.down", "residual", f"hidden{b}"),
        ]
        for name, out, into in layers:
            axes[f"{name}.weight"], axes[f"{name}.bias"] = (out, into), (out,)
        for name in ("norm1", "norm2"):
            axes[f"{b}.{name}.weight"] = axes[f"{b}.{name}.bias"] = ("residual",)
    return _permutable(axes, sizes)


def gru_seq2seq_spec(vocabulary: int = 13, hidden: int = 128) -> WeightSpec:
    """An encoder and a decoder GRU that share vocabulary and state: 22 tensors as flax lays them out."""
    axes: dict[str, tuple[Axis, ...]] = {}
    for cell in ("encoder", "decoder"):
        for gate in "rzn":
            axes[f"{cell}.i{gate}.kernel"] = ("v", "h")
            axes[f"{cell}.i{gate}.bias"] = ("h",)
        for gate in "rzn":
            axes[f"{cell}.h{gate}.kernel"] = ("h", "h")
        axes[f"{cell}.hn.bias"] = ("h",)
    axes["output.kernel"], axes["output.bias"] = ("h", "v"), ("v",)
    return _permutable(axes, {"v": vocabulary, "h": hidden})


#: the weight spaces that equivariant layers are measured on
WEIGHT_SPACES: dict[str, Callable[[], WeightSpec]] = {
    "mlp": lambda: labelled_mlp_spec(784, 128, 128, 10),
    "cnn": lambda: cnn_spec(3, 16, 32, 64),
    "rnn": rnn_spec,
    "transformer": transformer_spec,
    "gru": gru_seq2seq_spec,
}


def tiny_spec(
    generator: torch.Generator,
    *,
    tensors: int = 3,
    max_rank: int = 3,
    sizes: Mapping[str, int] | None = None,
) -> WeightSpec:
    """As :func:`random_spec`, but small enough for dense matrices over all pairs of weights.

    ``sizes`` are those of the labels ``a`` and ``b``.
    """

    def pick(n: int) -> int:
        return int(torch.randint(n, (1,), generator=generator))

    if sizes is None:
        sizes = {"a": 1 + pick(3), "b": 2 + pick(3)}
    axes: dict[str, tuple[Axis, ...]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for t in range(tensors):
        entries: list[Axis] = []
        lengths: list[int] = []
        budget = 40
        for _ in range(pick(max_rank + 1)):
            label, other = "ab"[pick(2)], "ab"[pick(2)]
            entry, length = {
                0: (None, 1 + pick(3)),
                1: ((label, other), sizes[label] * sizes[other]),
                2: ((None, label), 2 * sizes[label]),
            }.get(pick(8), (label, sizes[label]))
            if length <= budget:
                budget //= length
                entries.append(entry)
                lengths.append(length)
        axes[f"t{t}"], shapes[f"t{t}"] = tuple(entries), tuple(lengths)
    used = {f for e in axes.values() for a in e for f in (a if isinstance(a, tuple) else (a,))}
    return WeightSpec(axes, shapes, sizes={k: size for k, size in sizes.items() if k in used})
