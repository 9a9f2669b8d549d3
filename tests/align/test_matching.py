"""Weight matching: it undoes a permutation, never gets worse, and merges real networks."""

import pytest
import torch
from torch import Tensor, nn

import weightops
from weightops import align, testing

SPEC = testing.mlp_spec(6, 12, 9, 4)
RECURRENT = weightops.WeightSpec(
    {"w_in": ("h", None), "w_rec": ("h", "h"), "b": ("h",), "w_out": (None, ("h", None))},
    {"w_in": (8, 3), "w_rec": (8, 8), "b": (8,), "w_out": (2, 16)},
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "spec", [SPEC, RECURRENT, testing.resnet20_spec()], ids=["mlp", "rnn", "resnet"]
)
def test_match_undoes_a_permutation(spec: weightops.WeightSpec, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    reference = torch.randn(spec.numel, generator=generator, dtype=dtype)
    hidden = spec.random_permutations(3, generator)
    shuffled = weightops.permute(reference.expand(3, -1), hidden, spec)
    found = align.match(spec, reference, shuffled)
    torch.testing.assert_close(
        weightops.permute(shuffled, found.perms, spec), reference.expand(3, -1), rtol=0, atol=0
    )
    torch.testing.assert_close(found.objective, reference.double().pow(2).sum().expand(3))


@pytest.mark.parametrize("spec", [SPEC, RECURRENT], ids=["mlp", "rnn"])
def test_objective_rises_to_what_the_permutations_give(spec: weightops.WeightSpec) -> None:
    generator = torch.Generator().manual_seed(2)
    flat = torch.randn(5, spec.numel, generator=generator)
    found = align.match(spec, flat[0], flat[1:], seed=3)
    assert (found.history.diff(dim=0) >= -1e-5).all()
    # With a label twice in one tensor the proposals are linearised, and a network may stay as it is.
    assert (found.history[-1] > found.history[0]).sum() >= (3 if spec is RECURRENT else 4)
    aligned = weightops.permute(flat[1:], found.perms, spec).double()
    torch.testing.assert_close(found.objective, aligned @ flat[0].double())
    torch.testing.assert_close(found.objective, found.history[-1])


def test_no_swap_of_two_units_improves_the_match() -> None:
    generator = torch.Generator().manual_seed(4)
    flat = torch.randn(2, SPEC.numel, generator=generator, dtype=torch.float64)
    found = align.match(SPEC, flat[0], flat[1:])
    for label, size in SPEC.labels.items():
        for i in range(size):
            for j in range(i):
                swapped = {k: v.clone() for k, v in found.perms.items()}
                swapped[label][0, [i, j]] = swapped[label][0, [j, i]]
                reached = weightops.permute(flat[1:], swapped, SPEC)[0] @ flat[0]
                assert reached <= found.objective[0] + 1e-9


def test_running_statistics_do_not_steer_the_match() -> None:
    spec = weightops.WeightSpec(
        {"w": ("h", None), "norm.running_var": ("h",)}, {"w": (6, 3), "norm.running_var": (6,)}
    )
    generator = torch.Generator().manual_seed(6)
    flat = torch.randn(2, spec.numel, generator=generator)
    other = flat.clone()
    other[:, -6:] = 1e6 * torch.rand(2, 6, generator=generator)
    first, second = (align.match(spec, f[0], f[1:]) for f in (flat, other))
    assert torch.equal(first.perms["h"], second.perms["h"])
    counted = align.match(spec, other[0], other[1:], tensors=["norm.running_var"])
    theirs, ours = other[1, -6:][counted.perms["h"][0]], other[0, -6:]
    assert torch.equal(theirs.argsort(), ours.argsort())


def test_deterministic_under_a_seed() -> None:
    generator = torch.Generator().manual_seed(7)
    flat = torch.randn(3, SPEC.numel, generator=generator)
    first, second = (align.match(SPEC, flat[0], flat[1:], seed=1) for _ in range(2))
    assert all(torch.equal(first.perms[label], second.perms[label]) for label in SPEC.labels)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.norm = nn.Linear(6, 12), nn.BatchNorm1d(12)
        self.fc2 = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.norm(self.fc1(x)).relu())


NET_SPEC = weightops.WeightSpec(
    {
        "fc1.weight": ("h", None),
        "fc1.bias": ("h",),
        **{f"norm.{name}": ("h",) for name in ("weight", "bias", "running_mean", "running_var")},
        "fc2.weight": (None, "h"),
        "fc2.bias": (None,),
    },
    {name: tuple(t.shape) for name, t in Net().state_dict().items() if t.dim()},
)


