"""Layers on weight manifolds, and networks synthesised from their bases, against what torch has today."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from itertools import product

import manifold_peers as peers
import memory
import pytest
import torch
import torch.nn.functional as F
from timing import matmul_precision
from torch import Tensor

import weightops
from weightops.testing import ManifoldConv, ManifoldLinear, Synthesize

Problem = ManifoldLinear | ManifoldConv

PASSES = ("forward", "forward+backward")
OURS = ("weightops", "weightops-high", "weightops-medium")
# The others do what one of these does, and copy besides.
AT_MEDIUM = ("medium-matmuls", "medium-scaled-matmuls", "medium-concatenated", "medium-wide")
LAYERS = [
    ManifoldLinear("per-sample", batch, n, n) for n in (256, 1024) for batch in (32, 512, 4096)
]
HALF = ManifoldLinear("per-sample", 512, 1024, 1024, dtype=torch.bfloat16)
ONE_ROW = ManifoldLinear("per-sample", 1, 1024, 1024, bases=9)
PER_SAMPLE = [
    *product(LAYERS, PASSES, (*OURS, *peers.LINEAR, *AT_MEDIUM)),
    *product((HALF, ONE_ROW), ("forward",), ("weightops", *peers.LINEAR)),
]
GROUPED = [
    ManifoldLinear("grouped", 4096, 1024, 1024),
    ManifoldLinear("grouped", 512, 256, 256),
]
CONTEXTS = (
    "weightops",
    "weightops-medium",
    *peers.LINEAR,
    *peers.LOOPS,
    "medium-loop",
    "medium-loop-sorted",
)
NETWORK = Synthesize(25_600_000)
IN_PLACE = ("mul-add", "mul-add-in-chunks", "foreach", "matmul")
STEP = 1e-2
# Weights for every sample are tried up to here.
MOST_BYTES = 2**28
# How far results may lie from ours in float32, in units of their root mean square.
TOLERANCES = {"highest": 1e-4, "high": 1e-3, "medium": 0.1}


def precision_of(implementation: str) -> str:
    return next((each for each in ("high", "medium") if each in implementation), "highest")


def assert_near(given: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> None:
    for each, wanted in zip(given, expected, strict=True):
        far = tolerance * wanted.float().square().mean().sqrt().item()
        torch.testing.assert_close(each, wanted, rtol=0, atol=far)


def call_of(
    problem: Problem, passes: str, f: Callable[..., Tensor], leaves: Sequence[Tensor]
) -> Callable[[], tuple[Tensor, ...]]:
    if passes == "forward":
        return lambda: (f(*leaves),)
    return peers.with_gradients(f, leaves, problem.outputs)


def work(problem: Problem, passes: str) -> dict:
    """Of a floor: the backward has two products as large as the forward's."""
    backward = passes != "forward"
    return {
        "bytes_moved": problem.bytes + backward * problem.backward_bytes,
        "flops": problem.flops * (3 if backward else 1),
        "dtype": problem.dtype,
    }


def skip_if_large(name: str, problem: ManifoldLinear, weight: Tensor) -> None:
    if name == "bmm" and problem.batch * weight[0].nbytes > MOST_BYTES:
        pytest.skip("weights of every sample take more than 256 MiB")


def compare(
    measure: Callable,
    problem: Problem,
    passes: str,
    implementation: str,
    f: peers.Layer,
    ours: peers.Layer,
    leaves: Sequence[Tensor],
) -> None:
    """Times ``f`` at its precision, once it has given what ``ours`` gives at the highest."""
    x, coeffs, weight = leaves
    precision = precision_of(implementation)
    half = problem.dtype != torch.float32
    prepare = partial(peers.prepared, implementation)
    call = call_of(problem, passes, f, [x, coeffs, prepare(weight)])
    with torch.set_grad_enabled(passes != "forward"):
        expected = list(call_of(problem, passes, ours, [x, coeffs, weight])())
        expected[3:] = map(prepare, expected[3:])
        with matmul_precision(precision):
            assert_near(call(), expected, TOLERANCES["medium" if half else precision])
            del expected
            measure(call, **work(problem, passes))


@pytest.mark.parametrize(("problem", "passes", "implementation"), PER_SAMPLE, ids=str)
def test_per_sample(
    problem: ManifoldLinear, passes: str, implementation: str, measure, benchmark, device
) -> None:
    benchmark.group = f"manifold {problem} {passes}"
    x, coeffs, weight, _, _ = problem.make(device)
    name = implementation.removeprefix("medium-")
    skip_if_large(name, problem, weight)
    f = peers.LINEAR.get(name, weightops.manifold_linear)
    leaves = [x, coeffs, weight]
    compare(measure, problem, passes, implementation, f, weightops.manifold_linear, leaves)


@pytest.mark.parametrize("implementation", ["read-amax", "read-sum", "read-dot"])
def test_reading_the_bases(implementation: str, measure, benchmark, device) -> None:
    """Reading all bases as fast as torch can: the floor of a layer of one row."""
    benchmark.group = f"manifold {ONE_ROW} forward"
    weight = ONE_ROW.make(device)[2].flatten()
    half = weight.numel() // 2
    f = {
        "read-amax": lambda: torch.amax(weight),
        "read-sum": lambda: torch.sum(weight),
        "read-dot": lambda: torch.dot(weight[:half], weight[half:]),
    }[implementation]
    measure(f)


