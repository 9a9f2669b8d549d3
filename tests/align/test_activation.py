"""Activation matching: it undoes a permutation, by statistics that the batches do not change."""

import itertools
import re
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import weightops
from weightops.align.activation import (
    activation_scores,
    assign_factors,
    match_activations,
)

NORM = ("weight", "bias", "running_mean", "running_var")


def spec_of(model: nn.Module, axes: dict[str, tuple], **sizes: int) -> weightops.WeightSpec:
    """A spec of all of a model's floating tensors; those that ``axes`` leaves out are fixed."""
    shapes = {k: tuple(t.shape) for k, t in model.state_dict().items() if t.is_floating_point()}
    parts = {name.partition("[")[0] for name in axes if "[" in name}
    fixed = {k: (None,) * len(shape) for k, shape in shapes.items() if k not in parts}
    assert all(name in shapes or "[" in name for name in axes)
    return weightops.WeightSpec(
        fixed | axes,
        {k: v for k, v in shapes.items() if k not in parts}
        | {
            name: model.state_dict()[name.partition("[")[0]][slices(name)].shape
            for name in axes
            if "[" in name
        },
        sizes=sizes,
    )


def slices(name: str) -> tuple[slice, ...]:
    return tuple(
        slice(*(int(n) if n else None for n in text.split(":")))
        for text in re.search(r"\[(.*)\]", name)[1].split(", ")  # type: ignore[index]
    )


class MLP(nn.Module):
    def __init__(self, width: int = 24, inputs: int = 6, outputs: int = 4) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(inputs, width), nn.Linear(width, width)
        self.fc3 = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(self.fc2(self.fc1(x).relu()).relu())

    def spec(self) -> weightops.WeightSpec:
        return spec_of(
            self,
            {
                "fc1.weight": ("a", None),
                "fc1.bias": ("a",),
                "fc2.weight": ("b", "a"),
                "fc2.bias": ("b",),
                "fc3.weight": (None, "b"),
            },
        )


