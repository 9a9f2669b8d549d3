"""Networks of other widths: padding keeps the function, and matching finds the units that correspond."""

import pytest
import torch
from torch import Tensor, nn

import weightops
from weightops import align, testing
from weightops.align.widths import match_partial, widen

RECURRENT = weightops.WeightSpec(
    {"w_in": ("h", None), "w_rec": ("h", "h"), "b": ("h",), "w_out": (None, ("h", None))},
    {"w_in": (6, 7), "w_rec": (6, 6), "b": (6,), "w_out": (2, 12)},
)
ATTENTION = weightops.WeightSpec(
    {
        "embed": ("d", None),
        "q": (("head", "dim"), "d"),
        "o": ("d", ("head", "dim")),
        "slope": ("head", None),
        "angle": ("dim", None),
    },
    {"embed": (6, 8), "q": (12, 6), "o": (6, 12), "slope": (3, 8), "angle": (4, 8)},
)


class Net(nn.Module):
    def __init__(self, hidden: int, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, channels, 3)
        self.norm = nn.BatchNorm2d(channels)
        self.fc1 = nn.Linear(channels * 4, hidden)
        self.fc2 = nn.Linear(hidden, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(self.norm(self.conv(x)).relu().flatten(1)).relu())


def net_spec(hidden: int, channels: int) -> weightops.WeightSpec:
    axes: dict = {
        "conv.weight": ("c", None, None, None),
        **{f"{name}": ("c",) for name in ("conv.bias", "norm.weight", "norm.bias")},
        **{f"norm.running_{name}": ("c",) for name in ("mean", "var")},
        "fc1.weight": ("h", ("c", None)),
        "fc1.bias": ("h",),
        "fc2.weight": (None, "h"),
        "fc2.bias": (None,),
    }
    state = Net(hidden, channels).state_dict()
    return weightops.WeightSpec(axes, {name: tuple(state[name].shape) for name in axes})


def test_wider_networks_compute_the_same() -> None:
    torch.manual_seed(0)
    narrow, wide = Net(5, 4), Net(8, 6)
    inputs = torch.randn(7, 2, 4, 4)
    narrow(inputs)  # so that the running statistics are not the initial ones
    spec = net_spec(5, 4)
    wider, flat = widen(spec, spec.flatten(narrow.eval()), sizes={"h": 8, "c": 6})
    assert wider == net_spec(8, 6)
    wider.load_(wide.eval(), flat[0])
    torch.testing.assert_close(wide(inputs), narrow(inputs))
    assert (wide.norm.running_var[4:] == 1).all()
    assert (wide.fc1.weight[5:] == 0).all()
    assert (wide.fc1.weight.view(8, 6, 4)[:, 4:] == 0).all()


def test_widening_by_nothing_changes_nothing_and_gradients_flow() -> None:
    flat = torch.randn(2, RECURRENT.numel, requires_grad=True)
    same, copy = widen(RECURRENT, flat, sizes={})
    assert same == RECURRENT
    assert torch.equal(copy, flat)
    wider, padded = widen(RECURRENT, flat, sizes={"h": 9})
    assert wider.shapes["w_out"] == (2, 18)
    padded.sum().backward()
    assert torch.equal(flat.grad, torch.ones_like(flat))


def pruned(
    spec: weightops.WeightSpec, flat: Tensor, kept: dict[str, Tensor]
) -> tuple[weightops.WeightSpec, Tensor]:
    """The network of the kept units, in their order."""
    tensors = {}
    for name, tensor in spec.unflatten(flat).items():
        factors = [f for axis in range(len(spec.shapes[name])) for f in spec.factors(name, axis)]
        tensor = tensor.reshape(*(size for _, size in factors))
        for dim, (label, _) in enumerate(factors):
            if label in kept:
                tensor = tensor.index_select(dim, kept[label])
        shape, sizes = [], list(tensor.shape)
        for axis in range(len(spec.shapes[name])):
            count = len(spec.factors(name, axis))
            shape.append(int(torch.tensor(sizes[:count]).prod()))
            sizes = sizes[count:]
        tensors[name] = tensor.reshape(shape)
    narrow = weightops.WeightSpec(
        spec.axes,
        {name: tuple(tensor.shape) for name, tensor in tensors.items()},
        sizes={label: len(kept[label]) if label in kept else n for label, n in spec.labels.items()},
    )
    return narrow, torch.cat([tensor.flatten() for tensor in tensors.values()])


