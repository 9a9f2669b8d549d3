"""The basis is complete and free of duplicates, and as large as the paper says."""

import time
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from weightops import EquivariantPlan, WeightSpec, equivariant_linear, permute, testing
from weightops.ops.equivariant import size
from weightops.ops.equivariant.reference import per_term

MOST = 150  # terms whose dense matrices are looked at
SEEDS = st.integers(0, 2**31)


def all_labelled(spec: WeightSpec, side: str = "") -> WeightSpec:
    """``spec`` with a label of its own on every fixed axis."""
    axes, sizes = {}, dict(spec.labels)
    for name, shape in spec.shapes.items():
        entries = []
        for axis in range(len(shape)):
            labels = []
            for factor, (label, length) in enumerate(spec.factors(name, axis)):
                labels.append(label or f"{side}{name}.{axis}.{factor}")
                sizes[labels[-1]] = length
            entries.append(tuple(labels) if len(labels) > 1 else labels[0])
        axes[name] = tuple(entries)
    return WeightSpec(axes, spec.shapes, sizes=sizes)


def moved(spec: WeightSpec, perms: dict[str, Tensor]) -> Tensor:
    """[P]: the positions that a permutation of the labels brings each weight from."""
    held = {label: index for label, index in perms.items() if label in spec.labels}
    return permute(torch.arange(spec.numel)[None], held, spec)[0]


def generators(*specs: WeightSpec) -> Iterator[dict[str, Tensor]]:
    """A transposition and a cycle of every label: together they make all permutations."""
    for label, length in {k: v for spec in specs for k, v in spec.labels.items()}.items():
        if length > 1:
            yield {label: torch.arange(length).roll(1)}
            yield {label: torch.cat([torch.tensor([1, 0]), torch.arange(2, length)])}


def count_orbits(spec: WeightSpec, spec_out: WeightSpec) -> tuple[int, Tensor]:
    """Orbits of the group on pairs (input weight, output weight), and which one each pair is in."""
    pairs = torch.arange(spec.numel * spec_out.numel).view(spec.numel, spec_out.numel)
    sources, targets = [pairs.flatten()], [pairs.flatten()]
    for perms in generators(spec, spec_out):
        image = pairs[moved(spec, perms)][:, moved(spec_out, perms)]
        sources.append(pairs.flatten())
        targets.append(image.flatten())
    rows, columns = torch.cat(sources).numpy(), torch.cat(targets).numpy()
    graph = coo_array((rows * 0 + 1, (rows, columns)), shape=(pairs.numel(), pairs.numel()))
    count, orbit = connected_components(graph, directed=False)
    return count, torch.from_numpy(orbit).view(pairs.shape)


def check_basis_is_orbits(spec: WeightSpec, spec_out: WeightSpec, fixed: str) -> None:
    counted = size.count_terms(spec, spec_out, fixed)
    plan = EquivariantPlan(spec, spec_out, fixed=fixed)
    assert plan.num_terms == len(plan.terms) == counted
    if fixed == "permute":
        same = spec == spec_out
        spec = all_labelled(spec)
        spec_out = spec if same else all_labelled(spec_out, "out ")
    count, orbit = count_orbits(spec, spec_out)
    if count == 0 or plan.num_terms == 0:
        assert count == plan.num_terms == 0
        return
    unit = torch.eye(spec.numel, dtype=torch.float64)[..., None]
    each = torch.eye(plan.num_terms, dtype=torch.float64)[:, None]
    for layer in (per_term, equivariant_linear):
        support = (layer(unit, each, None, plan) != 0).flatten(0, 1).double()
        first = torch.zeros(count, plan.num_terms, dtype=torch.float64)
        first[orbit.flatten()] = support
        assert torch.equal(first[orbit.flatten()], support)  # every term is a sum of orbits
        assert torch.linalg.matrix_rank(first) == count  # nothing is missing
    if long_enough(spec, spec_out):
        assert plan.num_terms == count  # nothing is dependent


def long_enough(*specs: WeightSpec) -> bool:
    """Whether a label has as many entries as two tensors may have different indices of it."""
    sizes = {label: size for spec in specs for label, size in spec.labels.items()}
    indices: Counter = Counter()
    for spec in specs:
        most: Counter = Counter()
        for name, shape in spec.shapes.items():
            factors = [f for axis in range(len(shape)) for f in spec.factors(name, axis)]
            most |= Counter(label for label, _ in factors)
        indices += most
    return all(indices[label] <= size for label, size in sizes.items())


