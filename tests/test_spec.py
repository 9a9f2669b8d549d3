"""WeightSpec: what it accepts, how it lays networks out, and that its permutations mean something."""

import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from weightops import WeightSpec, permute, testing

SEEDS = st.integers(0, 2**31)
SPEC = WeightSpec(
    {"fc1.weight": ("h", None), "fc1.bias": ("h",), "scale": (), "fc2.weight": (None, ("h", None))},
    {"fc1.weight": (4, 3), "fc1.bias": (4,), "scale": (), "fc2.weight": (2, 8)},
)


def spec_of(seed: int) -> WeightSpec:
    return testing.random_spec(torch.Generator().manual_seed(seed))


def one(axes: Any, shape: Any, **sizes: int) -> WeightSpec:
    return WeightSpec({"w": axes}, {"w": shape}, sizes=sizes or None)


def test_layout_follows_the_order_of_axes() -> None:
    spec = WeightSpec({"b": ("h",), "a": (None, "h")}, {"a": (2, 3), "b": (3,)})
    assert list(spec.shapes) == ["b", "a"]
    assert dict(spec.offsets) == {"b": 0, "a": 3}
    assert spec.numel == 9
    assert dict(spec.labels) == {"h": 3}
    assert list(spec.occurrences("h")) == [("b", 0), ("a", 1)]


def test_products_tell_the_one_size_they_lack() -> None:
    spec = WeightSpec(
        {"a": (("h", "k"),), "b": (("k", "d", None),), "c": (("d", "d"),), "e": ("h",)},
        {"a": (6,), "b": (30,), "c": (25,), "e": (2,)},
        sizes={"d": 5},
    )
    assert dict(spec.labels) == {"h": 2, "k": 3, "d": 5}
    assert spec.factors("a", 0) == (("h", 2), ("k", 3))
    assert spec.factors("b", 0) == (("k", 3), ("d", 5), (None, 2))
    assert SPEC.factors("fc2.weight", 0) == ((None, 2),)


def test_tensors_with_the_same_product_tell_its_factor_together() -> None:
    product = ("head", "dim")
    axes = {"w": (product, None), "b": (product,)}
    spec = WeightSpec(axes, {"w": (12, 5), "b": (12,)}, sizes={"head": 3})
    assert dict(spec.labels) == {"head": 3, "dim": 4}
    with pytest.raises(ValueError, match=r"b axis 0 has length 15, but its factors .* make 12"):
        WeightSpec(axes, {"w": (12, 5), "b": (15,)}, sizes={"head": 3})


def test_sizes_settle_what_products_leave_open() -> None:
    assert dict(one((("h", "d"),), (12,), h=3).labels) == {"h": 3, "d": 4}
    assert dict(one((("h", None),), (0,), h=3).labels) == {"h": 3}
    assert one((("h", "d"),), (0,), h=3, d=0).numel == 0


def test_empty_specs_and_shapes() -> None:
    nothing = WeightSpec({}, {})
    assert nothing.numel == 0
    assert nothing.flatten({}).shape == (1, 0)
    assert nothing.unflatten(torch.empty(3, 0)) == {}
    assert one((), ()).numel == 1
    assert one(("h",), (0,)).labels["h"] == 0