class CNN(nn.Module):
    """Batch norm, a residual stream, in-place activations, and a linear layer on a flattened map."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.norm2 = nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.conv3, self.norm3 = nn.Conv2d(12, 8, 1), nn.BatchNorm2d(8)
        self.up = nn.ConvTranspose2d(8, 5, 2)
        self.relu, self.fc = nn.SiLU(inplace=True), nn.Linear(5 * 49, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm1(self.conv1(x)))
        y = self.relu(self.norm2(self.conv2(x)))
        x = self.relu(x + self.norm3(self.conv3(y)))
        return self.fc(self.relu(self.up(x)).flatten(1))

    def spec(self) -> weightops.WeightSpec:
        axes: dict[str, tuple] = {
            "conv1.weight": ("stream", None, None, None),
            "conv2.weight": ("inner", "stream", None, None),
            "conv2.bias": ("inner",),
            "conv3.weight": ("stream", "inner", None, None),
            "conv3.bias": ("stream",),
            "up.weight": ("stream", "up", None, None),
            "up.bias": ("up",),
            "fc.weight": (None, ("up", None)),
        }
        for i, label in ((1, "stream"), (2, "inner"), (3, "stream")):
            axes |= {f"norm{i}.{name}": (label,) for name in NORM}
        return spec_of(self, axes)


class Transformer(nn.Module):
    """Tied embedding, one block with grouped-query attention, norms and a fused gate and up."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 16)
        self.norm1, self.norm2 = nn.LayerNorm(16), nn.RMSNorm(16)
        self.query, self.key, self.value = nn.Linear(16, 24), nn.Linear(16, 12), nn.Linear(16, 15)
        self.out = nn.Linear(30, 16)
        self.gate_up, self.down = nn.Linear(16, 40), nn.Linear(20, 16)
        self.head = nn.Linear(16, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        y = self.norm1(x)
        q = self.query(y).unflatten(-1, (3, 2, 4))
        k, v = (each(y).unflatten(-1, (3, -1)) for each in (self.key, self.value))
        weights = torch.einsum("btkgd,bskd->bkgts", q, k).softmax(-1)
        x = x + self.out(torch.einsum("bkgts,bskd->btkgd", weights, v).flatten(2))
        gate, up = self.gate_up(self.norm2(x)).chunk(2, -1)
        return self.head(x + self.down(nn.functional.silu(gate) * up))

    def spec(self) -> weightops.WeightSpec:
        q, k, v = ("kv", "group", "qk"), ("kv", "qk"), ("kv", "v")
        axes: dict[str, tuple] = {
            "embedding.weight": (None, "d"),
            "out.weight": ("d", ("kv", "group", "v")),
            "down.weight": ("d", "hidden"),
        }
        for name, entry in (("query", q), ("key", k), ("value", v)):
            axes |= {f"{name}.weight": (entry, "d"), f"{name}.bias": (entry,)}
        for part in ("[0:20]", "[20:40]"):
            axes |= {f"gate_up.weight{part}": ("hidden", "d"), f"gate_up.bias{part}": ("hidden",)}
        axes |= dict.fromkeys(
            ("norm1.weight", "norm1.bias", "norm2.weight", "out.bias", "down.bias"), ("d",)
        )
        state = spec_of(self, axes | {"head.weight": (None, "d")}, kv=3, group=2, qk=4, v=5)
        tied = {k: v for k, v in state.axes.items() if k != "head.weight"}
        return weightops.WeightSpec(
            tied, {k: state.shapes[k] for k in tied}, sizes=dict(state.labels)
        )


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase] = nn.LSTM, bidirectional: bool = False) -> None:
        super().__init__()
        self.rnn = kind(3, 10, batch_first=True, bidirectional=bidirectional)  # type: ignore[call-arg]
        self.fc = nn.Linear(20 if bidirectional else 10, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.rnn(x)[0][:, -1])

    def spec(self) -> weightops.WeightSpec:
        axes: dict[str, tuple] = {}
        for suffix, label in (("", "h"), ("_reverse", "r")):
            for kind in ("ih", "hh"):
                axes[f"rnn.weight_{kind}_l0{suffix}"] = (
                    (None, label),
                    label if kind == "hh" else None,
                )
                axes[f"rnn.bias_{kind}_l0{suffix}"] = ((None, label),)
        if self.rnn.bidirectional:
            return spec_of(
                self, axes | {"fc.weight[:, 0:10]": (None, "h"), "fc.weight[:, 10:20]": (None, "r")}
            )
        axes = {name: entries for name, entries in axes.items() if "reverse" not in name}
        return spec_of(self, axes | {"fc.weight": (None, "h")}, h=10)


def case(name: str) -> tuple[Any, Tensor]:
    torch.manual_seed(1)
    if name == "transformer":
        return Transformer(), torch.randint(11, (60, 9))
    if name == "cnn":
        return CNN(), torch.randn(60, 3, 8, 8)
    if name == "mlp":
        return MLP(), torch.randn(60, 6)
    kind = {"lstm": nn.LSTM, "gru": nn.GRU, "bidirectional": nn.LSTM}[name]
    return Recurrent(kind, name == "bidirectional"), torch.randn(60, 7, 3)


def randomised(model: Any, spec: weightops.WeightSpec) -> Tensor:
    """A row with norms and statistics of their own for every unit, and no unit that never acts."""
    row = spec.flatten(model)[0].detach()
    row = row + 0.3 * torch.randn(row.shape)
    for name, view in spec.unflatten(row).items():
        if name.endswith("running_var"):
            view.abs_()
        if isinstance(model, MLP) and name.endswith("bias"):
            view.abs_()
    return row


CASES = ["mlp", "cnn", "transformer", "lstm", "gru", "bidirectional"]


