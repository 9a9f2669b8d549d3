"""Stacks of layers: memory, compilation, copies, parameters of each sample's own."""

import copy
import pickle
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, func, nn
from torch.utils._python_dispatch import TorchDispatchMode

from weightops import EquivariantPlan, WeightSpec, _load, equivariant_linear, testing
from weightops.nn import (
    UNF,
    EquivariantLinear,
    Featurize,
    InvariantPool,
    PositionalEncoding,
)
from weightops.testing.checks import _torch_warnings

DOUBLE = torch.float64
MLP = testing.mlp_spec(6, 5, 4, 3)
RNN = testing.rnn_spec(3, 4, 2)
X = torch.zeros(2, MLP.numel, 2)


def test_layers_of_a_stack_share_their_plan() -> None:
    first, second, third = UNF(RNN, [1, 2, 3, 4], terms=lambda term: True).layers
    assert first.plan is second.plan is third.plan
    assert EquivariantLinear(RNN, 1, 1).plan is not first.plan


def test_networks_with_parameters_of_their_own(generator: torch.Generator) -> None:
    torch.manual_seed(0)
    stacks = [UNF(RNN, [2, 3, 1], dtype=DOUBLE) for _ in range(4)]
    parameters, _ = func.stack_module_state(stacks)
    x = torch.randn(4, RNN.numel, 2, generator=generator, dtype=DOUBLE)
    expected = torch.cat([unf(one[None]) for unf, one in zip(stacks, x, strict=True)])
    given = func.functional_call(stacks[0], parameters, (x,))  # one call, no loop
    torch.testing.assert_close(given, expected)
    with torch.no_grad():
        mapped = func.vmap(lambda p, one: func.functional_call(stacks[0], p, (one[None],)))
        torch.testing.assert_close(mapped(parameters, x)[:, 0], expected)


class Held(TorchDispatchMode):
    """The most tensors of one size that were alive at once behind an op."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel, self.alive, self.most = numel, {}, 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = op(*args, **(kwargs or {}))
        for each in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(each, Tensor) and each.untyped_storage().nbytes() >= 4 * self.numel:
                key = each.untyped_storage()._cdata
                self.alive.setdefault(key, []).append(weakref.ref(each))
        self.alive = {k: v for k, v in self.alive.items() if any(r() is not None for r in v)}
        self.most = max(self.most, len(self.alive))
        return out


@pytest.mark.parametrize(
    ("activation", "norm", "most"), [("gelu", False, 2), ("gelu", True, 2), ("relu", False, 1)]
)
def test_inference_holds_two_features_and_overwrites_nothing_of_the_callers(
    activation: str, norm: bool, most: int
) -> None:
    torch.manual_seed(0)
    unf = UNF(MLP, [3, 3, 3, 3, 3], activation, norm=norm).eval()
    x = torch.randn(4, MLP.numel, 3)
    kept = x.clone()
    expected = unf(x)
    seen: list[Tensor] = []
    with torch.no_grad():
        with Held(x.numel()) as held:
            y = unf(x)
        torch.testing.assert_close(y, expected)
        hook = unf.layers[0].register_forward_hook(lambda m, i, out: seen.append(out))
        torch.testing.assert_close(unf(x), expected)
        torch.testing.assert_close(seen[0], unf.layers[0](x))
        hook.remove()
    assert held.most == most  # besides the input, which no op made
    assert torch.equal(x, kept)


PEAK = """
import torch
from weightops import testing
from weightops.nn import UNF


def megabytes(what):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(what))

torch.set_num_threads(2)
unf = UNF(testing.WEIGHT_SPACES["mlp"](), [16] * 4)
x = torch.ones(8, unf.spec.numel, 16)
with torch.no_grad():
    unf(x[:1, :, :])
    before = megabytes("VmRSS")
    y = unf(x)
print((megabytes("VmHWM") - before) / (4 * y.numel() / 2**20))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.skipif(not _load.has_kernel("equivariant_stack", "cpu"), reason="needs the kernel")
def test_a_stacks_peak_memory_is_below_two_features() -> None:
    features = float(subprocess.check_output([sys.executable, "-c", PEAK], text=True))
    assert 0.9 < features < 2, features


