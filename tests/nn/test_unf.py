"""Stacks of layers: memory, compilation, copies, parameters of each sample's own."""

import copy
import pickle
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, func, nn
from torch.utils._python_dispatch import TorchDispatchMode

from weightops import EquivariantPlan, WeightSpec, equivariant_linear, testing
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


@pytest.mark.parametrize("norm", [False, True])
def test_inference_holds_two_features_and_overwrites_nothing_of_the_callers(norm: bool) -> None:
    torch.manual_seed(0)
    unf = UNF(MLP, [3, 3, 3, 3, 3], "gelu", norm=norm).eval()
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
    assert held.most == 2  # besides the input, which no op made
    assert torch.equal(x, kept)


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