BAD = [
    ([("w", ("h",))], {}, None, TypeError, "axes must map tensor names, not list"),
    ({1: ("h",)}, {1: (3,)}, None, TypeError, "axes must map tensor names, but has int 1"),
    ({"w": ("h",)}, 3, None, TypeError, "shapes must map tensor names, not int 3"),
    ({"w": ("h",)}, {}, None, ValueError, "'w' is in axes, but not in shapes"),
    ({}, {"w": (3,)}, None, ValueError, "'w' is in shapes, but not in axes"),
    ({"w": "h"}, {"w": (3,)}, None, TypeError, r"axes\['w'\] must be a tuple .* not str 'h'"),
    ({"w": None}, {"w": (3,)}, None, TypeError, r"axes\['w'\] must be a tuple .* not NoneType"),
    (
        {"w": ("h", 3)},
        {"w": (3, 3)},
        None,
        TypeError,
        r"axes\['w'\]\[1\] must be a label.* not int 3",
    ),
    ({"w": (["h", "k"],)}, {"w": (3,)}, None, TypeError, r"axes\['w'\]\[0\] must be .* not list"),
    ({"w": (("h", 1),)}, {"w": (3,)}, None, TypeError, r"axes\['w'\]\[0\] must be .* not tuple"),
    (
        {"w": (("h",),)},
        {"w": (3,)},
        None,
        ValueError,
        r"axes\['w'\]\[0\] is .* two factors or more",
    ),
    (
        {"w": ((None, None),)},
        {"w": (3,)},
        None,
        ValueError,
        r"axes\['w'\]\[0\] is .* one of them None",
    ),
    ({"w": ("h",)}, {"w": 3}, None, TypeError, r"shapes\['w'\] must be a shape, not int 3"),
    (
        {"w": ("h",)},
        {"w": (3.0,)},
        None,
        TypeError,
        r"shapes\['w'\]\[0\] must be an integer, not float",
    ),
    (
        {"w": ("h",)},
        {"w": (True,)},
        None,
        TypeError,
        r"shapes\['w'\]\[0\] must be an integer, not bool",
    ),
    (
        {"w": ("h",)},
        {"w": (-1,)},
        None,
        ValueError,
        r"shapes\['w'\]\[0\] must be at least 0, not -1",
    ),
    ({"w": ("h",)}, {"w": (2**63,)}, None, ValueError, r"shapes\['w'\]\[0\] must be below 2\^63"),
    (
        {"w": ("h",)},
        {"w": (3, 4)},
        None,
        ValueError,
        r"w has shape \[3, 4\], but axes gives it 1 ent",
    ),
    (
        {"w": ("h",), "v": (None, "h")},
        {"w": (3,), "v": (2, 4)},
        None,
        ValueError,
        "label 'h' has size 3 at w axis 0, but 4 at v axis 1",
    ),
    (
        {"w": ("h",)},
        {"w": (3,)},
        {"h": 4},
        ValueError,
        "label 'h' has size 3 at w axis 0, but 4 at sizes",
    ),
    ({"w": ("h",)}, {"w": (3,)}, {"z": 4}, ValueError, r"sizes has label 'z', axes has \['h'\]"),
    (
        {"w": ("h",)},
        {"w": (3,)},
        {"h": 3.0},
        TypeError,
        r"sizes\['h'\] must be an integer, not float",
    ),
    ({"w": ("h",)}, {"w": (3,)}, {"h": -3}, ValueError, r"sizes\['h'\] must be at least 0, not -3"),
    ({"w": ("h",)}, {"w": (3,)}, ["h"], TypeError, "sizes must map labels, not list"),
    (
        {"w": (("h", "k"),)},
        {"w": (6,)},
        None,
        ValueError,
        r"sizes of \['h', 'k'\] can't be told from w axis 0",
    ),
    (
        {"w": (("h", "k", None),)},
        {"w": (6,)},
        {"h": 3},
        ValueError,
        r"sizes of \['k'\] can't be told",
    ),
    (
        {"w": (("h", "h"),)},
        {"w": (9,)},
        None,
        ValueError,
        r"can't be told from w axis 0.* length 9",
    ),
    (
        {"w": (("h", "k"),)},
        {"w": (7,)},
        {"h": 3},
        ValueError,
        r"w axis 0 has length 7, but its factors \('h', 'k'\) make 3 times something",
    ),
    (
        {"w": (("h", "k"),)},
        {"w": (9,)},
        {"h": 3, "k": 2},
        ValueError,
        r"w axis 0 has length 9, but its factors \('h', 'k'\) make 6$",
    ),
    (
        {"w": (("h", None),)},
        {"w": (0,)},
        {"h": 0},
        ValueError,
        "w axis 0 has length 0, .* make 0 times",
    ),
]


@pytest.mark.parametrize(("axes", "shapes", "sizes", "error", "text"), BAD)
def test_bad_construction_names_tensor_axis_and_label(
    axes: Any, shapes: Any, sizes: Any, error: type, text: str
) -> None:
    with pytest.raises(error, match="^WeightSpec: .*" + text):
        WeightSpec(axes, shapes, sizes=sizes)


def test_specs_are_immutable() -> None:
    for change in (
        lambda: setattr(SPEC, "numel", 3),
        lambda: setattr(SPEC, "_numel", 3),
        lambda: delattr(SPEC, "_axes"),
        lambda: setattr(SPEC, "other", 3),
    ):
        with pytest.raises(AttributeError, match="WeightSpec is immutable"):
            change()
    for mapping in (SPEC.axes, SPEC.shapes, SPEC.labels, SPEC.offsets):
        with pytest.raises(TypeError):
            mapping["fc1.bias"] = 3  # type: ignore[index]


