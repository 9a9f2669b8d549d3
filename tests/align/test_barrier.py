"""Barriers follow their definition, by whatever way they are computed."""

import copy
from collections import Counter

import pytest
import torch
from small_networks import NET_SPEC, Net, evaluated, networks, random_networks
from torch import Tensor, nn

import weightops
from weightops import align
from weightops.align import _evaluation
from weightops.align.simplex import Simplex, barrier_simplex


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_barrier_follows_the_definition(dtype: torch.dtype, rtol: float) -> None:
    models, inputs, targets = networks()
    models, inputs = [model.to(dtype) for model in models], inputs.to(dtype)
    start, end = NET_SPEC.flatten(models).detach()
    before = {name: t.clone() for name, t in models[0].state_dict().items()}
    models[0].train()
    found = align.barrier(
        models[0], NET_SPEC, start, end, inputs, targets, points=5, batch_size=77, progress=False
    )
    assert models[0].training
    assert all(torch.equal(before[name], t) for name, t in models[0].state_dict().items())
    losses, errors = evaluated(
        Net().to(dtype),
        NET_SPEC,
        [(1 - a) * start + a * end for a in found.alphas.tolist()],
        inputs,
        targets,
    )
    torch.testing.assert_close(found.losses, losses, rtol=rtol, atol=rtol)
    torch.testing.assert_close(found.errors, errors)
    for barrier, values in ((found.loss, losses), (found.error, errors)):
        excess = max(
            value - ((1 - a) * values[0] + a * values[-1])
            for a, value in zip(found.alphas.tolist(), values.tolist(), strict=True)
        )
        assert barrier == pytest.approx(excess.item(), abs=rtol)
    assert found.loss > 0.01


def test_barrier_between_a_network_and_its_permutation_vanishes_after_matching() -> None:
    models, inputs, targets = networks()
    flat = NET_SPEC.flatten(models[0])
    shuffled = weightops.permute(
        flat, NET_SPEC.random_permutations(1, torch.Generator().manual_seed(9)), NET_SPEC
    )
    evaluate = lambda end: align.barrier(  # noqa: E731
        models[0], NET_SPEC, flat[0], end, inputs, targets, points=5, progress=False
    )
    assert evaluate(shuffled[0]).loss > 0.1
    found = align.match(NET_SPEC, flat[0], shuffled)
    after = evaluate(weightops.permute(shuffled, found.perms, NET_SPEC)[0])
    assert abs(after.loss) < 1e-5
    assert after.error == 0


class Reader(nn.Module):
    """Reads its input through a linear layer, a convolution and a layer without bias."""

    def __init__(self, size: int = 10, width: int = 5) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 3, size, bias=False)
        self.linear = nn.Linear(size * size, width)
        self.scaled = nn.Linear(size * size, width, bias=False)
        self.out = nn.Linear(3 + 2 * width, 4)

    def forward(self, x: Tensor) -> Tensor:
        read = (self.conv(x).flatten(1), self.linear(x.flatten(1)), self.scaled(x.flatten(1) / 2))
        return self.out(torch.cat(read, 1).tanh())


def test_layers_that_read_the_data_are_computed_at_the_corners_once(monkeypatch) -> None:
    model, spec, flat = random_networks(Reader, 3)
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(23, 1, 10, 10, generator=generator, dtype=torch.float64)
    targets = torch.randint(4, (23,), generator=generator)
    applied: list[nn.Module] = []
    product = _evaluation._Layers._product
    monkeypatch.setattr(
        _evaluation._Layers, "_product", lambda *a: applied.append(a[1]) or product(*a)
    )

    def counts() -> list[int]:
        return sorted(Counter(map(id, applied)).values())

    found = barrier_simplex(
        model, spec, flat, inputs, targets, points=4, batch_size=10, progress=False
    )
    # Three batches at three corners; at ten points where a layer's input is computed.
    assert counts() == [9, 9, 30, 30]
    losses, errors = evaluated(copy.deepcopy(model), spec, found.weights @ flat, inputs, targets)
    torch.testing.assert_close(found.losses, losses, rtol=1e-12, atol=0)
    torch.testing.assert_close(found.errors, errors)

    monkeypatch.setattr(_evaluation, "_BUDGET", 0)
    applied.clear()
    unmixed = barrier_simplex(
        model, spec, flat, inputs, targets, points=4, batch_size=10, progress=False
    )
    assert counts() == [30, 30, 33, 33]
    torch.testing.assert_close(unmixed.losses, losses, rtol=1e-12, atol=0)