def networks() -> tuple[list[nn.Module], Tensor, Tensor]:
    generator = torch.Generator().manual_seed(8)
    inputs = torch.randn(300, 6, generator=generator)
    targets = inputs[:, :4].argmax(1)
    models: list[nn.Module] = []
    for seed in range(2):
        torch.manual_seed(seed)
        model = Net()
        optimizer = torch.optim.Adam(model.parameters(), 0.02)
        for _ in range(60):
            loss = nn.functional.cross_entropy(model(inputs), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        models.append(model.eval())
    return models, inputs, targets


def test_barrier_follows_the_definition() -> None:
    models, inputs, targets = networks()
    start, end = NET_SPEC.flatten(models)
    before = {name: t.clone() for name, t in models[0].state_dict().items()}
    models[0].train()
    found = align.barrier(
        models[0], NET_SPEC, start, end, inputs, targets, points=5, batch_size=77, progress=False
    )
    assert models[0].training
    assert all(torch.equal(before[name], t) for name, t in models[0].state_dict().items())
    probe, losses, errors = Net().eval(), [], []
    for a in found.alphas.tolist():
        NET_SPEC.load_(probe, ((1 - a) * start + a * end))
        logits = probe(inputs)
        losses.append(nn.functional.cross_entropy(logits, targets).item())
        errors.append((logits.argmax(1) != targets).double().mean().item())
    torch.testing.assert_close(
        found.losses, torch.tensor(losses, dtype=torch.float64), rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(found.errors, torch.tensor(errors, dtype=torch.float64))
    excess = max(
        loss - ((1 - a) * losses[0] + a * losses[-1])
        for a, loss in zip(found.alphas.tolist(), losses, strict=True)
    )
    assert found.loss == pytest.approx(excess, abs=1e-5)


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


def test_reset_statistics_equal_those_of_one_large_batch() -> None:
    models, inputs, _ = networks()
    from weightops.align.barrier import reset_batch_norm

    reset_batch_norm(models[0], inputs, 300)
    activations = models[0].fc1(inputs)
    torch.testing.assert_close(models[0].norm.running_mean, activations.mean(0).detach())
    torch.testing.assert_close(models[0].norm.running_var, activations.var(0).detach())
    assert not models[0].norm.training
    assert models[0].norm.momentum == 0.1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spec": None}, "match: spec must be a WeightSpec"),
        (
            {"reference": torch.zeros(3)},
            r"match: reference has shape \[3\], but the spec's networks have",
        ),
        ({"reference": torch.zeros(1, 1, SPEC.numel)}, "match: reference must have shape"),
        ({"reference": torch.zeros(1, SPEC.numel)}, r"match: flat must have shape \[N, T, P\]"),
        ({"flat": torch.zeros(SPEC.numel)}, r"match: flat must have shape \[N, P\]"),
        (
            {"flat": torch.zeros(1, SPEC.numel).double()},
            "match: flat is torch.float64, but reference",
        ),
        (
            {"flat": torch.full((1, SPEC.numel), float("nan"))},
            r"match: flat must be finite, but flat\[0, 0\] is nan",
        ),
        ({"method": "magic"}, "match: method must be one of"),
        ({"max_sweeps": 0}, "match: max_sweeps must be at least 1"),
        ({"tensors": ["nope"]}, "match: tensors has 'nope'"),
        ({"tensors": []}, "match: tensors is empty"),
        ({"seed": "x"}, "match: seed must be an integer"),
    ],
)
def test_match_refuses_bad_input(change: dict, message: str) -> None:
    arguments = {
        "spec": SPEC,
        "reference": torch.zeros(SPEC.numel),
        "flat": torch.zeros(1, SPEC.numel),
    }
    with pytest.raises((ValueError, TypeError), match=message):
        align.match(**(arguments | change))


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
        ({"points": 1}, "barrier: points must be an integer from 2"),
        ({"batch_size": 0}, "barrier: batch_size must be an integer from 1"),
        ({"norm_inputs": 5}, "barrier: norm_inputs must be a tensor"),
        ({"end": torch.zeros(NET_SPEC.numel, device="meta")}, "barrier: end is on meta"),
    ],
)
def test_barrier_refuses_bad_input(change: dict, message: str) -> None:
    arguments = {
        "model": Net(),
        "spec": NET_SPEC,
        "start": torch.zeros(NET_SPEC.numel),
        "end": torch.zeros(NET_SPEC.numel),
        "inputs": torch.zeros(5, 6),
        "targets": torch.zeros(5).long(),
    }
    with pytest.raises((ValueError, TypeError), match=message):
        align.barrier(**(arguments | change))