def test_changing_the_arguments_afterwards_changes_nothing() -> None:
    axes: dict[str, Any] = {"w": ["h", None]}
    shapes = {"w": [3, 2]}
    spec = WeightSpec(axes, shapes)
    axes["w"][0], shapes["w"][0] = None, 5
    assert spec == one(("h", None), (3, 2))


def test_equality_is_by_content() -> None:
    assert one(("h",), (3,)) == one(["h"], torch.Size([3]))
    assert hash(one(("h",), (3,))) == hash(one(("h",), (3,)))
    different = [one(("h",), (3,)), one(("k",), (3,)), one((None,), (3,)), one(("h",), (4,))]
    different += [one((("h", "k"),), (6,), h=2), one((("h", "k"),), (6,), h=3)]
    assert len(set(different)) == len({spec.digest for spec in different}) == len(different)
    assert one(("h",), (3,)) != "w"
    # The order of the tensors is part of the layout.
    a, b = {"a": ("h",), "b": ("h",)}, {"b": ("h",), "a": ("h",)}
    shapes = {"a": (3,), "b": (3,)}
    assert WeightSpec(a, shapes) != WeightSpec(b, shapes)


@settings(max_examples=100, deadline=None)
@given(SEEDS)
def test_json_pickle_and_copies_round_trip(seed: int) -> None:
    spec = spec_of(seed)
    permute(torch.zeros(1, spec.numel), {}, spec)  # fills the cache, which is not part of it
    for other in (
        WeightSpec.from_json(spec.to_json()),
        pickle.loads(pickle.dumps(spec)),
        copy.deepcopy(spec),
        copy.copy(spec),
        WeightSpec(spec.axes, spec.shapes, sizes=spec.labels),
    ):
        assert other == spec
        assert hash(other) == hash(spec)
        assert other.digest == spec.digest
        assert (other.axes, other.shapes) == (spec.axes, spec.shapes)
        assert list(other.labels.items()) == list(spec.labels.items())
        assert other.offsets == spec.offsets


def test_repr_shows_tensors_and_labels() -> None:
    text = repr(SPEC)
    assert text.startswith("WeightSpec(4 tensors, 33 weights, labels: h=4")
    for name, shape in SPEC.shapes.items():
        assert any(name in line and str(list(shape)) in line for line in text.splitlines())
    assert "., h*." in text
    assert repr(WeightSpec({}, {})).startswith("WeightSpec(0 tensors, 0 weights")