def test_models_that_change_their_input_are_served_the_changed_values() -> None:
    class Changing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.rand(1))
            self.linear = nn.Linear(80, 4)

        def forward(self, x: Tensor) -> Tensor:
            before = x.clone()
            logits = self.linear(x.mul_(self.scale))
            x.copy_(before)
            return logits

    model, spec, flat = random_networks(Changing, 2)
    inputs, targets = torch.randn(9, 80, dtype=torch.float64), torch.arange(9) % 4
    found = align.barrier(model, spec, *flat, inputs, targets, points=5, progress=False)
    path = torch.stack([1 - found.alphas, found.alphas], 1) @ flat
    losses, _ = evaluated(copy.deepcopy(model), spec, path, inputs, targets)
    torch.testing.assert_close(found.losses, losses, rtol=1e-12, atol=0)


def test_large_linear_layers_agree_with_torch() -> None:
    model, spec, flat = random_networks(
        lambda: nn.Sequential(
            nn.Linear(20, 512), nn.ReLU(), nn.Linear(512, 512), nn.Linear(512, 10)
        ),
        2,
        torch.float32,
    )
    generator = torch.Generator().manual_seed(4)
    inputs = torch.randn(200, 20, generator=generator)
    targets = torch.randint(10, (200,), generator=generator)
    assert _evaluation._FEWEST_PRODUCTS < 200 * 512 * 512
    found = align.barrier(model, spec, *flat, inputs, targets, points=3, progress=False)
    path = [(1 - a) * flat[0] + a * flat[1] for a in found.alphas.tolist()]
    losses, errors = evaluated(copy.deepcopy(model), spec, path, inputs, targets)
    torch.testing.assert_close(found.losses, losses, rtol=1e-6, atol=0)
    torch.testing.assert_close(found.errors, errors, rtol=0, atol=0.01)


class Language(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.rnn = nn.Embedding(7, 8), nn.GRU(8, 8, batch_first=True)
        self.head = nn.Linear(8, 7)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.rnn(self.embedding(tokens))[0])


def test_a_loss_of_ones_own_serves_language_models() -> None:
    model, spec, flat = random_networks(Language, 2)
    tokens = torch.randint(7, (13, 6), generator=torch.Generator().manual_seed(5))
    inputs, targets = tokens[:, :-1], tokens[:, 1:]

    def per_sequence(logits: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits.mT, targets, reduction="none").mean(1)

    found = align.barrier(
        model, spec, *flat, inputs, targets,
        points=4, loss=per_sequence, batch_size=5, progress=False,
    )  # fmt: skip
    probe = copy.deepcopy(model).eval()
    for a, loss in zip(found.alphas.tolist(), found.losses.tolist(), strict=True):
        spec.load_(probe, (1 - a) * flat[0] + a * flat[1])
        expected = nn.functional.cross_entropy(probe(inputs).flatten(0, 1), targets.flatten())
        assert loss == pytest.approx(expected.item(), rel=1e-12)
    assert found.errors.isnan().all()
    assert found.error != found.error


