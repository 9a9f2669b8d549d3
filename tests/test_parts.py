"""Parts: spec tensors that are slices of a model's tensors are ordinary ones to every op."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from weightops import WeightSpec, permute


class Dense(nn.Module):
    """Two branches side by side, read by one layer: its columns are two labels, and so is a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 4)
        self.b = nn.Linear(3, 6)
        self.norm = nn.BatchNorm1d(10)
        self.out = nn.Linear(10, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(torch.cat([self.a(x), self.b(x)], 1)).relu())


NORM = ("weight", "bias", "running_mean", "running_var")
DENSE = WeightSpec(
    {
        **{"a.weight": ("a", None), "a.bias": ("a",), "b.weight": ("b", None), "b.bias": ("b",)},
        **{f"norm.{each}[0:4]": ("a",) for each in NORM},
        **{"out.weight[:, 4:10]": (None, "b"), "out.weight[:, 0:4]": (None, "a")},
        **{f"norm.{each}[4:10]": ("b",) for each in NORM},
        "out.bias": (None,),
    },
    {
        **{"a.weight": (4, 3), "a.bias": (4,), "b.weight": (6, 3), "b.bias": (6,)},
        **{f"norm.{each}[0:4]": (4,) for each in NORM},
        **{"out.weight[:, 4:10]": (2, 6), "out.weight[:, 0:4]": (2, 4)},
        **{f"norm.{each}[4:10]": (6,) for each in NORM},
        "out.bias": (2,),
    },
)


def dense() -> Dense:
    model = Dense().double().eval()
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(0.5, 2.0)
    return model


def spec_of(**shapes: tuple[int, ...]) -> WeightSpec:
    return WeightSpec({name: (None,) * len(shape) for name, shape in shapes.items()}, shapes)


def test_parts_of_concatenated_axes_permute_on_their_own() -> None:
    model, x = dense(), torch.randn(5, 3, dtype=torch.float64)
    flat = DENSE.flatten(model)
    for label, size in DENSE.labels.items():
        moved = permute(flat, {label: torch.arange(size).flip(0)}, DENSE)[0]
        assert not torch.equal(moved, flat[0])
        torch.testing.assert_close(DENSE.load_(copy.deepcopy(model), moved)(x), model(x))
        by_state = torch.func.functional_call(model, DENSE.state_dict(moved), (x,))
        torch.testing.assert_close(by_state, model(x))


def test_flatten_reads_slices_in_the_order_of_the_spec_and_load_writes_them_back() -> None:
    model = dense()
    flat = DENSE.flatten([model, dense()])
    views = DENSE.unflatten(flat[0])
    assert torch.equal(views["out.weight[:, 4:10]"], model.out.weight[:, 4:10])
    assert torch.equal(views["norm.running_var[4:10]"], model.norm.running_var[4:10])
    other = Dense().double()
    weight = other.out.weight
    DENSE.load_(other, flat[0])
    assert other.out.weight is weight
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            assert torch.equal(other.state_dict()[name], tensor)


def test_flatten_of_parts_is_differentiable() -> None:
    state = {
        name: tensor.clone().requires_grad_()
        for name, tensor in dense().state_dict().items()
        if tensor.is_floating_point()
    }
    weights = torch.randn(1, DENSE.numel, dtype=torch.float64)
    (DENSE.flatten(state) * weights).sum().backward()
    for name, expected in DENSE.state_dict(weights[0]).items():
        assert torch.equal(state[name].grad, expected)


def test_state_dict_joins_parts_and_views_the_rest() -> None:
    state = {k: v for k, v in dense().state_dict().items() if v.is_floating_point()}
    flat = DENSE.flatten([state, state])
    joined = DENSE.state_dict(flat)
    assert joined.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(joined[name], torch.stack([tensor, tensor]))
    flat.zero_()
    assert not joined["a.weight"].any()
    assert joined["out.weight"].all()
    row = flat[0].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda row: tuple(DENSE.state_dict(row).values()), row)
    batched = torch.func.vmap(lambda row: DENSE.state_dict(row)["out.weight"])(flat)
    assert torch.equal(batched, DENSE.state_dict(flat)["out.weight"])


def test_parts_tile_in_two_dimensions() -> None:
    shapes = {"w[0:2, 0:3]": (2, 3), "w[0:2, 3:4]": (2, 1), "w[2:7]": (5, 4)}
    spec = spec_of(**shapes)
    w = torch.randn(7, 4)
    assert torch.equal(spec.state_dict(spec.flatten({"w": w})[0])["w"], w)


