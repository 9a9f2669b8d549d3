"""Many networks at once: the universe's gradient and line search are exact, and what is found is good."""

from collections.abc import Mapping

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import weightops
from weightops import align, testing
from weightops.align.cycles import cycle_error
from weightops.align.many import MatchAll, match_all
from weightops.align.universe import Universe, maximum

MLP = testing.mlp_spec(6, 12, 9, 4)
WIDE = testing.mlp_spec(20, 16, 16, 4)
RECURRENT = weightops.WeightSpec(
    {"w_in": ("h", None), "w_rec": ("h", "h"), "b": ("h",), "w_out": (None, ("h", None))},
    {"w_in": (8, 3), "w_rec": (8, 8), "b": (8,), "w_out": (2, 16)},
)
ATTENTION = weightops.WeightSpec(
    {"q": (("head", "dim"), "d"), "n": ("d",), "o": ("d", ("head", "dim")), "temperature": ()},
    {"q": (6, 4), "n": (4,), "o": (4, 6), "temperature": ()},
    sizes={"head": 2},
)
CONVOLUTION = weightops.WeightSpec(
    {"c1": ("a", None, None, None), "c2": ("b", "a", None, None), "fc": (None, ("b", None))},
    {"c1": (5, 3, 3, 3), "c2": (4, 5, 3, 3), "fc": (10, 16)},
)
SPECS = {
    "mlp": MLP,
    "rnn": RECURRENT,
    "attention": ATTENTION,
    "convolution": CONVOLUTION,
    **{
        f"random{seed}": testing.tiny_spec(torch.Generator().manual_seed(seed)) for seed in range(4)
    },
}
every_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


def places(spec: weightops.WeightSpec, name: str) -> list[tuple[str | None, int]]:
    return [f for axis in range(len(spec.shapes[name])) for f in spec.factors(name, axis)]


def moved(
    spec: weightops.WeightSpec, flat: Tensor, matrices: Mapping[str, Tensor], without: int = -1
) -> dict[str, Tensor]:
    """Name -> ``[N, *factors]``, multiplied by the matrices at every place but ``without``."""
    found = {}
    for name, tensor in spec.unflatten(flat).items():
        factors = places(spec, name)
        tensor = tensor.reshape(len(flat), *(size for _, size in factors))
        for axis, (label, _) in enumerate(factors):
            if label is not None and axis != without:
                front = tensor.movedim(axis + 1, 1)
                front = torch.einsum("nij,nj...->ni...", matrices[label], front)
                tensor = front.movedim(1, axis + 1)
        found[name] = tensor
    return found


def objective(
    spec: weightops.WeightSpec, flat: Tensor, matrices: Mapping[str, Tensor], names: list[str]
) -> Tensor:
    """The definition: pair by pair."""
    tensors = moved(spec, flat, matrices)
    return sum(
        (tensors[name][i] * tensors[name][j]).sum()
        for name in names
        for i in range(len(flat))
        for j in range(i)
    )


def pairwise_gradient(
    spec: weightops.WeightSpec, flat: Tensor, matrices: Mapping[str, Tensor], names: list[str]
) -> dict[str, Tensor]:
    """The definition: for each pair and place, the Gram of one network with the other."""
    found = {label: torch.zeros_like(x) for label, x in matrices.items()}
    whole = moved(spec, flat, matrices)
    for name in names:
        for axis, (label, size) in enumerate(places(spec, name)):
            if label is None:
                continue
            rest = moved(spec, flat, matrices, without=axis)[name]
            for i in range(len(flat)):
                for j in range(len(flat)):
                    if i != j:
                        ours = rest[i].movedim(axis, 0).reshape(size, -1)
                        found[label][i] += (
                            whole[name][j].movedim(axis, 0).reshape(size, -1) @ ours.T
                        )
    return found


