"""Training of populations: gradients, optimisers, draws and what is left alone, against torch itself."""

import copy
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import weightops
from weightops.ops.population import grouped, training_reference
from weightops.ops.population.training import population_loss_grad, population_steps, steps_by_torch
from weightops.population import (
    TrainingState,
    population_batchnorm,
    population_forward,
    population_train,
)
from weightops.population._batches import Batches, network_seeds
from weightops.population._resolve import resolve
from weightops.tracing.export import read_weights

CLASSES = 5


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.last = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).relu()
        y = y + self.second(y)
        return self.last((y + y).relu().mean((2, 3)))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(7, 7), nn.Linear(7, 7)
        self.second.weight = self.first.weight
        self.last = nn.Linear(7, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.first(x).tanh()).relu())


class Sine(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(self.factor * x)


def images(*layers: nn.Module) -> tuple[nn.Module, tuple[int, ...]]:
    model = nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(CLASSES))
    model(torch.zeros(2, 3, 9, 8))
    return model, (3, 9, 8)


def features(*layers: nn.Module) -> tuple[nn.Module, tuple[int, ...]]:
    return nn.Sequential(nn.Linear(7, 33), *layers, nn.Linear(33, CLASSES, bias=False)), (7,)


def conv(outputs: int = 4, **options: int) -> nn.Module:
    return nn.Conv2d(3, outputs, 3, **options)  # type: ignore[arg-type]


MODELS = {
    "linear": lambda: (nn.Linear(7, CLASSES), (7,)),
    "relu": lambda: features(nn.ReLU()),
    "silu": lambda: features(nn.SiLU()),
    "gelu": lambda: features(nn.GELU()),
    "gelu of tanh": lambda: features(nn.GELU("tanh")),
    "tanh": lambda: features(nn.Tanh()),
    "sine": lambda: features(Sine(3.0)),
    "sines of pooled maxima": lambda: images(conv(), nn.MaxPool2d(2), Sine(1.0)),
    "layer norm": lambda: features(nn.LayerNorm(33), nn.ReLU()),
    "layer norm of images": lambda: images(conv(), nn.LayerNorm((4, 7, 6), bias=False)),
    "conv": lambda: images(conv(9), nn.ReLU(), nn.Conv2d(9, 10, 2, bias=False)),
    "conv stride": lambda: images(
        conv(stride=2, padding=1), nn.Conv2d(4, 5, 3, (2, 1), (2, 1), (1, 2))
    ),
    "conv groups": lambda: images(conv(), nn.SiLU(), nn.Conv2d(4, 6, 3, 1, 1, 2, groups=2)),
    "max pool": lambda: images(conv(padding=(1, 2)), nn.ReLU(), nn.MaxPool2d((3, 2), (3, 2))),
    "max pool overlapping": lambda: images(conv(), nn.MaxPool2d(3, 2, 1), nn.ReLU()),
    "average pool": lambda: images(conv(), nn.AvgPool2d(3, 2, 1, count_include_pad=False)),
    "batch norm": lambda: images(conv(), nn.BatchNorm2d(4), nn.ReLU()),
    "group norm": lambda: images(conv(), nn.GroupNorm(2, 4), nn.ReLU()),
    "residual": lambda: (Residual(), (3, 6, 6)),
    "tied": lambda: (Tied(), (7,)),
}


def population(name: str, n: int = 3) -> tuple[nn.Module, Tensor, tuple[int, ...]]:
    """The model, in double, networks with other weights each ``[n, P]``, the shape of a sample."""
    torch.manual_seed(0)
    model, shape = MODELS[name]()
    model = model.double().eval()
    state = model.state_dict()
    flat = torch.cat([state[each].flatten() for each in read_weights(model).shapes])
    flat = flat + 0.1 * torch.rand(n, len(flat), dtype=torch.float64)
    return model, flat, shape


def data(shape: tuple[int, ...], *rows: int, values: bool = False) -> tuple[Tensor, Tensor]:
    x = torch.randn(*rows, *shape, dtype=torch.float64)
    if values:
        return x, torch.randn(*rows, CLASSES, dtype=torch.float64)
    return x, torch.randint(CLASSES, rows)


