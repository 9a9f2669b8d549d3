"""Activation matching: it undoes a permutation, by statistics that the batches do not change."""

import re
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import weightops
from weightops.align._places import places
from weightops.align.activation import _check_arguments, activation_scores, match_activations

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
