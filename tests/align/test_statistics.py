"""Statistics estimated anew are the inputs' own; REPAIR sets each unit's to what the corners' merge to."""

import copy

import pytest
import torch
from small_networks import NET_SPEC, Net, evaluated, networks, random_networks
from torch import Tensor, nn

import weightops
from weightops import align
from weightops.align.statistics import repair, reset_batch_norm


def test_reset_statistics_equal_those_of_one_large_batch() -> None:
    models, inputs, _ = networks()
    reset_batch_norm(models[0], inputs, 300)
    activations = models[0].fc1(inputs)
    torch.testing.assert_close(models[0].norm.running_mean, activations.mean(0).detach())
    torch.testing.assert_close(models[0].norm.running_var, activations.var(0).detach())
    assert not models[0].norm.training
    assert models[0].norm.momentum == 0.1


class Plain(nn.Module):
    """A convolution and two linear layers, without norms."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc1, self.fc2 = nn.Conv1d(2, 4, 3), nn.Linear(24, 6), nn.Linear(6, 3)

    def layers(self, x: Tensor) -> list[Tensor]:
        """Pre-activations ``[..., units]``."""
        conv = self.conv(x)
        fc1 = self.fc1(conv.relu().flatten(1))
        return [conv.movedim(1, -1), fc1, self.fc2(fc1.relu())]

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)[-1]


@torch.no_grad()
def moments(model: Plain, spec, row: Tensor, x: Tensor) -> list[tuple[Tensor, Tensor]]:
    spec.load_(model, row)
    flat = [each.flatten(0, -2) for each in model.layers(x)]
    return [(each.mean(0), each.std(0, correction=0)) for each in flat]


@pytest.mark.parametrize("batch_size", [40, 15])
def test_repair_sets_means_and_deviations_of_every_unit(batch_size: int) -> None:
    model, spec, flat = random_networks(Plain, 3)
    x = torch.randn(40, 2, 8, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    weights = torch.tensor([[0.2, 0.3, 0.5], [0.0, 1.0, 0.0]], dtype=torch.float64)
    repaired = repair(model, spec, flat, weights, x, batch_size=batch_size)
    corners = [moments(copy.deepcopy(model), spec, row, x) for row in flat]
    found = moments(copy.deepcopy(model), spec, repaired[0], x)
    tolerance = 1e-10 if batch_size == 40 else 0.3  # statistics of batches are averaged
    for layer, (mean, std) in enumerate(found):
        means, stds = (torch.stack([corner[layer][i] for corner in corners]) for i in (0, 1))
        torch.testing.assert_close(mean, weights[0] @ means, rtol=tolerance, atol=tolerance / 2)
        torch.testing.assert_close(std, weights[0] @ stds, rtol=tolerance, atol=0)
    torch.testing.assert_close(repaired[1], flat[1], rtol=1e-10, atol=1e-12)
    unrepaired = moments(copy.deepcopy(model), spec, weights[0] @ flat, x)
    assert (found[-1][1] / unrepaired[-1][1]).max() > 1.2
    alone = repair(model, spec, flat, [0.2, 0.3, 0.5], x, batch_size=batch_size)
    assert torch.equal(alone, repaired[0])


def test_a_repaired_barrier_is_that_of_repaired_networks() -> None:
    model, spec, flat = random_networks(Plain, 2)
    x = torch.randn(60, 2, 8, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    targets = torch.arange(60) % 3
    found = align.barrier(
        model, spec, *flat, x, targets, points=4, norm_inputs=x[:50], norm="repair", progress=False
    )
    path = torch.stack([1 - found.alphas, found.alphas], 1)
    rows = repair(model, spec, flat, path, x[:50])
    losses, errors = evaluated(copy.deepcopy(model), spec, rows, x, targets)
    torch.testing.assert_close(found.losses, losses, rtol=1e-12, atol=0)
    torch.testing.assert_close(found.errors, errors)


class Normed(nn.Module):
    """A convolution that batch norm reads, and a linear layer that none does."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(2, 4, 3, bias=False), nn.BatchNorm1d(4)
        self.fc = nn.Linear(24, 3, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(self.conv(x)).relu().flatten(1))


