"""equivariant_linear against its definition term by term, types grouped in torch, and nfn."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from math import prod

import pytest
import torch
from nfn.common import ArraySpec, NetworkSpec, WeightSpaceFeatures
from nfn.layers import NPLinear
from torch import Tensor

import weightops
from weightops.nn import UNF
from weightops.ops.equivariant import equivariant_stack, grouped, reference
from weightops.ops.equivariant.plan import code_of
from weightops.testing import WEIGHT_SPACES, Equivariant

SPACES = tuple(WEIGHT_SPACES)
LAYERS = [
    *(Equivariant(space, 8, c, c) for space in SPACES for c in (16, 32)),
    *(Equivariant(space, 32) for space in SPACES if space != "gru"),
    *(Equivariant(space, 1) for space in SPACES),
    *(Equivariant(space, 8, 1, 16) for space in SPACES),
]
STACKS = [
    *(Equivariant(space) for space in SPACES if space != "gru"),
    Equivariant("mlp", 8, 32, 32),
]
PEERS = ("copy_", "by-type", "per-term", "per-term-compiled", "nfn")
PASSES = ("forward", "forward+backward")


def by_type(x: Tensor, theta: Tensor, bias: Tensor, problem: Equivariant) -> Tensor:
    return grouped.linear(x, theta[None], bias[None], code_of(problem.plan))


def per_term(x: Tensor, theta: Tensor, bias: Tensor, problem: Equivariant) -> Tensor:
    return reference.per_term(x, theta, bias, problem.plan)


def nfn_layer(problem: Equivariant, x: Tensor) -> tuple[Callable, list[Tensor]]:
    """nfn's layer on the same networks, channels first as it wants them, and its parameters."""
    views = problem.plan.spec.unflatten(x.movedim(-1, 1))
    tensors = [view.contiguous() for view in views.values()]
    weights, biases = tensors[::2], tensors[1::2]
    spec = NetworkSpec(
        [ArraySpec(tuple(w.shape[2:])) for w in weights],
        [ArraySpec(tuple(b.shape[2:])) for b in biases],
    )
    layer = NPLinear(spec, problem.in_channels, problem.out_channels)
    return lambda: layer(WeightSpaceFeatures(weights, biases)), [*tensors, *layer.parameters()]


