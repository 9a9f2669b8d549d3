"""Populations through the public functions: what compiles, against the models themselves."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import weightops
import weightops.info
from weightops.population import explain, overlap, population_forward, population_loss


class Residual(nn.Module):
    """Every layer that a program has."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.batch = nn.BatchNorm2d(8)
        self.group = nn.GroupNorm(2, 8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding="same", groups=2, dilation=2, bias=False)
        self.conv3 = nn.Conv2d(8, 8, (3, 2), stride=2, padding=(1, 0))
        self.pool = nn.MaxPool2d(2, stride=1, padding=1)
        self.mean = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(8, 10, bias=False)
        self.layer = nn.LayerNorm(10)
        self.drop = nn.Dropout()

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.batch(self.conv1(x)))
        y = y + self.conv2(F.gelu(self.group(y), approximate="tanh"))
        y = self.pool(F.gelu(self.conv3(y)))
        y = y + F.silu(y)
        y = F.avg_pool2d(y, 2, 1, 1, count_include_pad=False)
        z = self.mean(y).flatten(1) + y.mean((2, 3)).view(y.shape[0], -1)
        return self.drop(torch.tanh(self.layer(self.linear(z))))


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        same = y.view(-1, 6)
        y.relu_()
        return self.b(same + y)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(20, 16), nn.SiLU(), nn.Linear(16, 4))


def recurrent() -> nn.Module:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.out = nn.GRU(3, 4, batch_first=True), nn.Linear(4, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.rnn(x)[0][:, -1])

    return Last()


def wide() -> nn.Module:
    return nn.Sequential(nn.Linear(260, 130), nn.ReLU(), nn.Linear(130, 4))


MODELS = {
    "wide": (wide, (260,)),
    "residual": (Residual, (3, 9, 8)),
    "mlp": (mlp, (4, 5)),
    "in place": (InPlace, (6,)),
    "recurrent": (recurrent, (7, 3)),
}
COMPILED = [name for name in MODELS if name != "recurrent"]


def population(name: str, n: int = 3) -> tuple[list[nn.Module], tuple[int, ...]]:
    make, shape = MODELS[name]
    torch.manual_seed(0)
    models = [make().double().eval() for _ in range(n)]
    for model in models:
        for key, value in model.state_dict().items():
            if "running" in key:
                value.uniform_(0.5, 2)
    return models, shape


@pytest.mark.parametrize("name", MODELS)
def test_outputs_are_the_models_own_on_shared_and_own_samples(name: str) -> None:
    models, shape = population(name)
    flat = weightops.trace(models[0], torch.randn(2, *shape).double()).flatten(models).detach()
    shared, own = torch.randn(7, *shape).double(), torch.randn(3, 7, *shape).double()
    expected = torch.stack([model(shared) for model in models])
    torch.testing.assert_close(population_forward(flat, models[0], shared), expected)
    expected = torch.stack([model(x) for model, x in zip(models, own, strict=True)])
    torch.testing.assert_close(population_forward(flat, models[0], own), expected)


@pytest.mark.parametrize("name", COMPILED)
def test_a_traced_spec_stands_for_its_model(name: str) -> None:
    models, shape = population(name)
    x = torch.randn(5, *shape).double()
    spec = weightops.trace(models[0], x)
    flat = spec.flatten(models).detach()
    expected = torch.stack([model(x) for model in models])
    torch.testing.assert_close(population_forward(flat, spec, x), expected)


@pytest.mark.parametrize("name", MODELS)
def test_reductions_and_gradients(name: str) -> None:
    models, shape = population(name)
    x = torch.randn(6, *shape).double()
    flat = weightops.trace(models[0], x).flatten(models).detach()
    logits = torch.stack([model(x) for model in models]).detach()
    classes = torch.randint(0, logits.shape[2], (6,))
    losses = torch.stack([F.cross_entropy(each, classes) for each in logits])
    wrong = logits.argmax(2) != classes

    def reduced(to: str, targets: Tensor) -> Tensor:
        return population_forward(flat, models[0], x, reduce=to, targets=targets)

    torch.testing.assert_close(reduced("loss", classes), losses)
    torch.testing.assert_close(reduced("accuracy", classes), 1 - wrong.double().mean(1))
    assert torch.equal(reduced("errors", classes.expand(3, 6)), wrong)
    values = torch.randn_like(logits)
    torch.testing.assert_close(
        reduced("loss", values), (logits - values).square().mean((1, 2)).detach()
    )
    leaf = flat.clone().requires_grad_()
    population_loss(leaf, models[0], x, classes).sum().backward()
    for model, grad in zip(models, leaf.grad, strict=True):
        F.cross_entropy(model(x), classes).backward()
        held = {k: v.grad for k, v in model.named_parameters()}
        own = [
            torch.zeros_like(v) if held.get(k) is None else held[k]
            for k, v in model.state_dict().items()
            if v.is_floating_point()
        ]
        torch.testing.assert_close(grad, torch.cat([each.flatten() for each in own]))