def test_a_segment_is_the_simplex_of_its_ends_and_a_triangle_has_three() -> None:
    models, inputs, targets = networks()
    torch.manual_seed(2)
    flat = NET_SPEC.flatten([*models, Net()]).detach()
    common = {"norm_inputs": inputs[:150], "progress": False}

    def segment(i: int, j: int) -> align.Barrier:
        return align.barrier(
            models[0], NET_SPEC, flat[i], flat[j], inputs, targets, points=5, **common
        )

    two = barrier_simplex(models[0], NET_SPEC, flat[:2], inputs, targets, points=5, **common)
    ends = segment(0, 1)
    assert torch.equal(two.losses, ends.losses)
    assert torch.equal(two.weights[:, 1], ends.alphas)
    assert two.loss == pytest.approx(ends.loss)
    assert two.error == pytest.approx(ends.error)

    three = barrier_simplex(models[0], NET_SPEC, flat, inputs, targets, points=5, **common)
    assert three.weights.shape == (15, 3)
    for i, j in ((0, 1), (0, 2), (1, 2)):
        edge = three.weights[:, [i, j]].sum(1) == 1
        assert edge.sum() == 5
        torch.testing.assert_close(three.losses[edge], segment(i, j).losses, rtol=1e-6, atol=0)
        assert three.corner_losses[i] == three.losses[three.weights[:, i] == 1]


def test_excess_over_the_plane_and_its_worst_point() -> None:
    weights = torch.tensor(
        [[1, 0, 0], [0, 1, 0], [0, 0, 1], [0.5, 0.5, 0], [0.2, 0.3, 0.5]]
    ).double()
    losses = torch.tensor([1.0, 2.0, 4.0, 1.4, 3.9]).double()
    found = Simplex(weights, losses, losses / 10, losses[:3], losses[:3] / 10)
    assert found.loss == pytest.approx(3.9 - (0.2 + 0.6 + 2.0))
    assert found.error == pytest.approx(found.loss / 10)
    assert torch.equal(found.worst, weights[4])


def test_given_points_are_measured_against_corners_that_are_not_among_them() -> None:
    models, inputs, targets = networks()
    flat = NET_SPEC.flatten(models).detach()
    weights = torch.tensor([[0.25, 0.75], [1.0, 0.0], [1.5, -0.5]])
    found = barrier_simplex(
        models[0], NET_SPEC, flat, inputs, targets, weights=weights, progress=False
    )
    losses, _ = evaluated(Net(), NET_SPEC, weights @ flat, inputs, targets)
    torch.testing.assert_close(found.losses, losses, rtol=1e-5, atol=0)
    ends, _ = evaluated(Net(), NET_SPEC, flat, inputs, targets)
    torch.testing.assert_close(found.corner_losses, ends, rtol=1e-5, atol=0)


def test_statistics_are_reset_at_every_point() -> None:
    models, inputs, targets = networks()
    flat = NET_SPEC.flatten(models).detach()
    found = align.barrier(
        models[0], NET_SPEC, *flat, inputs, targets,
        points=3, norm_inputs=inputs[:200], batch_size=130, progress=False,
    )  # fmt: skip
    probe = Net()
    for a, loss in zip(found.alphas.tolist(), found.losses.tolist(), strict=True):
        NET_SPEC.load_(probe, (1 - a) * flat[0] + a * flat[1])
        with torch.no_grad():
            batches = [probe.fc1(batch) for batch in inputs[:200].split(100)]
        probe.norm.running_mean.copy_(torch.stack([b.mean(0) for b in batches]).mean(0))
        probe.norm.running_var.copy_(torch.stack([b.var(0) for b in batches]).mean(0))
        expected = nn.functional.cross_entropy(probe.eval()(inputs), targets).item()
        assert loss == pytest.approx(expected, rel=1e-5)