def soft(spec: weightops.WeightSpec, networks: int = 3) -> tuple[Tensor, Universe]:
    """Networks, and their universe some steps away from the identity."""
    generator = torch.Generator().manual_seed(1)
    flat = torch.randn(networks, spec.numel, generator=generator, dtype=torch.float64)
    universe = Universe(spec, flat, list(spec.shapes))
    for t in (0.3, 0.6):
        universe.step(spec.random_permutations(networks, generator), t)
    return flat, universe


@every_spec
def test_steps_move_every_tensor_as_the_matrices_do(spec: weightops.WeightSpec) -> None:
    flat, universe = soft(spec)
    for x in universe.matrices.values():
        torch.testing.assert_close(x.sum(1), torch.ones_like(x[:, 0]))
        torch.testing.assert_close(x.sum(2), torch.ones_like(x[:, 0]))
    expected = moved(spec, flat, universe.matrices)
    for tensor, name in zip(universe.tensors, spec.shapes, strict=True):
        torch.testing.assert_close(tensor.on[-1], expected[name])


@every_spec
def test_gradient_is_that_of_the_pairs(spec: weightops.WeightSpec) -> None:
    flat, universe = soft(spec)
    matrices = {label: x.clone().requires_grad_() for label, x in universe.matrices.items()}
    value = objective(spec, flat, matrices, list(spec.shapes))
    assert universe.objective() == pytest.approx(value.item())
    if not matrices:
        return
    expected = torch.autograd.grad(value, list(matrices.values()))
    pairwise = pairwise_gradient(spec, flat, universe.matrices, list(spec.shapes))
    for (label, given), derivative in zip(universe.gradient().items(), expected, strict=True):
        torch.testing.assert_close(given, derivative)
        torch.testing.assert_close(given, pairwise[label])


@every_spec
def test_line_search_is_exact(spec: weightops.WeightSpec) -> None:
    flat, universe = soft(spec)
    target = spec.random_permutations(3, torch.Generator().manual_seed(2))
    polynomial = universe.along(target)
    grid = torch.linspace(0, 1, 21, dtype=torch.float64).tolist()

    def at(t: float) -> float:
        matrices = {
            label: (1 - t) * x
            + t * nn.functional.one_hot(target[label], x.shape[-1]).to(torch.float64)
            for label, x in universe.matrices.items()
        }
        return float(objective(spec, flat, matrices, list(spec.shapes)))

    values = [at(t) for t in grid]
    assert values == pytest.approx([polynomial(t) for t in grid])
    t = maximum(polynomial)
    assert 0 <= t <= 1
    reached = at(t)
    assert reached >= max(values) - 1e-9
    universe.step(target, t)
    assert universe.objective() == pytest.approx(reached)


