"""Git Re-Basin's dictionaries become specs, which verify proves or refutes."""

from collections import defaultdict
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from weightops import WeightSpec
from weightops.tracing import VerificationError, verify

NORM = ("weight", "bias", "running_mean", "running_var")


class PermutationSpec(NamedTuple):
    perm_to_axes: dict[str, list[tuple[str, int]]]
    axes_to_perm: dict[str, tuple[str | None, ...]]


def both_ways(axes_to_perm: dict[str, Any]) -> PermutationSpec:
    perm_to_axes = defaultdict(list)
    for name, entries in axes_to_perm.items():
        for axis, label in enumerate(entries):
            if label is not None:
                perm_to_axes[label].append((name, axis))
    return PermutationSpec(dict(perm_to_axes), axes_to_perm)


def conv(name: str, into: str | None, out: str | None) -> dict[str, Any]:
    return {f"{name}.weight": (out, into, None, None)}


def norm(name: str, label: str) -> dict[str, Any]:
    return {f"{name}.{each}": (label,) for each in NORM}


def mlp() -> tuple[nn.Module, dict[str, Any], Tensor]:
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 3))
    permutations = {
        **{"0.weight": ("P_0", None), "0.bias": ("P_0",)},
        **{"2.weight": ("P_1", "P_0"), "2.bias": ("P_1",)},
        **{"4.weight": (None, "P_1"), "4.bias": (None,)},
    }
    return model, permutations, torch.randn(4, 5)


def vgg() -> tuple[nn.Module, dict[str, Any], Tensor]:
    features = nn.Sequential(
        *(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(4, 5, 3, padding=1), nn.BatchNorm2d(5), nn.ReLU(), nn.MaxPool2d(2)),
    )
    layers = {"features": features, "flat": nn.Flatten(), "classifier": nn.Linear(20, 3)}
    model = nn.Sequential()
    for name, layer in layers.items():
        model.add_module(name, layer)
    permutations: dict[str, Any] = {
        **(conv("features.0", None, "P_Conv_0") | {"features.0.bias": ("P_Conv_0",)}),
        **(conv("features.4", "P_Conv_0", "P_Conv_4") | {"features.4.bias": ("P_Conv_4",)}),
        "classifier.weight": (None, "P_Conv_4"),
    }
    for at, label in ((1, "P_Conv_0"), (5, "P_Conv_4")):
        # As published: two entries for vectors, and one for the counter of batches.
        permutations |= {f"features.{at}.{each}": (label, None) for each in NORM}
        permutations[f"features.{at}.num_batches_tracked"] = ()
    return model, permutations, torch.randn(2, 3, 8, 8)


