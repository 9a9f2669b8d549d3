"""``verify`` passes right specs of fresh models, and names what is wrong with the others."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from weightops import WeightSpec
from weightops.spec import Axis
from weightops.tracing import Verification, VerificationError, verify

NORM = ("weight", "bias", "running_mean", "running_var")


def spec_of(model: nn.Module, labels: Mapping[str, Any], **sizes: int) -> WeightSpec:
    """``labels``: tensor -> its entries; tensors it lacks are fixed, integer and tied ones left out."""
    axes: dict[str, tuple[Axis, ...]] = {}
    known = set()
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and tensor.data_ptr() not in known:
            axes[name] = labels.get(name, (None,) * tensor.dim())
            known.add(tensor.data_ptr())
    shapes = {name: model.state_dict()[name].shape for name in axes}
    return WeightSpec(axes, shapes, sizes=sizes or None, unverified=True)


def mlp() -> nn.Module:
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    for layer in model[::2]:
        nn.init.zeros_(layer.bias)
    return model


MLP = {
    **{"0.weight": ("a", None), "0.bias": ("a",)},
    **{"2.weight": ("b", "a"), "2.bias": ("b",), "4.weight": (None, "b")},
}
X = torch.randn(8, 5, generator=torch.Generator().manual_seed(1))


class Residual(nn.Module):
    """A residual network with batch norms, a classifier that reads a flattened map."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                *(nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1)),
                *(nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1)),
            )
            for _ in range(2)
        )
        self.out = nn.Linear(width * 16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.out(x.flatten(1))


def residual_labels() -> dict[str, Any]:
    labels: dict[str, Any] = {"stem.weight": ("r", None, None, None)}
    for i in range(2):
        for j, inner in ((0, "r"), (3, f"i{i}")):
            labels |= {f"blocks.{i}.{j}.{each}": (inner,) for each in NORM}
        labels[f"blocks.{i}.2.weight"] = (f"i{i}", "r", None, None)
        labels[f"blocks.{i}.2.bias"] = (f"i{i}",)
        labels[f"blocks.{i}.5.weight"] = ("r", f"i{i}", None, None)
        labels[f"blocks.{i}.5.bias"] = ("r",)
    return labels | {"out.weight": (None, ("r", None))}


IMAGE = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(2))