@pytest.mark.parametrize("statistic", ["correlation", "gram"])
@pytest.mark.parametrize("name", CASES)
def test_shuffled_copies_are_recovered_exactly(name: str, statistic: str) -> None:
    model, inputs = case(name)
    spec = model.spec()
    reference = randomised(model, spec)
    hidden = spec.random_permutations(3, torch.Generator().manual_seed(2))
    shuffled = weightops.permute(reference.expand(3, -1), hidden, spec)
    # what the spec says is so: otherwise nothing is proven
    outputs = [spec.load_(model.eval(), row)(inputs) for row in (reference, *shuffled)]
    for other in outputs[1:]:
        torch.testing.assert_close(other, outputs[0], rtol=1e-3, atol=1e-4)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.train()
    perms = match_activations(
        spec, reference, shuffled, model, inputs, statistic=statistic, batch_size=17
    )
    for label, inverse in spec.invert(hidden).items():
        assert torch.equal(perms[label], inverse), label
    assert list(perms) == list(spec.labels)
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not model._modules[next(iter(model._modules))]._forward_hooks


def _scores(
    spec: weightops.WeightSpec,
    reference: Tensor,
    flat: Tensor,
    model: nn.Module,
    inputs: Tensor,
    statistic: str = "correlation",
    batch_size: int = 1000,
) -> dict[tuple[str, ...], Tensor]:
    return activation_scores(
        spec, reference[None], flat[:, None], model, (inputs,), statistic, batch_size, False
    )


@pytest.mark.parametrize("name", CASES)
def test_every_label_is_seen(name: str) -> None:
    model, inputs = case(name)
    row = model.spec().flatten(model).detach()
    scores = _scores(model.spec(), row[0], row, model, inputs)
    assert {label for labels in scores for label in labels} == set(model.spec().labels)


@pytest.mark.parametrize("offset", [0.0, 100.0])
@pytest.mark.parametrize("statistic", ["correlation", "gram"])
def test_streamed_scores_are_the_definition(statistic: str, offset: float) -> None:
    torch.manual_seed(3)
    model, inputs = MLP(), torch.randn(300, 6)
    spec = model.spec()
    flat = torch.stack([randomised(model, spec) for _ in range(3)])
    views = spec.unflatten(flat)
    views["fc1.bias"].add_(offset)
    views["fc1.weight"][1, 4] = 0  # a unit that does not vary
    hidden: list[dict[str, np.ndarray]] = []
    for row in flat:
        network = spec.load_(MLP(), row).double()
        a = network.fc1(inputs.double()).relu()
        b = network.fc2(a).relu()
        hidden.append({"a": a.detach().numpy(), "b": b.detach().numpy()})
    for batch_size in (300, 64, 1):
        scores = _scores(spec, flat[0], flat[1:], model, inputs, statistic, batch_size)
        for label, n in (("a", 1), ("a", 2), ("b", 1), ("b", 2)):
            x, y = hidden[0][label], hidden[n][label]
            expected = x.T @ y / np.linalg.norm(x) / np.linalg.norm(y)
            if statistic == "correlation":
                varies = np.outer(x.std(0) > 1e-9, y.std(0) > 1e-9)
                assert varies.any()
                assert (label, n) != ("a", 1) or not varies[:, 4].any()
                with np.errstate(invalid="ignore", divide="ignore"):
                    expected = np.where(varies, np.corrcoef(x.T, y.T)[:24, 24:], 0)
            np.testing.assert_allclose(
                scores[label,][n - 1], expected, rtol=1e-4, atol=2e-4 if offset else 1e-5
            )


def test_batches_of_any_size_match_alike() -> None:
    model, inputs = case("cnn")
    spec = model.spec()
    flat = torch.stack([randomised(model, spec) for _ in range(3)]).double()
    inputs = inputs.double()
    found = [
        match_activations(spec, flat[0], flat[1:], model.double(), inputs, batch_size=size)
        for size in (1000, 60, 7)
    ]
    for other in found[1:]:
        assert all(torch.equal(p, found[0][label]) for label, p in other.items())


