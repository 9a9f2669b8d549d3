"""``weightops align`` merges checkpoints modulo permutation; ``weightops info`` says what is installed."""

from __future__ import annotations

import argparse
import importlib
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from weightops import _checkpoints, info
from weightops._checkpoints import CheckpointError, Weights
from weightops._state import storage
from weightops.align.matching import Match, match
from weightops.ops.permute import merge, permute
from weightops.spec import WeightSpec
from weightops.tracing.verify import verify


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` and return its exit code: 2 where an argument can't be used."""
    parser = argparse.ArgumentParser(prog="weightops", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    about = "what is installed, what was built, and which kernel serves what"
    shown = commands.add_parser("info", help=about, description=about)
    shown.add_argument("--json", action="store_true", help="machine-readable")
    about = "align checkpoints to the first by permutation, and merge them"
    _add_align(commands.add_parser("align", help=about, description=about))
    arguments = parser.parse_args(argv)
    if arguments.command == "info":
        info.show(as_json=arguments.json)
        return 0
    try:
        align(arguments)
    except CheckpointError as error:
        print(f"weightops align: {error}", file=sys.stderr)
        return 2
    return 0


def _add_align(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("checkpoints", nargs="+", type=Path, help="safetensors or .pt files of one architecture")
    add("--model", required=True, help="module:factory that returns it, or it and example inputs")
    add("--input", action="append", type=_shape, help="an example input's shape, like 1,3,32,32")
    add("--input-dtype", default="float32", type=_dtype, help="dtype of the inputs (float32)")
    add("--spec", type=Path, help="a spec's JSON, instead of tracing the model; verified as well")
    add("--out", type=Path, help="where the merged network goes")
    add("--aligned-dir", type=Path, help="where each aligned network goes, under its file's name")
    add("--weights", type=_numbers, help="of the merged networks, like .7,.3 (equal ones)")
    add("--method", default="weight", help="of weightops.align.match (weight)")
    add("--seed", default=0, type=int, help="of matching and verification (0)")


def align(arguments: argparse.Namespace) -> None:
    """Read, trace, verify, match, merge, write; :class:`CheckpointError` where something does not fit."""
    paths = arguments.checkpoints
    outputs = _outputs(arguments)
    weights = arguments.weights or [1 / len(paths)] * len(paths)
    if len(weights) != len(paths):
        raise CheckpointError(f"--weights: {len(weights)} numbers for {len(paths)} checkpoints")
    files = [_checkpoints.read(path) for path in paths]
    for path, file in zip(paths[1:], files[1:]):
        _checkpoints.check_equal(str(paths[0]), files[0], str(path), file)
    model, inputs = _model(arguments)
    states = [_complete(model, path, file) for path, file in zip(paths, files)]
    _check_model(model, paths[0], states[0])
    model.load_state_dict(states[0], strict=False)
    spec = _spec(arguments, model, inputs)

    with _named("the spec"):
        flat = spec.flatten(states)
    with _named(f"--method {arguments.method}"):
        found = match(spec, flat[0], flat[1:], method=arguments.method, seed=arguments.seed)
    aligned = torch.cat([flat[:1], permute(flat[1:], found.perms, spec)])
    rows = dict(zip(outputs[: len(paths)], aligned)) if arguments.aligned_dir else {}
    if arguments.out:
        rows[outputs[-1]] = merge(aligned, weights, spec)
    _checkpoints.write({path: _written(model, spec, files[0], row) for path, row in rows.items()})
    _report(spec, paths, flat, aligned, found)
    for path in rows:
        print(f"wrote {path}")
    if arguments.out and any(name.endswith("running_var") for name in files[0]):
        print("running statistics are averages: estimate them anew on data before use")


def _outputs(arguments: argparse.Namespace) -> list[Path]:
    """The aligned networks' paths, where asked for, and the merged one's."""
    if len(arguments.checkpoints) < 2:
        raise CheckpointError(f"{arguments.checkpoints[0]}: one checkpoint has none to align to")
    outputs = []
    if arguments.aligned_dir:
        outputs += [arguments.aligned_dir / path.name for path in arguments.checkpoints]
        if not arguments.aligned_dir.is_dir():
            raise CheckpointError(f"--aligned-dir {arguments.aligned_dir}: is no directory")
    if arguments.out:
        outputs.append(arguments.out)
        if not arguments.out.parent.is_dir():
            raise CheckpointError(f"--out {arguments.out}: {arguments.out.parent} is no directory")
    if not outputs:
        raise CheckpointError("give --out, --aligned-dir or both")
    for path in outputs:
        _checkpoints.check_suffix(path)
        if outputs.count(path) > 1:
            raise CheckpointError(f"{path}: would be written twice")
        if path.exists() and any(path.samefile(p) for p in arguments.checkpoints if p.exists()):
            raise CheckpointError(f"{path}: is an input, and would be overwritten")
    return outputs


def _model(arguments: argparse.Namespace) -> tuple[nn.Module, tuple]:
    """What ``--model`` makes, and example inputs."""
    where = f"--model {arguments.model}"
    module, _, attribute = arguments.model.partition(":")
    if not (module and attribute):
        raise CheckpointError(f"{where}: must be module:factory")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        made = attrgetter(attribute)(importlib.import_module(module))()
    except Exception as error:
        raise CheckpointError(f"{where}: {type(error).__name__}: {_first_line(error)}") from error
    model, given = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise CheckpointError(
            f"{where}: must return a module, or a module and example inputs, "
            f"not {type(model).__name__}"
        )
    if arguments.input:
        return model.eval(), tuple(
            _example(model, shape, arguments.input_dtype) for shape in arguments.input
        )
    if given is None:
        raise CheckpointError(f"{where}: returned no example inputs; give --input 1,3,32,32")
    return model.eval(), given if isinstance(given, tuple) else (given,)


def _example(model: nn.Module, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    if dtype.is_floating_point:
        return torch.randn(shape, dtype=dtype, generator=generator)
    tables = [each.num_embeddings for each in model.modules() if isinstance(each, nn.Embedding)]
    return torch.randint(min(tables, default=2), shape, generator=generator).to(dtype)


def _complete(model: nn.Module, path: Path, file: Weights) -> Weights:
    """``file`` in one floating dtype, with all names of the model's tied tensors, of which one is enough."""
    dtypes = {tensor.dtype for tensor in file.values()}
    wide = torch.float64 if torch.float64 in dtypes else torch.float32
    state = {name: t.to(wide) if t.is_floating_point() else t for name, t in file.items()}
    for names in _tied(model):
        given = [name for name in names if name in file]
        for name in given[1:]:
            if not torch.equal(file[name], file[given[0]]):
                raise CheckpointError(
                    f"{path}: {given[0]} and {name} differ, but are one tensor of the model"
                )
        state |= dict.fromkeys(names, state[given[0]]) if given else {}
    return state


def _tied(model: nn.Module) -> list[list[str]]:
    groups: dict[Any, list[str]] = {}
    for name, tensor in model.state_dict().items():
        groups.setdefault(storage(tensor) if tensor.numel() else name, []).append(name)
    return list(groups.values())


def _check_model(model: nn.Module, path: Path, state: Weights) -> None:
    """Raise where the model's tensors are not the checkpoint's; counters and dtypes do not matter."""
    expected, given = (
        {name: tensor.double() for name, tensor in each.items() if tensor.is_floating_point()}
        for each in (model.state_dict(), state)
    )
    _checkpoints.check_equal("the model", expected, str(path), given)


def _spec(arguments: argparse.Namespace, model: nn.Module, inputs: tuple) -> WeightSpec:
    if arguments.spec:
        try:
            text = arguments.spec.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{arguments.spec}: {error}") from None
        with _named(str(arguments.spec)):
            spec = WeightSpec.from_json(text)
            verify(spec, model, *inputs, seed=arguments.seed)
        return spec
    from weightops.tracing import trace

    with _named(f"--model {arguments.model}"):
        spec = trace(model, *inputs)
        verify(spec, model, *inputs, seed=arguments.seed)
    return spec


def _written(model: nn.Module, spec: WeightSpec, file: Weights, row: Tensor) -> Weights:
    """``file`` with the weights of ``row``, in its own dtypes; its integer tensors stay."""
    state = spec.state_dict(row)
    for names in _tied(model):
        named = [name for name in names if name in state]
        state |= dict.fromkeys(names, state[named[0]]) if named else {}
    return {
        name: state[name].to(tensor.dtype) if tensor.is_floating_point() else tensor
        for name, tensor in file.items()
    }


def _report(
    spec: WeightSpec, paths: Sequence[Path], flat: Tensor, aligned: Tensor, found: Match
) -> None:
    from rich.console import Console
    from rich.table import Table

    position = torch.arange(spec.numel).expand(len(flat) - 1, -1)
    moved = (permute(position, found.perms, spec) != position).double().mean(1)
    distances = [(each[1:].double() - flat[0].double()).norm(dim=1) for each in (flat, aligned)]
    table = Table(title=f"aligned to {paths[0].name}")
    for column in ("network", "objective before", "after", "distance before", "after", "permuted"):
        table.add_column(column, justify="left" if column == "network" else "right")
    for n, path in enumerate(paths[1:]):
        measured = (found.history[0][n], found.objective[n], distances[0][n], distances[1][n])
        table.add_row(path.name, *(f"{value.item():.6g}" for value in measured), f"{moved[n]:.1%}")
    Console().print(table)


@contextmanager
def _named(what: str) -> Iterator[None]:
    """Errors about ``what`` say so."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{what}: {error}") from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]


def _shape(text: str) -> list[int]:
    try:
        shape = [int(part) for part in text.split(",")]
    except ValueError:
        shape = [0]
    if min(shape) < 1:
        raise argparse.ArgumentTypeError(f"must be lengths like 1,3,32,32, not {text!r}")
    return shape


def _dtype(text: str) -> torch.dtype:
    dtype = getattr(torch, text, None)
    if not isinstance(dtype, torch.dtype):
        raise argparse.ArgumentTypeError(f"must be a dtype like int64, not {text!r}")
    return dtype


def _numbers(text: str) -> list[float]:
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = [math.nan]
    if not all(map(math.isfinite, numbers)):
        raise argparse.ArgumentTypeError(f"must be numbers like .7,.3, not {text!r}")
    return numbers
