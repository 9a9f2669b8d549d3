"""Learned matching: it undoes a permutation, never ends above weight matching, and says where it is."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import weightops
from weightops import align, testing
from weightops.align.learned import match_sinkhorn, match_straight_through, mix, sinkhorn

METHODS = [match_straight_through, match_sinkhorn]
NORM = ("weight", "bias", "running_mean", "running_var")


class MLP(nn.Module):
    def __init__(self, *widths: int) -> None:
        super().__init__()
        for i, (a, b) in enumerate(pairwise(widths), 1):
            setattr(self, f"fc{i}", nn.Linear(a, b))

    def forward(self, x: Tensor) -> Tensor:
        *hidden, last = self.children()
        for layer in hidden:
            x = layer(x).relu()
        return last(x)


class Attention(nn.Module):
    """Batch norm, a fused projection given by parts, two heads, tied embedding, a recurrent layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm = nn.Embedding(7, 8), nn.BatchNorm1d(8)
        self.qkv, self.out = nn.Linear(8, 24, bias=False), nn.Linear(8, 8)
        self.rnn, self.head = nn.LSTM(8, 8, batch_first=True), nn.Linear(8, 7, bias=False)
        self.back = nn.Linear(8, 8)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.embedding(tokens).mT).mT
        q, k, v = (each.unflatten(-1, (2, 4)) for each in self.qkv(x).chunk(3, -1))
        weights = torch.einsum("bthd,bshd->bhts", q, k).softmax(-1)
        x = x + self.out(torch.einsum("bhts,bshd->bthd", weights, v).flatten(2))
        return self.head(x + self.back(self.rnn(x)[0]))[:, -1]

    @staticmethod
    def spec() -> weightops.WeightSpec:
        qk, v = ("head", "qk"), ("head", "v")
        axes: dict[str, tuple] = {
            "embedding.weight": (None, "d"),
            **{f"norm.{name}": ("d",) for name in NORM},
            "qkv.weight[0:8]": (qk, "d"),
            "qkv.weight[8:16]": (qk, "d"),
            "qkv.weight[16:24]": (v, "d"),
            "out.weight": ("d", v),
            "out.bias": ("d",),
            "rnn.weight_ih_l0": ((None, "h"), "d"),
            "rnn.weight_hh_l0": ((None, "h"), "h"),
            "rnn.bias_ih_l0": ((None, "h"),),
            "rnn.bias_hh_l0": ((None, "h"),),
            "back.weight": ("d", "h"),
            "back.bias": ("d",),
        }
        state = Attention().state_dict()
        shapes = {name: (8, 8) if "[" in name else tuple(state[name].shape) for name in axes}
        return weightops.WeightSpec(axes, shapes, sizes={"head": 2, "qk": 4, "v": 4})


def digits() -> tuple[Tensor, Tensor]:
    x, y = (torch.from_numpy(each) for each in load_digits(return_X_y=True))
    return x.float() / 16, y


def trained(width: int, networks: int) -> Tensor:
    x, y = digits()
    rows = []
    for seed in range(networks):
        torch.manual_seed(seed)
        model = MLP(64, width, width, 10)
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        for _ in range(60):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        rows.append(testing.mlp_spec(64, width, width, 10).flatten(model)[0].detach())
    return torch.stack(rows)


def midpoints(
    spec: weightops.WeightSpec, model: nn.Module, flat: Tensor, perms: dict[str, Tensor]
) -> Tensor:
    x, y = digits()
    rows = (weightops.permute(flat[1:], perms, spec) + flat[0]) / 2
    with torch.no_grad():
        losses = [nn.functional.cross_entropy(spec.load_(model, row)(x), y) for row in rows]
    return torch.stack(losses).double()


