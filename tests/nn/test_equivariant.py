"""Layers on weight space: they commute with permutations, and say what the paper says they are."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, func, nn

from weightops import WeightSpec, permute, testing
from weightops.nn import (
    UNF,
    EquivariantDropout,
    EquivariantLinear,
    EquivariantNorm,
    Featurize,
    InvariantPool,
    PositionalEncoding,
)
from weightops.ops.equivariant.basis import Term

DOUBLE = torch.float64


class Net(nn.Module):
    """A small convolutional network with batch norm, whose map is flattened for the last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 5, 3, bias=False), nn.BatchNorm2d(5)
        self.conv2, self.norm2 = nn.Conv2d(5, 4, 3), nn.BatchNorm2d(4)
        self.fc = nn.Linear(4 * 2 * 2, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.conv1(x)).relu()
        x = self.norm2(self.conv2(x)).relu()
        return self.fc(x.flatten(1))


NORM = ("weight", "bias", "running_mean", "running_var")
CNN = WeightSpec(
    {
        "conv1.weight": ("c1", None, None, None),
        **{f"norm1.{name}": ("c1",) for name in NORM},
        "conv2.weight": ("c2", "c1", None, None),
        "conv2.bias": ("c2",),
        **{f"norm2.{name}": ("c2",) for name in NORM},
        "fc.weight": (None, ("c2", None)),
        "fc.bias": (None,),
    },
    {k: v.shape for k, v in Net().state_dict().items() if "num_batches" not in k},
)
MLP = testing.mlp_spec(6, 5, 4, 3)
TRANSFORMER = testing.transformer_spec(dim=6, hidden=5, heads=2)
RNN = testing.rnn_spec(3, 4, 2)
SPECS = {"mlp": MLP, "cnn": CNN, "transformer": TRANSFORMER, "rnn": RNN}
Make = Callable[[WeightSpec], nn.Module]


def moved(x: Tensor, perms: dict[str, Tensor], spec: WeightSpec) -> Tensor:
    """Features [B, P, C] of the permuted networks."""
    at = permute(torch.arange(spec.numel).repeat(x.shape[0], 1), perms, spec)
    return x.gather(1, at[..., None].expand_as(x))


def seeded(layer: nn.Module, x: Tensor) -> Tensor:
    torch.manual_seed(1)
    return layer(x)


def assert_commutes(layer: nn.Module, spec: WeightSpec, channels: int, g: torch.Generator) -> None:
    layer = layer.to(DOUBLE)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=g, dtype=DOUBLE) / 10)
        x = torch.randn(3, spec.numel, channels, generator=g, dtype=DOUBLE)
        for _ in range(2):
            perms = spec.random_permutations(3, g)
            expected = moved(seeded(layer, x), perms, spec)
            given = seeded(layer, moved(x, perms, spec))
            torch.testing.assert_close(given, expected, rtol=1e-12, atol=1e-12)
            assert not torch.equal(moved(x, perms, spec), x)