class Block(nn.Module):
    def __init__(self, into: int, out: int, inner: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(into, inner, 3, 1, 1, bias=False), nn.BatchNorm2d(inner)
        self.conv2, self.bn2 = nn.Conv2d(inner, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        self.shortcut = nn.Sequential()
        if into != out:
            self.shortcut = nn.Sequential(nn.Conv2d(into, out, 1, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        h = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (h + self.shortcut(x)).relu()


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, 1, 1, bias=False), nn.BatchNorm2d(4)
        self.layer1, self.layer2 = Block(4, 4, 5), Block(4, 8, 6)
        self.linear = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer2(self.layer1(self.bn1(self.conv1(x)).relu()))
        return self.linear(x.mean((2, 3)))


def block(name: str, into: str, out: str) -> dict[str, Any]:
    inner = f"P_{name}_inner"
    return {
        **(conv(f"{name}.conv1", into, inner) | norm(f"{name}.bn1", inner)),
        **(conv(f"{name}.conv2", inner, out) | norm(f"{name}.bn2", out)),
    }


def shortcut(name: str, into: str, out: str) -> dict[str, Any]:
    return conv(f"{name}.shortcut.0", into, out) | norm(f"{name}.shortcut.1", out)


def resnet() -> tuple[nn.Module, dict[str, Any], Tensor]:
    permutations = {
        **(conv("conv1", None, "P_bg0") | norm("bn1", "P_bg0")),
        **block("layer1", "P_bg0", "P_bg0"),
        **(block("layer2", "P_bg0", "P_bg1") | shortcut("layer2", "P_bg0", "P_bg1")),
        **{"linear.weight": (None, "P_bg1"), "linear.bias": (None,)},
    }
    return ResNet(), permutations, torch.randn(2, 3, 6, 6)


@pytest.mark.parametrize(("make", "count"), [(mlp, 2), (vgg, 2), (resnet, 4)])
def test_dictionaries_become_specs_that_are_proven(make: Any, count: int) -> None:
    model, permutations, x = make()
    spec = WeightSpec.from_git_rebasin(permutations, model)
    assert spec.unverified
    assert verify(spec, model, x).labels == count
    assert spec.flatten(model).shape == (1, spec.numel)
    ways = both_ways(permutations)
    for given in (ways, ways.perm_to_axes, ways.axes_to_perm):
        assert WeightSpec.from_git_rebasin(given, model.state_dict()) == spec
    shapes = {name: list(spec.shapes[name]) for name in spec.shapes}
    assert WeightSpec.from_git_rebasin(ways.perm_to_axes, shapes) == spec


def jax_names(name: str) -> str:
    return name.replace(".", "/").replace("weight", "kernel")


def test_kernels_whose_outputs_come_last_are_read_as_they_are_named() -> None:
    model, permutations, _ = resnet()
    transposed = {
        jax_names(name): (None, None, entries[1], entries[0])
        if len(entries) == 4
        else entries[::-1]
        for name, entries in permutations.items()
    }
    shapes = {
        jax_names(name): tensor.permute(2, 3, 1, 0).numpy()
        if tensor.dim() == 4
        else tensor.T.numpy()
        for name, tensor in model.state_dict().items()
        if tensor.is_floating_point() and tensor.dim() > 1
    } | {
        jax_names(name): tensor.numpy()
        for name, tensor in model.state_dict().items()
        if tensor.is_floating_point() and tensor.dim() == 1
    }
    spec = WeightSpec.from_git_rebasin(both_ways(transposed), shapes)
    assert dict(spec.labels) == dict(WeightSpec.from_git_rebasin(permutations, model).labels)
    assert spec.axes["layer2/conv1/kernel"] == (None, None, "P_bg0", "P_layer2_inner")
    assert spec.shapes["layer2/conv1/kernel"] == (3, 3, 4, 6)
    assert spec.axes["linear/kernel"] == ("P_bg1", None)


def test_flattened_maps_become_products_and_what_is_not_named_is_fixed() -> None:
    model, permutations, _ = vgg()
    spec = WeightSpec.from_git_rebasin(permutations, model)
    assert spec.axes["classifier.weight"] == (None, ("P_Conv_4", None))
    assert spec.axes["classifier.bias"] == (None,)
    assert dict(spec.labels) == {"P_Conv_0": 4, "P_Conv_4": 5}
    assert not any("tracked" in name for name in spec.shapes)


def test_tied_weights_are_named_once() -> None:
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7, bias=False))
    model[1].weight = model[0].weight
    for permutations in (
        {"0.weight": (None, "P")},
        {"0.weight": (None, "P"), "1.weight": (None, "P")},
    ):
        spec = WeightSpec.from_git_rebasin(permutations, model)
        assert list(spec.shapes) == ["0.weight"]
        verify(spec, model, torch.tensor([3, 1]))
    with pytest.raises(ValueError, match=r"0\.weight and 1\.weight are one tensor"):
        WeightSpec.from_git_rebasin({"0.weight": (None, "P"), "1.weight": ("P", None)}, model)


def test_faults_of_published_dictionaries_are_named() -> None:
    model, permutations, x = resnet()
    optional = permutations | shortcut("layer1", "P_bg0", "P_bg0")
    with pytest.raises(
        ValueError,
        match=r"^from_git_rebasin: permutations has \['layer1\.shortcut\.0\.weight', 'layer1.*lacks",
    ):
        WeightSpec.from_git_rebasin(optional, model)
    # The norm of the stem given the last stage's permutation, as for networks that normalise first.
    with pytest.raises(
        ValueError, match=r"'P_bg1' has length 4 at bn1\.weight axis 0, but 8 at layer2\.conv2"
    ):
        WeightSpec.from_git_rebasin(permutations | norm("bn1", "P_bg1"), model)
    # Running statistics left out, which only the experiment can tell.
    forgotten = {name: of for name, of in permutations.items() if "running" not in name}
    with pytest.raises(VerificationError):
        verify(WeightSpec.from_git_rebasin(forgotten, model), model, x)


@pytest.mark.parametrize(
    ("permutations", "shapes", "error", "text"),
    [
        (3, {"w": (2,)}, TypeError, "permutations must map tensors .* not int 3"),
        ({"w": "P"}, {"w": (2,)}, TypeError, r"permutations\['w'\] must be a list, not str 'P'"),
        ({"w": (3,)}, {"w": (2,)}, TypeError, r"\['w'\] must hold labels .* pairs, not int 3"),
        ({"P": [("w", 0.0)]}, {"w": (2,)}, TypeError, r"pairs, not tuple \('w', 0.0\)"),
        ({"w": ("P",)}, 3, TypeError, "shapes must be a module, .* not int 3"),
        ({"w": (None, "P")}, {"w": (2,)}, ValueError, r"'P' on axis 1 of w, whose shape is \[2\]"),
        ({"P": [("w", -1)]}, {"w": (2,)}, ValueError, "'P' on axis -1 of w"),
        ({"P": [("w", 0)], "Q": [("w", 0)]}, {"w": (2,)}, ValueError, "permutations 'P' and 'Q'"),
        ({"P": [("w", 0), ("v", 0)]}, {"w": (2,), "v": (3,)}, ValueError, "length 3 at v axis 0"),
        ({"P": [("w", 0), ("v", 0)]}, {"w": (2,), "v": (4,)}, ValueError, "length 4 at v axis 0"),
        ({"w": ("P",)}, {"w": 2}, TypeError, r"shapes\['w'\] must be a shape, not int 2"),
        ({"w": ("P",)}, {"w": (2.5,)}, TypeError, r"shapes\['w'\]\[0\] must be an integer"),
    ],
)
def test_bad_dictionaries_are_named(permutations: Any, shapes: Any, error: type, text: str) -> None:
    with pytest.raises(error, match=text):
        WeightSpec.from_git_rebasin(permutations, shapes)