@pytest.mark.parametrize(
    ("shapes", "text"),
    [
        (
            {"w[0:2]": (2,), "w[3:4]": (1,)},
            r"parts of w must cover \[4\] .* entry \[2\] is in none of \['w\[0:2\]', 'w\[3:4\]'\]",
        ),
        ({"w[2:4]": (2,)}, r"entry \[0\] is in none of \['w\[2:4\]'\]"),
        (
            {"w[0:3]": (3,), "w[2:4]": (2,)},
            r"entry \[2\] is in w\[0:3\] and w\[2:4\]",
        ),
        (
            {"w[0:2]": (2, 3), "w[2:4]": (2, 4)},
            r"must cover \[4, 4\] exactly once, but entry \[0, 3\] is in none",
        ),
        ({"w[0:2, 0:2]": (2, 2), "w[0:2, 2:3]": (2, 1), "w[2:3, 0:2]": (1, 2)}, r"\[2, 2\]"),
        ({"w[0:2]": (2,), "w[2:4]": (2, 1)}, r"w\[0:2\] has shape \[2\], but w\[2:4\], a part of"),
        ({"w[0:2]": (3,)}, r"w\[0:2\] has shape \[3\], but its slice of axis 0 has length 2"),
        ({"w[0:2, 0:1]": (2,)}, r"w\[0:2, 0:1\] slices 2 axes, but has shape \[2\]"),
        ({"w[2:2]": (0,)}, r"w\[2:2\] is empty along axis 0"),
        ({"w[3:2]": (1,)}, r"w\[3:2\] is empty along axis 0"),
        ({"w": (4,), "w[0:4]": (4,)}, r"w is given whole and by its part w\[0:4\]"),
    ],
)
def test_parts_that_do_not_cover_their_tensor_once_are_named(shapes: Any, text: str) -> None:
    with pytest.raises(ValueError, match="^WeightSpec: .*" + text):
        spec_of(**shapes)


def test_a_models_tensor_that_is_not_what_the_parts_cover_is_named() -> None:
    spec = spec_of(**{"w[0:2]": (2, 3), "w[2:4]": (2, 3)})
    for shape in ([5, 3], [4, 4], [4]):
        with pytest.raises(
            ValueError,
            match=rf"flatten: w has shape \{shape}, the spec's parts of it cover \[4, 3\]",
        ):
            spec.flatten({"w": torch.zeros(shape)})
    with pytest.raises(ValueError, match="models has no tensor 'w', which the spec names"):
        spec.flatten({"w[0:2]": torch.zeros(2, 3), "w[2:4]": torch.zeros(2, 3)})
    with pytest.raises(ValueError, match=r"load_: model has a tensor 'v', which the spec lacks"):
        model = nn.Module()
        model.w, model.v = nn.Parameter(torch.zeros(4, 3)), nn.Parameter(torch.zeros(3))
        spec.load_(model, torch.zeros(12))


@pytest.mark.parametrize(
    "name", ["w[0]", "w[:]", "w[0:2, :]", "w[0:2", "w[0:4:2]", "w[-1:2]", "w[a:b]", "[0:2]", "w[]"]
)
def test_names_with_brackets_that_are_no_slices_are_plain(name: str) -> None:
    spec, value = spec_of(**{name: (2, 3)}), torch.randn(2, 3)
    flat = spec.flatten({name: value})
    assert torch.equal(flat, value.view(1, -1))
    assert torch.equal(spec.state_dict(flat[0])[name], value)


def test_a_name_with_brackets_may_have_parts() -> None:
    spec, value = spec_of(**{"w[0][0:1]": (1, 3), "w[0][1:2]": (1, 3)}), torch.randn(2, 3)
    assert torch.equal(spec.flatten({"w[0]": value}), value.view(1, -1))


def test_unverified_is_kept_by_copies_and_no_part_of_equality() -> None:
    axes, shapes = {"w": ("h", None)}, {"w": (3, 2)}
    spec, proven = WeightSpec(axes, shapes, unverified=True), WeightSpec(axes, shapes)
    assert spec.unverified
    assert not proven.unverified
    assert spec == proven
    assert hash(spec) == hash(proven)
    assert spec.digest == proven.digest
    assert "unverified" in repr(spec)
    assert "unverified" not in repr(proven) + proven.to_json()
    for other in (spec, proven):
        for again in (
            WeightSpec.from_json(other.to_json()),
            pickle.loads(pickle.dumps(other)),
            copy.copy(other),
            copy.deepcopy(other),
        ):
            assert again.unverified == other.unverified
    with pytest.raises(AttributeError):
        spec.unverified = False  # type: ignore[misc]
    with pytest.raises(TypeError, match="WeightSpec: unverified must be True or False, not int 1"):
        WeightSpec(axes, shapes, unverified=1)  # type: ignore[arg-type]