class Attention(nn.Module):
    """A language model with a tied embedding, norms in float32, one block of attention."""

    def __init__(self, width: int = 6, heads: int = 3, inner: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.embedding = nn.Embedding(11, width)
        self.register_buffer("causal", torch.ones(5, 5).tril())
        self.scale = nn.Parameter(torch.ones(width))
        self.query, self.key, self.value = (nn.Linear(width, heads * inner) for _ in range(3))
        self.merge = nn.Linear(heads * inner, width)
        self.head = nn.Linear(width, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor, *, temperature: float = 1.0) -> Tensor:
        x = self.embedding(tokens)
        h = x.float()
        h = self.scale * (h * (h.square().mean(-1, keepdim=True) + 1e-5).rsqrt()).to(x.dtype)
        q, k, v = (
            layer(h).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        scores = (q @ k.mT / temperature).masked_fill(self.causal == 0, -torch.inf)
        h = scores.softmax(-1, dtype=torch.float32).to(v.dtype) @ v
        return self.head(x + self.merge(h.transpose(1, 2).flatten(2)) + torch.zeros(6))


ATTENTION = {
    **{"embedding.weight": (None, "w"), "scale": ("w",)},
    **{f"{name}.weight": (("h", "k"), "w") for name in ("query", "key")},
    **{f"{name}.bias": (("h", "k"),) for name in ("query", "key")},
    **{"value.weight": (("h", "v"), "w"), "value.bias": (("h", "v"),)},
    **{"merge.weight": ("w", ("h", "v")), "merge.bias": ("w",)},
}
TOKENS = torch.tensor([[1, 4, 2, 10, 3], [0, 0, 7, 2, 9]])


@dataclass
class Output:
    states: Tensor
    last: Tensor


class Recurrent(nn.Module):
    """An RNN that returns nested outputs and takes its first state by name."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.RNN(3, 4, batch_first=True)
        self.heads = nn.ModuleList([nn.Linear(4, 2), nn.Linear(4, 1)])
        self.unused = nn.Linear(4, 1)

    def forward(self, x: Tensor, gain: Tensor) -> dict[str, Any]:
        states, last = self.rnn(x)
        return {
            "first": (self.heads[0](states), [states.shape]),
            "second": [Output(self.heads[1](states) * gain, self.heads[0](last).argmax(-1))],
        }


RECURRENT = {
    **{"rnn.weight_ih_l0": ("h", None), "rnn.weight_hh_l0": ("h", "h")},
    **{"rnn.bias_ih_l0": ("h",), "rnn.bias_hh_l0": ("h",), "unused.weight": (None, "h")},
    **{"heads.0.weight": (None, "h"), "heads.1.weight": (None, "h")},
}
SEQUENCE = {"x": torch.randn(2, 5, 3), "gain": torch.tensor(2.0)}


class Concatenation(nn.Module):
    """Two branches side by side: the readers' columns are parts with labels of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 3), nn.Linear(5, 4)
        self.out = nn.Linear(7, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.cat([self.a(x), self.b(x)], -1).relu())


def concatenation(first: str = "a") -> WeightSpec:
    axes = {
        **{"a.weight": ("a", None), "a.bias": ("a",), "b.weight": ("b", None), "b.bias": ("b",)},
        **{"out.weight[:, 0:3]": (None, first), "out.weight[:, 3:7]": (None, "b")},
        "out.bias": (None,),
    }
    state = Concatenation().state_dict()
    sliced = {"out.weight[:, 0:3]": (2, 3), "out.weight[:, 3:7]": (2, 4)}
    return WeightSpec(axes, {name: sliced.get(name) or state[name].shape for name in axes})


def test_parts_are_proven_and_named_like_tensors() -> None:
    assert verify(concatenation(), Concatenation(), X).labels == 2
    with pytest.raises(VerificationError, match="it is missing on out") as caught:
        verify(concatenation(first="c"), Concatenation(), X)
    assert (caught.value.label, caught.value.tensor) == ("a", "out.weight[:, 0:3]")


def changed(labels: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    return {name: entries for name, entries in (labels | changes).items() if entries is not ...}


@pytest.mark.parametrize(
    ("model", "labels", "sizes", "inputs", "kwargs", "count"),
    [
        (mlp(), MLP, {}, (X,), None, 2),
        (Residual(), residual_labels(), {}, (IMAGE,), {}, 3),
        (Attention(), ATTENTION, {"h": 3}, (TOKENS,), {"temperature": 2.0}, 4),
        (Recurrent(), RECURRENT, {}, (), SEQUENCE, 1),
    ],
    ids=["mlp", "residual", "attention", "recurrent"],
)
def test_right_specs_of_fresh_models_pass_and_the_model_stays_as_it_is(
    model: nn.Module, labels: Any, sizes: Any, inputs: Any, kwargs: Any, count: int
) -> None:
    spec = spec_of(model, labels, **sizes)
    other = copy.copy(spec)
    before = copy.deepcopy(model.state_dict())
    result = verify(spec, model, *inputs, kwargs=kwargs)
    assert isinstance(result, Verification)
    assert result.labels == count
    assert result.error < 1e-11
    labelled = sum(spec.shapes[name].numel() for name in labels)
    assert 0.7 < result.moved * spec.numel / labelled <= 1
    assert not spec.unverified
    assert other.unverified
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.get_default_dtype() == torch.float32


#: model, right labels, what is wrong with the spec -> the label, tensor and axis that are named
WRONG: dict[str, tuple[Any, Any, dict[str, Any], dict[str, int], Any, tuple]] = {
    "a missing bias, which is zero at initialisation": (
        *(mlp(), MLP, {"2.bias": (None,)}, {}, X),
        ("b", "2.bias", 0, r"'b' .* missing on 2\.bias axis 0 \(fixed\)"),
    ),
    "a missing statistic, which is one at initialisation": (
        *(Residual(), residual_labels(), {"blocks.1.3.running_var": (None,)}, {}, IMAGE),
        ("i1", "blocks.1.3.running_var", 0, "missing on blocks.1.3.running_var"),
    ),
    "a missing reader of a flattened map": (
        *(Residual(), residual_labels(), {"out.weight": (None, None)}, {}, IMAGE),
        ("r", "out.weight", 1, r"missing on out\.weight axis 1"),
    ),
    "a label on the classes": (
        *(mlp(), MLP, {"4.bias": ("c",)}, {}, X),
        ("c", "4.bias", 0, r"'c' .* does not belong on 4\.bias axis 0"),
    ),
    "kernel height tied with channels": (
        *(Residual(), residual_labels(), {"stem.weight": ("r", "rgb", "rgb", None)}, {}, IMAGE),
        ("rgb", None, None, "it stands on stem.weight axis 1, stem.weight axis 2"),
    ),
    "two labels exchanged in a matrix": (
        *(mlp(), MLP, {"2.weight": ("a", "b")}, {}, X),
        ("a", "2.weight", 0, r"2\.weight axis 0 \('a'\) in the place of 'b', on 2\.weight axis 1"),
    ),
    "two labels exchanged across tensors": (
        *(mlp(), MLP, {"0.bias": ("b",), "2.bias": ("a",)}, {}, X),
        ("a", "2.bias", 0, r"2\.bias axis 0 \('a'\) in the place of 'b', on 0\.bias axis 0"),
    ),
    "another label on one tensor": (
        *(mlp(), MLP, {"2.bias": ("a",)}, {}, X),
        ("a", "2.bias", 0, "'a' .* does not belong on"),
    ),
    "a residual tie that one block breaks": (
        *(
            Residual(),
            residual_labels(),
            {
                "blocks.1.5.weight": ("s", "i1", None, None),
                "blocks.1.5.bias": ("s",),
                "out.weight": (None, ("s", None)),
            },
        ),
        *({}, IMAGE, ("r", "blocks.1.5.weight", 0, "'s' must be the same label")),
    ),
    "a product in the wrong order": (
        *(Attention(), ATTENTION, {"query.weight": (("k", "h"), "w")}, {"h": 3}, TOKENS),
        ("k", "query.weight", 0, r"\('k', 'h'\) must be \('h', 'k'\), on query\.weight axis 0$"),
    ),
    "a product in the wrong order everywhere": (
        *(
            Attention(),
            ATTENTION,
            {
                "value.weight": (("v", "h"), "w"),
                "value.bias": (("v", "h"),),
                "merge.weight": ("w", ("v", "h")),
            },
        ),
        *({"h": 3}, TOKENS, ("h", "value.weight", 0, r"must be \('h', 'v'\), on value\.weight")),
    ),
    "a label on the wrong axis": (
        *(mlp(), MLP, {"2.weight": (None, "a"), "2.bias": (None,), "4.weight": (None, "a")}, {}, X),
        ("a", "4.weight", 1, r"'a' .* does not belong on 4\.weight axis 1"),
    ),
    "nothing single mends it": (
        *(mlp(), MLP, {"4.weight": ("out", "b"), "4.bias": ("out",)}, {}, X),
        ("out", None, None, "it stands on 4.weight axis 0, 4.bias axis 0"),
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_specs_name_label_tensor_and_axis(kind: str) -> None:
    model, labels, changes, sizes, inputs, (label, tensor, axis, text) = WRONG[kind]
    spec = spec_of(model, changed(labels, changes), **sizes)
    with pytest.raises(VerificationError, match="^verify: .*" + text) as caught:
        verify(spec, model, inputs)
    assert (caught.value.label, caught.value.tensor, caught.value.axis) == (label, tensor, axis)
    assert spec.unverified


def test_gradients_are_compared_too() -> None:
    class Detached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            return x * (self.w[:2].sum() + self.w[2:].sum().detach())

    model = Detached()
    with pytest.raises(
        VerificationError, match=r"changes gradients, but not outputs: .* w axis 0"
    ) as caught:
        verify(spec_of(model, {"w": ("h",)}), model, torch.ones(2))
    assert caught.value.label == "h"


def test_tables_of_constants_are_taken_as_they_are() -> None:
    class Table(nn.Module):
        """Both halves of the table are equal, as in rotary embeddings; with noise they would not be."""

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.rand(1, 3).expand(2, 3).contiguous())
            self.w, self.v = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(2, 3))

        def forward(self, x: Tensor) -> Tensor:
            return x * ((self.w * self.table).sin() * self.v).sum()

    model = Table()
    verify(spec_of(model, {"w": ("half", None), "v": ("half", None)}), model, torch.ones(2))


class Forward(nn.Module):
    def __init__(self, forward: Any) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.rand(4))
        self.call = forward

    def forward(self, x: Tensor) -> Any:
        return self.call(x, self.w)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda x, w: (x * w.sum()).argmax(), "model has no floating output to compare"),
        (lambda x, w: [], "model has no floating output to compare"),
        (lambda x, w: x / (w - w).sum(), r"output 0 of the model must be finite.* is inf"),
        (lambda x, w: x + 1, "no output of the model has a gradient by its weights"),
        (lambda x, w: x * w.sum().detach(), "no output of the model has a gradient by its weights"),
        (lambda x, w: x * w.sum() * torch.rand(2), "model is random in eval mode"),
        (lambda x, w: x.view(7) * w.sum(), "model does not run in float64 .* RuntimeError"),
    ],
)
def test_models_that_prove_nothing_are_refused(call: Any, text: str) -> None:
    model = Forward(call)
    with pytest.raises(ValueError, match="^verify: " + text):
        verify(spec_of(model, {"w": ("h",)}), model, torch.ones(2))