class Called(TorchDispatchMode):
    """The library's ops that were called."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op.namespace == "weightops":
            self.ops.append(op.__name__.split(".")[0])
        return op(*args, **(kwargs or {}))


def called(unf: UNF, x: Tensor) -> tuple[Tensor, list[str]]:
    with Called() as mode:
        y = unf(x)
    return y, mode.ops


@pytest.mark.parametrize("invariant", [False, True])
def test_layers_with_relu_alone_between_are_one_op_without_gradients(invariant: bool) -> None:
    torch.manual_seed(0)
    unf = UNF(RNN, [3, 4, 17, 2], invariant=invariant, dtype=DOUBLE, dropout=0.5).eval()
    x = torch.randn(3, RNN.numel, 3, dtype=DOUBLE)
    pooled = ["equivariant_backward"] * invariant  # whose sums the pool takes
    expected, ops = called(unf, x)
    assert ops == ["equivariant_linear"] * 3 + pooled
    with torch.no_grad():
        y, ops = called(unf, x)
        assert ops == ["equivariant_stack", *pooled]
        torch.testing.assert_close(y, expected)
    frozen = copy.deepcopy(unf).requires_grad_(False)
    assert called(frozen, x)[1] == ["equivariant_stack", *pooled]
    assert called(frozen, x.clone().requires_grad_())[1] == ["equivariant_linear"] * 3 + pooled


def test_layers_that_somebody_watches_or_changed_are_called_one_by_one() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, RNN.numel, 2)

    class Own(EquivariantLinear):
        def forward(self, x: Tensor) -> Tensor:
            return -super().forward(x)

    def stack(*args: Any, **options: Any) -> UNF:
        return UNF(RNN, [2, 3, 3], *args, **options)

    changed, bare, hooked = stack(), stack(), stack()
    changed.layers[1] = Own(RNN, 3, 3)
    bare.layers[0].register_parameter("bias", None)
    seen: list[Tensor] = []
    hooked.layers[0].register_forward_hook(lambda m, i, out: seen.append(out))
    others = [stack("silu"), stack(nn.ReLU()), stack(norm=True), stack(rank=1), stack(dropout=0.5)]
    with torch.no_grad():
        for unf in (changed, bare, hooked, *others):
            ops = called(unf, x)[1]
            assert set(ops) == {"equivariant_linear"}
        between = changed.layers[0](x).relu()
        torch.testing.assert_close(changed(x), changed.layers[1](between))
    assert seen[0].min() < 0
    hooked(x)
    assert seen[1].min() < 0


@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_training_keeps_a_feature_a_layer(activation: str) -> None:
    torch.manual_seed(0)
    unf = UNF(MLP, [3, 3, 3, 3, 3], activation, dtype=DOUBLE)
    watched = copy.deepcopy(unf)
    for layer in watched.layers:
        layer.register_full_backward_hook(lambda *_: None)
    x = torch.randn(4, MLP.numel, 3, dtype=DOUBLE)
    with Held(2 * x.numel()) as held:
        y = unf(x)
    assert held.most == 4
    x.requires_grad_()  # as the hooks would have it
    gradients = [
        torch.autograd.grad(each(x).pow(2).sum(), list(each.parameters()))
        for each in (unf, watched)
    ]
    torch.testing.assert_close(*gradients)
    torch.testing.assert_close(y, watched(x))
    small = UNF(testing.labelled_mlp_spec(2, 3), [1, 2, 1], activation, dtype=DOUBLE)
    x = torch.randn(2, small.spec.numel, 1, dtype=DOUBLE, requires_grad=True)
    torch.autograd.gradgradcheck(small, (x,))


def test_a_compiled_stack_without_gradients_is_one_op() -> None:
    torch.manual_seed(0)
    unf, x = UNF(MLP, [2, 3, 3]), torch.randn(3, MLP.numel, 2)
    graphs: list[str] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph.code)
        return graph.forward

    torch._dynamo.reset()
    with torch.no_grad(), _torch_warnings():
        compiled = torch.compile(unf, backend=backend, fullgraph=True)
        torch.testing.assert_close(compiled(x), unf(x))
    assert len(graphs) == 1
    assert graphs[0].count("weightops.equivariant") == 1


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_stack_is_one_graph(backend: str) -> None:
    torch.manual_seed(0)
    # Inductor takes seconds for every kernel that it writes.
    unf = UNF(MLP, [2, 3, 3], norm=backend == "aot_eager", rank=2, out_features=2)
    x = torch.randn(3, MLP.numel, 2)
    torch._dynamo.reset()
    with _torch_warnings():
        compiled = torch.compile(unf, backend=backend, fullgraph=True)
        y = compiled(x)
        torch.testing.assert_close(y, unf(x))
        y.sum().backward()
        if backend == "aot_eager":
            with torch.no_grad():
                torch.testing.assert_close(compiled(x), unf(x))
    assert all(p.grad is not None for p in unf.parameters())


def model(rank: int | None) -> nn.Sequential:
    featurize = Featurize(RNN, embedding="gaussian", size=2)
    unf = UNF(RNN, [5, 4, 1], nn.PReLU(), norm=True, rank=rank, out_features=3)
    return nn.Sequential(featurize, PositionalEncoding(RNN, 5), unf)


@pytest.mark.parametrize("rank", [None, 2])
def test_modules_are_saved_copied_and_pickled(rank: int | None) -> None:
    torch.manual_seed(0)
    first, other = model(rank), model(rank)
    x = torch.randn(2, RNN.numel, 1)
    assert not torch.equal(other(x), first(x))
    other.load_state_dict(first.state_dict())
    for same in (other, copy.deepcopy(first), pickle.loads(pickle.dumps(first))):
        assert torch.equal(same(x), first(x))


@pytest.mark.parametrize("rank", [None, 2])
def test_parameters_travel_through_safetensors(rank: int | None, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    torch.manual_seed(0)
    first, other = model(rank), model(rank)
    safetensors.save_file(first.state_dict(), tmp_path / "unf.safetensors")
    other.load_state_dict(safetensors.load_file(tmp_path / "unf.safetensors"))
    x = torch.randn(2, RNN.numel, 1)
    assert torch.equal(other(x), first(x))


def test_empty_batches_and_weight_spaces() -> None:
    for spec in (MLP, WeightSpec({}, {}), WeightSpec({"w": ("h",), "s": ()}, {"w": (0,), "s": ()})):
        for batch in (0, 2):
            x = torch.zeros(batch, spec.numel, 2)
            for rank in (None, 1):
                unf = UNF(spec, [2, 3, 4], norm=True, rank=rank)
                assert unf(x).shape == (batch, spec.numel, 4)
                with torch.no_grad():
                    assert unf(x).isfinite().all()
            assert PositionalEncoding(spec, 2)(x).shape == x.shape
            assert Featurize(spec, 2)(x).shape == x.shape
            pool = InvariantPool(spec)
            assert pool(x).shape == (batch, pool.out_features(2))


def test_the_op_takes_a_layers_parameters() -> None:
    layer = EquivariantLinear(MLP, 2, 1)
    assert isinstance(layer.plan, EquivariantPlan)
    assert torch.equal(equivariant_linear(X, layer.theta, layer.bias, layer.plan), layer(X))