def test_one_permutation_serves_all_checkpoints() -> None:
    model, inputs = case("mlp")
    spec = model.spec()
    generator = torch.Generator().manual_seed(4)
    trajectory = torch.stack([randomised(model, spec) for _ in range(3)])
    hidden = spec.random_permutations(2, generator)
    rows = {label: p.repeat_interleave(3, 0) for label, p in hidden.items()}
    shuffled = weightops.permute(trajectory.repeat(2, 1), rows, spec).view(2, 3, -1)
    found = match_activations(spec, trajectory, shuffled, model, inputs)
    assert all(torch.equal(found[label], p) for label, p in spec.invert(hidden).items())
    pairs = [_scores(spec, trajectory[t], shuffled[:, t], model, inputs)["a",] for t in range(3)]
    assert torch.equal(found["a"], weightops.assign(sum(pairs)))


def test_product_axes_reach_the_best_pair_of_permutations() -> None:
    generator = torch.Generator().manual_seed(5)
    score = torch.rand(4, 12, 12, generator=generator, dtype=torch.float64)
    found = assign_factors({"head": 3, "dim": 4}, {("head", "dim"): score})
    for n in range(4):
        blocks = score[n].view(3, 4, 3, 4)
        heads = torch.tensor(list(itertools.permutations(range(3))))
        given = blocks.movedim(2, 1)[range(3), heads].sum(1)  # [heads, 4, 4]
        best = given.gather(2, weightops.assign(given)[..., None]).sum((1, 2)).max()
        head, dim = found["head"][n], found["dim"][n]
        reached = blocks.movedim(2, 1)[range(3), head].sum(0)[range(4), dim].sum()
        assert reached >= 0.97 * best


