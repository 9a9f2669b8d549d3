"""The compiled forward of a population against its definition in float64."""

import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from weightops import _load
from weightops.ops.population import (
    Layer,
    Program,
    grouped,
    population_eval,
    population_logits,
    reference,
    training,
)

# kind -> (name, taken, made, tensors' sizes, settings)
CONV = {
    "plain": ((3, 9, 8), (5, 7, 6), 3, (3, 3, 1, 1, 0, 0, 1, 1, 1)),
    "padded": ((3, 9, 8), (9, 9, 8), 3, (3, 3, 1, 1, 1, 1, 1, 1, 1)),
    "strided": ((3, 11, 10), (6, 5, 9), 3, (3, 2, 2, 1, 0, 0, 1, 1, 1)),
    "dilated": ((2, 9, 9), (7, 7, 5), 2, (2, 3, 1, 1, 1, 0, 4, 2, 1)),
    "grouped": ((6, 5, 7), (9, 5, 5), 2, (3, 3, 1, 1, 1, 0, 1, 1, 3)),
    "depthwise": ((4, 6, 6), (4, 3, 3), 1, (3, 3, 2, 2, 1, 1, 1, 1, 4)),
    "far outside": ((1, 3, 3), (2, 7, 7), 1, (1, 1, 1, 1, 2, 2, 1, 1, 1)),
    "one pixel": ((5, 1, 1), (17, 1, 1), 5, (1, 1, 1, 1, 0, 0, 1, 1, 1)),
}
POOLS = {
    "halves": ((3, 8, 6), (3, 4, 3), (2, 2, 2, 2, 0, 0, 1, 1)),
    "odd": ((2, 7, 9), (2, 3, 5), (2, 3, 2, 2, 0, 1, 1, 1)),
    "overlapping": ((2, 5, 5), (2, 5, 5), (3, 3, 1, 1, 1, 1, 1, 1)),
    "whole": ((4, 3, 5), (4, 1, 1), (3, 5, 3, 5, 0, 0, 1, 1)),
    "dilated": ((1, 9, 9), (1, 5, 3), (3, 3, 1, 2, 0, 0, 2, 2)),
}
ACTIVATIONS = ("relu", "silu", "gelu", "gelu_tanh", "tanh")


def layers() -> dict[str, tuple[Program, dict[str, int]]]:
    """One program for each layer and the way it is used, with the sizes of its tensors."""
    made: dict[str, tuple[Program, dict[str, int]]] = {}

    def add(name: str, layer: Layer, **sizes: int) -> None:
        made[name] = Program(layer.taken, (layer,)), sizes

    for name, (taken, out, inner, settings) in CONV.items():
        weight = out[0] * inner * settings[0] * settings[1]
        add(
            f"conv {name}",
            Layer("conv", (0,), taken, out, ("w", "b"), settings),
            w=weight,
            b=out[0],
        )
    taken, out, inner, settings = CONV["padded"]
    add("conv without bias", Layer("conv", (0,), taken, out, ("w", None), settings), w=9 * 27)
    for taken, out in ((7, 1), (33, 19), (1, 65)):
        layer = Layer("linear", (0,), (taken,), (out,), ("w", "b"))
        add(f"linear {taken}->{out}", layer, w=taken * out, b=out)
    for name, (taken, out, settings) in POOLS.items():
        add(f"max_pool {name}", Layer("max_pool", (0,), taken, out, (), settings))
        if name != "dilated":
            for counts in (0, 1):
                layer = Layer("average_pool", (0,), taken, out, (), (*settings, counts))
                add(f"average_pool {name} {counts}", layer)
    for kind in ACTIVATIONS:
        add(kind, Layer(kind, (0,), (5, 3, 2), (5, 3, 2)))
    add("sine", Layer("sine", (0,), (5, 3, 2), (5, 3, 2), eps=3.0))
    shape = (6, 3, 5)
    four = ("w", "b", "m", "v")
    sizes = dict.fromkeys(four, 6)
    add("batch_norm", Layer("batch_norm", (0,), shape, shape, four, (), 1e-3), **sizes)
    bare = Layer("batch_norm", (0,), (6,), (6,), (None, None, "m", "v"), (), 1e-3)
    add("batch_norm bare", bare, m=6, v=6)
    for groups in (1, 3, 6):
        layer = Layer("group_norm", (0,), shape, shape, ("w", "b"), (groups,), 1e-5)
        add(f"group_norm {groups}", layer, w=6, b=6)
    bare = Layer("group_norm", (0,), shape, shape, (None, None), (2,), 1e-5)
    add("group_norm bare", bare)
    add("layer_norm", Layer("layer_norm", (0,), shape, shape, ("w", "b"), (), 1e-5), w=90, b=90)
    weighed = Layer("layer_norm", (0,), (7,), (7,), ("w", None), (), 1e-5)
    add("layer_norm without bias", weighed, w=7)
    add("add", Layer("add", (0, 0), (3, 2, 2), (3, 2, 2)))
    return made