def test_models_that_cannot_be_copied_are_refused() -> None:
    model = mlp()
    model[0].computed = 2 * model[0].weight  # as the weight norm of old keeps it
    with pytest.raises(ValueError, match=r"^verify: model can't be copied .*graph leaves"):
        verify(spec_of(model, MLP), model, X)


def test_specs_that_move_nothing_that_counts_are_refused() -> None:
    model = mlp()
    for labels in ({}, {"0.weight": (None, None)}):
        with pytest.raises(ValueError, match="no permutable axis, so there is nothing to prove"):
            verify(spec_of(model, labels), model, X)
    one = nn.Sequential(nn.Linear(5, 1), nn.Linear(1, 2))
    with pytest.raises(ValueError, match="no permutable axis"):
        verify(spec_of(one, {"0.weight": ("a", None)}), one, X)
    recurrent = Recurrent()
    with pytest.raises(ValueError, match="depends on a weight that the spec moves"):
        verify(spec_of(recurrent, {"unused.weight": (None, "h")}), recurrent, kwargs=SEQUENCE)


def test_labels_of_two_units_are_told_apart() -> None:
    """Each has one permutation that moves anything, so that moved together they look like one."""
    model = nn.Sequential(nn.Linear(5, 2), nn.Tanh(), nn.Linear(2, 3))
    labels = {"0.weight": ("a", None), "0.bias": ("a",), "2.weight": (None, "b")}
    spec = spec_of(model, labels)
    with pytest.raises(VerificationError):
        verify(spec, model, X)
    assert spec.unverified
    verify(spec_of(model, labels | {"2.weight": (None, "a")}), model, X)


