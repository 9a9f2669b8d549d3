"""What a plan says of its tokens, and which tensors make a layer."""

import pytest
import torch
from architectures import resnet18

from weightops import WeightSpec, testing, trace
from weightops.tokens import TokenPlan

MLP = testing.mlp_spec(4, 3, 2)  # rows of 4 + 1 and 3 + 1; layers of 15 and 8 weights


@pytest.mark.parametrize(
    ("kind", "size", "tokens", "positions"),
    [
        ("network", None, 1, [(0, 0, 0)]),
        ("network", 30, 1, [(0, 0, 0)]),
        ("chunk", 6, 4, [(0, 0, 0), (1, 0, 1), (2, 0, 2), (3, 1, 0)]),
        ("layer", None, 2, [(0, 0, 0), (1, 1, 0)]),
        ("layer", 10, 3, [(0, 0, 0), (1, 0, 1), (2, 1, 0)]),
        ("channel", None, 5, [(0, 0, 0), (1, 0, 1), (2, 0, 2), (3, 1, 0), (4, 1, 1)]),
    ],
)
def test_number_and_positions_of_tokens(
    kind: str, size: int | None, tokens: int, positions: list
) -> None:
    plan = TokenPlan(MLP, kind, size=size)
    assert plan.num_tokens == tokens
    assert [tuple(row) for row in plan.positions.tolist()] == positions
    assert plan.positions.dtype == torch.int64
    assert plan.mask.shape == (tokens, plan.size)
    assert plan.mask.sum() == MLP.numel


def test_by_default_nothing_is_cut() -> None:
    sizes = {kind: TokenPlan(MLP, kind).size for kind in ("network", "layer", "channel")}
    assert sizes == {"network": 23, "layer": 15, "channel": 5}


def test_rows_longer_than_a_token_are_several_tokens() -> None:
    plan = TokenPlan(MLP, "channel", size=4)
    assert plan.num_tokens == 3 * 2 + 2
    assert plan.positions[:, 1].tolist() == [0] * 6 + [1] * 2
    assert plan.positions[:, 2].tolist() == [0, 1, 2, 3, 4, 5, 0, 1]
    assert plan.mask.sum(1).tolist() == [4, 1] * 3 + [4, 4]


def test_a_layer_is_a_weight_with_its_bias_and_norm() -> None:
    norm = ("weight", "bias", "running_mean", "running_var")
    spec = trace(resnet18().eval(), torch.randn(1, 3, 32, 32))
    layers = TokenPlan(spec, "channel").layers
    convs = [name for name, shape in spec.shapes.items() if len(shape) == 4]
    assert len(layers) == len(convs) + 1
    for names, conv in zip(layers, convs):
        prefix = conv.removesuffix("weight")
        before = prefix.replace("conv", "bn").replace("downsample.0", "downsample.1")
        assert names == (conv, *(f"{before}{each}" for each in norm))
    assert layers[-1] == ("fc.weight", "fc.bias")
    assert sorted(n for names in layers for n in names) == sorted(spec.shapes)


def test_vectors_join_by_label_across_tensors_and_by_length_only_their_neighbour() -> None:
    spec = WeightSpec(
        {
            "before": ("a",),
            "wq[0:3]": ("a", None),
            "wq[3:5]": ("b", None),
            "bq[0:3]": ("a",),
            "bq[3:5]": ("b",),
            "out": (None, "a"),
            "shift": (None,),
            "other": (None,),
            "last": (None,),
            "scalar": (),
            "late": ("b",),
        },
        {
            **{"before": (3,), "wq[0:3]": (3, 2), "wq[3:5]": (2, 2), "bq[0:3]": (3,)},
            **{"bq[3:5]": (2,), "out": (4, 3), "shift": (4,), "other": (3,), "last": (4,)},
            **{"scalar": (), "late": (2,)},
        },
    )
    assert TokenPlan(spec, "channel").layers == (
        ("before",),
        ("wq[0:3]", "bq[0:3]"),
        ("wq[3:5]", "bq[3:5]", "late"),
        ("out", "shift"),
        ("other",),
        ("last",),
        ("scalar",),
    )


def test_networks_without_weights_have_no_tokens() -> None:
    for spec in (WeightSpec({}, {}), WeightSpec({"w": ("a", None)}, {"w": (3, 0)})):
        for kind in ("network", "layer", "channel"):
            plan = TokenPlan(spec, kind)
            assert (plan.num_tokens, plan.size) == (0, 1)
            assert plan.mask.shape == (0, 1)
            assert plan.positions.shape == (0, 3)


def test_equal_plans_are_equal_and_no_others() -> None:
    plans = [
        TokenPlan(MLP, "layer", size=15),
        TokenPlan(MLP, "layer", size=14),
        TokenPlan(MLP, "chunk", size=15),
        TokenPlan(testing.mlp_spec(4, 3, 1), "layer", size=15),
    ]
    assert len(set(plans)) == 4
    assert TokenPlan(MLP, "layer") == plans[0]
    assert hash(TokenPlan(MLP, "layer")) == hash(plans[0])
    assert plans[0] != "layer"


def test_json_reads_back_and_tells_where_the_spec_differs() -> None:
    plan = TokenPlan(MLP, "channel", size=4)
    assert TokenPlan.from_json(plan.to_json(), spec=MLP) == plan
    other = testing.mlp_spec(4, 3, 1)
    text = r"^TokenPlan.from_json: text is of another spec: they differ in fc2.weight$"
    with pytest.raises(ValueError, match=text):
        TokenPlan.from_json(plan.to_json(), spec=other)


def test_a_token_size_for_networks_holds_the_network() -> None:
    with pytest.raises(ValueError, match=r"^TokenPlan: size must be at least 23, as .* not 22$"):
        TokenPlan(MLP, "network", size=22)
    with pytest.raises(ValueError, match=r"^TokenPlan: kind 'chunk' needs a size$"):
        TokenPlan(MLP, "chunk")