COMMON = {
    "model": Net(),
    "spec": NET_SPEC,
    "inputs": torch.zeros(5, 6),
    "targets": torch.zeros(5).long(),
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": 3}, "barrier: model must be a module"),
        ({"spec": 3}, "barrier: spec must be a WeightSpec"),
        ({"start": torch.zeros(2)}, "barrier: start has shape"),
        ({"end": torch.zeros(NET_SPEC.numel).long()}, "barrier: end must be floating point"),
        ({"inputs": torch.zeros(0, 6)}, "barrier: inputs must hold examples"),
        (
            {"targets": torch.zeros(2).long()},
            "barrier: targets has length 2, but the batch of inputs has size 5",
        ),
        ({"targets": torch.zeros(5)}, "barrier: targets must be int64 classes"),
        ({"points": 1}, "barrier: points must be at least 2, not 1"),
        ({"points": 2.5}, "barrier: points must be an integer"),
        ({"batch_size": 0}, "barrier: batch_size must be at least 1, not 0"),
        ({"norm_inputs": 5}, "barrier: norm_inputs must be a tensor"),
        ({"norm_inputs": torch.zeros(0, 6)}, "barrier: norm_inputs must hold examples"),
        ({"norm_inputs": torch.zeros(1, 6)}, "barrier: a batch gives norm a tensor of shape"),
        ({"norm": "whiten"}, "barrier: norm must be one of 'reset', 'repair'"),
        ({"norm": "repair"}, "barrier: norm='repair' needs norm_inputs"),
        ({"targets": torch.zeros(5, device="meta").long()}, "barrier: targets is on meta"),
        (
            {"model": Net().double()},
            "barrier: the model's fc1.weight is torch.float64, but the net",
        ),
        (
            {"model": Net().to("meta")},
            "barrier: the model's fc1.weight is on meta, but inputs is on",
        ),
        ({"model": nn.Linear(6, 4)}, "barrier: model has no tensor 'fc1.weight'"),
        ({"loss": 3}, "barrier: loss must be a function of outputs and targets"),
        ({"loss": nn.CrossEntropyLoss()}, r"barrier: loss must return one loss a sample, \[5\]"),
        ({"loss": lambda outputs, targets: 0.0}, "barrier: what loss returns must be a tensor"),
        ({"end": torch.zeros(NET_SPEC.numel, device="meta")}, "barrier: end is on meta"),
    ],
)
def test_barrier_refuses_bad_input(change: dict, message: str) -> None:
    ends = {"start": torch.zeros(NET_SPEC.numel), "end": torch.zeros(NET_SPEC.numel)}
    with pytest.raises((ValueError, TypeError), match=message):
        align.barrier(**(COMMON | ends | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spec": 3}, "barrier_simplex: spec must be a WeightSpec"),
        ({"corners": torch.zeros(NET_SPEC.numel)}, r"barrier_simplex: corners must have shape"),
        (
            {"corners": torch.zeros(1, NET_SPEC.numel)},
            "corners must hold at least 2 networks, not 1",
        ),
        ({"corners": torch.zeros(2, NET_SPEC.numel).int()}, "corners must be floating point"),
        ({"points": 1}, "barrier_simplex: points must be at least 2"),
        ({"weights": [[1.0, 0, 0]]}, "barrier_simplex: weights must be a tensor"),
        ({"weights": torch.eye(2)}, "weights has length 2, but the corners has size 3"),
        (
            {"weights": torch.ones(1, 3)},
            r"rows of weights must sum to 1, but weights\[0\] sums to 3",
        ),
        ({"weights": torch.full((1, 3), torch.nan)}, "weights must be finite"),
        ({"weights": torch.zeros(0, 3)}, "weights holds no point"),
        ({"weights": torch.eye(3).long()}, "weights must be floating point"),
        ({"targets": torch.zeros(5)}, "barrier_simplex: targets must be int64 classes"),
    ],
)
def test_barrier_simplex_refuses_bad_input(change: dict, message: str) -> None:
    corners = {"corners": torch.zeros(3, NET_SPEC.numel)}
    with pytest.raises((ValueError, TypeError), match=message):
        barrier_simplex(**(COMMON | corners | change))