LAYERS = layers()


def residual() -> tuple[Program, dict[str, int]]:
    """Values that are read late, twice, in place and after ReLU that is fused, on images."""
    conv = (3, 3, 1, 1, 1, 1, 1, 1, 1)
    image, small = (4, 6, 5), (4, 3, 2)
    made = (
        Layer("conv", (0,), (3, 6, 5), image, ("w1", "b1"), conv),
        Layer("relu", (1,), image, image),
        Layer("conv", (2,), image, image, ("w2", "b2"), conv),
        Layer("relu", (3,), image, image),
        Layer("add", (2, 4), image, image),
        Layer("conv", (5,), image, image, ("w3", None), conv),
        Layer("relu", (6,), image, image),
        Layer("add", (7, 6), image, image),
        Layer("max_pool", (8,), image, small, (), (2, 2, 2, 2, 0, 0, 1, 1)),
        Layer("linear", (9,), (24,), (10,), ("w4", "b4")),
    )
    sizes = {"w1": 108, "b1": 4, "w2": 144, "b2": 4, "w3": 144, "w4": 240, "b4": 10}
    return Program((3, 6, 5), made), sizes


def mlp(inside: int = 12, hidden: int = 20, outputs: int = 5) -> tuple[Program, dict[str, int]]:
    made = (
        Layer("linear", (0,), (inside,), (hidden,), ("w1", "b1")),
        Layer("relu", (1,), (hidden,), (hidden,)),
        Layer("linear", (2,), (hidden,), (outputs,), ("w2", "b2")),
    )
    sizes = {"w1": inside * hidden, "b1": hidden, "w2": hidden * outputs, "b2": outputs}
    return Program((inside,), made), sizes


def chain(*widths: int, kind: str | None = "relu") -> tuple[Program, dict[str, int]]:
    """Linear layers, every second one without a bias, with an activation between or without."""
    made: list[Layer] = []
    sizes: dict[str, int] = {}
    for n, (inside, outside) in enumerate(pairwise(widths)):
        if n > 0 and kind is not None:
            made.append(Layer(kind, (len(made),), (inside,), (inside,)))
        names = f"w{n}", f"b{n}" if n % 2 == 0 else None
        made.append(Layer("linear", (len(made),), (inside,), (outside,), names))
        sizes |= {f"w{n}": inside * outside}
        if n % 2 == 0:
            sizes |= {f"b{n}": outside}
    return Program((widths[0],), tuple(made)), sizes


def encode(program: Program, sizes: dict[str, int]) -> tuple[list[int], int]:
    offsets, at = {}, 3
    for name, size in sizes.items():
        offsets[name] = at
        at += size
    return program.encode(offsets), at


