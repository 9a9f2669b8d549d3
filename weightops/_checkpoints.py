"""Checkpoints on disk: read with reasons where that fails, compared, written whole or not at all."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Weights = dict[str, Tensor]
_SUFFIXES = (".safetensors", ".pt", ".pth")
#: differences that a message lists
_LISTED = 20
#: key of a file's description among the strings that safetensors keeps
_KEY = "weightops"


class CheckpointError(ValueError):
    """A file or an argument that can't be used; the message names it and says why."""


def check_suffix(path: Path) -> None:
    if path.suffix not in _SUFFIXES:
        raise CheckpointError(f"{path}: must end in one of {', '.join(_SUFFIXES)}")


def read(path: Path) -> Weights:
    """Name -> tensor, on the CPU; :class:`CheckpointError` where ``path`` holds no finite weights."""
    check_suffix(path)
    try:
        path.open("rb").close()
        state = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from None
    if not state:
        raise CheckpointError(f"{path}: holds no tensor")
    for name, tensor in state.items():
        if tensor.is_floating_point() and not (finite := tensor.isfinite()).all():
            at = (~finite).nonzero()[0].tolist()
            raise CheckpointError(f"{path}: {name}{at or ''} is {tensor[tuple(at)].item()}")
    return state


def _read_safetensors(path: Path) -> Weights:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"{path}: is truncated or no safetensors file: {error}") from None


def _read_pickle(path: Path) -> Weights:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path}: is truncated or no state dict: {reason}") from None
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{path}: holds no state dict, but {type(state).__name__}")
    for name, tensor in state.items():
        if not (isinstance(name, str) and isinstance(tensor, Tensor)):
            raise CheckpointError(
                f"{path}: holds no state dict: {name!r} is no tensor, but {type(tensor).__name__}"
            )
    return dict(state)


def check_equal(first: str, expected: Weights, second: str, given: Weights) -> None:
    """Raise, tensor by tensor, where two checkpoints are not of one architecture.

    ``first`` and ``second`` are what messages call them.
    """
    faults = [
        f"{name} {_form(expected[name])} is missing" for name in expected.keys() - given.keys()
    ]
    faults += [
        f"{name} {_form(given[name])} is not in {first}" for name in given if name not in expected
    ]
    faults += [
        f"{name} is {_form(given[name])}, but {_form(tensor)} in {first}"
        for name, tensor in expected.items()
        if name in given and _form(given[name]) != _form(tensor)
    ]
    if faults:
        more = [f"and {len(faults) - _LISTED} more"] if len(faults) > _LISTED else []
        lines = "\n  ".join([*sorted(faults)[:_LISTED], *more])
        raise CheckpointError(f"{second}: is not of the architecture of {first}:\n  {lines}")


def _form(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def write(states: Mapping[Path, Weights]) -> None:
    """Write all checkpoints, or none where one fails; an existing file is replaced at once."""
    written: dict[Path, Path] = {}
    try:
        for path, state in states.items():
            temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
            written[temporary] = path
            _save({name: tensor.clone() for name, tensor in state.items()}, path.suffix, temporary)
        for temporary, path in written.items():
            os.replace(temporary, path)
    except Exception as error:  # torch and safetensors have errors of their own for a full disk
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{path}: can't be written: {reason}") from error
    finally:
        for temporary in written:
            temporary.unlink(missing_ok=True)


def _save(state: Weights, suffix: str, path: Path) -> Any:
    if suffix != ".safetensors":
        return torch.save(state, path)
    from safetensors.torch import save_file

    return save_file(state, path, metadata={"format": "pt"})


def write_described(
    where: str, path: Path, tensors: Mapping[str, Tensor], description: Mapping[str, Any]
) -> None:
    """Write one safetensors file with a description as JSON: whole, or not at all."""
    from safetensors.torch import save_file

    if not path.name:
        raise CheckpointError(f"{where}: {path}: can't be written: it is no file")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    if not path.parent.is_dir():
        raise CheckpointError(f"{where}: {path}: can't be written: {path.parent} is no folder")
    copies = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
    try:
        save_file(copies, temporary, metadata={_KEY: json.dumps(description)})
        os.replace(temporary, path)
    except Exception as error:  # safetensors has an error of its own for a full disk
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{where}: {path}: can't be written: {reason}") from error
    finally:
        temporary.unlink(missing_ok=True)


def read_described(where: str, path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and description of a file that :func:`write_described` wrote."""
    tensors, strings = read_tensors(where, path)
    if _KEY not in strings:
        raise CheckpointError(f"{where}: {path}: was not written by weightops")
    return tensors, json.loads(strings[_KEY])


def read_tensors(where: str, path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors of a safetensors file, in mapped memory, and the strings kept with them."""
    from safetensors import SafetensorError, safe_open

    try:
        path.open("rb").close()
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, file.metadata() or {}
    except OSError as error:
        raise CheckpointError(f"{where}: {path}: {error.strerror or error}") from None
    except SafetensorError as error:
        raise CheckpointError(
            f"{where}: {path}: is truncated or no safetensors file: {error}"
        ) from None