class Gated(nn.Module):
    """Two experts; no input of ordinary size gets to the second one."""

    def __init__(self) -> None:
        super().__init__()
        self.near = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
        self.far = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x[:, :1] < 100, self.near(x), self.far(x))


def test_labels_that_the_inputs_do_not_reach_are_not_taken_for_proven() -> None:
    model = Gated()
    labels = {
        f"{each}.{name}": tuple(axis and each for axis in axes)
        for each in ("near", "far")
        for name, axes in {"0.weight": "a.", "0.bias": "a", "2.weight": ".a"}.items()
        for axes in [[None if axis == "." else axis for axis in axes]]
    }
    spec = spec_of(model, labels)
    with pytest.raises(ValueError, match=r"a weight that the spec moves by \['far'\]; pass inputs"):
        verify(spec, model, X)
    assert spec.unverified
    verify(spec, model, torch.cat([X, 200 + X]))


def test_draws_go_on_while_rectifiers_are_dead() -> None:
    """Which hides all that lies before them: a wrong spec would pass."""
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 1), nn.ReLU(), nn.Linear(1, 3))
    nn.init.constant_(model[2].weight, 1e-3)
    nn.init.zeros_(model[2].bias)
    wrong = {"0.weight": ("a", None), "0.bias": ("a",), "2.weight": (None, "b")}
    for seed in range(6):
        with pytest.raises(VerificationError):
            verify(spec_of(model, wrong), model, X, seed=seed, trials=1)


def test_specs_of_other_models_are_refused() -> None:
    with pytest.raises(ValueError, match=r"verify: model has no tensor 'stem\.weight'"):
        verify(spec_of(Residual(), residual_labels()), mlp(), X)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"spec": 3}, TypeError, "spec must be a WeightSpec, not int 3"),
        ({"model": {}}, TypeError, "model must be a module, not dict"),
        ({"kwargs": [3]}, TypeError, "kwargs must map names to inputs, not list"),
        ({"trials": 0}, ValueError, "trials must be at least 1, not 0"),
        ({"seed": 1.0}, TypeError, "seed must be an integer, not float 1.0"),
        ({"rtol": 2}, ValueError, r"rtol must be in \[0, 1\), not 2"),
    ],
)
def test_bad_arguments_are_named(arguments: Any, error: type, text: str) -> None:
    given = {"spec": spec_of(mlp(), MLP), "model": mlp(), "kwargs": {"input": X}} | arguments
    with pytest.raises(error, match="^verify: " + text):
        verify(given.pop("spec"), given.pop("model"), **given)


def test_the_same_seed_gives_the_same_result() -> None:
    model = mlp()
    first, again, other = (verify(spec_of(model, MLP), model, X, seed=seed) for seed in (3, 3, 4))
    assert first == again
    assert first != other