class Tied(nn.Module):
    """Two names of one weight, and a counter."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 3, bias=False)
        self.b = nn.Linear(3, 3, bias=False)
        self.b.weight = self.a.weight
        self.norm = nn.BatchNorm1d(3)


TIED = WeightSpec(
    {"a.weight": ("h", None)}
    | {f"norm.{k}": ("h",) for k in ("weight", "bias", "running_mean", "running_var")},
    {"a.weight": (3, 3)}
    | {f"norm.{k}": (3,) for k in ("weight", "bias", "running_mean", "running_var")},
)


def test_flatten_takes_a_module_a_state_dict_or_a_list() -> None:
    modules = [Tied() for _ in range(3)]
    expected = torch.stack(
        [torch.cat([m.state_dict()[name].flatten() for name in TIED.shapes]) for m in modules]
    )
    assert torch.equal(TIED.flatten(modules), expected)
    assert torch.equal(TIED.flatten([m.state_dict() for m in modules]), expected)
    assert torch.equal(TIED.flatten((modules[0], modules[1].state_dict())), expected[:2])
    assert torch.equal(TIED.flatten(modules[1]), expected[1:2])
    assert torch.equal(TIED.flatten(modules[1].state_dict()), expected[1:2])


def test_flatten_refuses_a_weight_that_is_untied() -> None:
    model = Tied()
    model.b.weight = nn.Parameter(torch.zeros(3, 3))
    with pytest.raises(
        ValueError, match=r"flatten: models has a tensor 'b\.weight', which the spec lacks"
    ):
        TIED.flatten(model)


def test_flatten_of_a_dict_is_differentiable() -> None:
    state = {n: torch.randn(s, requires_grad=True) for n, s in SPEC.shapes.items()}
    weights = torch.randn(1, SPEC.numel)
    (SPEC.flatten(state) * weights).sum().backward()
    for name, expected in SPEC.unflatten(weights[0]).items():
        assert torch.equal(state[name].grad, expected)


@settings(max_examples=50, deadline=None)
@given(SEEDS, st.sampled_from([(), (3,), (2, 3), (0,)]))
def test_unflatten_gives_views_and_flatten_undoes_it(seed: int, batch: tuple[int, ...]) -> None:
    spec = spec_of(seed)
    flat = torch.randn(*batch, spec.numel)
    views = spec.unflatten(flat)
    assert list(views) == list(spec.shapes)
    start, end = flat.data_ptr(), flat.data_ptr() + flat.nbytes
    for name, view in views.items():
        assert view.shape == (*flat.shape[:-1], *spec.shapes[name])
        if view.numel():
            assert start <= view.data_ptr() < end
            assert view.data_ptr() == start + spec.offsets[name] * flat.element_size()
            view.fill_(-1.0)
    assert (flat == -1).all()
    if batch == (3,):
        flat.normal_()
        states = [{name: view[n] for name, view in views.items()} for n in range(3)]
        assert torch.equal(spec.flatten(states), flat)


def test_unflatten_of_strided_networks_copies_nothing() -> None:
    flat = torch.zeros(SPEC.numel, 5).t()
    SPEC.unflatten(flat)["fc2.weight"][2, 1, 7] = 1.0
    assert flat[2, -1] == 1.0
    flat.requires_grad_()
    SPEC.unflatten(flat)["scale"].sum().backward()
    assert flat.grad is not None
    assert flat.grad.sum() == 5


def test_load_writes_running_statistics_too() -> None:
    source, target = Tied(), Tied()
    source.norm(torch.randn(8, 3))
    row = TIED.flatten(source)[0]
    assert TIED.load_(target, row) is target
    assert torch.equal(TIED.flatten(target)[0], row)
    assert not torch.equal(target.norm.running_mean, torch.zeros(3))
    assert target.b.weight is target.a.weight
    assert target.a.weight.requires_grad


def test_failed_load_changes_nothing() -> None:
    model = Tied()
    before = TIED.flatten(model).clone()
    model.norm.double()
    with pytest.raises(
        TypeError, match=r"load_: norm\.weight is torch\.float64, but row is torch\.float32"
    ):
        TIED.load_(model, torch.zeros(TIED.numel))
    assert torch.equal(TIED.flatten(model.float()), before)


def test_random_permutations_are_uniform_and_reproducible() -> None:
    spec = WeightSpec({"w": ("a", "b")}, {"w": (3, 101)})
    perms = spec.random_permutations(6000, torch.Generator().manual_seed(1))
    again = spec.random_permutations(6000, torch.Generator().manual_seed(1))
    for label, size in spec.labels.items():
        assert perms[label].dtype == torch.int64
        assert torch.equal(perms[label].sort(1).values, torch.arange(size).expand(6000, -1))
        assert torch.equal(perms[label], again[label])
    # 1000 expected of each; 6 standard deviations are 173.
    counts = (perms["a"] @ torch.tensor([9, 3, 1])).unique(return_counts=True)[1]
    assert len(counts) == 6
    assert (counts - 1000).abs().max() < 173
    assert spec.random_permutations(0)["b"].shape == (0, 101)
    assert torch.equal(spec.identity(2)["a"], torch.arange(3).expand(2, -1))


@settings(max_examples=60, deadline=None)
@given(SEEDS, st.integers(1, 3))
def test_permutations_form_a_group_that_acts(seed: int, n: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    spec = testing.random_spec(generator)
    p, q, r = (spec.random_permutations(n, generator) for _ in range(3))
    flat = torch.randn(n, spec.numel, generator=generator)

    def assert_equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
        assert left.keys() == right.keys()
        assert all(torch.equal(left[label], right[label]) for label in left)

    identity = spec.identity(n)
    assert_equal(spec.compose(p, spec.invert(p)), identity)
    assert_equal(spec.compose(spec.invert(p), p), identity)
    assert_equal(spec.compose(p, identity), p)
    assert_equal(spec.compose({}, p), p)
    assert_equal(spec.compose(p, {}), p)
    assert_equal(spec.compose(spec.compose(p, q), r), spec.compose(p, spec.compose(q, r)))
    assert_equal(spec.invert(spec.compose(p, q)), spec.compose(spec.invert(q), spec.invert(p)))
    both = permute(permute(flat, p, spec), q, spec)
    assert torch.equal(both, permute(flat, spec.compose(p, q), spec))
    assert torch.equal(permute(flat, p, spec, inverse=True), permute(flat, spec.invert(p), spec))
    assert torch.equal(permute(permute(flat, p, spec), p, spec, inverse=True), flat)
    shared = {label: index[0] for label, index in p.items()}
    expected = {label: index.expand(n, -1) for label, index in shared.items()}
    assert_equal(spec.compose(shared, q), spec.compose(expected, q))


class Attention(nn.Module):
    def __init__(self, width: int = 6, heads: int = 3, key: int = 4, value: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, heads * key)
        self.key = nn.Linear(width, heads * key)
        self.value = nn.Linear(width, heads * value)
        self.out = nn.Linear(heads * value, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        return self.out((q @ k.mT).softmax(-1).matmul(v).transpose(1, 2).flatten(2))


def mlp() -> tuple[nn.Module, WeightSpec, Tensor]:
    layers = {"fc1": nn.Linear(5, 7), "a": nn.Tanh(), "fc2": nn.Linear(7, 11), "b": nn.ReLU()}
    model = nn.Sequential()
    for name, layer in (layers | {"fc3": nn.Linear(11, 3)}).items():
        model.add_module(name, layer)
    return model, testing.mlp_spec(5, 7, 11, 3), torch.randn(9, 5)


def cnn() -> tuple[nn.Module, WeightSpec, Tensor]:
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 5, 3), nn.Tanh()),
        *(nn.Flatten(), nn.Linear(5 * 4 * 4, 10)),
    )
    axes: dict[str, Any] = {
        "0.weight": ("c", None, None, None),
        "0.bias": ("c",),
        **{f"1.{each}": ("c",) for each in ("weight", "bias", "running_mean", "running_var")},
        "3.weight": ("d", "c", None, None),
        "3.bias": ("d",),
        "6.weight": (None, ("d", None)),
        "6.bias": (None,),
    }
    state = model.state_dict()
    for each in ("weight", "bias", "running_mean", "running_var"):
        state[f"1.{each}"].uniform_(0.5, 2.0)
    return model, WeightSpec(axes, {n: state[n].shape for n in axes}), torch.randn(2, 3, 8, 8)


def attention() -> tuple[nn.Module, WeightSpec, Tensor]:
    model = Attention()
    axes: dict[str, Any] = {"out.weight": (None, ("head", "v")), "out.bias": (None,)}
    for name, inner in (("query", "qk"), ("key", "qk"), ("value", "v")):
        axes[f"{name}.weight"], axes[f"{name}.bias"] = ((("head", inner), None), (("head", inner),))
    shapes = {name: model.state_dict()[name].shape for name in axes}
    return model, WeightSpec(axes, shapes, sizes={"head": 3}), torch.randn(2, 5, 6)


@pytest.mark.parametrize("make", [mlp, cnn, attention])
def test_permuted_network_moves_its_weights_and_keeps_its_function(make: Any) -> None:
    model, spec, x = make()
    model, x = model.double().eval(), x.double()
    flat, perms = spec.flatten([model] * 4), spec.random_permutations(4)
    permuted = permute(flat, perms, spec)
    assert not torch.equal(permuted, flat)
    assert torch.equal(permuted.sort(1).values, flat.sort(1).values)
    expected = model(x)
    for row in permuted:
        by_views = torch.func.functional_call(model, spec.unflatten(row), (x,))
        torch.testing.assert_close(by_views, expected, rtol=1e-12, atol=1e-12)
        loaded = spec.load_(copy.deepcopy(model), row)
        torch.testing.assert_close(loaded(x), expected, rtol=1e-12, atol=1e-12)
    for label in spec.labels:
        # One label alone is a symmetry as well, and it moves something.
        alone = {label: torch.arange(spec.labels[label]).flip(0)}
        row = permute(flat[:1], alone, spec)[0]
        assert not torch.equal(row, flat[0])
        by_views = torch.func.functional_call(model, spec.unflatten(row), (x,))
        torch.testing.assert_close(by_views, expected, rtol=1e-12, atol=1e-12)