@pytest.mark.parametrize("method", METHODS)
def test_learned_matching_ends_below_weight_matching(method: Callable) -> None:
    flat, model, spec = trained(32, 3), MLP(64, 32, 32, 10), testing.mlp_spec(64, 32, 32, 10)
    weight = midpoints(spec, model, flat, align.match(spec, flat[0], flat[1:]).perms)
    naive = midpoints(spec, model, flat, {})
    perms, history = method(
        spec, flat[0], flat[1:], model, *digits(), steps=40, batch_size=600, progress=False
    )
    reached = midpoints(spec, model, flat, perms)
    assert (weight < naive).all()
    assert (reached <= weight).all()
    assert (reached < 0.9 * weight).any()
    assert history.shape == (41, 2)
    torch.testing.assert_close(history[0], weight, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(history.amin(0), reached, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_a_poor_training_leaves_the_weight_matching(method: Callable) -> None:
    flat, model, spec = trained(16, 2), MLP(64, 16, 16, 10), testing.mlp_spec(64, 16, 16, 10)
    expected = align.match(spec, flat[0], flat[1:]).perms
    perms, _ = method(
        spec, flat[0], flat[1:], model, *digits(), steps=3, learning_rate=1e-9, progress=False
    )
    assert all(torch.equal(perms[label], p) for label, p in expected.items())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("batch_size", [50, 2])
def test_shuffled_copies_are_recovered_exactly(method: Callable, batch_size: int) -> None:
    torch.manual_seed(0)
    model, spec = Attention(), Attention.spec()
    tokens, targets = torch.randint(7, (25, 5)), torch.randint(7, (25,))
    flat = spec.flatten(model).detach()
    flat = flat + 0.1 * torch.rand(flat.shape)
    hidden = spec.random_permutations(2, torch.Generator().manual_seed(1))
    shuffled = weightops.permute(flat.expand(2, -1), hidden, spec)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    # Random targets may well be met better by another permutation: training must not get there.
    options = {"steps": 4, "learning_rate": 1e-4, "batch_size": batch_size}
    perms, history = method(spec, flat[0], shuffled, model, tokens, targets, **options)
    assert all(torch.equal(perms[label], p) for label, p in spec.invert(hidden).items())
    torch.testing.assert_close(history[0, 0], history[0, 1], rtol=1e-5, atol=1e-6)
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("method", METHODS)
def test_deterministic_under_a_seed_and_without_gradients_of_the_caller(method: Callable) -> None:
    flat, spec = trained(16, 2), testing.mlp_spec(64, 16, 16, 10)
    model = MLP(64, 16, 16, 10)
    options = {"steps": 8, "batch_size": 100, "seed": 3, "learning_rate": 0.3}
    with torch.no_grad():
        first = method(spec, flat[0], flat[1:], model, *digits(), **options)
    flat.requires_grad_()
    second = method(spec, flat[0], flat[1:], model, *digits(), **options)
    assert torch.equal(first[1], second[1])
    assert all(torch.equal(p, second[0][label]) for label, p in first[0].items())
    assert flat.grad is None
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_another_loss_and_several_inputs(method: Callable) -> None:
    torch.manual_seed(2)
    model = nn.Bilinear(3, 4, 5)
    spec = weightops.WeightSpec(
        {"weight": ("h", None, None), "bias": ("h",)}, {"weight": (5, 3, 4), "bias": (5,)}
    )
    flat = spec.flatten([model, nn.Bilinear(3, 4, 5)]).detach()
    inputs, targets = (torch.randn(30, 3), torch.randn(30, 4)), torch.randn(30, 5)
    mean_square = nn.functional.mse_loss
    perms, history = method(
        spec, flat[0], flat[1:], model, inputs, targets, steps=20, loss=mean_square
    )
    middle = (flat[:1] + weightops.permute(flat[1:], perms, spec)) / 2
    expected = mean_square(spec.load_(model, middle[0])(*inputs), targets)
    assert history.amin().item() == pytest.approx(expected.item(), rel=1e-5)
    assert history.amin() < history[0]


def test_sinkhorn_matrices_are_doubly_stochastic_and_differentiable() -> None:
    logits = torch.randn(3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    matrices = sinkhorn(logits)
    for axis in (1, 2):
        torch.testing.assert_close(
            matrices.sum(axis), torch.ones(3, 6, dtype=torch.float64), rtol=0, atol=1e-4
        )
    assert (matrices > 0).all()
    torch.autograd.gradcheck(sinkhorn, logits[:1, :3, :3].clone().requires_grad_())


def test_mixing_by_permutation_matrices_is_permuting() -> None:
    generator = torch.Generator().manual_seed(4)
    for spec in (Attention.spec(), *(testing.random_spec(generator) for _ in range(10))):
        flat = torch.randn(3, spec.numel, generator=generator)
        perms = spec.random_permutations(3, generator)
        soft = {
            label: nn.functional.one_hot(p, spec.labels[label]).to(flat)
            for label, p in perms.items()
        }
        torch.testing.assert_close(
            mix(flat, soft, spec), weightops.permute(flat, perms, spec), rtol=0, atol=0
        )


@pytest.mark.parametrize("method", METHODS)
def test_straying_weights_are_an_error(method: Callable) -> None:
    flat, spec = trained(16, 2), testing.mlp_spec(64, 16, 16, 10)
    x, y = digits()
    x[5] = torch.nan
    with pytest.raises(ValueError, match="match: the loss is nan at step 0; a lower learning_rate"):
        method(spec, flat[0], flat[1:], MLP(64, 16, 16, 10), x, y, batch_size=2000)


ROW = testing.mlp_spec(3, 4, 2).flatten(MLP(3, 4, 2)).detach()
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"model": 3}, TypeError, "match: model must be a module, not int 3"),
    ({"inputs": torch.zeros(0, 3)}, ValueError, "match: inputs must hold examples"),
    ({"targets": [1]}, TypeError, r"match: targets must be a tensor \[B, ...\], not list"),
    (
        {"targets": torch.zeros(4)},
        ValueError,
        "match: targets has length 4, but the batch of inputs has size 6",
    ),
    ({"targets": torch.tensor(1)}, ValueError, "match: targets has length 0"),
    ({"loss": "mse"}, TypeError, "match: loss must be a function, not str 'mse'"),
    ({"steps": 0}, ValueError, "match: steps must be at least 1, not 0"),
    ({"steps": True}, TypeError, "match: steps must be an integer"),
    ({"learning_rate": -1.0}, ValueError, "match: learning_rate must be in"),
    ({"learning_rate": "1"}, TypeError, "match: learning_rate must be a number"),
    ({"batch_size": 0}, ValueError, "match: batch_size must be at least 1, not 0"),
]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("changes", "error", "message"), BAD)
def test_bad_input(
    method: Callable, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments: dict[str, Any] = {
        "model": MLP(3, 4, 2),
        "inputs": torch.zeros(6, 3),
        "targets": torch.zeros(6, dtype=torch.int64),
    }
    with pytest.raises(error, match=message):
        method(testing.mlp_spec(3, 4, 2), ROW[0], ROW, **(arguments | changes))


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_too_small_for_batch_norm_is_an_error(method: Callable) -> None:
    model, spec = Attention(), Attention.spec()
    flat = spec.flatten(model).detach()
    tokens, targets = torch.randint(7, (25, 5)), torch.randint(7, (25,))
    with pytest.raises(ValueError, match="batch norm needs batches of at least 2 inputs"):
        method(spec, flat[0], flat, model, tokens, targets, batch_size=1)