def test_repair_leaves_layers_to_the_batch_norm_that_reads_them() -> None:
    model, spec, flat = random_networks(Normed, 2)
    x = torch.randn(50, 2, 8, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    merged = flat.mean(0)
    row = repair(model, spec, flat, [0.5, 0.5], x)
    parts, before = spec.unflatten(row), spec.unflatten(merged)
    assert torch.equal(parts["conv.weight"], before["conv.weight"])
    probe = spec.load_(copy.deepcopy(model), merged)
    with torch.no_grad():
        read = probe.conv(x).movedim(1, -1).flatten(0, 1)
    torch.testing.assert_close(parts["norm.running_mean"], read.mean(0))
    torch.testing.assert_close(parts["norm.running_var"], read.var(0))
    # The ends whose logits count have statistics of the same inputs.
    logits = []
    for each in flat:
        reset_batch_norm(spec.load_(probe, each), x, 50)
        logits.append(probe.eval()(x).std(0))
    torch.testing.assert_close(
        spec.load_(probe, row)(x).std(0), torch.stack(logits).mean(0), rtol=1e-3, atol=0
    )


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 4), nn.Linear(4, 4)
        self.down.weight = self.up.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu())


@pytest.mark.parametrize(
    ("build", "size", "message"),
    [
        (lambda: Normed(bias=False), (9, 2, 8), "repair: fc has no bias of its own"),
        (Tied, (9, 4), "repair: up shares its weights with another layer"),
        (Plain, (0, 2, 8), "repair: inputs must hold examples"),
        (Tied, (1, 4), r"repair: a batch gives up a tensor of shape \[1, 4\], one value a unit"),
        (lambda: nn.BatchNorm1d(4), (1, 4), "repair: a batch gives .* one value a unit"),
    ],
)
def test_what_cannot_be_repaired_is_named(build, size: tuple[int, ...], message: str) -> None:
    model = build()
    spec = weightops.WeightSpec(
        {
            name: (None,) * p.dim()
            for name, p in model.state_dict().items()
            if p.dim() and name != "down.weight"
        },
        {
            name: tuple(p.shape)
            for name, p in model.state_dict().items()
            if p.dim() and name != "down.weight"
        },
    )
    flat = spec.flatten([model, model]).detach()
    with pytest.raises(ValueError, match=message):
        repair(model, spec, flat, [0.5, 0.5], torch.randn(size))


class Branching(nn.Module):
    """Calls a layer as often as its weights say."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.layer = nn.Parameter(torch.zeros(1)), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        return self.layer(x) if self.gate > 0 else x


@pytest.mark.parametrize("gates", [(0.0, 1.0), (-1.0, -1.0)])
def test_layers_called_unequally_often_cannot_be_repaired(gates: tuple[float, float]) -> None:
    model, spec, flat = random_networks(Branching, 2)
    flat[:, 0] = torch.tensor(gates)
    weights = [0.5, 0.5] if gates[0] != gates[1] else [1.0, -2.0]
    with pytest.raises(ValueError, match="repair: layer is called more often by some networks"):
        repair(model, spec, flat, weights, torch.randn(5, 3, dtype=torch.float64))


@pytest.mark.parametrize("batch_size", [1, 1000])
def test_reset_names_the_norm_whose_batch_is_too_small(batch_size: int) -> None:
    inputs = torch.zeros(3 if batch_size == 1 else 1, 6)
    model = Net().eval()
    with pytest.raises(ValueError, match=r"reset_batch_norm: a batch gives norm .*\[1, 12\]"):
        reset_batch_norm(model, inputs, batch_size)
    assert model.norm.momentum == 0.1
    assert not model.norm.training


def test_no_batch_is_left_with_a_single_sample() -> None:
    models, inputs, _ = networks()
    reset_batch_norm(models[0], inputs[:101], 100)
    assert models[0].norm.running_var.isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": 3}, "repair: model must be a module"),
        ({"spec": 3}, "repair: spec must be a WeightSpec"),
        ({"corners": torch.zeros(2, 3)}, "repair: corners has shape"),
        ({"weights": [0.5]}, r"weights must have shape \[2\] or \[L, 2\]"),
        ({"inputs": None}, "repair: inputs must be a tensor"),
        ({"batch_size": 0}, "repair: batch_size must be at least 1"),
    ],
)
def test_repair_refuses_bad_input(change: dict, message: str) -> None:
    common = {"model": Net(), "spec": NET_SPEC, "inputs": torch.zeros(5, 6)}
    merge = {"corners": torch.zeros(2, NET_SPEC.numel), "weights": [0.5, 0.5]}
    with pytest.raises((ValueError, TypeError), match=message):
        repair(**(common | merge | change))
