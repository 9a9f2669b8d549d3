"""Networks that begin with pairs of tokens, and the probe of their signals, against torch itself."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import weightops
from weightops import population
from weightops.ops.population import grouped, population_logits, training_reference
from weightops.ops.population.training import population_loss_grad, population_steps, steps_by_torch
from weightops.population import SignalProbe, population_forward, population_train
from weightops.population._resolve import resolve
from weightops.tracing.export import read_weights

TOKENS, CLASSES = 9, 4


class Pairs(nn.Module):
    def __init__(
        self, *layers: nn.Module, width: int, features: int = 5, bias: bool = True
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, features)
        self.first = nn.Linear(2 * features, width, bias=bias)
        self.rest = nn.Sequential(*layers)

    def forward(self, pairs: Tensor) -> Tensor:
        return self.rest(self.first(self.embedding(pairs).flatten(1)))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "relu": lambda: Pairs(nn.ReLU(), nn.Linear(17, CLASSES), width=17),
    "silu": lambda: Pairs(nn.SiLU(), nn.Linear(16, CLASSES), width=16, features=16),
    "nothing": lambda: Pairs(width=CLASSES, bias=False, features=1),
    "norm": lambda: Pairs(nn.LayerNorm(33), nn.Tanh(), nn.Linear(33, CLASSES), width=33),
}


def networks(name: str, count: int = 3) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = MODELS[name]().double().eval()
    state = model.state_dict()
    flat = torch.cat([state[each].flatten() for each in read_weights(model).shapes])
    return model, flat + 0.1 * torch.rand(count, len(flat), dtype=torch.float64)


def data(*rows: int) -> tuple[Tensor, Tensor]:
    return torch.randint(TOKENS, (*rows, 2)), torch.randint(CLASSES, rows)


@pytest.mark.parametrize("rows", [1, 70])
@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients_are_those_of_torch(name: str, rows: int) -> None:
    model, flat = networks(name)
    names = read_weights(model)
    for own in (False, True):
        pairs, targets = data(*([3] if own else []), rows)
        runner, x = resolve("test", flat, model, pairs)
        assert runner.program is not None
        assert runner.program.layers[0].kind == "token_pair"
        logits = population_forward(flat, model, pairs)
        for n, row in enumerate(flat):
            taken = pairs[n] if own else pairs
            expected = torch.func.functional_call(model, names.views(row), (taken,))
            torch.testing.assert_close(logits[n], expected)
        arguments = flat, x, targets, runner.code, runner.shared
        expected = training_reference.population_loss_grad(*arguments)
        for made in (
            population_loss_grad(*arguments),
            grouped.population_loss_grad(*arguments),
        ):
            torch.testing.assert_close(made, expected, rtol=1e-10, atol=1e-12)
        single = (t.float() if t.is_floating_point() else t for t in (flat, x, targets))
        grads = population_loss_grad(*single, runner.code, runner.shared)[1]
        torch.testing.assert_close(grads.double(), expected[1], rtol=1e-3, atol=1e-5)
        accuracy = population_forward(flat, model, pairs, reduce="accuracy", targets=targets)
        torch.testing.assert_close(accuracy, (logits.argmax(2) == targets).double().mean(1))


@pytest.mark.parametrize("batch_size", [None, 7])
def test_training_is_that_of_torch(batch_size: int | None) -> None:
    model, flat = networks("silu")
    pairs, targets = data(3, 40)
    frozen = model.get_parameter("first.bias").requires_grad_(False)
    options: dict[str, Any] = {"steps": 5, "lr": 0.01, "batch_size": batch_size, "progress": False}
    trained = population_train(flat, model, (pairs, targets), **options)
    weights = read_weights(model)
    rows = population._batches.Batches(
        40, batch_size, population._batches.network_seeds("test", 0, 3)
    ).rows(0, 5)
    for n in range(3):
        views = weights.views(flat[n])
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(views[name])
        optimizer = torch.optim.AdamW(model.parameters(), 0.01)
        for step in range(5):
            taken = rows[step, n] if batch_size else slice(None)
            loss = F.cross_entropy(model(pairs[n, taken]), targets[n, taken])
            torch.testing.assert_close(trained.losses[step, n], loss.detach())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        for name, view in weights.views(trained.flat[n]).items():
            torch.testing.assert_close(view, model.state_dict()[name])
    assert not frozen.requires_grad


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_kernel_measures_signals_as_calls_do(every: int, dtype: torch.dtype) -> None:
    model, flat = networks("relu")
    pairs, targets = data(40)
    spec = weightops.trace(model, pairs)
    probe = SignalProbe(spec, "embedding.weight")
    probes = {"called": lambda flat: probe(flat), "measured": probe, "second": probe}
    given = flat.to(dtype), spec, (pairs, targets)
    options: dict[str, Any] = {"every": every, "progress": False}
    trained = population_train(*given, steps=7, probes=probes, **options)
    assert trained.probes["measured"].shape == (-(-7 // every), 3, 4)
    torch.testing.assert_close(trained.probes["measured"], trained.probes["called"])
    torch.testing.assert_close(trained.probes["measured"], trained.probes["second"])
    first = population_train(*given, steps=4, probes={"measured": probe}, **options)
    rest = population_train(
        first.flat, *given[1:], steps=3, state=first.state, probes={"measured": probe}, **options
    )
    both = torch.cat([each.probes["measured"] for each in (first, rest)])
    assert both.equal(trained.probes["measured"])
    embeddings = spec.unflatten(flat.to(dtype))["embedding.weight"]
    torch.testing.assert_close(both[0], weightops.fourier_signal(embeddings))


def test_steps_without_a_kernel_are_the_definitions() -> None:
    model, flat = networks("norm")
    pairs, targets = data(3, 20)
    runner, x = resolve("test", flat, model, pairs)
    batches, rates = torch.randint(20, (4, 3, 6)), torch.full((3,), 0.01).double()
    state, place = torch.zeros(2, *flat.shape, dtype=torch.float64), read_weights(model).offsets
    rest = [], "adamw", [0.1, 0.9, 0.999, 1e-8], 2, [place["embedding.weight"], TOKENS, 5, 3]
    arguments = flat, state, x, targets, batches, rates, runner.code, False, *rest
    expected = training_reference.population_steps(*arguments)
    assert expected[3].shape == (1, 3, 4)
    for made in (steps_by_torch(*arguments), population_steps(*arguments)):
        torch.testing.assert_close(made, expected, rtol=1e-9, atol=1e-11)


def test_tokens_that_do_not_fit_are_refused() -> None:
    model, flat = networks("relu")
    pairs, targets = data(10)
    for wrong in (TOKENS, -1):
        outside = pairs.clone()
        outside[3, 1] = wrong
        message = rf"population_forward: x\[3, 1\] is {wrong}, outside 0..8"
        with pytest.raises(ValueError, match=message):
            population_forward(flat, model, outside)
        runner, _ = resolve("test", flat, model, pairs)
        for op in (
            population_logits,
            lambda *given: population_loss_grad(*given[:2], targets, *given[2:]),
        ):
            with pytest.raises((RuntimeError, IndexError)):
                op(flat, outside.double(), runner.code, True)
    spec = weightops.trace(model, pairs)
    with pytest.raises(TypeError, match="population_forward: x must be int64 or int32"):
        population_forward(flat, spec, pairs.double())
    assert population_forward(flat, spec, pairs.int()).equal(population_forward(flat, spec, pairs))
    assert "token pair, relu, linear" in population.explain(model, pairs)


def test_other_embeddings_fall_to_torch() -> None:
    class Three(Pairs):
        def forward(self, pairs: Tensor) -> Tensor:
            return self.first(self.embedding(pairs).sum(1).repeat(1, 2))

    model = Three(width=CLASSES).double()
    flat = torch.randn(2, weightops.trace(model, torch.zeros(4, 3).long()).numel).double()
    triples = torch.randint(TOKENS, (6, 3))
    assert "something else than pairs of tokens" in population.explain(model, triples)
    assert population_forward(flat, model, triples).shape == (2, 6, CLASSES)
    padded = Pairs(width=CLASSES)
    padded.embedding.padding_idx = 0
    assert "gradients of their own" in population.explain(padded, triples[:, :2])


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("first.weight", None, ""),
        (
            "first.bias",
            ValueError,
            r"must be of an embedding \[p, d\], p >= 3, but first.bias has shape",
        ),
        ("nobody", ValueError, "name must be one of"),
        (3, TypeError, "name must be a string"),
    ],
)
def test_a_probe_is_of_an_embedding(name: Any, error: Any, message: str) -> None:
    model, flat = networks("relu")
    spec = weightops.trace(model, data(10)[0])
    if error is None:
        assert SignalProbe(spec, name)(flat).shape == (3, 8)
        return
    with pytest.raises(error, match=message):
        SignalProbe(spec, name)
    with pytest.raises(TypeError, match="spec must be a WeightSpec"):
        SignalProbe(model, "embedding.weight")  # type: ignore[arg-type]
