"""Functionals: whose parameters they take, what widths they run on, what their files hold."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import weightops
from weightops import WeightSpec
from weightops._checkpoints import CheckpointError, write_described
from weightops.learned import Functional, LearnedOptimizer
from weightops.learned._rule import propose
from weightops.nn import EquivariantLinear
from weightops.testing import cnn_spec, labelled_mlp_spec, mlp_spec, rnn_spec, transformer_spec

D = torch.float64
KINDS = ("unf", "nfn", "deep_sets")
SPEC = mlp_spec(3, 4, 2)
PER_WEIGHT = 2 * (19 * 32 + 32 * 32 + 32 * 32)  # of the layers that see one weight


def inputs(spec: WeightSpec, networks: int = 2, dtype: torch.dtype = D) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(networks, spec.numel, 8, dtype=dtype, generator=generator)
    return x, torch.randn(11, dtype=dtype, generator=generator)


def small(spec: WeightSpec = SPEC, kind: str = "unf", **options: Any) -> Functional:
    torch.manual_seed(0)
    return Functional(spec, kind, **({"hidden": 4, "layers": 3, "dtype": D} | options))


@pytest.mark.parametrize(
    ("spec", "terms"),
    [(labelled_mlp_spec(64, 32, 10), 32), (cnn_spec(3, 16, 32, 64), 136), (rnn_spec(), 81)],
)
def test_its_size_is_the_paper_s(spec: WeightSpec, terms: int) -> None:
    # 3 numbers more in the paper's tables are alpha, beta and the decay of m.
    counted = 32 * terms + len(spec.shapes) + 2755
    assert Functional(spec).num_parameters + 3 == counted
    assert Functional(spec, "deep_sets").num_parameters == 2752 + 33


@pytest.mark.parametrize("equivariant", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_layers_with_relu_between(kind: str, equivariant: int) -> None:
    functional = small(kind=kind, equivariant=equivariant)
    x, time = inputs(SPEC)
    y = torch.cat([x, time.expand(*x.shape[:2], -1)], -1)
    for n, (weight, bias) in enumerate(zip(functional.weights, functional.biases, strict=True)):
        y = y.relu() if n else y
        if kind == "deep_sets" or n < 3 - equivariant:
            y = y @ weight[0] + bias
        else:
            fixed = {"unf": "permute", "nfn": "index"}[kind]
            layer = EquivariantLinear(SPEC, *weight.shape[1:], fixed=fixed, dtype=D)
            layer.load_state_dict({"theta": weight, "bias": bias})
            y = layer(y)
    torch.testing.assert_close(functional(x, time), y[..., 0])


@pytest.mark.parametrize("dtype", [D, torch.float32])
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("equivariant", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_with_gradients_and_without_it_is_the_same(
    kind: str, equivariant: int, layers: int, dtype: torch.dtype
) -> None:
    functional = small(kind=kind, layers=layers, equivariant=min(layers, equivariant))
    flat, grads, *momenta = torch.randn(
        8, 2, SPEC.numel, dtype=dtype, generator=torch.Generator().manual_seed(0)
    )
    given = flat, grads, torch.stack(momenta), 3, functional
    found = propose(*given)
    assert found.requires_grad
    assert found.dtype == dtype
    with torch.no_grad():
        torch.testing.assert_close(propose(*given), found.detach())
        theta = functional.flatten().repeat(2, 1)
        torch.testing.assert_close(propose(*given, theta), found.detach())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("own_time", [False, True])
def test_each_network_can_have_parameters_of_its_own(kind: str, own_time: bool) -> None:
    functional = small(kind=kind)
    x, time = inputs(SPEC, 3)
    times = time * torch.tensor([[1.0], [2.0], [3.0]], dtype=D) if own_time else time
    theta = torch.stack([functional.flatten() * scale for scale in (1.0, 0.5, -1.0)])
    together = functional(x, times, theta)
    for n in range(3):
        one = small(kind=kind).load_flat_(theta[n])
        alone = one(x[n : n + 1], times[n] if own_time else time)
        torch.testing.assert_close(together[n : n + 1], alone)
        assert torch.equal(one.flatten(), theta[n])
    torch.testing.assert_close(functional(x, times, theta[0]), functional(x, times))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_right_and_can_be_differentiated(kind: str) -> None:
    functional = small(WeightSpec({"w": ("a", None), "v": ("a",)}, {"w": (2, 2), "v": (2,)}), kind)
    x, time = inputs(functional.spec)
    theta = functional.flatten().repeat(2, 1)
    leaves = [each.requires_grad_() for each in (x, time, theta)]
    assert torch.autograd.gradcheck(functional, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(functional, leaves, fast_mode=True)


def test_it_runs_the_same_with_gradients_and_without() -> None:
    functional = small()
    x, time = inputs(SPEC)
    with torch.no_grad():
        without = functional(x, time)
    assert torch.equal(functional(x, time), without)


def test_empty_populations_pass() -> None:
    x, time = inputs(SPEC, 0)
    assert small()(x, time).shape == (0, SPEC.numel)


@pytest.mark.parametrize("kind", KINDS)
def test_first_draws_keep_the_scale(kind: str) -> None:
    torch.manual_seed(0)
    spec = mlp_spec(20, 30, 10)
    functional = Functional(spec, kind)
    x, time = inputs(spec, 4, torch.float32)
    # Each relu halves a mean square, and means over neurons are small.
    assert 0.01 < functional(x, time).square().mean() < 2


def test_flops_count_every_map() -> None:
    spec = labelled_mlp_spec(5, 7, 3)
    assert Functional(spec, "deep_sets").flops() == spec.numel * (PER_WEIGHT + 2 * 32)
    # Maps that keep the indices of a weight see it once, with all its readers; those of fewer indices are small.
    extra = Functional(spec).flops() - spec.numel * PER_WEIGHT
    assert 2 * 32 * spec.numel < extra < 4 * 2 * 32 * spec.numel


WIDER: dict[str, tuple[WeightSpec, WeightSpec]] = {
    "mlp": (mlp_spec(3, 4, 2), mlp_spec(5, 9, 4)),
    "mlp of one unit": (mlp_spec(3, 4, 2), mlp_spec(3, 1, 2)),
    "cnn": (cnn_spec(1, 2, 3), cnn_spec(1, 5, 4)),
    "rnn": (rnn_spec(3, 4), rnn_spec(6, 5)),
}


@pytest.mark.parametrize("name", WIDER)
@pytest.mark.parametrize("kind", ["unf", "deep_sets"])
def test_it_runs_on_other_widths_with_the_same_parameters(name: str, kind: str) -> None:
    narrow, wide = WIDER[name]
    functional = small(narrow, kind)
    other = functional.on(wide)
    assert other.weights is functional.weights
    assert functional.on(narrow) is functional
    x, time = inputs(wide)
    fresh = small(wide, kind).load_flat_(functional.flatten())
    torch.testing.assert_close(other(x, time), fresh(x, time))
    torch.testing.assert_close(functional(*inputs(narrow)), small(narrow, kind)(*inputs(narrow)))


def traced(model: nn.Module, shape: tuple[int, ...]) -> WeightSpec:
    return weightops.trace(model, torch.zeros(2, *shape))


def test_names_of_tensors_and_labels_do_not_matter() -> None:
    def model(width: int) -> nn.Module:
        return nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 2))

    assert small().on(traced(model(6), (3,)))
    assert small().on(traced(nn.Sequential(nn.Flatten(), *model(6)), (3,)))


def test_parts_of_tensors_are_told_by_their_order() -> None:
    def model(width: int) -> nn.Module:
        layer = nn.TransformerEncoderLayer(width, 2, 2 * width, dropout=0.0, batch_first=True)
        return nn.Sequential(nn.Linear(3, width), layer, nn.Linear(width, 2))

    narrow, wide = (traced(model(width), (4, 3)) for width in (4, 8))
    assert narrow.shapes.keys() != wide.shapes.keys()
    assert small(narrow).on(wide).spec == wide


def test_positions_without_a_label_are_parameters_of_nfn() -> None:
    functional = small(mlp_spec(3, 4, 2), "nfn")
    assert functional.on(mlp_spec(3, 9, 2))
    with pytest.raises(
        ValueError,
        match=r"is fc1.weight \(label 0, 5 fixed\), .* be fc1.weight \(label 0, 3 fixed\)",
    ):
        functional.on(mlp_spec(5, 4, 2))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            mlp_spec(3, 4, 4, 2),
            r"of 6 tensors, 4 wanted, the first .* is fc2.weight \(label 1, label 0\), .* fc2.weight \(., label 0\)",
        ),
        (
            cnn_spec(1, 2),
            r"is conv1.weight \(label 0, label 1, label 2, label 3\), which should be fc1.weight \(label 0, .\)",
        ),
        (
            WeightSpec({"w": ("a", None)}, {"w": (3, 3)}),
            r"of 1 tensors, 4 wanted, .* is missing, which should be fc1.bias \(label 0\)",
        ),
    ],
)
def test_another_architecture_is_refused_with_its_first_difference(
    other: WeightSpec, message: str, tmp_path: Path
) -> None:
    functional = small()
    with pytest.raises(
        ValueError, match=f"^Functional.on: spec is of another architecture .*{message}"
    ):
        functional.on(other)
    functional.save(tmp_path / "f.safetensors")
    with pytest.raises(
        ValueError, match=f"^Functional.load: spec is of another architecture .*{message}"
    ):
        Functional.load(tmp_path / "f.safetensors", other)


def test_a_model_of_another_architecture_is_refused_by_the_optimizer() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(ValueError, match=r"^LearnedOptimizer: spec is of another arch"):
        LearnedOptimizer(traced(model, (3,)), small(), 0.1, 0.1, model)


def test_one_that_sees_single_weights_runs_on_any_architecture() -> None:
    other = small(kind="deep_sets").on(transformer_spec())
    x, time = inputs(transformer_spec(), 1)
    assert other(x, time).shape == (1, transformer_spec().numel)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, D])
def test_a_file_gives_it_back(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    functional = small(kind=kind, dtype=dtype, equivariant=2, eps=1e-3)
    functional.save(tmp_path / "f.safetensors")
    wide = mlp_spec(3, 9, 2)
    loaded = Functional.load(str(tmp_path / "f.safetensors"), wide)
    assert loaded._options() == functional._options()
    assert (loaded.spec, loaded.eps) == (wide, 1e-3)
    torch.testing.assert_close(loaded.flatten(), functional.flatten(), rtol=0, atol=0)
    x, time = inputs(wide, dtype=dtype)
    assert torch.equal(loaded(x, time), functional.on(wide)(x, time))


def test_a_file_holds_nothing_but_tensors_and_json(tmp_path: Path) -> None:
    path = tmp_path / "f.safetensors"
    small().save(path)
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]])
    description = json.loads(header["__metadata__"]["weightops"])
    assert description["names"] == list(SPEC.shapes)
    assert description["outline"] == [[0, None], [0], [None, 0], [None]]
    assert not any("4" in text for text in description["names"])


def rewritten(**changes: Any) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        functional = small()
        description = {
            "format": "weightops functional",
            "version": 1,
            "options": functional._options(),
            "outline": [[0, None], [0], [None, 0], [None]],
            "names": list(SPEC.shapes),
        }
        state = changes.pop("state", functional.state_dict())
        write_described("save", path, state, description | changes)

    return write


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: None, "No such file"),
        (lambda path: path.write_bytes(b"no"), "is truncated or no safetensors file"),
        (rewritten(format="zoo"), "holds no functional"),
        (rewritten(version=2), "has version 2 of the format, this library reads 1"),
        (rewritten(options={}), "holds no functional: KeyError"),
        (rewritten(options={"kind": "cnn"}), "holds no functional: KeyError"),
        (rewritten(options={"kind": "unf", "wings": 2}), "holds no functional: .*wings"),
        (rewritten(state={"weights.0": torch.zeros(1)}), "does not fit"),
    ],
)
def test_files_that_hold_none_are_refused_by_name(
    write: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "f.safetensors"
    write(path)
    with pytest.raises(CheckpointError, match=f"^Functional.load: .*f.safetensors: {message}"):
        Functional.load(path, SPEC)


def test_a_functional_s_file_is_no_optimizer_s(tmp_path: Path) -> None:
    path = tmp_path / "f.safetensors"
    small(dtype=torch.float32).save(path)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(CheckpointError, match="holds a functional, but no alpha and beta"):
        LearnedOptimizer.load(path, traced(model, (3,)), model)


@pytest.mark.parametrize(
    ("path", "error", "message"),
    [
        (3, TypeError, "path must be a path, not int 3"),
        (b"f", TypeError, "path must be a path, not bytes"),
        ("f\0", ValueError, "path must be a path, which has no null character"),
        ("", ValueError, "can't be written: it is no file"),
        ("missing/f.safetensors", ValueError, "can't be written: missing is no folder"),
    ],
)
def test_a_path_that_can_not_be_written_is_refused(
    path: Any, error: type, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = nn.Linear(3, 4).to(D)
    spec = traced(nn.Linear(3, 4), (3,))
    functional = small(spec)
    optimizer = LearnedOptimizer(spec, functional, 0.1, 0.1, model)
    for where, each in (("Functional", functional), ("LearnedOptimizer", optimizer)):
        with pytest.raises(error, match=f"^{where}.save: .*{message}"):
            each.save(path)
    assert not list(tmp_path.iterdir())