@pytest.mark.parametrize("implementation", CONTEXTS)
@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("problem", GROUPED, ids=str)
def test_grouped(
    problem: ManifoldLinear, passes: str, implementation: str, measure, benchmark, device
) -> None:
    benchmark.group = f"manifold {problem} {passes}"
    x, coeffs, weight, _, index = problem.make(device)
    name = implementation.removeprefix("medium-")
    skip_if_large(name, problem, weight)

    def ours(x: Tensor, coeffs: Tensor, weight: Tensor) -> Tensor:
        return weightops.manifold_linear(x, coeffs, weight, index=index)

    def peer(x: Tensor, coeffs: Tensor, weight: Tensor) -> Tensor:
        if name in peers.LOOPS:
            return peers.LOOPS[name](x, coeffs, weight, index)
        return peers.LINEAR[name](x, coeffs[index], weight)

    f = ours if name.startswith("weightops") else peer
    compare(measure, problem, passes, implementation, f, ours, [x, coeffs, weight])


@pytest.mark.parametrize("implementation", ["F.linear", "medium-F.linear"])
@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("problem", GROUPED, ids=str)
def test_one_context(
    problem: ManifoldLinear, passes: str, implementation: str, measure, benchmark, device
) -> None:
    """An ordinary layer of the same sizes."""
    benchmark.group = f"manifold {problem} {passes}"
    x, _, weight, _, _ = problem.make(device)
    call = call_of(problem, passes, F.linear, [x, weight[0].clone()])
    with (
        matmul_precision(precision_of(implementation)),
        torch.set_grad_enabled(passes != "forward"),
    ):
        measure(call)


@pytest.mark.parametrize("implementation", [*peers.CONVOLUTIONS])
@pytest.mark.parametrize("passes", PASSES)
def test_convolution(passes: str, implementation: str, measure, benchmark, device) -> None:
    if implementation == "condconv" and find_spec("timm") is None:
        pytest.skip("timm is not installed")
    problem = memory.PROBLEM
    benchmark.group = f"manifold conv {problem} {passes}"
    x, coeffs, weight, _, _ = problem.make(device)
    f, ours = (peers.CONVOLUTIONS[name](problem) for name in (implementation, "weightops"))
    compare(measure, problem, passes, implementation, f, ours, [x, coeffs, weight])
    benchmark.extra_info["extra_bytes"] = memory.extra_bytes(implementation, passes)


@pytest.mark.parametrize(
    "implementation", ["weightops", "copy_", "einsum", *IN_PLACE, "torch.compile"]
)
def test_synthesize(implementation: str, measure, benchmark, device) -> None:
    benchmark.group = f"manifold synthesize {NETWORK}"
    (coeffs,), bases = NETWORK.make(device)
    c = coeffs.tolist()
    out = torch.empty_like(bases[0])
    if implementation == "copy_":
        source = torch.ones(NETWORK.bytes // 8, device=device)
        target = torch.empty_like(source)
        measure(lambda: target.copy_(source), NETWORK.bytes)
        return
    f = {
        "weightops": lambda: weightops.synthesize(coeffs, bases, out=out),
        "einsum": lambda: torch.einsum("k,kp->p", coeffs, bases),
        "mul-add": lambda: peers.in_place(c, bases.unbind(), out),
        "mul-add-in-chunks": lambda: peers.in_chunks(c, bases, out),
        "foreach": lambda: peers.foreach(c, bases),
        "matmul": lambda: torch.mm(coeffs[None], bases, out=out[None])[0],
        "torch.compile": partial(peers.compiled(), coeffs, bases, out),
    }[implementation]
    given = f()
    given = given if isinstance(given, Tensor) else torch.cat(given)
    assert_near([given], [weightops.synthesize(coeffs, bases)], TOLERANCES["highest"])
    measure(f, NETWORK.bytes, NETWORK.flops)


@pytest.mark.parametrize("implementation", ["weightops", *peers.STEPS])
def test_step(implementation: str, measure, benchmark, device) -> None:
    """A network at one context, the gradients by its coefficients and bases, a preconditioned step."""
    benchmark.group = f"manifold step {NETWORK}"
    (coeffs,), bases = NETWORK.make(device)
    grad, out = torch.randn_like(bases[0]), torch.empty_like(bases[0])
    inverse_gram = torch.diag(torch.tensor([1.0, 2.0, 2.0], device=device))

    def ours(bases: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
        options = {"lr": STEP, "inverse_gram": inverse_gram}

        def step() -> tuple[Tensor, Tensor]:
            theta = weightops.synthesize(coeffs, bases, out=out)
            return theta, weightops.synthesize_update_(bases, grad, coeffs, **options)

        return step

    def peer(bases: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
        return peers.STEPS[implementation](bases, coeffs, grad, STEP, inverse_gram, out)

    results = []
    for make in (ours if implementation == "weightops" else peer, ours):
        stepped = bases.clone()
        call = make(stepped)
        theta, to_coeffs = call()
        results.append([theta.detach().clone(), stepped.detach(), to_coeffs])
    (*given, slope), (*wanted, expected) = results
    assert_near(given, wanted, TOLERANCES["highest"])
    # Sums of millions of products that nearly cancel.
    torch.testing.assert_close(slope, expected, rtol=0, atol=1e-6 * NETWORK.parameters)
    del results, given, wanted
    call = (ours if implementation == "weightops" else peer)(bases)
    measure(call, NETWORK.bytes + NETWORK.update_bytes, 3 * NETWORK.flops)
