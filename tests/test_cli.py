"""``weightops align`` on real files: what it writes, and what it says where it can't."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from weightops import WeightSpec, _checkpoints, permute
from weightops.cli import main

FACTORY = """
import torch
from torch import nn

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.inner = nn.Linear(6, 8)
        self.outer = nn.Linear(8, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embedding.weight
    def forward(self, tokens):
        x = self.embedding(tokens)
        return self.head(x + self.outer(self.inner(x).relu()))

def mlp():
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.BatchNorm1d(8), nn.Linear(8, 3))

def with_inputs():
    return mlp(), torch.randn(4, 5)

def wide():
    return nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.BatchNorm1d(9), nn.Linear(9, 3))

def number():
    return 3

def fails():
    raise KeyError("no such thing")

constant = 3
"""
NORM = ("weight", "bias", "running_mean", "running_var")
MLP = WeightSpec(
    {
        **{"0.weight": ("h", None), "0.bias": ("h",), **{f"2.{each}": ("h",) for each in NORM}},
        **{"3.weight": (None, "h"), "3.bias": (None,)},
    },
    {
        **{"0.weight": (8, 5), "0.bias": (8,), **{f"2.{each}": (8,) for each in NORM}},
        **{"3.weight": (3, 8), "3.bias": (3,)},
    },
)
TIED = WeightSpec(
    {
        **{"embedding.weight": (None, "w"), "inner.weight": ("h", "w"), "inner.bias": ("h",)},
        **{"outer.weight": ("w", "h"), "outer.bias": ("w",)},
    },
    {
        **{"embedding.weight": (11, 6), "inner.weight": (8, 6), "inner.bias": (8,)},
        **{"outer.weight": (6, 8), "outer.bias": (6,)},
    },
)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory with a module of factories and specs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "factories", raising=False)
    (tmp_path / "factories.py").write_text(FACTORY)
    (tmp_path / "mlp.json").write_text(MLP.to_json())
    (tmp_path / "tied.json").write_text(TIED.to_json())
    return tmp_path


def factory(name: str) -> Any:
    namespace: dict[str, Any] = {}
    exec(FACTORY, namespace)
    return namespace[name]()


def checkpoint(seed: int, model: str = "mlp") -> dict[str, Tensor]:
    torch.manual_seed(seed)
    network = factory(model)
    if model == "mlp":
        for _ in range(seed + 1):
            network(torch.randn(9, 5))
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def shuffled(state: dict[str, Tensor], spec: WeightSpec, seed: int) -> dict[str, Tensor]:
    perms = spec.random_permutations(1, torch.Generator().manual_seed(seed))
    return state | spec.unflatten(permute(spec.flatten(state), perms, spec)[0])


def run(
    *arguments: str, spec: str = "mlp.json", model: str = "factories:mlp", names: str = "ab"
) -> int:
    given = ["align", *(f"{name}.safetensors" for name in names), "--model", model]
    given += ["--input", "4,5"] if model == "factories:mlp" else []
    return main([*given, *(["--spec", spec] if spec else []), *arguments])


def error(capsys: pytest.CaptureFixture[str], *arguments: str, **options: str) -> str:
    assert run(*arguments, **options) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("weightops align: ")
    return err.removeprefix("weightops align: ").rstrip("\n")


def equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        left[name].dtype == tensor.dtype and torch.equal(left[name], tensor)
        for name, tensor in right.items()
    )


def test_shuffled_copies_merge_into_the_original(here: Path, capsys: Any) -> None:
    original = checkpoint(0)
    save_file(original, "a.safetensors")
    save_file(shuffled(original, MLP, 1), "b.safetensors")
    save_file(shuffled(original, MLP, 2), "c.safetensors")
    (here / "aligned").mkdir()
    assert run("--out", "merged.safetensors", "--aligned-dir", "aligned", names="abc") == 0
    merged = load_file("merged.safetensors")
    assert merged["2.num_batches_tracked"] == original["2.num_batches_tracked"]
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, original[name])
    for name in "abc":
        assert equal(load_file(f"aligned/{name}.safetensors"), original)
    with safe_open("merged.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    out = capsys.readouterr().out
    assert re.search(r"c\.safetensors .* 0 ", out)
    assert "wrote merged.safetensors" in out
    assert "estimate them anew" in out
    assert sorted(os.listdir("aligned")) == [f"{name}.safetensors" for name in "abc"]
    assert not list(here.glob(".*"))


def test_without_a_spec_the_model_is_traced(here: Path, capsys: Any) -> None:
    original = checkpoint(0)
    save_file(original, "a.safetensors")
    save_file(shuffled(original, MLP, 1), "b.safetensors")
    assert run("--out", "merged.safetensors", spec="") == 0
    for name, tensor in load_file("merged.safetensors").items():
        torch.testing.assert_close(tensor, original[name])
    tied = {n: t for n, t in checkpoint(0, "Tied").items() if n != "head.weight"}
    save_file(tied, "a.safetensors")
    save_file(shuffled(tied, TIED, 1), "b.safetensors")
    inputs = ("--input", "2,4", "--input-dtype", "int64")
    assert run(*inputs, "--out", "tied.safetensors", spec="", model="factories:Tied") == 0
    for name, tensor in load_file("tied.safetensors").items():
        torch.testing.assert_close(tensor, tied[name])


def test_models_that_cannot_be_traced_are_named(files: Path, capsys: Any) -> None:
    text = error(capsys, "--input", "4,6", "--out", "m.pt", spec="", model="factories:with_inputs")
    assert text.startswith("--model factories:with_inputs: trace: ")


def test_weights_and_dtypes_and_torch_files(here: Path) -> None:
    a, b = checkpoint(0), checkpoint(3)
    halves = [{k: v.half() if k == "0.weight" else v for k, v in each.items()} for each in (a, b)]
    torch.save(halves[0], "a.pt")
    torch.save(halves[1], "b.pth")
    arguments = ["a.pt", "b.pth", "--model", "factories:with_inputs", "--spec", "mlp.json"]
    assert main(["align", *arguments, "--weights", "1,0", "--out", "one.pt"]) == 0
    assert equal(torch.load("one.pt", weights_only=True), halves[0])
    assert main(["align", *arguments, "--weights", ".25,.75", "--out", "x.safetensors"]) == 0
    merged = load_file("x.safetensors")
    assert merged["0.weight"].dtype == torch.float16
    assert merged["2.num_batches_tracked"] == 1
    torch.testing.assert_close(merged["3.bias"], 0.25 * a["3.bias"] + 0.75 * b["3.bias"])


def test_tied_weights_may_stand_under_any_of_their_names(here: Path) -> None:
    state = checkpoint(0, "Tied")
    moved = TIED.unflatten(permute(TIED.flatten(factory_state(state)), perms(), TIED)[0])
    both = state | moved | {"head.weight": moved["embedding.weight"].clone()}
    one = {name: tensor for name, tensor in state.items() if name != "embedding.weight"}
    other = {name: both[name] for name in one}
    save_file(one, "a.safetensors")
    save_file(other, "b.safetensors")
    options = {"spec": "tied.json", "model": "factories:Tied"}
    inputs = ("--input", "2,4", "--input-dtype", "int64")
    assert run(*inputs, "--out", "merged.safetensors", **options) == 0
    merged = load_file("merged.safetensors")
    assert merged.keys() == one.keys()
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, one[name])
    save_file(state, "a.safetensors")
    save_file(both, "b.safetensors")
    assert run(*inputs, "--out", "merged.safetensors", **options) == 0
    assert load_file("merged.safetensors").keys() == state.keys()


def perms() -> dict[str, Tensor]:
    return TIED.random_permutations(1, torch.Generator().manual_seed(1))


def factory_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: state[name] for name in TIED.shapes}


def test_tied_weights_that_differ_are_named(here: Path, capsys: Any) -> None:
    state = checkpoint(0, "Tied")
    save_file(state, "a.safetensors")
    save_file(state | {"head.weight": state["head.weight"] + 1}, "b.safetensors")
    options = {"spec": "tied.json", "model": "factories:Tied"}
    text = error(capsys, "--input", "2,4", "--input-dtype", "int64", "--out", "m.pt", **options)
    assert text == (
        "b.safetensors: embedding.weight and head.weight differ, but are one tensor of the model"
    )


@pytest.fixture
def files(here: Path) -> Path:
    save_file(checkpoint(0), "a.safetensors")
    save_file(checkpoint(1), "b.safetensors")
    return here


def changed(**tensors: Tensor | None) -> None:
    state = load_file("b.safetensors") | tensors
    save_file({name: t for name, t in state.items() if t is not None}, "b.safetensors")


def test_unequal_architectures_are_named_tensor_by_tensor(files: Path, capsys: Any) -> None:
    changed(
        **{"0.weight": torch.ones(8, 4), "0.bias": torch.ones(8).half(), "3.bias": None},
        **{"4.bias": torch.ones(2)},
    )
    assert error(capsys, "--out", "m.safetensors").splitlines() == [
        "b.safetensors: is not of the architecture of a.safetensors:",
        "  0.bias is float16 [8], but float32 [8] in a.safetensors",
        "  0.weight is float32 [8, 4], but float32 [8, 5] in a.safetensors",
        "  3.bias float32 [3] is missing",
        "  4.bias float32 [2] is not in a.safetensors",
    ]
    assert not Path("m.safetensors").exists()


def test_many_differences_are_cut_short(files: Path, capsys: Any) -> None:
    save_file({f"{i}.w": torch.ones(1) for i in range(30)}, "b.safetensors")
    lines = error(capsys, "--out", "m.pt").splitlines()
    assert len(lines) == 22
    assert lines[-1] == "  and 19 more"


def test_checkpoints_of_another_model_are_named(files: Path, capsys: Any) -> None:
    text = error(capsys, "--input", "4,5", "--out", "m.pt", model="factories:wide")
    assert text.startswith("a.safetensors: is not of the architecture of the model:\n")
    assert "0.bias is float64 [8], but float64 [9] in the model" in text


def broken(text: str) -> Callable[[], Any]:
    return lambda: Path("b.safetensors").write_bytes(text.encode())


def truncated() -> None:
    path = Path("b.safetensors")
    path.write_bytes(path.read_bytes()[:-8])


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (broken("{}"), "b.safetensors: is truncated or no safetensors file: .+"),
        (broken(""), "b.safetensors: is truncated or no safetensors file: .+"),
        (truncated, "b.safetensors: is truncated or no safetensors file: .+"),
        (lambda: os.remove("b.safetensors"), "b.safetensors: No such file or directory"),
        (
            lambda: changed(**{"3.bias": torch.tensor([1.0, torch.nan, 2.0])}),
            r".*3\.bias\[1\] is nan",
        ),
        (lambda: save_file({}, "b.safetensors"), "b.safetensors: holds no tensor"),
    ],
)
def test_unreadable_files_are_named_with_the_reason(
    files: Path, capsys: Any, spoil: Callable[[], Any], text: str
) -> None:
    spoil()
    said = error(capsys, "--out", "m.pt")
    assert re.fullmatch(text, said), said
    assert not Path("m.pt").exists()


class Anything:
    pass


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (Anything(), "a.pt: is truncated or no state dict: .+"),
        (b"", "a.pt: is truncated or no state dict: .+"),
        (b"PK\x03\x04", "a.pt: is truncated or no state dict: .+"),
        ([torch.ones(2)], "a.pt: holds no state dict, but list"),
        ({"epoch": 3}, "a.pt: holds no state dict: 'epoch' is no tensor, but int"),
    ],
)
def test_torch_files_that_hold_no_state_dict_are_named(
    files: Path, capsys: Any, content: Any, text: str
) -> None:
    if isinstance(content, bytes):
        Path("a.pt").write_bytes(content)
    else:
        torch.save(content, "a.pt")
    assert (
        main(["align", "a.pt", "b.safetensors", "--model", "factories:mlp", "--out", "m.pt"]) == 2
    )
    said = capsys.readouterr().err.removeprefix("weightops align: ").rstrip("\n")
    assert re.fullmatch(text, said), said


@pytest.mark.parametrize(
    ("model", "text"),
    [
        ("factories", "must be module:factory"),
        ("nowhere:mlp", "ModuleNotFoundError: No module named 'nowhere'"),
        ("factories:nothing", "AttributeError: module 'factories' has no attribute 'nothing'"),
        ("factories:constant", "TypeError: 'int' object is not callable"),
        ("factories:fails", "KeyError: 'no such thing'"),
        ("factories:number", "must return a module, or a module and example inputs, not int"),
        ("factories:mlp.__name__", "TypeError: 'str' object is not callable"),
        ("factories:wide", "returned no example inputs; give --input 1,3,32,32"),
    ],
)
def test_factories_that_make_no_model_are_named(
    files: Path, capsys: Any, model: str, text: str
) -> None:
    assert error(capsys, "--out", "m.pt", model=model) == f"--model {model}: {text}"


def test_specs_are_verified(files: Path, capsys: Any) -> None:
    axes = dict(MLP.axes) | {"2.bias": (None,)}
    Path("wrong.json").write_text(WeightSpec(axes, MLP.shapes).to_json())
    text = error(capsys, "--out", "m.pt", spec="wrong.json")
    assert re.fullmatch(r"wrong\.json: verify: label 'h' .* missing on 2\.bias axis 0 .*", text)
    Path("wrong.json").write_text("{}")
    assert error(capsys, "--out", "m.pt", spec="wrong.json").startswith("wrong.json: from_json")
    assert error(capsys, "--out", "m.pt", spec="none.json").startswith(
        "none.json: [Errno 2] No such"
    )
    other = error(capsys, "--out", "m.pt", spec="tied.json")
    assert other.startswith("tied.json: verify: model has no tensor 'embedding.weight'")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "give --out, --aligned-dir or both"),
        (["--out", "m.npz"], "m.npz: must end in one of .safetensors, .pt, .pth"),
        (["--out", "no/m.pt"], "--out no/m.pt: no is no directory"),
        (["--aligned-dir", "no"], "--aligned-dir no: is no directory"),
        (["--out", "a.safetensors"], "a.safetensors: is an input, and would be overwritten"),
        (["--aligned-dir", "."], "a.safetensors: is an input, and would be overwritten"),
        (["--out", "m.pt", "--weights", ".5"], "--weights: 1 numbers for 2 checkpoints"),
        (
            ["--out", "m.pt", "--method", "magic"],
            "--method magic: match: method must be one of .*magic.*",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_named(
    files: Path, capsys: Any, arguments: list[str], text: str
) -> None:
    said = error(capsys, *arguments)
    assert re.fullmatch(text, said), said


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--input", "4,x"], "must be lengths like 1,3,32,32, not '4,x'"),
        (["--input", "4,0"], "must be lengths like 1,3,32,32, not '4,0'"),
        (["--input-dtype", "int"], ""),
        (["--input-dtype", "number"], "must be a dtype like int64, not 'number'"),
        (["--weights", ".5,a"], "must be numbers like .7,.3, not '.5,a'"),
        (["--weights", ".5,inf"], "must be numbers like .7,.3, not '.5,inf'"),
    ],
)
def test_arguments_that_cannot_be_read_are_named(
    files: Path, capsys: Any, arguments: list[str], text: str
) -> None:
    if not text:
        assert run(*arguments, "--out", "no/m.pt") == 2
        return
    with pytest.raises(SystemExit) as caught:
        run(*arguments, "--out", "m.pt")
    assert caught.value.code == 2
    assert text in capsys.readouterr().err


def test_one_checkpoint_is_not_enough(files: Path, capsys: Any) -> None:
    assert main(["align", "a.safetensors", "--model", "factories:mlp", "--out", "m.pt"]) == 2
    assert "a.safetensors: one checkpoint has none to align to" in capsys.readouterr().err


def test_output_appears_whole_or_not_at_all(
    files: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    Path("m.pt").write_text("before")
    (files / "aligned").mkdir()

    def full(state: Any, suffix: str, path: Path) -> None:
        path.write_bytes(b"half")
        if suffix == ".pt":
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(_checkpoints, "_save", full)
    text = error(capsys, "--out", "m.pt", "--aligned-dir", "aligned")
    assert text == "m.pt: can't be written: No space left on device"
    assert Path("m.pt").read_text() == "before"
    assert not list((files / "aligned").iterdir())
    assert not list(files.glob(".*"))


def test_info_is_a_command(capsys: Any) -> None:
    assert main(["info", "--json"]) == 0
    assert "ops" in json.loads(capsys.readouterr().out)
    assert main(["info"]) == 0
    assert "library" in capsys.readouterr().out


def test_the_package_runs_as_a_program(here: Path) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "weightops",
            "align",
            "a.pt",
            "b.pt",
            "--model",
            "x:y",
            "--out",
            "m.pt",
        ],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)},
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == "weightops align: a.pt: No such file or directory\n"