def population(networks: int, numel: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Positive in half of the cases, so that variances can be among them."""
    return (torch.randn(networks, numel).abs() + 0.1).to(dtype)


def signed(networks: int, numel: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(networks, numel).to(dtype) / 3


def assert_close(made: Tensor, expected: Tensor) -> None:
    bound = 3e-6 if made.dtype == torch.float32 else 1e-13
    scale = expected.abs().max().clamp(min=1)
    torch.testing.assert_close(made.double(), expected, rtol=bound, atol=bound * scale.item())


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def test_the_op_is_compiled() -> None:
    if _load.reasons["cpu"] is not None:
        pytest.skip("no compiled library")
    for name in ("population_logits", "population_eval"):
        assert _load.has_kernel(name, "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_is_its_definition(name: str, dtype: torch.dtype) -> None:
    program, sizes = LAYERS[name]
    code, numel = encode(program, sizes)
    make = population if "batch_norm" in name else signed
    flat = make(3, numel, dtype)
    for samples in (1, 37):
        x = (2 * torch.randn(samples, *program.taken)).to(dtype)
        expected = reference.population_logits(flat.double(), x.double(), code, True)
        assert_close(population_logits(flat, x, code, True), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("make", [residual, mlp])
@pytest.mark.parametrize("samples", [1, 3, 16, 50, 131])
def test_blocks_and_their_tails_on_shared_and_own_samples(make, samples, dtype) -> None:
    program, sizes = make()
    code, numel = encode(program, sizes)
    flat = signed(5, numel, dtype)
    for shared in (True, False):
        x = torch.randn(*(() if shared else (5,)), samples, *program.taken).to(dtype)
        expected = reference.population_logits(flat.double(), x.double(), code, shared)
        assert_close(population_logits(flat, x, code, shared), expected)


@pytest.mark.parametrize("kind", [None, *ACTIVATIONS])
@pytest.mark.parametrize(
    "widths",
    [
        (64, 32, 10),
        (784, 128, 10),
        (64, 32),
        (65, 33, 64, 17),
        (31, 90, 47, 1),
        (300, 64, 32),
        (32, 16, 32, 48),
    ],
)
def test_chains_of_linear_layers(widths: tuple[int, ...], kind: str | None) -> None:
    program, sizes = chain(*widths, kind=kind)
    code, numel = encode(program, sizes)
    flat = signed(3, numel, torch.float32)
    for samples in (32, 33, 100, 300):
        for shared in (True, False):
            x = torch.randn(*(() if shared else (3,)), samples, *program.taken)
            expected = reference.population_logits(flat.double(), x.double(), code, shared)
            assert_close(population_logits(flat, x, code, shared), expected)
    if widths[-1] > 1:
        targets = torch.randint(widths[-1], (samples,))
        for to in ("loss", "errors"):
            made = population_eval(flat, x, targets, code, False, to)
            logits = population_logits(flat, x, code, False)
            found = reference.reduce(logits.double(), targets.expand(3, -1), to)
            assert_close(made, found) if to == "loss" else torch.testing.assert_close(made, found)


def test_what_is_not_finite_stays_with_its_sample_and_its_network() -> None:
    program, sizes = chain(64, 32, 10)
    code, numel = encode(program, sizes)
    flat, x = signed(4, numel, torch.float32), torch.randn(90, 64)
    x[40, 3], flat[2, 700] = float("nan"), float("inf")
    made = population_logits(flat, x, code, True).isfinite()
    assert not made[:, 40].any()
    assert not made[2].all()
    made[:, 40] = made[2] = True
    assert made.all()


@pytest.mark.parametrize("networks", [0, 1, 300])
@pytest.mark.parametrize("samples", [0, 1, 20])
@pytest.mark.parametrize("shared", [True, False])
def test_few_and_many_networks_and_samples(networks: int, samples: int, shared: bool) -> None:
    program, sizes = mlp()
    code, numel = encode(program, sizes)
    flat = signed(networks, numel)
    x = torch.randn(*(() if shared else (networks,)), samples, 12).double()
    made = population_logits(flat, x, code, shared)
    assert made.shape == (networks, samples, 5)
    if made.numel():
        assert_close(made, reference.population_logits(flat, x, code, shared))
    targets = torch.zeros(samples, dtype=torch.int64)
    losses = population_eval(flat, x, targets, code, shared, "loss")
    assert losses.shape == (networks,)
    assert losses.isnan().all() == (samples == 0 or networks == 0)
    assert population_eval(flat, x, targets, code, shared, "errors").shape == (networks, samples)


def test_many_outputs_are_written_row_by_row() -> None:
    for outputs in (1, 2, 15, 16, 17, 40):
        program, sizes = mlp(outputs=outputs)
        code, numel = encode(program, sizes)
        flat, x = signed(3, numel, torch.float32), torch.randn(53, 12)
        expected = reference.population_logits(flat.double(), x.double(), code, True)
        assert_close(population_logits(flat, x, code, True), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("own", [False, True])
def test_reductions(own: bool, dtype: torch.dtype) -> None:
    program, sizes = residual()
    code, numel = encode(program, sizes)
    flat, x = signed(4, numel, dtype), torch.randn(61, 3, 6, 5).to(dtype)
    logits = reference.population_logits(flat.double(), x.double(), code, True)
    for targets in (
        torch.randint(10, (4, 61) if own else (61,)),
        torch.randn(*((4,) if own else ()), 61, 10).to(dtype),
    ):
        regresses = targets.is_floating_point()
        each = (targets.double() if regresses else targets).expand(4, *targets.shape[own:])
        for to in ("loss",) if regresses else ("loss", "accuracy", "scores", "errors"):
            made = population_eval(flat, x, targets, code, True, to)
            expected = reference.reduce(logits, each, to)
            if to == "errors":
                assert torch.equal(made, expected)
            else:
                assert_close(made, expected)


def test_ties_nan_and_infinities_are_as_in_torch() -> None:
    program = Program((6,), (Layer("relu", (0,), (6,), (6,)),))
    code, _ = encode(program, {})
    nan, inf = float("nan"), float("inf")
    x = torch.tensor([[1.0, 3, 3, 2, 0, 0], [1, nan, 2, nan, inf, 0], [inf, 0, inf, 0, 0, 0]])
    for dtype in (torch.float32, torch.float64):
        x, flat = x.to(dtype), torch.zeros(2, 3, dtype=dtype)
        torch.testing.assert_close(population_logits(flat, x, code, True)[1], x, equal_nan=True)
        wrong = population_eval(flat, x, torch.tensor([1, 1, 0]), code, True, "errors")
        assert not wrong.any()
        wrong = population_eval(flat, x, torch.tensor([2, 3, 2]), code, True, "errors")
        assert wrong.all()
        assert population_eval(flat, x, torch.tensor([1, 1, 0]), code, True, "loss").isnan().all()
    pool = Layer("max_pool", (0,), (1, 2, 3), (1, 1, 2), (), (2, 2, 2, 1, 0, 0, 1, 1))
    code, _ = encode(Program((1, 2, 3), (pool,)), {})
    x = torch.tensor([[nan, 1, 2, 3, 4, 5], [1, 2, 3, 4, 5, nan], [-inf, -inf, -1, -inf, -inf, -2]])
    expected = torch.nn.functional.max_pool2d(x.view(3, 1, 2, 3), 2, 1).flatten(1)
    made = population_logits(torch.zeros(1, 3), x, code, True)[0]
    torch.testing.assert_close(made, expected, equal_nan=True)


@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_activations_hold_over_the_whole_range(kind: str, dtype: torch.dtype) -> None:
    code, _ = encode(Program((1,), (Layer(kind, (0,), (1,), (1,)),)), {})
    x = torch.cat([torch.linspace(-100, 100, 4001), torch.linspace(-6, 6, 4001)]).to(dtype)[:, None]
    x = torch.cat([x, 1e-5 * x])
    made = population_logits(torch.zeros(1, 3, dtype=dtype), x, code, True)[0]
    expected = reference.population_logits(torch.zeros(1, 3).double(), x.double(), code, True)[0]
    eps = torch.finfo(dtype).eps
    # Far below zero both GELU multiply what has lost its digits, in the argument of the exponential.
    torch.testing.assert_close(made.double(), expected, rtol=8 * eps, atol=32 * eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sines_hold_wherever_their_argument_is_known(dtype: torch.dtype) -> None:
    code, _ = encode(Program((1,), (Layer("sine", (0,), (1,), (1,), eps=1.0),)), {})
    near = torch.pi / 2 * torch.arange(-40, 41)  # where a digit is easily lost
    x = torch.cat([torch.linspace(-9000, 9000, 20001), near, torch.tensor([1e7, 1e20, 0.0, -0.0])])
    x = x.to(dtype)[:, None]
    made = population_logits(torch.zeros(1, 3, dtype=dtype), x, code, True)[0]
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(made.double(), x.double().sin(), rtol=4 * eps, atol=eps)
    nothing = torch.tensor([[torch.inf], [-torch.inf], [torch.nan]], dtype=dtype)
    assert population_logits(torch.zeros(1, 3, dtype=dtype), nothing, code, True).isnan().all()


def test_threads_do_not_change_a_bit() -> None:
    program, sizes = residual()
    code, numel = encode(program, sizes)
    flat, x = signed(7, numel, torch.float32), torch.randn(100, 3, 6, 5)
    targets = torch.randint(10, (100,))
    before, made = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            made.append(
                [population_logits(flat, x, code, True)]
                + [population_eval(flat, x, targets, code, True, to) for to in ("loss", "scores")]
            )
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, *made))


def test_networks_may_lie_apart() -> None:
    program, sizes = mlp()
    code, numel = encode(program, sizes)
    apart = signed(6, numel + 5)[::2, :numel]
    x = torch.randn(12, 9).double().T
    expected = reference.population_logits(apart.contiguous(), x.contiguous(), code, True)
    assert_close(population_logits(apart, x, code, True), expected)


@pytest.mark.parametrize("targets", [[0, 1, 5], [0, -1, 1]])
def test_targets_out_of_range_are_refused(targets: list[int]) -> None:
    program, sizes = mlp()
    code, numel = encode(program, sizes)
    for to in ("loss", "accuracy", "errors"):
        with pytest.raises(RuntimeError, match=r"population_eval: targets must lie in \[0, 5\)"):
            population_eval(
                signed(2, numel), torch.randn(3, 12).double(), torch.tensor(targets), code, True, to
            )


@pytest.mark.skipif(_load.reasons["cpu"] is not None, reason="no compiled library")
def test_what_does_not_fit_is_refused_by_the_kernel() -> None:
    program, sizes = mlp()
    code, numel = encode(program, sizes)
    flat, x = signed(2, numel), torch.randn(3, 12).double()
    for given in (
        (flat[:, 1:], x, code, True),
        (flat, x[:, 1:], code, True),
        (flat, x, code, False),
        (flat, x.float(), code, True),
        (flat, x, code[:-1], True),
        (flat.half(), x.half(), code, True),
    ):
        with pytest.raises((RuntimeError, IndexError)):
            population_logits(*given)


@pytest.mark.parametrize("isa", ["generic", "avx2"])
def test_other_instruction_sets_pass_too(isa: str) -> None:
    if _load.reasons["cpu"] is not None:
        pytest.skip("no compiled library")
    chosen = "definition or blocks or outputs or reductions or ties or range or threads"
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            "-p",
            "no:cacheprovider",
            "-k",
            chosen,
            __file__,
        ],
        env={**os.environ, "WEIGHTOPS_ISA": isa},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stdout[-3000:]
    assert " passed" in result.stdout


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("name", [*LAYERS, "residual", "mlp"])
def test_batched_over_networks_is_the_definition_with_its_gradients(
    name: str, shared: bool
) -> None:
    program, sizes = {"residual": residual, "mlp": mlp}.get(name, lambda: LAYERS[name])()
    code, numel = encode(program, sizes)
    flat = (population if "batch_norm" in name else signed)(3, numel).requires_grad_()
    x = torch.randn(*(() if shared else (3,)), 4, *program.taken).double().requires_grad_()
    made = grouped.population_logits(flat, x, code, shared)
    expected = reference.population_logits(flat, x, code, shared)
    assert_close(made, expected)
    # As the op's declaration says, of new memory.
    assert made.is_contiguous()
    cotangent = torch.randn_like(expected)
    given = torch.autograd.grad(made, (flat, x), cotangent, materialize_grads=True)
    for grad, own in zip(
        given,
        torch.autograd.grad(expected, (flat, x), cotangent, materialize_grads=True),
        strict=True,
    ):
        assert_close(grad, own)


def test_layers_of_shared_values_behind_the_first_are_batched_too() -> None:
    """Pools and norms before a network's first weights, sums of what is shared with what is not."""
    image = (4, 6, 6)
    made = (
        Layer("max_pool", (0,), image, image, (), (3, 3, 1, 1, 1, 1, 1, 1)),
        Layer("group_norm", (1,), image, image, (None, None), (2,)),
        Layer("group_norm", (2,), image, image, ("w", "b"), (2,)),
        Layer("add", (1, 3), image, image),
        Layer("add", (4, 2), image, image),
        Layer("layer_norm", (1,), image, image, ("v", None)),
        Layer("add", (6, 5), image, image),
        Layer("conv", (1,), image, image, ("k", None), (3, 3, 1, 1, 1, 1, 1, 1, 2)),
        Layer("add", (8, 7), image, image),
    )
    code, numel = encode(Program(image, made), {"w": 4, "b": 4, "v": 144, "k": 72})
    flat, x = signed(3, numel), torch.randn(5, *image).double()
    assert_close(
        grouped.population_logits(flat, x, code, True),
        reference.population_logits(flat, x, code, True),
    )
    code, _ = encode(Program(image, made[:2]), {})
    assert_close(
        grouped.population_logits(flat, x, code, True),
        reference.population_logits(flat, x, code, True),
    )


@pytest.mark.parametrize("networks", [0, 3])
@pytest.mark.parametrize("samples", [0, 3])
def test_batched_without_networks_or_samples(networks: int, samples: int) -> None:
    program, sizes = residual()
    code, numel = encode(program, sizes)
    for shared in (True, False):
        x = torch.randn(*(() if shared else (networks,)), samples, *program.taken).double()
        made = grouped.population_logits(signed(networks, numel), x, code, shared)
        assert made.shape == (networks, samples, 10)


def test_devices_without_kernels_are_batched_over_networks(monkeypatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("one network at a time")

    monkeypatch.setattr(reference, "run", refuse)
    program, sizes = residual()
    code, numel = encode(program, sizes)
    flat = torch.empty(3, numel, device="meta", requires_grad=True)
    x, classes = torch.empty(5, 3, 6, 5, device="meta"), torch.empty(5, dtype=int, device="meta")
    assert population_logits.reference(flat, x, code, True).shape == (3, 5, 10)
    assert training.population_loss.reference(flat, x, classes, code, True).shape == (3,)
    population_logits(flat, x, code, True).sum().backward()
    assert flat.grad.shape == flat.shape
