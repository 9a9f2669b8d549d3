"""Problems shared by tests and benchmarks, and checks that any op can be put through.

Everything here is public: who writes an op on weight space can test it with
:func:`check_transform`, :func:`check_gradients`, :func:`check_op` and :func:`assert_equivariant`.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, func

from weightops import _check
from weightops.spec import Axis, Permutations, WeightSpec

Function = Callable[[Tensor], Tensor]


def _total(f: Function, power: int) -> Callable[[Tensor], Tensor]:
    return lambda x: f(x).pow(power).sum()


#: name -> ``make(f)``: a function of x that uses ``f``, under transforms of torch.func
TRANSFORMS: dict[str, Callable[[Function], Callable[[Tensor], Any]]] = {
    "none": lambda f: lambda x: f(2 * x),
    "grad": lambda f: func.grad(_total(f, 2)),
    "vjp": lambda f: lambda x: func.vjp(f, x)[1](f(x).detach())[0],
    "jvp": lambda f: lambda x: func.jvp(f, (x,), (3 * x,))[1],
    "jacrev": lambda f: func.jacrev(lambda x: f(x).pow(3)),
    "jacfwd": lambda f: func.jacfwd(lambda x: f(x).pow(3)),
    "hessian": lambda f: func.hessian(_total(f, 3)),
    "jacrev(jacrev)": lambda f: func.jacrev(func.jacrev(_total(f, 3))),
    "vmap": lambda f: lambda x: func.vmap(f)(_stack(x)),
    "vmap(vmap)": lambda f: lambda x: func.vmap(func.vmap(f))(_stack(_stack(x))),
    "vmap(grad)": lambda f: lambda x: func.vmap(func.grad(_total(f, 2)))(_stack(x)),
    "vmap(jvp)": lambda f: lambda x: func.vmap(lambda y: func.jvp(f, (y,), (y * y,))[1])(_stack(x)),
    "grad(vmap)": lambda f: lambda x: func.grad(_total(func.vmap(f), 2))(_stack(x)),
    "jvp(grad)": lambda f: lambda x: func.jvp(func.grad(_total(f, 3)), (x,), (3 * x,))[1],
    "vmap(in_dims=-1)": lambda f: lambda x: func.vmap(f, in_dims=-1)(_stack(x).movedim(0, -1)),
}

#: how a transformed function is run
MODES = ("eager", "aot_eager", "inductor")


def _stack(x: Tensor) -> Tensor:
    return torch.stack([x, x + 1])


@contextmanager
def _torch_warnings() -> Iterator[None]:
    """Torch's compiler warns about itself; an op under test is to raise or to be right."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def check_transform(name: str, mode: str, op: Function, reference: Function, x: Tensor) -> None:
    """Assert that ``op`` and ``reference`` agree under one of :data:`TRANSFORMS`, run in one mode.

    Args:
        name: a key of :data:`TRANSFORMS`.
        mode: one of :data:`MODES`: eager, or ``torch.compile(fullgraph=True)`` with that backend.
        op: the op as a function of one tensor, differentiable in it.
        reference: the same in plain torch.
        x: float64 input.
    """
    make = TRANSFORMS[name]
    expected = make(reference)(x)
    f = make(op)
    with _torch_warnings():
        if mode != "eager":
            torch._dynamo.reset()
            f = torch.compile(f, backend=mode, fullgraph=True)
        given = f(x)
    torch.testing.assert_close(given, expected)


def check_gradients(op: Function, x: Tensor) -> None:
    """First and second derivatives against finite differences, forward mode and batched too."""
    x = x.detach().double().requires_grad_()
    with _torch_warnings():
        torch.autograd.gradcheck(
            op,
            (x,),
            check_forward_ad=True,
            check_batched_grad=True,
            check_batched_forward_grad=True,
        )
        torch.autograd.gradgradcheck(op, (x,))


def check_op(op: Callable, *args: Any) -> None:
    """``torch.library.opcheck`` of an op that ``_op.define`` returned, on one set of arguments."""
    with _torch_warnings():
        torch.library.opcheck(getattr(op, "raw", op), args)


def check_compiled_training(op: Function, reference: Function, inputs: Sequence[Tensor]) -> None:
    """``torch.compile`` with dynamic shapes: values and gradients right, one compilation for all."""
    torch._dynamo.reset()
    compilations = 0

    def counting_backend(graph: Any, example_inputs: Any) -> Any:
        nonlocal compilations
        compilations += 1
        return torch._dynamo.lookup_backend("aot_eager")(graph, example_inputs)

    compiled = torch.compile(
        lambda x: op(2 * x).sin(), backend=counting_backend, fullgraph=True, dynamic=True
    )
    with _torch_warnings():
        for x in inputs:
            ours, theirs = (x.detach().clone().requires_grad_() for _ in range(2))
            out, expected = compiled(ours), reference(2 * theirs).sin()
            torch.testing.assert_close(out, expected)
            out.sum().backward()
            expected.sum().backward()
            torch.testing.assert_close(ours.grad, theirs.grad)
    assert compilations == 1, f"compiled {compilations} times for {len(inputs)} sizes"