@pytest.mark.parametrize("method", ["universe", "merge-many"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("spec", [WIDE, RECURRENT, CONVOLUTION], ids=["mlp", "rnn", "convolution"])
def test_shuffled_copies_come_back(
    spec: weightops.WeightSpec, dtype: torch.dtype, method: str
) -> None:
    generator = torch.Generator().manual_seed(3)
    network = torch.randn(1, spec.numel, generator=generator, dtype=dtype).expand(4, -1)
    shuffled = weightops.permute(network, spec.random_permutations(4, generator), spec)
    found = match_all(spec, shuffled, method=method)
    aligned = weightops.permute(shuffled, found.perms, spec)
    torch.testing.assert_close(aligned, shuffled[:1].expand(4, -1), rtol=0, atol=0)
    assert found.objective == pytest.approx(6 * float(network[0].double().pow(2).sum()))


def check_found(spec: weightops.WeightSpec, flat: Tensor, found: MatchAll) -> None:
    aligned = weightops.permute(flat, found.perms, spec).double()
    expected = sum(aligned[i] @ aligned[j] for i in range(len(flat)) for j in range(i))
    assert found.objective == pytest.approx(float(expected))
    assert found.objective == float(found.history[-1])
    assert torch.equal(aligned[0], flat[0].double())
    for label, size in spec.labels.items():
        assert torch.equal(
            found.perms[label].sort(1).values, torch.arange(size).expand(len(flat), -1)
        )


@pytest.mark.parametrize("method", ["universe", "merge-many"])
@every_spec
def test_objective_is_what_the_permutations_give(spec: weightops.WeightSpec, method: str) -> None:
    generator = torch.Generator().manual_seed(4)
    flat = torch.randn(4, spec.numel, generator=generator)
    found = match_all(spec, flat, method=method)
    check_found(spec, flat, found)
    falls = (found.history.diff() < -1e-6 * found.history[1:].abs()).sum()
    assert falls <= (1 if method == "universe" else 0)
    assert found.objective >= float(found.history[0])


@pytest.mark.parametrize("method", ["universe", "merge-many"])
def test_permutations_of_pairs_agree_around_cycles(method: str) -> None:
    flat = torch.randn(3, MLP.numel, generator=torch.Generator().manual_seed(5))
    perms = match_all(MLP, flat, method=method).perms
    a, b, c = ({label: index[n] for label, index in perms.items()} for n in range(3))
    cycle = [MLP.compose(p, MLP.invert(q)) for p, q in ((a, b), (b, c), (c, a))]
    assert cycle_error(MLP, cycle).units == 0


@pytest.mark.parametrize("method", ["universe", "merge-many"])
def test_no_network_can_be_matched_better_to_the_others(method: str) -> None:
    flat = torch.randn(4, MLP.numel, generator=torch.Generator().manual_seed(6))
    aligned = weightops.permute(flat, match_all(MLP, flat, method=method).perms, MLP)
    for n in range(4):
        others = aligned.sum(0) - aligned[n]
        found = align.match(MLP, others, aligned[n : n + 1])
        assert found.objective[0] <= (1 + 1e-5) * others.double() @ aligned[n].double()


def test_running_statistics_do_not_steer() -> None:
    spec = weightops.WeightSpec(
        {"w": ("h", None), "norm.running_var": ("h",)}, {"w": (6, 3), "norm.running_var": (6,)}
    )
    generator = torch.Generator().manual_seed(7)
    flat = torch.randn(3, spec.numel, generator=generator)
    other = flat.clone()
    other[:, -6:] = 1e6 * torch.rand(3, 6, generator=generator)
    first, second = (match_all(spec, f) for f in (flat, other))
    assert torch.equal(first.perms["h"], second.perms["h"])
    counted = match_all(spec, other, tensors=["norm.running_var"])
    variances = other[:, -6:].gather(1, counted.perms["h"]).argsort(1)
    assert (variances == variances[0]).all()


@pytest.mark.parametrize("method", ["universe", "merge-many"])
def test_deterministic_under_a_seed(method: str) -> None:
    flat = torch.randn(3, MLP.numel, generator=torch.Generator().manual_seed(8))
    first, second = (match_all(MLP, flat, method=method, seed=1) for _ in range(2))
    assert all(torch.equal(first.perms[label], second.perms[label]) for label in MLP.labels)


def test_half_precision_is_matched_in_float32() -> None:
    flat = torch.randn(3, MLP.numel, generator=torch.Generator().manual_seed(9)).bfloat16()
    half, full = match_all(MLP, flat), match_all(MLP, flat.float())
    assert all(torch.equal(half.perms[label], full.perms[label]) for label in MLP.labels)


@pytest.mark.parametrize("method", ["universe", "merge-many"])
def test_an_unverified_spec_is_warned_of_once(method: str) -> None:
    guess = weightops.WeightSpec(MLP.axes, MLP.shapes, unverified=True)
    flat = torch.randn(2, MLP.numel, generator=torch.Generator().manual_seed(10))
    with pytest.warns(UserWarning, match="match_all: spec was never verified") as caught:
        match_all(guess, flat, method=method)
    assert len(caught) == 1


@pytest.fixture(scope="module")
def trained() -> tuple[weightops.WeightSpec, Tensor]:
    """Four digit classifiers 64-24-24-10 of different seeds."""
    digits = load_digits()
    inputs = torch.tensor(digits.data, dtype=torch.float32) / 16
    targets = torch.tensor(digits.target)
    models = []
    for seed in range(4):
        torch.manual_seed(seed)
        model = nn.Sequential()
        for i, (n, m) in enumerate(((64, 24), (24, 24), (24, 10)), 1):
            model.add_module(f"fc{i}", nn.Linear(n, m))
            if i < 3:
                model.add_module(f"relu{i}", nn.ReLU())
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        for _ in range(6):
            for batch in torch.randperm(len(inputs)).split(200):
                loss = nn.functional.cross_entropy(model(inputs[batch]), targets[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        models.append(model)
    spec = testing.mlp_spec(64, 24, 24, 10)
    return spec, spec.flatten(models)


def test_universe_is_no_worse_than_merge_many_and_the_first_network(
    trained: tuple[weightops.WeightSpec, Tensor],
) -> None:
    spec, flat = trained
    universe = match_all(spec, flat)
    merged = match_all(spec, flat, method="merge-many")
    star = align.match(spec, flat[0], flat)
    to_first = weightops.permute(flat, star.perms, spec).double()
    whole = to_first.sum(0)
    first = float(whole @ whole - to_first.pow(2).sum()) / 2
    assert universe.objective >= 0.98 * merged.objective
    assert min(universe.objective, merged.objective) > 1.02 * first
    assert first > 2 * float(merged.history[0])
    check_found(spec, flat, universe)
    check_found(spec, flat, merged)


def test_shuffling_the_networks_changes_the_objective_little(
    trained: tuple[weightops.WeightSpec, Tensor],
) -> None:
    spec, flat = trained
    generator = torch.Generator().manual_seed(10)
    shuffled = weightops.permute(flat, spec.random_permutations(4, generator), spec)
    first, second = (match_all(spec, f).objective for f in (flat, shuffled.flip(0)))
    assert first == pytest.approx(second, rel=0.02)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spec": None}, "match_all: spec must be a WeightSpec"),
        ({"flat": [1.0]}, r"match_all: flat must be a tensor \[N, P\]"),
        ({"flat": torch.zeros(MLP.numel)}, r"match_all: flat must have shape \[N, P\]"),
        (
            {"flat": torch.zeros(2, 5)},
            r"match_all: flat has shape \[2, 5\], but the spec's networks",
        ),
        (
            {"flat": torch.zeros(1, MLP.numel)},
            "match_all: flat must hold 2 networks or more, not 1",
        ),
        ({"flat": torch.zeros(2, MLP.numel).long()}, "match_all: flat must be floating point"),
        (
            {"flat": torch.full((2, MLP.numel), float("inf"))},
            r"match_all: flat must be finite, but flat\[0, 0\] is inf",
        ),
        ({"method": "magic"}, "match_all: method must be one of 'universe', 'merge-many'"),
        ({"method": 3}, "match_all: method must be a string"),
        ({"seed": "x"}, "match_all: seed must be an integer"),
        ({"seed": -1}, "match_all: seed must be at least 0"),
        ({"tensors": []}, "match_all: tensors is empty"),
        ({"tensors": ["nope"]}, "match_all: tensors has 'nope'"),
        ({"max_sweeps": 0}, "match_all: max_sweeps must be at least 1"),
        ({"tolerance": -1.0}, r"match_all: tolerance must be in \[0, 1\)"),
        ({"progress": 1}, "match_all: progress must be True or False"),
    ],
)
def test_match_all_refuses_bad_input(change: dict, message: str) -> None:
    arguments = {"spec": MLP, "flat": torch.zeros(2, MLP.numel)}
    with pytest.raises((ValueError, TypeError), match=message):
        match_all(**(arguments | change))
