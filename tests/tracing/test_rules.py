"""What single ops do to labels, and what a trace refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import architectures
import pytest
import torch
import torch.nn.functional as F
from architectures import Apply
from torch import Tensor, nn

from weightops.tracing import explain, trace, verify

SERIES = torch.randn(2, 5, 4)


def between(function: Callable[[Any, Tensor], Tensor], width: int = 6, out: int = 6) -> nn.Module:
    """A function of hidden units ``[2, 5, width]`` between two linear maps."""
    return Apply(
        lambda model, x: model.head(function(model, model.fc(x))),
        fc=nn.Linear(4, width),
        head=nn.Linear(out, 2),
    )


#: hidden units come out of these as one label
KEPT: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "a scalar": lambda m, x: 2 * x + 1,
    "a uniform tensor": lambda m, x: x * torch.full((6,), 0.5) + torch.zeros(6),
    "a lifted uniform constant": lambda m, x: x * torch.tensor([2.0] * 6),
    "a constant along another axis": lambda m, x: x * torch.arange(5.0)[:, None],
    "normalised by a reduction": lambda m, x: (
        (x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True)
    ),
    "softmax": lambda m, x: x.softmax(-1),
    "in place": lambda m, x: x.mul_(2).relu_(),
    "its greatest": lambda m, x: x * x.amax(-1, keepdim=True) + x.max(-1, keepdim=True)[0],
    "transposed and back": lambda m, x: x.transpose(1, 2).contiguous().mT,
    "padded and cropped": lambda m, x: F.pad(F.pad(x, (0, 3)), (0, -3)) * x,
    "moved by an index elsewhere": lambda m, x: x[:, torch.tensor([4, 0, 2])],
    "written to elsewhere": lambda m, x: torch.cat(
        [x.clone().index_fill_(1, torch.tensor([1]), 0.0)]
    ),
    "gathered elsewhere": lambda m, x: x.gather(1, torch.zeros(2, 3, 6, dtype=torch.int64)),
    "windows elsewhere": lambda m, x: x.unfold(1, 2, 2).sum(-1),
    "no gradient": lambda m, x: x * torch.no_grad()(torch.sigmoid)(x),
    "complex": lambda m, x: torch.fft.fft(x, dim=1).abs(),
}
#: their order counts here
FROZEN: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "a varying constant": lambda m, x: x * torch.arange(6.0),
    "a lifted varying constant": lambda m, x: x * torch.tensor([1.0, 2, 3, 4, 5, 6]),
    "cumulative": lambda m, x: x.cumsum(-1),
    "sorted": lambda m, x: x.sort(-1)[0],
    "flipped": lambda m, x: x.flip(-1),
    "rolled": lambda m, x: x.roll(1, -1),
    "indexed": lambda m, x: x[..., torch.tensor([1, 0, 3, 2, 5, 4])],
    "the place of its greatest": lambda m, x: x + x.max(-1, keepdim=True)[1],
    "slid over": lambda m, x: F.avg_pool1d(x, 3, 1, 1),
    "every other": lambda m, x: torch.cat([x[..., ::2], x[..., 1::2]], -1),
    "an unknown op": lambda m, x: torch.linalg.pinv(x).mT,
    "masked": lambda m, x: x.masked_fill(torch.tensor([0, 1, 0, 0, 0, 0], dtype=torch.bool), 0.0),
    "windows": lambda m, x: x.unfold(2, 2, 2).flatten(2),
    "triangular": lambda m, x: x.tril(),
}


@pytest.mark.parametrize("name", KEPT)
def test_hidden_units_keep_one_label(name: str) -> None:
    torch.manual_seed(0)
    model = between(KEPT[name])
    spec = trace(model, SERIES)
    assert dict(spec.labels) == {"fc": 6}
    assert spec.axes["head.weight"] == (None, "fc")
    verify(spec, model, SERIES, trials=1)


@pytest.mark.parametrize("name", FROZEN)
def test_hidden_units_are_fixed(name: str) -> None:
    told = explain(between(FROZEN[name]), SERIES)
    assert not told.labels
    assert told.permutable == 0
    assert bool(told.unknown) == (name == "an unknown op")


#: function, hidden width, width it hands on, axes of fc.weight[0], and of head.weight[1], by parts
STRUCTURES: dict[str, tuple[Any, int, int, list[Any], list[Any]]] = {
    "two labels side by side": (
        lambda m, x: torch.cat([x[..., 2:], x[..., :2]], -1),
        6,
        6,
        ["a", "b"],
        ["b", "a"],
    ),
    "two of the same": (lambda m, x: torch.cat([x, x], -1), 6, 12, ["a"], [(None, "a")]),
    "a gate and what it gates": (lambda m, x: F.glu(x, -1), 6, 3, [(None, "a")], ["a"]),
    # Copies of a unit are alike, so their weights may change places.
    "interleaved": (lambda m, x: x.repeat_interleave(2, -1), 6, 12, ["a"], [("a", "b")]),
    "a view's factors": (lambda m, x: x.unflatten(-1, (2, 3)).sum(2), 6, 3, [("a", "b")], ["b"]),
    "padded": (lambda m, x: F.pad(x, (0, 2)), 6, 8, ["a"], ["a", None]),
    "heads over three dimensions each": (
        # As GPT-NeoX: heads lead, so that parts can't be told apart and share a label.
        lambda m, x: (lambda q, k, v: ((q * k).sum(-1, keepdim=True) * v).flatten(2))(
            *x.unflatten(-1, (2, 9)).chunk(3, -1)
        ),
        18,
        6,
        [("a", None, "b")],
        [("a", "b")],
    ),
    "queries, keys and values of unequal numbers of heads": (
        lambda m, x: (
            lambda q, k, v: (
                F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2)
            )
        )(*x.unflatten(-1, (8, 3)).transpose(1, 2).split([4, 2, 2], 1)),
        24,
        12,
        [("a", "b", "c"), ("a", "c"), ("a", "d")],
        [("a", "b", "d")],
    ),
    "fixed on both sides": (
        # Of (None, a, None) the label goes.
        lambda m, x: (
            x.unflatten(-1, (2, 3, 2))
            * torch.arange(1.0, 3)
            * torch.tensor([1.0, 2])[:, None, None]
        ).flatten(2),
        12,
        12,
        [None],
        [None],
    ),
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_axes_are_refined_as_ops_split_and_join_them(name: str) -> None:
    torch.manual_seed(0)
    function, width, out, rows, columns = STRUCTURES[name]
    model = between(function, width, out)
    spec = trace(model, SERIES)
    found = [
        [entries[axis] for part, entries in spec.axes.items() if part.startswith(tensor)]
        for tensor, axis in (("fc.weight", 0), ("head.weight", 1))
    ]
    # Rename in order of appearance.
    names: dict[str, str] = {}

    def renamed(entry: Any) -> Any:
        if isinstance(entry, tuple):
            return tuple(map(renamed, entry))
        return None if entry is None else names.setdefault(entry, "abcdef"[len(names)])

    assert [[renamed(entry) for entry in entries] for entries in found] == [rows, columns]
    if spec.labels:
        verify(spec, model, SERIES, trials=1)


def test_constant_buffers_are_fixed_and_running_statistics_permute() -> None:
    model = between(lambda m, x: m.norm((x * m.table[:5, None]).mT).mT)
    model.norm = nn.BatchNorm1d(6)
    model.register_buffer("table", torch.rand(8))
    model.register_buffer("mask", torch.ones(3, dtype=torch.bool))
    spec = trace(model, SERIES)
    assert spec.axes["table"] == (None,)
    assert spec.axes["norm.running_mean"] == spec.axes["norm.running_var"] == ("fc",)
    assert "mask" not in spec.shapes
    assert "norm.num_batches_tracked" not in spec.shapes
    model = between(lambda m, x: x * m.table)
    model.register_buffer("table", torch.ones(6))  # uniform now, but a state dict may change it
    assert not trace(model, SERIES).labels


def test_unused_tensors_and_shared_memory_are_fixed() -> None:
    model = between(lambda m, x: x)
    model.unused = nn.Linear(3, 3)
    told = explain(model, SERIES)
    assert told.frozen["unused.weight", 0] == "not used by the model"
    assert dict(told.spec.labels) == {"fc": 6}

    model = Apply(a=nn.Linear(4, 4), b=nn.Linear(4, 4), c=nn.Linear(4, 4))
    model.b.weight = nn.Parameter(model.a.weight.data.T)
    told = explain(model, torch.randn(3, 4))
    assert told.frozen["a.weight", 0] == "memory shared with b.weight in another layout"
    # What is left: the units between b and c would have to permute b.weight.
    assert not told.labels


def test_tied_layers_share_labels() -> None:
    model = Apply(a=nn.Linear(4, 6), b=nn.Linear(6, 6), c=nn.Linear(6, 6), d=nn.Linear(6, 2))
    apart = trace(model, torch.randn(3, 4))
    assert dict(apart.labels) == {"a": 6, "b": 6, "c": 6}
    model.c.weight = model.b.weight
    tied = trace(model, torch.randn(3, 4))
    assert dict(tied.labels) == {"a": 6}
    assert "c.weight" not in tied.shapes
    verify(tied, model, torch.randn(3, 4), trials=1)


def test_a_position_table_longer_than_the_input_stays_one_tensor() -> None:
    model = between(lambda m, x: x + m.table[:, : x.shape[1]])
    model.table = nn.Parameter(torch.randn(1, 9, 6))
    spec = trace(model, SERIES)
    assert spec.axes["table"] == (None, None, "fc")
    verify(spec, model, SERIES, trials=1)


def test_stacked_weights_taken_apart_by_index_have_labels_of_their_own() -> None:
    model = Apply(
        lambda m, x: F.linear(F.linear(F.linear(x, m.into), m.w[0]).relu(), m.w[1]).sum(-1),
        into=nn.Identity(),
    )
    model.into = nn.Parameter(torch.randn(6, 4))
    model.w = nn.Parameter(torch.randn(2, 6, 6))
    spec = trace(model, SERIES)
    assert spec.axes["w[0:1]"] == (None, "w[0:1]", "into")
    assert spec.axes["w[1:2]"] == (None, "w[1:2]", "w[0:1]")
    assert len(spec.labels) == 3
    verify(spec, model, SERIES, trials=1)


def test_keyword_inputs_reach_the_model() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.head = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor, *, scale: Tensor) -> dict[str, Tensor]:
            return {"out": self.head(self.fc(x) * scale)}

    assert dict(trace(Named(), SERIES, scale=torch.rand(5, 1)).labels) == {"fc": 6}
    assert not trace(Named(), SERIES, scale=torch.rand(6)).labels


def test_models_on_meta_are_traced() -> None:
    with torch.device("meta"):
        model, tokens = architectures.GPT(depth=1), torch.zeros(1, 7, dtype=torch.int64)
    assert trace(model, tokens) == trace(
        architectures.GPT(depth=1), tokens.new_zeros(1, 7, device="cpu")
    )


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) if x.sum() > 0 else x


def test_models_that_do_not_export_are_refused_by_module_and_line() -> None:
    model = Apply(first=nn.Linear(4, 4), branch=Branching())
    with pytest.raises(
        ValueError,
        match=r"trace: torch.export can't export Apply \(in module 'branch', Branching, .*test_rules.py:\d+\): .*data-dependent",
    ):
        trace(model, SERIES)
    with pytest.raises(ValueError, match=r"explain: .* \(in module 'first', Linear"):
        explain(model, torch.randn(2, 3))
    assert model.training
    with pytest.raises(TypeError, match="trace: model must be a module, not dict"):
        trace({}, SERIES)  # type: ignore[arg-type]