class Partly(nn.Module):
    """A label of a parameter that no module owns, two recurrent layers, and experts of choice."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.fc = nn.GRU(3, 8, 2), nn.Linear(8, 6)
        self.weight = nn.Parameter(torch.randn(5, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.rnn(x)[0]).relu() @ self.weight.T

    def spec(self) -> weightops.WeightSpec:
        axes: dict[str, tuple] = {"fc.weight": ("out", "h1"), "fc.bias": ("out",)}
        axes["weight"] = (None, "out")
        for layer, into in ((0, None), (1, "h0")):
            for kind, column in (("ih", into), ("hh", f"h{layer}")):
                axes[f"rnn.weight_{kind}_l{layer}"] = ((None, f"h{layer}"), column)
                axes[f"rnn.bias_{kind}_l{layer}"] = ((None, f"h{layer}"),)
        return spec_of(self, axes)


def test_unseen_labels_are_matched_by_weights_given_the_others() -> None:
    torch.manual_seed(6)
    model, inputs = Partly(), torch.randn(9, 20, 3)
    spec = model.spec()
    reference = spec.flatten(model)[0].detach()
    hidden = spec.random_permutations(2, torch.Generator().manual_seed(7))
    shuffled = weightops.permute(reference.expand(2, -1), hidden, spec)
    seen = {k for labels in _scores(spec, reference, shuffled, model, inputs) for k in labels}
    assert seen == {"h1", "out"}
    found = match_activations(spec, reference, shuffled, model, inputs)
    assert all(torch.equal(found[label], p) for label, p in spec.invert(hidden).items())


class Routed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(6, 1)
        self.expert = MLP()

    def forward(self, x: Tensor) -> Tensor:
        return self.expert(x[self.gate(x)[:, 0] > 0])


def test_modules_that_see_other_samples_in_another_network_are_left_out() -> None:
    torch.manual_seed(8)
    model, inputs = Routed(), torch.randn(100, 6)
    spec = spec_of(model, {f"expert.{k}": v for k, v in MLP().spec().axes.items()})
    flat = spec.flatten([model, Routed()]).detach()
    assert _scores(spec, flat[0], flat[:1], model, inputs).keys() == {("a",), ("b",)}
    assert not _scores(spec, flat[0], flat[1:], model, inputs)
    found = match_activations(spec, flat[0], flat[1:], model, inputs)
    expected = weightops.align.match(spec, flat[0], flat[1:])
    assert all(torch.equal(p, expected.perms[label]) for label, p in found.items())


def test_several_inputs_in_batches() -> None:
    model = nn.Bilinear(3, 4, 5)
    spec = spec_of(model, {"weight": ("h", None, None), "bias": ("h",)})
    reference = spec.flatten(model)[0].detach()
    hidden = spec.random_permutations(1, torch.Generator().manual_seed(9))
    shuffled = weightops.permute(reference[None], hidden, spec)
    inputs = (torch.randn(50, 3), torch.randn(50, 4))
    found = match_activations(spec, reference, shuffled, model, inputs, batch_size=20)
    assert torch.equal(found["h"], spec.invert(hidden)["h"])


@pytest.mark.parametrize("statistic", ["correlation", "gram"])
def test_trained_networks_come_closer(statistic: str) -> None:
    x, y = (torch.from_numpy(each) for each in load_digits(return_X_y=True))
    x = x.float() / 16
    rows, model = [], MLP(32, 64, 10)
    spec = model.spec()
    for seed in range(3):
        torch.manual_seed(seed)
        trained = MLP(32, 64, 10)
        optimizer = torch.optim.Adam(trained.parameters(), 0.01)
        for _ in range(60):
            optimizer.zero_grad()
            nn.functional.cross_entropy(trained(x), y).backward()
            optimizer.step()
        rows.append(spec.flatten(trained)[0].detach())
    flat = torch.stack(rows)
    perms = match_activations(spec, flat[0], flat[1:], model, x, statistic=statistic)
    matched = weightops.permute(flat[1:], perms, spec)

    def midpoint(other: Tensor) -> float:
        spec.load_(model, (flat[0] + other) / 2)
        return nn.functional.cross_entropy(model(x), y).item()

    for naive, after in zip(flat[1:], matched, strict=True):
        assert midpoint(after) < 0.6 * midpoint(naive)


def test_activations_that_are_not_finite_are_named() -> None:
    model, inputs = case("mlp")
    spec = model.spec()
    flat = spec.flatten([model, MLP()]).detach()
    inputs[3, 2] = torch.inf
    with pytest.raises(ValueError, match=r"match: activations at 'fc2' \(a\) must be finite"):
        match_activations(spec, flat[0], flat[1:], model, inputs)


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"model": 3}, TypeError, "match: model must be a module, not int 3"),
    ({"inputs": [1.0]}, TypeError, r"match: inputs must be a tensor \[B, ...\], not list"),
    ({"inputs": ()}, ValueError, "match: inputs is an empty tuple"),
    ({"inputs": torch.zeros(0, 6)}, ValueError, r"inputs must hold examples, not shape \[0, 6\]"),
    ({"inputs": torch.tensor(1.0)}, ValueError, r"inputs must hold examples, not shape \[\]"),
    (
        {"inputs": (torch.zeros(2, 6), torch.zeros(3))},
        ValueError,
        r"inputs\[1\] has length 3, but the batch of inputs\[0\] has size 2",
    ),
    ({"statistic": "cosine"}, ValueError, "statistic must be one of 'correlation', 'gram'"),
    ({"batch_size": 0}, ValueError, "match: batch_size must be at least 1, not 0"),
    ({"batch_size": 1.5}, TypeError, "match: batch_size must be an integer"),
]


@pytest.mark.parametrize(("changes", "error", "message"), BAD)
def test_bad_input(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    model, inputs = case("mlp")
    spec = model.spec()
    row = spec.flatten(model).detach()
    arguments = {"model": model, "inputs": inputs} | changes
    with pytest.raises(error, match=message):
        match_activations(spec, row[0], row, **arguments)