def check_export(op: Function, x: Tensor, name: str) -> None:
    """``torch.export`` keeps ``weightops::name`` as one node, and the program gives the same."""

    class Exported(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return op(x)

    with _torch_warnings():
        program = torch.export.export(Exported(), (x,))
        assert f"weightops.{name}" in str(program.graph), program.graph
        torch.testing.assert_close(program.module()(x), op(x))


def check_autocast(op: Function, x: Tensor) -> None:
    """Autocast neither changes the dtype nor the values of an op on weights."""
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        given = op(x)
    torch.testing.assert_close(given, op(x), rtol=0, atol=0)


def assert_equivariant(
    f: Callable[[Tensor], Tensor], flat: Tensor, spec: WeightSpec, *, trials: int = 3, seed: int = 0
) -> None:
    """Assert ``f(P w) = P f(w)`` for random permutations P of the spec's labels.

    Args:
        f: maps networks ``[N, P]`` to networks ``[N, P]``.
        flat: networks ``[N, P]``, floating point.

    Raises:
        AssertionError: naming the first tensor that differs.
        ValueError: the spec has no label longer than one, so there is nothing to prove.
    """
    from weightops.ops.permute import permute

    if not any(size > 1 for size in spec.labels.values()):
        raise ValueError("assert_equivariant: the spec has no permutable axis, so this proves nothing")
    generator = torch.Generator().manual_seed(seed)
    for _ in range(trials):
        perms = spec.random_permutations(flat.shape[0], generator)
        perms = {label: index.to(flat.device) for label, index in perms.items()}
        given = spec.unflatten(f(permute(flat, perms, spec)))
        expected = spec.unflatten(permute(f(flat), perms, spec))
        for name in spec.shapes:
            torch.testing.assert_close(
                given[name], expected[name], msg=lambda text, name=name: f"{name}: {text}"
            )


@dataclass(frozen=True)
class PermuteAxes:
    """``permute_axes`` of the first axes behind the batch axis."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    permuted: int = 2

    def __str__(self) -> str:
        return "x".join(map(str, self.shape))

    @property
    def bytes(self) -> int:
        """Each element read once and written once; the indices are small beside them."""
        return 2 * prod(self.shape) * self.dtype.itemsize

    def make(self, device: str = "cpu", seed: int = 0) -> tuple[Tensor, list[Tensor | None]]:
        generator = torch.Generator().manual_seed(seed)
        x = (torch.randn(self.shape, generator=generator) * 10).to(self.dtype)
        perms: list[Tensor | None] = [
            random_rows(self.shape[0], size, generator).to(device)
            for size in self.shape[1 : 1 + self.permuted]
        ]
        return x.to(device), perms + [None] * (len(self.shape) - 1 - self.permuted)


@dataclass(frozen=True)
class Networks:
    """``permute`` or ``merge`` of whole networks."""

    name: str
    spec: WeightSpec
    count: int = 1
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        return f"{self.name}x{self.count}"

    @property
    def bytes(self) -> int:
        """Bytes of ``permute``: each weight read once and written once."""
        return 2 * self.count * self.spec.numel * self.dtype.itemsize

    @property
    def merge_bytes(self) -> int:
        """Bytes of ``merge`` to one network: each weight read once, one network written."""
        return (self.count + 1) * self.spec.numel * self.dtype.itemsize

    def make(self, device: str = "cpu", seed: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        flat = torch.randn(self.count, self.spec.numel, generator=generator).to(device, self.dtype)
        perms = self.spec.random_permutations(self.count, generator)
        return flat, {label: index.to(device) for label, index in perms.items()}


@dataclass(frozen=True)
class Assign:
    """``assign`` of random problems: ``gram`` (two random networks' layers, maximised) or ``uniform``."""

    family: str
    size: int
    problems: int = 64

    def __str__(self) -> str:
        return f"{self.family}-{self.problems}x{self.size}"

    @property
    def maximize(self) -> bool:
        return self.family == "gram"

    @property
    def bytes(self) -> int:
        """Each score read once."""
        return self.problems * self.size**2 * 4

    def make(self, seed: int = 0, change: float = 0.02) -> tuple[Tensor, Tensor]:
        """Scores ``[B, n, n]``, and the same after a relative change (in the Frobenius norm)."""
        generator = torch.Generator().manual_seed(seed)
        b, n = self.problems, self.size

        def scores() -> Tensor:
            if self.family == "uniform":
                return torch.rand(b, n, n, generator=generator)
            left, right = torch.randn(2, b, n, 512, generator=generator)
            return left @ right.mT

        score, other = scores(), scores()
        noise = other - other.mean()
        return score, score + change * noise * (score.norm() / noise.norm())


def best_time(f: Callable[[], Any], seconds: float = 0.5) -> float:
    """The least seconds that one call of ``f`` took, over calls for about ``seconds``."""
    f()
    best, end = float("inf"), time.perf_counter() + seconds
    while True:
        began = time.perf_counter()
        f()
        now = time.perf_counter()
        best = min(best, now - began)
        if now > end:
            return best


def random_rows(rows: int, size: int, generator: torch.Generator | None = None) -> Tensor:
    """``[rows, size]`` of independent random permutations."""
    return torch.rand(rows, size, generator=generator).argsort(1)


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
        {name: (size, size) for name in names},
    )


_NORM = ("weight", "bias", "running_mean", "running_var")


class _ConvBuilder:
    def __init__(self) -> None:
        self.axes: dict[str, tuple[Axis, ...]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}

    def conv(self, name: str, out: tuple[str | None, int], into: tuple[str | None, int], k: int) -> None:
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
    build, into = _ConvBuilder(), ((None, 3))
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
    into = ("stage0", 16)
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


def pack(perms: Permutations, spec: WeightSpec) -> Tensor:
    """Permutations of all labels side by side, as the raw ops take them."""
    return torch.cat([perms[label] for label in spec.labels], 1)


def describe(problem: Any) -> str:
    """A problem as test and benchmark ids show it."""
    return _check.describe(problem) if isinstance(problem, (Tensor, Mapping)) else str(problem)