@pytest.mark.parametrize(
    "spec", [testing.mlp_spec(9, 8, 7, 4), RECURRENT, ATTENTION, net_spec(6, 5)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_units_of_a_pruned_network_are_found(
    spec: weightops.WeightSpec, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(2)
    large = torch.randn(spec.numel, generator=generator, dtype=dtype)
    kept = {
        label: torch.randperm(size, generator=generator)[: size - 1]
        for label, size in spec.labels.items()
    }
    narrow, small = pruned(spec, large, kept)
    for label, size in narrow.labels.items():
        assert size == spec.labels[label] - 1
    from_large = match_partial(spec, large, narrow, small[None])
    from_small = match_partial(narrow, small, spec, large[None])
    for found in (from_large, from_small):
        for label, units in kept.items():
            assert torch.equal(found.units[label][0], units)
    counted = [n for n in narrow.shapes if not n.endswith(("running_mean", "running_var"))]
    expected = sum(narrow.unflatten(small)[n].double().pow(2).sum() for n in counted)
    for found in (from_large, from_small):
        torch.testing.assert_close(found.objective[0], expected)


def test_either_side_may_be_the_larger_label_by_label() -> None:
    generator = torch.Generator().manual_seed(3)
    ours, theirs = testing.mlp_spec(9, 8, 5, 4), testing.mlp_spec(9, 6, 7, 4)
    reference = torch.randn(ours.numel, generator=generator)
    flat = torch.randn(3, theirs.numel, generator=generator)
    found = match_partial(ours, reference, theirs, flat)
    assert found.units["h1"].shape == (3, 6)
    assert found.units["h2"].shape == (3, 5)
    for label, most in (("h1", 8), ("h2", 7)):
        for row in found.units[label]:
            assert len(row.unique()) == len(row)
            assert 0 <= row.min() <= row.max() < most
    for n, network in enumerate(flat):
        # h1 is indexed in the reference, h2 in the other network.
        first, second = found.units["h1"][n], found.units["h2"][n]
        a, b = ours.unflatten(reference), theirs.unflatten(network)
        objective = (
            (a["fc1.weight"][first] * b["fc1.weight"]).sum()
            + a["fc1.bias"][first] @ b["fc1.bias"]
            + (a["fc2.weight"][:, first] * b["fc2.weight"][second]).sum()
            + a["fc2.bias"] @ b["fc2.bias"][second]
            + (a["fc3.weight"] * b["fc3.weight"][:, second]).sum()
            + a["fc3.bias"] @ b["fc3.bias"]
        )
        torch.testing.assert_close(found.objective[n], objective.double(), rtol=1e-5, atol=1e-5)
    wide = [
        widen(spec, networks, sizes=found.spec.labels)[1]
        for spec, networks in ((ours, reference[None]), (theirs, flat))
    ]
    moved = weightops.permute(wide[1], found.perms, found.spec)
    torch.testing.assert_close(found.objective, moved.double() @ wide[0][0].double())


def test_equal_widths_are_matched_as_by_match() -> None:
    spec = testing.mlp_spec(9, 8, 7, 4)
    flat = torch.randn(3, spec.numel, generator=torch.Generator().manual_seed(4))
    found = match_partial(spec, flat[0], spec, flat[1:], seed=5)
    expected = align.match(spec, flat[0], flat[1:], seed=5)
    assert all(torch.equal(found.units[label], expected.perms[label]) for label in spec.labels)
    torch.testing.assert_close(found.objective, expected.objective)


def test_tensors_may_stand_in_another_order_and_variances_of_padding_score_nothing() -> None:
    axes: dict = {"w": ("h", None), "norm.running_var": ("h",)}
    ours = weightops.WeightSpec(axes, {"w": (3, 2), "norm.running_var": (3,)})
    theirs = weightops.WeightSpec(
        dict(reversed(axes.items())), {"w": (5, 2), "norm.running_var": (5,)}
    )
    w, variances = torch.zeros(5, 2), torch.tensor([1.0, 5.0, 3.0, 2.0, 4.0])
    flat = torch.cat([variances, w.flatten()])[None]
    reference = torch.cat([torch.zeros(6), torch.tensor([9.0, 7.0, 8.0])])
    found = match_partial(ours, reference, theirs, flat, tensors=["norm.running_var"])
    assert found.units["h"].tolist() == [[1, 2, 4]]
    assert found.objective.tolist() == [9.0 * 5 + 7 * 3 + 8 * 4]


def parts_spec(query: int, value: int) -> weightops.WeightSpec:
    """Two projections in one tensor, and one whose rows are of both kinds."""
    both = query + value
    return weightops.WeightSpec(
        {
            f"qv[0:{query}]": ("q", None),
            f"qv[{query}:{both}]": ("v", None),
            f"out[:, 0:{query}]": (None, "q"),
            f"out[:, {query}:{both}]": (None, "v"),
        },
        {
            f"qv[0:{query}]": (query, 9),
            f"qv[{query}:{both}]": (value, 9),
            f"out[:, 0:{query}]": (5, query),
            f"out[:, {query}:{both}]": (5, value),
        },
    )


def test_parts_move_as_those_before_them_grow() -> None:
    spec = parts_spec(4, 6)
    state = {"qv": torch.randn(10, 9), "out": torch.randn(5, 10)}
    wider, flat = widen(spec, spec.flatten(state), sizes={"q": 7})
    assert wider == parts_spec(7, 6)
    expected = {
        "qv": torch.cat([state["qv"][:4], torch.zeros(3, 9), state["qv"][4:]]),
        "out": torch.cat([state["out"][:, :4], torch.zeros(5, 3), state["out"][:, 4:]], 1),
    }
    assert torch.equal(flat, wider.flatten(expected))


def test_parts_of_unequal_widths_correspond() -> None:
    ours, theirs = parts_spec(4, 6), parts_spec(7, 3)
    generator = torch.Generator().manual_seed(6)
    large = {
        "qv": torch.randn(13, 9, generator=generator),
        "out": torch.randn(5, 13, generator=generator),
    }
    q, v = torch.randperm(7, generator=generator)[:4], torch.randperm(6, generator=generator)[:3]
    reference = ours.flatten(
        {
            "qv": large["qv"][torch.cat([q, torch.arange(7, 13)])],
            "out": large["out"][:, torch.cat([q, torch.arange(7, 13)])],
        }
    )
    flat = theirs.flatten(
        {
            "qv": large["qv"][torch.cat([torch.arange(7), 7 + v])],
            "out": large["out"][:, torch.cat([torch.arange(7), 7 + v])],
        }
    )
    found = match_partial(ours, reference[0], theirs, flat)
    assert torch.equal(found.units["q"][0], q)
    assert torch.equal(found.units["v"][0], v)
    first = match_partial(ours, reference[0], theirs, flat, tensors=["qv[0:4]"])
    torch.testing.assert_close(first.objective[0], large["qv"][q].double().pow(2).sum())


def test_an_unverified_spec_is_warned_of_and_stays_unverified() -> None:
    mlp = testing.mlp_spec(9, 8, 7, 4)
    guess = weightops.WeightSpec(mlp.axes, mlp.shapes, unverified=True)
    with pytest.warns(UserWarning, match="widen: spec was never verified"):
        wider = widen(guess, torch.ones(1, mlp.numel), sizes={"h1": 9})[0]
    assert wider.unverified
    with pytest.warns(UserWarning, match="match_partial: spec was never verified") as caught:
        match_partial(guess, torch.ones(mlp.numel), mlp, torch.ones(1, mlp.numel))
    assert len(caught) == 1


MLP = testing.mlp_spec(9, 8, 7, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spec": 3}, "widen: spec must be a WeightSpec"),
        ({"flat": torch.zeros(3)}, r"widen: flat must have shape \[N, P\]"),
        ({"flat": torch.zeros(1, 3)}, r"widen: flat has shape \[1, 3\]"),
        ({"sizes": 9}, "widen: sizes must map labels"),
        ({"sizes": {"h9": 9}}, r"widen: sizes has label 'h9', the spec has \['h1', 'h2'\]"),
        ({"sizes": {"h1": 7}}, r"widen: sizes\['h1'\] must be at least 8, not 7"),
        ({"sizes": {"h1": 8.5}}, r"widen: sizes\['h1'\] must be an integer"),
    ],
)
def test_widen_refuses_bad_input(change: dict, message: str) -> None:
    arguments = {"spec": MLP, "flat": torch.zeros(1, MLP.numel), "sizes": {}}
    with pytest.raises((ValueError, TypeError), match=message):
        widen(**(arguments | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spec": None}, "match_partial: spec must be a WeightSpec"),
        ({"other_spec": None}, "match_partial: other_spec must be a WeightSpec"),
        (
            {"other_spec": testing.mlp_spec(9, 4)},
            "match_partial: other_spec has no tensor 'fc2.weight', which the other one has",
        ),
        ({"spec": testing.mlp_spec(9, 4)}, "match_partial: spec has no tensor 'fc2.weight'"),
        (
            {"other_spec": testing.labelled_mlp_spec(9, 8, 7, 4)},
            r"match_partial: fc1.weight has axes \('h1', None\) in spec, but \('n1', 'n0'\)",
        ),
        (
            {"other_spec": testing.mlp_spec(10, 8, 7, 4)},
            "match_partial: fc1.weight axis 1 has length 9 in spec, but 10 in other_spec",
        ),
        ({"tensors": ["nope"]}, "match_partial: tensors has 'nope', the spec has"),
        ({"reference": torch.zeros(5)}, r"match_partial: reference has shape \[5\]"),
        ({"flat": torch.zeros(MLP.numel)}, r"match_partial: flat must have shape \[N, P\]"),
        ({"reference": torch.zeros(MLP.numel).long()}, "match_partial: reference must be floating"),
        ({"flat": torch.zeros(1, MLP.numel).double()}, "match_partial: flat is torch.float64"),
        (
            {"flat": torch.full((1, MLP.numel), float("nan"))},
            r"match_partial: flat must be finite, but flat\[0, 0\] is nan",
        ),
    ],
)
def test_match_partial_refuses_bad_input(change: dict, message: str) -> None:
    arguments = {
        "spec": MLP,
        "reference": torch.zeros(MLP.numel),
        "other_spec": MLP,
        "flat": torch.zeros(1, MLP.numel),
    }
    with pytest.raises((ValueError, TypeError), match=message):
        match_partial(**(arguments | change))
