"""Specs of common architectures, and random ones."""

from __future__ import annotations

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