LAYERS: dict[str, Make] = {
    "full": lambda spec: EquivariantLinear(spec, 2, 3),
    "sum": lambda spec: EquivariantLinear(spec, 2, 3, normalize="sum", bias=False),
    "local": lambda spec: EquivariantLinear(spec, 2, 3, terms="local"),
    "mpnn": lambda spec: EquivariantLinear(spec, 2, 3, terms="mpnn"),
    "predicate": lambda spec: EquivariantLinear(spec, 2, 3, terms=lambda t: len(t.kept) == 1),
    "rank": lambda spec: EquivariantLinear(spec, 2, 3, rank=1),
    "norm": lambda spec: EquivariantNorm(spec, 2),
    "dropout": lambda spec: EquivariantDropout(),
    "learned": lambda spec: PositionalEncoding(spec, 2),
    "rms": lambda spec: Featurize(spec, 2),
    "gaussian": lambda spec: Featurize(spec, 2, embedding="gaussian", size=3),
    "sinusoidal": lambda spec: Featurize(spec, 2, normalize="none", embedding="sinusoidal", size=2),
    "unf": lambda spec: UNF(spec, [2, 3, 4, 2], "gelu", norm=True, dropout=0.3),
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_layers_commute_with_permutations(
    make: Make, spec: WeightSpec, generator: torch.Generator
) -> None:
    assert_commutes(make(spec), spec, 2, generator)


@pytest.mark.parametrize("fixed", ["index", "channel"])
@pytest.mark.parametrize("rank", [None, 1])
def test_layers_with_parameters_per_fixed_position_commute(
    fixed: str, rank: int | None, generator: torch.Generator
) -> None:
    layer = EquivariantLinear(MLP, 2, 3, fixed=fixed, rank=rank)
    assert (layer.factors is not None) == (rank is not None)
    assert_commutes(layer, MLP, 2, generator)
    assert_commutes(UNF(MLP, [2, 2, 3], "tanh", fixed=fixed, rank=rank), MLP, 2, generator)


def test_a_layer_maps_to_another_weight_space(generator: torch.Generator) -> None:
    out = WeightSpec({"per_unit": ("h1", "h2")}, {"per_unit": (5, 4)})
    for rank in (None, 1):
        layer = EquivariantLinear(MLP, 2, 3, spec_out=out, rank=rank, dtype=DOUBLE)
        x = torch.randn(3, MLP.numel, 2, generator=generator, dtype=DOUBLE)
        perms = MLP.random_permutations(3, generator)
        expected = moved(layer(x), perms, out)
        torch.testing.assert_close(layer(moved(x, perms, MLP)), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("out_features", [None, 5])
def test_invariant_functionals_ignore_permutations(
    spec: WeightSpec, out_features: int | None, generator: torch.Generator
) -> None:
    unf = UNF(spec, [2, 3, 4], "silu", norm=True, invariant=True, out_features=out_features)
    x = torch.randn(3, spec.numel, 2, generator=generator, dtype=DOUBLE)
    assert unf.pool is not None
    for f in (unf.to(DOUBLE), InvariantPool(spec)):
        y = f(x)
        again = f(moved(x, spec.random_permutations(3, generator), spec))
        torch.testing.assert_close(again, y, rtol=0, atol=1e-12)
    assert unf(x).shape == (3, out_features or unf.pool.out_features(4))


def matrix(term: Term, spec: WeightSpec) -> Tensor:
    """[P, P] of one term from what it says: 1 / count wherever equal letters have equal indices."""
    sizes: dict[str, int] = {}
    for name, indices in ((term.output, term.output_indices), (term.input, term.input_indices)):
        atoms = [a for axis in range(len(spec.shapes[name])) for a in spec.factors(name, axis)]
        sizes.update(zip(indices, [size for _, size in atoms], strict=True))
    letters = term.output_indices + term.input_indices
    grids = (
        torch.meshgrid(*[torch.arange(sizes[letter]) for letter in letters], indexing="ij")
        if letters
        else ()
    )
    held = torch.ones([sizes[letter] for letter in letters], dtype=DOUBLE)
    for a, letter in enumerate(letters):
        held = held * (grids[a] == grids[letters.index(letter)])
    for letter in set(term.input_indices) - set(term.output_indices):
        held = held / sizes[letter]
    full = torch.zeros(spec.numel, spec.numel, dtype=DOUBLE)
    rows, columns = (
        slice(spec.offsets[name], spec.offsets[name] + spec.shapes[name].numel())
        for name in (term.output, term.input)
    )
    full[rows, columns] = held.reshape(rows.stop - rows.start, columns.stop - columns.start)
    return full


@pytest.mark.parametrize("rank", [None, 1, 2])
@pytest.mark.parametrize("spec", [MLP, RNN], ids=["mlp", "rnn"])
def test_per_term_parameters_are_those_of_the_paper(
    spec: WeightSpec, rank: int | None, generator: torch.Generator
) -> None:
    layer = EquivariantLinear(spec, 2, 3, rank=rank, dtype=DOUBLE)
    tensors = layer.to_per_term()
    assert list(tensors) == list(spec.shapes)
    x = torch.randn(2, spec.numel, 2, generator=generator, dtype=DOUBLE)
    expected = torch.zeros(2, spec.numel, 3, dtype=DOUBLE)
    for name, theta in tensors.items():
        terms = [term for term in layer.plan.terms if term.output == name]
        assert theta.shape == (len(terms), 2, 3)
        for term, each in zip(terms, theta, strict=True):
            expected += matrix(term, spec) @ x @ each
    assert layer.bias is not None
    with torch.no_grad():
        layer.bias.normal_()
    for row, (name, shape) in zip(layer.bias, spec.shapes.items(), strict=True):
        expected[:, spec.offsets[name] : spec.offsets[name] + shape.numel()] += row
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("fixed", ["permute", "index"])
@pytest.mark.parametrize("terms", ["full", "local", "mpnn"])
def test_a_factored_layer_is_the_full_one_with_matrices_of_that_rank(
    fixed: str, terms: str, generator: torch.Generator
) -> None:
    def layer(rank: int | None) -> EquivariantLinear:
        return EquivariantLinear(MLP, 6, 5, fixed=fixed, terms=terms, rank=rank, dtype=DOUBLE)

    narrow, full, again = layer(2), layer(None), layer(2)
    assert narrow.factors is not None
    x = torch.randn(2, MLP.numel, 6, generator=generator, dtype=DOUBLE)
    full.from_per_term_(narrow.to_per_term())
    again.from_per_term_(full.to_per_term())
    torch.testing.assert_close(full(x), narrow(x))
    torch.testing.assert_close(again(x), narrow(x))
    count = [sum(p.numel() for p in each.parameters()) for each in (narrow, full)]
    assert count[0] < count[1]
    large = layer(10_000)  # factors would be larger than what they replace
    assert large.factors is None
    assert torch.equal(large.from_per_term_(full.to_per_term())(x), full(x))


def test_factors_of_a_repeated_label_keep_identity_and_transpose(
    generator: torch.Generator,
) -> None:
    narrow = EquivariantLinear(RNN, 8, 8, rank=3, dtype=DOUBLE)
    assert narrow.factors is not None
    sizes = sorted((len(g.readers), len(g.writers)) for g in narrow.factors.groups)
    assert (2, 1) in sizes  # one tensor carries h twice: as it is, and transposed
    full = EquivariantLinear(RNN, 8, 8, dtype=DOUBLE).from_per_term_(narrow.to_per_term())
    x = torch.randn(2, RNN.numel, 8, generator=generator, dtype=DOUBLE)
    torch.testing.assert_close(full(x), narrow(x))


def test_parameters_are_drawn_as_the_paper_does() -> None:
    torch.manual_seed(0)
    for rank in (None, 4):
        layer = EquivariantLinear(TRANSFORMER, 32, 48, rank=rank)
        assert layer.bias is not None
        assert not layer.bias.any()
        for theta in layer.to_per_term().values():
            expected = (32 * len(theta)) ** -0.5
            assert 0.8 < theta.std().item() / expected < 1.2


def test_gradients() -> None:
    torch.manual_seed(0)
    spec = WeightSpec({"w": ("h", "h"), "b": ("h",)}, {"w": (2, 2), "b": (2,)})
    unf = UNF(spec, [1, 2, 1], "tanh", norm=True, rank=1, dtype=DOUBLE)
    names = [name for name, _ in unf.named_parameters()]

    def f(x: Tensor, *parameters: Tensor) -> Tensor:
        return func.functional_call(unf, dict(zip(names, parameters, strict=True)), (x,))

    x = torch.randn(2, spec.numel, 1, dtype=DOUBLE, requires_grad=True)
    torch.autograd.gradcheck(f, (x, *unf.parameters()))


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_every_parameter_gets_a_gradient(spec: WeightSpec) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, spec.numel, 2)
    body = nn.Sequential(PositionalEncoding(spec, 2), Featurize(spec, 2))
    unf = UNF(spec, [2, 3, 3], "silu", norm=True, rank=2, out_features=2)
    unf(body(x)).square().sum().backward()
    learned = [*unf.named_parameters(), *body.named_parameters()]
    assert all(p.grad is not None and p.grad.isfinite().all() for _, p in learned if p.numel())
    assert not [name for name, p in learned if p.grad is not None and not p.grad.any()]


def test_features_stand_side_by_side(generator: torch.Generator) -> None:
    flat, grads, momenta = torch.randn(3, 2, MLP.numel, generator=generator, dtype=DOUBLE)
    assert MLP.features(flat).data_ptr() == flat.data_ptr()
    assert torch.equal(MLP.features(flat, grads)[..., 1], grads)
    assert torch.equal(MLP.features(flat, None, momenta)[..., 1], momenta)
    assert MLP.features(flat, grads, momenta, flat).shape == (2, MLP.numel, 4)
    inputs = (flat.requires_grad_(), grads.requires_grad_())
    torch.autograd.gradcheck(MLP.features, inputs)
    model = Net()
    assert CNN.features(CNN.flatten([model, Net()])).shape == (2, CNN.numel, 1)