@settings(deadline=None, max_examples=40)
@given(SEEDS, st.sampled_from(["permute", "index", "channel"]))
def test_terms_are_the_orbits_of_pairs(seed: int, fixed: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    spec = testing.tiny_spec(generator, tensors=2)
    assume(size.count_terms(spec, spec, fixed) <= MOST)
    check_basis_is_orbits(spec, spec, fixed)


@settings(deadline=None, max_examples=25)
@given(SEEDS, st.sampled_from(["permute", "index", "channel"]))
def test_terms_between_two_specs_are_the_orbits_of_pairs(seed: int, fixed: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    sizes = {"a": 3, "b": 2}
    spec, spec_out = (
        testing.tiny_spec(generator, tensors=2, max_rank=2, sizes=sizes) for _ in range(2)
    )
    assume(size.count_terms(spec, spec_out, fixed) <= MOST)
    check_basis_is_orbits(spec, spec_out, fixed)


def test_three_axes_of_one_label() -> None:
    # Bell(6) partitions need blocks for six different indices.
    spec = WeightSpec({"w": ("a", "a", "a")}, {"w": (6, 6, 6)})
    assert EquivariantPlan(spec).num_terms == 203
    check_basis_is_orbits(
        WeightSpec({"w": ("a", "a", "a")}, {"w": (4, 4, 4)}),
        WeightSpec({"b": ("a",)}, {"b": (4,)}),
        "permute",
    )


def terms(spec: WeightSpec) -> int:
    return EquivariantPlan(spec).num_terms


@pytest.mark.parametrize("layers", range(1, 6))
def test_terms_of_an_mlp(layers: int) -> None:
    widths = range(2, 3 + layers)
    assert terms(testing.labelled_mlp_spec(*widths)) == 4 * layers**2 + 10 * layers - 4
    # Fixed axes are permutable each by itself, unlike labels that first and last biases share.
    assert terms(testing.labelled_mlp_spec(*widths)) >= terms(testing.mlp_spec(*widths))


@pytest.mark.parametrize(
    ("name", "expected", "tensors"),
    [("mlp", 62, 6), ("cnn", 136, 8), ("rnn", 81, 5), ("transformer", 478, 16), ("gru", 2058, 22)],
)
def test_terms_of_the_measured_weight_spaces(name: str, expected: int, tensors: int) -> None:
    spec = testing.WEIGHT_SPACES[name]()
    assert (terms(spec), len(spec.shapes)) == (expected, tensors)


def test_terms_of_transformers() -> None:
    assert terms(testing.transformer_spec(heads=4)) == 544
    for blocks, expected in ((2, 1756), (4, 6712)):
        assert terms(testing.transformer_spec(blocks)) == expected


def test_a_deep_transformer_is_planned_in_seconds() -> None:
    spec = testing.transformer_spec(12)
    began = time.perf_counter()
    plan = EquivariantPlan(spec)
    assert time.perf_counter() - began < 5
    assert plan.num_terms == 58_536
    assert len(plan.types) < 60


def paper_networks() -> dict[str, tuple[dict, int]]:
    """The paper's MLP, its CNN (whose first kernel height is tied to the input channels), a char RNN."""
    return {
        "mlp": ({"w0": "ih", "b0": "h", "w1": "ho", "b1": "o"}, 3783),
        "cnn": (
            {"w0": "iwih", "b0": "h", "w1": "xyhk", "b1": "k", "w2": "ko", "b2": "o"},
            7369,
        ),
        "rnn": (
            {
                **{"embed": "ve", "ih": "eh", "ih.bias": "h", "hh": "hh", "hh.bias": "h"},
                **{"initial": "1h", "out": "hv", "out.bias": "v"},
            },
            8043,
        ),
    }


@pytest.mark.parametrize("name", paper_networks())
def test_parameter_counts_of_the_paper(name: str) -> None:
    axes, expected = paper_networks()[name]
    spec = WeightSpec(
        {name: tuple(labels) for name, labels in axes.items()},
        {name: (3,) * len(labels) for name, labels in axes.items()},
    )
    assert 32 * terms(spec) + len(spec.shapes) + 2755 == expected


def test_terms_read_like_an_einsum() -> None:
    spec = WeightSpec({"w": ("h", "h"), "b": ("h",)}, {"w": (3, 3), "b": (3,)})
    plan = EquivariantPlan(spec)
    assert len({str(term) for term in plan.terms}) == plan.num_terms == 15 + 2 * 5 + 2
    first = {(term.output, term.input): None for term in plan.terms}
    assert list(first) == [("w", "w"), ("w", "b"), ("b", "w"), ("b", "b")]


def test_selections_are_parts_of_the_basis() -> None:
    spec = testing.labelled_mlp_spec(3, 4, 2)
    full = {str(term) for term in EquivariantPlan(spec).terms}
    local = EquivariantPlan(spec, terms="local").terms
    messages = EquivariantPlan(spec, terms="mpnn").terms
    assert {str(t) for t in local} <= {str(t) for t in messages} <= full
    assert all(term.input == term.output for term in local)
    assert all(term.kept or term.input == term.output for term in messages)
    assert len({str(t) for t in local}) == size.count_terms(spec, spec, "permute", True)


def test_a_basis_too_large_is_refused_before_it_is_listed() -> None:
    spec = WeightSpec({"w": (None, None)}, {"w": (784, 784)})
    began = time.perf_counter()
    with pytest.raises(
        ValueError, match=r"377,801,998,336 terms .* GiB .* terms=\"local\" or fixed="
    ):
        EquivariantPlan(spec, fixed="index")
    assert time.perf_counter() - began < 1
    plan = EquivariantPlan(testing.transformer_spec(12))
    plan.check_size(16, 16)
    with pytest.raises(ValueError, match=r"58,536 terms, 100000 to 100000 .* GiB.*terms= .* rank="):
        plan.check_size(100_000, 100_000)


def test_plans_refuse_bad_arguments() -> None:
    spec = testing.labelled_mlp_spec(3, 4)
    other = WeightSpec({"w": ("n0",)}, {"w": (5,)})
    with pytest.raises(ValueError, match=r"label 'n0' has size 3 in spec, but 5 in spec_out"):
        EquivariantPlan(spec, other)
    with pytest.raises(TypeError, match=r"spec must be a WeightSpec, not dict"):
        EquivariantPlan({})
    with pytest.raises(TypeError, match=r"spec_out must be a WeightSpec, not str"):
        EquivariantPlan(spec, "w")
    with pytest.raises(ValueError, match=r"fixed must be one of .*'channel'.*, not 'none'"):
        EquivariantPlan(spec, fixed="none")
    with pytest.raises(
        ValueError, match=r"terms must be one of .*'mpnn' or a predicate, not 'all'"
    ):
        EquivariantPlan(spec, terms="all")
    with pytest.raises(ValueError, match=r"normalize must be one of 'mean', 'sum', not 'max'"):
        EquivariantPlan(spec, normalize="max")