@pytest.mark.parametrize("implementation", ["weightops", *PEERS])
@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("problem", LAYERS, ids=str)
def test_layer(problem: Equivariant, passes: str, implementation: str, measure, benchmark) -> None:
    benchmark.group = f"equivariant {problem} {passes}"
    backward = passes != "forward"
    peer = implementation != "weightops"
    if peer and (problem.batch != 8 or problem.in_channels != 16) and implementation != "copy_":
        pytest.skip("peers are compared at 16 channels and 8 networks")
    if implementation == "nfn" and problem.space not in ("mlp", "cnn"):
        pytest.skip("nfn knows MLPs and CNNs")
    if implementation == "per-term-compiled" and (backward or problem.space not in ("mlp", "rnn")):
        pytest.skip("compiling takes minutes")
    if implementation == "per-term" and backward and problem.space in ("gru", "transformer"):
        pytest.skip("what it saves for its gradient takes 120 and 12 GB")
    x, theta, bias = problem.make()
    if implementation == "copy_":
        if backward or problem.in_channels != problem.out_channels:
            pytest.skip("the floor of these is counted, not copied")
        out = torch.empty_like(x)
        measure(lambda: out.copy_(x), problem.bytes)
        return
    leaves = [x, theta, bias]
    if implementation == "nfn":
        run, leaves = nfn_layer(problem, x)
    elif implementation == "weightops":
        run = lambda: weightops.equivariant_linear(x, theta, bias, problem.plan)  # noqa: E731
    else:
        f = by_type if implementation == "by-type" else per_term
        if implementation.endswith("compiled"):
            torch._dynamo.reset()
            f = torch.compile(f)
        run = lambda: f(x, theta, bias, problem)  # noqa: E731
    for leaf in leaves:
        leaf.requires_grad_(backward)
    # A floor is what no layer can go without: x read and y written once, then three streams more.
    work = {
        "bytes_moved": int(problem.bytes * (2.5 if backward else 1)),
        "flops": problem.flops * (3 if backward else 1),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the compiler says of the definition it traces
        y = run()
    if implementation not in ("weightops", "nfn"):
        ours = weightops.equivariant_linear(x, theta, bias, problem.plan)
        torch.testing.assert_close(y, ours, rtol=1e-3, atol=1e-3)
    if not backward:
        with torch.no_grad():
            measure(run, **work)
        return
    outs = [y] if isinstance(y, Tensor) else [*y.weights, *y.biases]
    grads = [torch.ones_like(out) for out in outs]

    def both() -> None:
        y = run()
        outs = [y] if isinstance(y, Tensor) else [*y.weights, *y.biases]
        torch.autograd.grad(outs, leaves, grads)

    measure(both, **work)


@pytest.mark.parametrize("implementation", ["weightops-products"])
@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize(
    "problem", [each for each in LAYERS if each.batch > 1 and each.in_channels > 1], ids=str
)
def test_products(
    problem: Equivariant, passes: str, implementation: str, measure, benchmark
) -> None:
    """What a layer can't go without, by the best of matrix products: those of its types, on operands that
    are there already, and the read of its features that all sums need before the first write."""
    benchmark.group = f"equivariant {problem} {passes}"
    x = problem.make()[0]
    types = []
    for each in problem.plan.types:
        rows, readers, writers = prod(each.sizes), len(each.readers), len(each.writers)
        if readers and writers and rows * readers * writers > 1000:
            n, k, m = (
                problem.batch * rows,
                readers * problem.in_channels,
                writers * problem.out_channels,
            )
            types.append([torch.randn(n, k), torch.randn(k, m), torch.randn(n, m)])
    outs = [[torch.empty_like(each) for each in operands] for operands in types]

    def run() -> None:
        for (a, b, y), (to_a, to_b, to_y) in zip(types, outs, strict=True):
            torch.mm(a, b, out=to_y)
            if passes != "forward":
                torch.mm(y, b.T, out=to_a)
                torch.mm(a.T, y, out=to_b)
        for _ in range(1 if passes == "forward" else 2):
            x.view(-1).sum()

    measure(run)


def stack_name(problem: Equivariant) -> str:
    return f"{problem.space} {'->'.join([str(problem.in_channels)] * 4)} B={problem.batch}"


@pytest.mark.parametrize("implementation", ["weightops", "singly"])
@pytest.mark.parametrize("problem", STACKS, ids=str)
def test_stack(problem: Equivariant, implementation: str, measure, benchmark) -> None:
    """Three layers with relu between, as one op and as five."""
    benchmark.group = f"equivariant stack {stack_name(problem)}"
    x = problem.make()[0]
    theta, bias = zip(*(problem.make(seed=n)[1:] for n in range(3)), strict=True)

    def singly() -> Tensor:
        y = x
        for n in range(3):
            y = weightops.equivariant_linear(y, theta[n], bias[n], problem.plan)
            y = torch.relu(y) if n < 2 else y
        return y

    def stack() -> Tensor:
        return equivariant_stack(x, theta, bias, problem.plan)

    with torch.no_grad():
        torch.testing.assert_close(stack(), singly(), rtol=1e-3, atol=1e-3)
        run = stack if implementation == "weightops" else singly
        measure(run, problem.bytes, 3 * problem.flops)


@pytest.mark.parametrize("problem", STACKS, ids=str)
def test_training_step(problem: Equivariant, measure, benchmark) -> None:
    benchmark.group = f"equivariant UNF {stack_name(problem)} forward+backward"
    unf = UNF(problem.plan.spec, [problem.in_channels] * 4)
    x = problem.make()[0].requires_grad_()
    leaves, grad = [x, *unf.parameters()], torch.ones_like(x)
    measure(lambda: torch.autograd.grad(unf(x), leaves, grad))


@pytest.mark.parametrize("implementation", ["weightops", "shared-theta", "python-loop"])
def test_functional(implementation: str, measure, benchmark) -> None:
    """Thirty-two particles of a learned optimizer: three layers a weight, then one over the network."""
    benchmark.group = "equivariant 32 particles"
    plan = weightops.EquivariantPlan(weightops.testing.labelled_mlp_spec(64, 32, 10))
    x = torch.randn(32, plan.spec.numel, 19)
    pointwise = [torch.randn(32, c, 32) / c**0.5 for c in (19, 32, 32)]
    theta = torch.randn(32, plan.num_terms, 32, 1)
    bias = torch.randn(32, plan.num_biases, 1)

    def functional(x: Tensor, weights: list[Tensor], theta: Tensor, bias: Tensor) -> Tensor:
        for weight in weights:
            x = torch.relu_(x @ weight)
        return weightops.equivariant_linear(x, theta, bias, plan)

    def loop() -> None:
        for i in range(32):
            y = x[i : i + 1]
            for weight in pointwise:
                y = torch.relu_(y @ weight[i])
            reference.per_term(y, theta[i], bias[i], plan)

    shared = [weight[0] for weight in pointwise]
    run = {
        "weightops": lambda: functional(x, pointwise, theta, bias),
        "shared-theta": lambda: functional(x, shared, theta[0], bias[0]),
        "python-loop": loop,
    }[implementation]
    with torch.no_grad():
        measure(run)


@pytest.mark.parametrize("space", ["mlp 64-32-10", "cnn 1-16-32", "rnn 32-128-32"])
def test_particles(space: str, measure, benchmark) -> None:
    """The last layer of a learned optimizer, 32 features to one, with each particle's own theta."""
    benchmark.group = f"equivariant {space} 32->1, 32 particles"
    spec = {
        "mlp 64-32-10": weightops.testing.labelled_mlp_spec(64, 32, 10),
        "cnn 1-16-32": weightops.testing.cnn_spec(1, 16, 32),
        "rnn 32-128-32": weightops.testing.rnn_spec(),
    }[space]
    plan = weightops.EquivariantPlan(spec)
    x = torch.randn(32, spec.numel, 32)
    theta = torch.randn(32, plan.num_terms, 32, 1)
    bias = torch.randn(32, plan.num_biases, 1)
    run = lambda: weightops.equivariant_linear(x, theta, bias, plan)  # noqa: E731
    measure(run, 32 * spec.numel * 33 * 4)


def test_call(measure, benchmark) -> None:
    """One call on a small network: 2,410 weights."""
    benchmark.group = "equivariant call"
    plan = weightops.EquivariantPlan(weightops.testing.labelled_mlp_spec(64, 32, 10))
    x, theta = torch.randn(1, plan.spec.numel, 16), torch.randn(plan.num_terms, 16, 16)
    bias = torch.randn(plan.num_biases, 16)
    measure(lambda: weightops.equivariant_linear(x, theta, bias, plan))