@pytest.mark.parametrize("values", [False, True], ids=["classes", "values"])
@pytest.mark.parametrize("rows", [1, 70])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_torch(name: str, rows: int, values: bool) -> None:
    model, flat, shape = population(name)
    for own in (False, True):
        x, targets = data(shape, *([3] if own else []), rows, values=values)
        runner, x = resolve("test", flat, model, x)
        assert runner.program is not None, runner.reason
        arguments = flat, x, targets, runner.code, runner.shared
        losses, grads = population_loss_grad(*arguments)
        expected = training_reference.population_loss_grad(*arguments)
        torch.testing.assert_close(losses, expected[0], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(grads, expected[1], rtol=1e-10, atol=1e-10)
        single = (t.float() if t.is_floating_point() else t for t in (flat, x, targets))
        _, grads = population_loss_grad(*single, runner.code, runner.shared)
        torch.testing.assert_close(grads.double(), expected[1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("values", [False, True], ids=["classes", "values"])
@pytest.mark.parametrize("name", ["residual", "batch norm", "layer norm", "tied"])
def test_gradients_batched_over_networks_are_the_definitions(name: str, values: bool) -> None:
    model, flat, shape = population(name)
    for own in (False, True):
        x, targets = data(shape, *([3] if own else []), 20, values=values)
        runner, x = resolve("test", flat, model, x)
        arguments = flat, x, targets, runner.code, runner.shared
        made = grouped.population_loss_grad(*arguments)
        expected = training_reference.population_loss_grad(*arguments)
        torch.testing.assert_close(made, expected, rtol=1e-10, atol=1e-12)
        # The gradients in training, and the statistics that follow.
        made = grouped.population_train_grad(*arguments, 2)
        expected = training_reference.population_train_grad(*arguments, 2)
        torch.testing.assert_close(made, expected, rtol=1e-10, atol=1e-12)


def test_steps_batched_over_networks_are_the_definitions() -> None:
    model, flat, shape = population("batch norm")
    x, targets = data(shape, 30)
    runner, x = resolve("test", flat, model, x)
    batches = torch.randint(30, (4, 3, 6))
    rates, options = torch.full((3,), 0.01).double(), ("sgd", [0.1, 0.9, 0], 0, [])
    arguments = flat, flat.new_zeros(1, *flat.shape), x, targets, batches, rates
    arguments = *arguments, runner.code, runner.shared, [], *options
    expected = training_reference.population_steps(*arguments)
    made = steps_by_torch(*arguments)
    torch.testing.assert_close(made, expected, rtol=1e-9, atol=1e-11)


OPTIMIZERS = {
    "adamw": ({"optimizer": "adamw"}, lambda p: torch.optim.AdamW(p, 1e-2)),
    "adamw options": (
        {"optimizer": "adamw", "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.3},
        lambda p: torch.optim.AdamW(p, 1e-2, (0.8, 0.95), 1e-3, 0.3),
    ),
    "sgd": ({"optimizer": "sgd"}, lambda p: torch.optim.SGD(p, 1e-2)),
    "sgd momentum": (
        {"optimizer": "sgd", "momentum": 0.9, "weight_decay": 0.1},
        lambda p: torch.optim.SGD(p, 1e-2, 0.9, weight_decay=0.1),
    ),
    "sgd nesterov": (
        {"optimizer": "sgd", "momentum": 0.9, "nesterov": True},
        lambda p: torch.optim.SGD(p, 1e-2, 0.9, nesterov=True),
    ),
}


def loop(
    model: nn.Module, row: Tensor, optimizer, steps: int, x: Tensor, targets: Tensor, rows=None
) -> tuple[Tensor, list[float]]:
    """The plain loop of one network."""
    model, at = copy.deepcopy(model), 0
    for parameter in model.parameters():
        parameter.data = row[at : at + parameter.numel()].view_as(parameter).clone()
        at += parameter.numel()
    made, losses = optimizer(model.parameters()), []
    for step in range(steps):
        taken = slice(None) if rows is None else rows[step]
        loss = F.cross_entropy(model(x[taken]), targets[taken])
        made.zero_grad()
        loss.backward()
        made.step()
        losses.append(loss.item())
    return torch.cat([p.detach().flatten() for p in model.parameters()]), losses


@pytest.mark.parametrize("name", ["relu", "conv"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_steps_are_those_of_torch_optim(optimizer: str, name: str) -> None:
    model, flat, shape = population(name)
    x, targets = data(shape, 40)
    options, make = OPTIMIZERS[optimizer]
    trained = population_train(flat, model, (x, targets), steps=20, lr=1e-2, **options)
    for n in range(3):
        row, losses = loop(model, flat[n], make, 20, x, targets)
        torch.testing.assert_close(trained.flat[n], row, rtol=1e-9, atol=1e-10)
        assert trained.losses[:, n].tolist() == pytest.approx(losses, rel=1e-9)
    assert not trained.diverged.any()


def test_mini_batches_are_each_networks_own_permutations() -> None:
    model, flat, shape = population("relu")
    x, targets = data(shape, 50)
    rows = Batches(50, 16, network_seeds("test", 3, 3)).rows(0, 7)
    for epoch in (rows[0:3], rows[3:6]):
        assert all(len(set(own.flatten().tolist())) == 48 for own in epoch.transpose(0, 1))
    trained = population_train(flat, model, (x, targets), steps=7, batch_size=16, seed=3, lr=1e-2)
    for n in range(3):
        row, losses = loop(model, flat[n], OPTIMIZERS["adamw"][1], 7, x, targets, rows[:, n])
        torch.testing.assert_close(trained.flat[n], row, rtol=1e-9, atol=1e-10)
        assert trained.losses[:, n].tolist() == pytest.approx(losses, rel=1e-9)


def test_a_network_is_trained_alike_alone_and_among_others() -> None:
    model, flat, shape = population("conv")
    x, targets = data(shape, 3, 30)
    options = {"steps": 5, "batch_size": 7}
    together = population_train(flat, model, (x, targets), seed=[4, 5, 6], **options)
    alone = population_train(flat[1:2], model, (x[1:2], targets[1:2]), seed=[5], **options)
    assert torch.equal(together.flat[1:2], alone.flat)
    first = population_train(flat[:2], model, (x[:2], targets[:2]), seed=9, **options)
    every = population_train(flat, model, (x, targets), seed=9, **options)
    assert torch.equal(first.flat, every.flat[:2])


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("batch_size", [None, 8])
@pytest.mark.parametrize("name", ["relu", "batch norm"])
def test_two_parts_are_one_training_bit_for_bit(
    name: str, optimizer: str, batch_size: int | None
) -> None:
    model, flat, shape = population(name)
    options = {"optimizer": optimizer, "batch_size": batch_size, "momentum": 0.9, "every": 4}
    options |= {"probes": {"norm": lambda flat: flat.norm(dim=1)}}
    given = data(shape, 30)
    whole = population_train(flat, model, given, steps=23, **options)
    first = population_train(flat, model, given, steps=9, **options)
    second = population_train(first.flat, model, given, steps=14, state=first.state, **options)
    assert torch.equal(second.flat, whole.flat)
    assert torch.equal(second.state.moments, whole.state.moments)
    assert second.state.step == 23
    assert torch.equal(torch.cat([first.losses, second.losses]), whole.losses)
    assert torch.equal(
        torch.cat([first.probes["norm"], second.probes["norm"]]), whole.probes["norm"]
    )


@pytest.mark.parametrize("name", ["conv", "batch norm"])
def test_threads_change_no_bit(name: str) -> None:
    model, flat, shape = population(name, 5)
    given = data(shape, 40)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(population_train(flat, model, given, steps=4, batch_size=9))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0].flat, found[1].flat)
    assert torch.equal(found[0].losses, found[1].losses)


def test_probes_see_the_networks_before_their_step() -> None:
    model, flat, shape = population("relu")
    given = data(shape, 30)
    seen = population_train(
        flat, model, given, steps=10, every=4, probes={"flat": lambda flat: flat}
    )
    assert seen.probes["flat"].shape == (3, *flat.shape)
    assert seen.losses.shape == (3, 3)
    assert torch.equal(seen.probes["flat"][0], flat)
    assert torch.equal(seen.probes["flat"][2], population_train(flat, model, given, steps=8).flat)
    now = population_forward(
        seen.probes["flat"][1], model, given[0], reduce="loss", targets=given[1]
    )
    torch.testing.assert_close(seen.losses[1], now)


def test_rates_may_differ_and_the_input_stays() -> None:
    model, flat, shape = population("relu")
    given, before = data(shape, 30), flat.clone()
    rates = torch.tensor([0.0, 1e-3, 1e-2], dtype=torch.float64)
    trained = population_train(flat, model, given, steps=3, lr=rates, weight_decay=0.0)
    assert torch.equal(flat, before)
    assert torch.equal(trained.flat[0], flat[0])
    alone = population_train(flat[2:], model, given, steps=3, lr=1e-2, weight_decay=0.0)
    assert torch.equal(trained.flat[2:], alone.flat)


def test_one_network_diverges_and_the_others_go_on() -> None:
    model, flat, shape = population("relu")
    given = data(shape, 30, values=True)
    rates = torch.tensor([1e-3, 1e30, 1e-3])
    trained = population_train(flat, model, given, steps=30, optimizer="sgd", lr=rates)
    assert trained.diverged.tolist() == [False, True, False]
    others = population_train(flat[[0, 2]], model, given, steps=30, optimizer="sgd", lr=1e-3)
    torch.testing.assert_close(trained.flat[[0, 2]], others.flat)


def test_frozen_parameters_and_buffers_stay() -> None:
    model, flat, shape = population("batch norm")
    model[0].weight.requires_grad_(False)
    trained = population_train(flat, model, data(shape, 30), steps=3)
    spec = weightops.trace(copy.deepcopy(model), torch.randn(2, *shape, dtype=torch.float64))
    before, after = spec.unflatten(flat), spec.unflatten(trained.flat)
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {"0.weight"}
    assert not trained.state.moments[:, :, spec.offsets["1.running_mean"]].any()


class Norms(nn.Module):
    """Norms of images and features, in branches, one used twice, one that nothing comes of."""

    def __init__(self) -> None:
        super().__init__()
        self.of_x, self.conv = nn.BatchNorm2d(3, affine=False), nn.Conv2d(3, 4, 3, padding=1)
        self.first, self.second = nn.BatchNorm2d(4, momentum=0.3), nn.BatchNorm2d(4, eps=1e-2)
        self.next, self.pool = nn.Conv2d(4, 4, 3, padding=1), nn.MaxPool2d(2)
        self.linear, self.last = nn.Linear(4 * 9, 9), nn.BatchNorm1d(9, momentum=0.5)
        self.out = nn.Linear(9, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(self.conv(self.of_x(x))).relu()
        y = self.pool(self.second(self.next(y)) + self.first(y)).relu()
        return self.out(self.last(self.linear(y.flatten(1))).tanh())


NORMS = {
    "conv": lambda: MODELS["batch norm"](),
    "linear": lambda: features(nn.BatchNorm1d(33), nn.ReLU()),
    "average over all steps": lambda: features(nn.BatchNorm1d(33, momentum=None), nn.SiLU()),
    "momentum 0": lambda: features(nn.BatchNorm1d(33, momentum=0.0), nn.ReLU()),
    "first": lambda: (nn.Sequential(nn.BatchNorm1d(7), nn.Linear(7, CLASSES)), (7,)),
    "last": lambda: (nn.Sequential(nn.Linear(7, CLASSES), nn.BatchNorm1d(CLASSES)), (7,)),
    "pooled": lambda: images(nn.BatchNorm2d(3), conv(), nn.BatchNorm2d(4), nn.MaxPool2d(2)),
    "branches": lambda: (Norms(), (3, 6, 6)),
}


@pytest.mark.parametrize("batch_size", [None, 17, 50])
@pytest.mark.parametrize("name", NORMS)
def test_batch_norm_trains_by_the_batches_own_statistics(
    name: str, batch_size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(MODELS, name, NORMS[name])
    model, flat, shape = population(name)
    x, targets = data(shape, 70)
    options = {"optimizer": "sgd", "momentum": 0.9, "weight_decay": 0.1, "lr": 0.1}
    trained = population_train(flat, model, (x, targets), steps=5, batch_size=batch_size, **options)
    rows = Batches(70, batch_size, network_seeds("test", 0, 3)).rows(0, 5)
    kept = [name for name, each in model.state_dict().items() if each.is_floating_point()]
    for n in range(3):
        own, at = copy.deepcopy(model).train(), 0
        for each in own.state_dict().values():
            if each.is_floating_point():
                each.copy_(flat[n, at : at + each.numel()].view_as(each))
                at += each.numel()
        optimizer = torch.optim.SGD(own.parameters(), 0.1, 0.9, weight_decay=0.1)
        for step in range(5):
            taken = rows[step, n] if batch_size else slice(None)
            loss = F.cross_entropy(own(x[taken]), targets[taken])
            torch.testing.assert_close(trained.losses[step, n], loss, rtol=1e-10, atol=1e-10)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        expected = torch.cat([own.state_dict()[each].flatten() for each in kept])
        torch.testing.assert_close(trained.flat[n], expected.detach(), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("rows", [2, 40, 70])
@pytest.mark.parametrize("name", NORMS)
def test_gradients_through_statistics_are_those_of_torch(
    name: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(MODELS, name, NORMS[name])
    model, flat, shape = population(name)
    for own in (False, True):
        x, targets = data(shape, *([3] if own else []), rows)
        runner, x = resolve("test", flat, model, x)
        batches = torch.zeros(1, 3, 0, dtype=torch.int64)
        # One step of plain SGD at the rate 1 shows the gradient, and statistics beside it.
        rest = torch.ones(3, dtype=torch.float64), runner.code, runner.shared, []
        arguments = *rest, "sgd", [0.0, 0.0, 0.0], 3, []
        state = torch.zeros(1, *flat.shape, dtype=torch.float64)
        made = population_steps(flat, state, x, targets, batches, *arguments)
        expected = training_reference.population_steps(flat, state, x, targets, batches, *arguments)
        for found, right in zip(made, expected, strict=True):
            torch.testing.assert_close(found, right, rtol=1e-10, atol=1e-10)
        single = (t.float() if t.is_floating_point() else t for t in (flat, state, x, targets))
        found = population_steps(*single, batches, *arguments)[0]
        bound = 1e-4 if rows > 2 else 3e-2  # two numbers may be much alike
        torch.testing.assert_close(found.double(), expected[0], rtol=bound, atol=bound)


def test_batch_norm_refuses_batches_of_one_number() -> None:
    model = nn.Sequential(nn.Linear(7, CLASSES), nn.BatchNorm1d(CLASSES)).double()
    flat, given = torch.rand(2, 60, dtype=torch.float64), data((7,), 5)
    message = r"batch norm \(1.running_mean\) needs two numbers of a channel in a batch at least"
    with pytest.raises(ValueError, match=message):
        population_train(flat, model, given, steps=1, batch_size=1)
    assert population_train(flat, model, given, steps=1).losses.isfinite().all()


class Volumes(nn.Module):
    """No kernel has its batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv3d(1, 3, 2), nn.BatchNorm3d(3)
        self.out = nn.Linear(3, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(self.conv(x)).relu().mean((2, 3, 4)))


@pytest.mark.parametrize("kind", ["compiled", "mapped"])
@pytest.mark.parametrize("momentum", [None, 0.3])
def test_batch_norm_statistics_are_what_one_forward_in_training_leaves(
    momentum: float | None, kind: str
) -> None:
    torch.manual_seed(0)
    if kind == "compiled":
        model, shape = images(
            conv(), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 2), nn.BatchNorm2d(5)
        )
    else:
        model, shape = Volumes(), (1, 4, 4, 4)
    model = model.double()
    x = torch.randn(20, *shape, dtype=torch.float64)
    models = []
    for _ in range(3):
        models.append(copy.deepcopy(model))
        for tensor in models[-1].parameters():
            nn.init.normal_(tensor)
    kept = {
        name: tensor for name, tensor in model.state_dict().items() if tensor.is_floating_point()
    }

    def row(model: nn.Module) -> Tensor:
        state = model.state_dict()
        return torch.cat([state[name].flatten() for name in kept])

    flat = torch.stack([row(each) for each in models])
    found = population_batchnorm(flat, model, x, momentum=momentum)
    for each, estimated in zip(models, found, strict=True):
        for module in each.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.momentum = momentum
                module.num_batches_tracked.zero_()
        each.train()(x)
        torch.testing.assert_close(estimated, row(each), rtol=1e-9, atol=1e-9)


def test_models_without_a_program_train_alike() -> None:
    class Squared(nn.Module):
        def __init__(self, kernels: bool) -> None:
            super().__init__()
            self.first, self.last, self.kernels = nn.Linear(7, 9), nn.Linear(9, CLASSES), kernels

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            return self.last(y.relu() if self.kernels else y.clamp(min=0))

    given = data((7,), 40)
    flat = torch.randn(3, 7 * 9 + 9 + 9 * CLASSES + CLASSES, dtype=torch.float64)
    options = {"steps": 12, "batch_size": 8, "optimizer": "sgd", "momentum": 0.9}
    by_kernels = population_train(flat, Squared(True).double(), given, **options)
    by_torch = population_train(flat, Squared(False).double(), given, **options)
    torch.testing.assert_close(by_torch.flat, by_kernels.flat, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(by_torch.losses, by_kernels.losses, rtol=1e-9, atol=1e-10)


def test_no_steps_leave_the_networks() -> None:
    model, flat, shape = population("relu")
    nothing = population_train(flat, model, data(shape, 10), steps=0)
    assert torch.equal(nothing.flat, flat)
    assert nothing.losses.shape == (0, 3)
    assert nothing.state.step == 0
    empty = population_train(flat[:0], model, data(shape, 10), steps=2)
    assert empty.flat.shape == (0, flat.shape[1])


def test_a_state_of_another_optimizer_is_refused() -> None:
    model, flat, shape = population("relu")
    given = data(shape, 10)
    state = population_train(flat, model, given, steps=1).state
    with pytest.raises(ValueError, match=r"state must have torch.float64 moments \[1, 3, "):
        population_train(flat, model, given, steps=1, optimizer="sgd", state=state)
    with pytest.raises(TypeError, match="state must be a TrainingState, not int 3"):
        population_train(flat, model, given, steps=1, state=3)
    assert isinstance(state, TrainingState)


def test_the_op_refuses_what_does_not_fit() -> None:
    model, flat, shape = population("relu")
    x, targets = data(shape, 10)
    runner, x = resolve("test", flat, model, x)
    batches, rates = torch.zeros(1, 3, 2, dtype=torch.int64), torch.ones(3, dtype=torch.float64)
    arguments = [flat, torch.zeros(2, *flat.shape).double(), x, targets, batches, rates]
    arguments += [list(runner.code), True, [], "adamw", [0.0, 0.9, 0.999, 1e-8], 0, []]
    population_steps(*arguments)
    for place, wrong in ((4, batches + 10), (4, batches - 1), (3, targets + CLASSES)):
        with pytest.raises((RuntimeError, IndexError)):
            population_steps(*arguments[:place], wrong, *arguments[place + 1 :])


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["WEIGHTOPS_ISA=generic", "WEIGHTOPS_ISA=avx2"])
def test_gradients_under_other_instruction_sets(setting: str) -> None:
    name, value = setting.split("=")
    command = [sys.executable, "-m", "pytest", "-q", "-x", __file__, "-k", "are_those_of_torch"]
    subprocess.run(command, check=True, env=os.environ | {name: value}, timeout=600)