def test_overlap_is_intersection_over_union() -> None:
    errors = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0]]).bool()
    expected = torch.tensor([[1, 1 / 3, 0], [1 / 3, 1, 0], [0, 0, 1.0]])
    torch.testing.assert_close(overlap(errors), expected)


def test_info_says_what_runs_and_why() -> None:
    models, shape = population("mlp")
    said = explain(models[0], torch.randn(2, *shape).double())
    assert "linear, silu, linear; trained in one call" in said
    models, shape = population("recurrent")
    said = weightops.info.population(models[0], torch.randn(2, *shape).double())
    assert "torch.func: networks are mapped one by one, in training too, since no kernel" in said
    models, shape = population("wide")
    said = explain(models[0], torch.randn(2, *shape).double())
    assert said.startswith("products of many")
    assert "; trained in one call" in said
    models, shape = population("residual")
    said = explain(models[0], torch.randn(2, *shape).double())
    assert "batch norm" in said
    assert "; trained in one call" in said


def test_hooks_are_run_and_named_and_taken_away_again() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    x, flat = torch.randn(5, 4), torch.randn(2, 23)
    plain = population_forward(flat, model, x)
    handle = model[1].register_forward_hook(lambda module, args, output: 2 * output)
    spec = weightops.trace(model, x)
    expected = torch.stack([spec.load_(copy.deepcopy(model), row)(x) for row in flat])
    torch.testing.assert_close(population_forward(flat, model, x), expected)
    assert (
        "aten.mul.Tensor but in a sine (forward hooks are traced with the model: of '1')"
        in explain(model, x)
    )
    handle.remove()
    assert torch.equal(population_forward(flat, model, x), plain)
    assert "hooks" not in explain(model, x)


def test_a_changed_model_is_traced_anew() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    x, flat = torch.randn(2, 4), torch.randn(1, 15)
    relu = population_forward(flat, model, x)
    model[1] = nn.Tanh()
    tanh = population_forward(flat, model, x)
    assert relu.min() >= 0
    assert not torch.equal(relu, tanh)


def test_the_model_is_left_as_it_was() -> None:
    model = Residual().train()
    before = copy.deepcopy(model.state_dict())
    numel = sum(v.numel() for v in before.values() if v.is_floating_point())
    population_forward(torch.randn(2, numel), model, torch.randn(4, 3, 9, 8))
    assert model.training
    assert model.batch.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_spec_that_was_not_traced_asks_for_the_model() -> None:
    model = nn.Linear(4, 3)
    spec = weightops.WeightSpec.from_json(weightops.trace(model, torch.randn(2, 4)).to_json())
    message = (
        "population_forward: spec_or_model is a spec without layers, as it was not traced in this "
        r"process; pass the model itself, or what weightops.trace\(model, x\) makes of it"
    )
    with pytest.raises(ValueError, match=message):
        population_forward(torch.randn(2, 15), spec, torch.randn(5, 4))
    sigmoid = nn.Sequential(nn.Linear(4, 3), nn.Sigmoid())
    traced = weightops.trace(sigmoid, torch.randn(2, 4))
    with pytest.raises(
        ValueError, match=r"as no kernel has aten\.sigmoid\.default; pass the model"
    ):
        population_forward(torch.randn(2, 15), traced, torch.randn(5, 4))


def test_no_network_and_no_sample() -> None:
    models, shape = population("residual")
    x = torch.randn(4, *shape).double()
    flat = weightops.trace(models[0], x).flatten(models).detach()
    assert population_forward(flat[:0], models[0], x).shape == (0, 4, 10)
    assert population_forward(flat, models[0], x[:0]).shape == (3, 0, 10)
    with pytest.raises(ValueError, match="no sample"):
        population_loss(flat, models[0], x[:0], torch.empty(0, dtype=torch.int64))
