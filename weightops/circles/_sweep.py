"""Many trainings, kept in a folder: one that is killed goes on and loses at most one model's run."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weightops import _check
from weightops._checkpoints import CheckpointError, write
from weightops.circles.training import State, Training, _check_start, train


def sweep(
    folder: str | Path,
    seeds: Sequence[int],
    p: int,
    d: int,
    *,
    steps: int,
    batch: int = 8,
    embedding: Tensor | None = None,
    **options: Any,
) -> Iterator[dict[str, Tensor]]:
    """Train networks of the given seeds, ``batch`` at once, and keep what they gave.

    Every ``steps / batch`` steps the batch at work is written, whole or not at all; called again with the same
    arguments, a sweep reads what is done and goes on from there, to the bit.

    Args:
        folder: made where it is missing. It belongs to one sweep: other arguments are refused.
        seeds: one per network.
        p, d, steps: as for :func:`train`.
        batch: networks trained at once.
        embedding: to begin with, ``[p, d]`` for all or one per network, ``[len(seeds), p, d]``.
        options: numbers and flags of :func:`train`: ``width``, ``lr``, ``weight_decay``, ``share``, ``frozen``
            and ``every``; float32.

    Yields:
        Per batch ``seeds`` ``[m]``, ``flat`` ``[m, P]``, ``losses`` ``[R, m]``, ``signals`` ``[R, m, K]`` and
        ``diverged`` ``[m]``.

    Raises:
        ValueError: arguments out of range, other arguments than the folder's, a file that can't be read.
        TypeError: wrong types.
    """
    where = "sweep"
    _check.count(where, "batch", batch)
    _check.count(where, "steps", steps)
    if not isinstance(folder, (str, os.PathLike)):
        raise TypeError(f"{where}: folder must be a path, not {_check.describe(folder)}")
    if not isinstance(seeds, (list, tuple, range)) or not seeds:
        raise TypeError(f"{where}: seeds must list one or more, not {_check.describe(seeds)}")
    for seed in seeds:
        _check.seed(where, seed)
        if seed >= 2**63:
            raise ValueError(f"{where}: seeds must be below 2^63, not {seed}")
    _check_options(where, options)
    try:
        train(1, p, d, steps=0, **options)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{where}: {str(error).removeprefix('train: ')}") from None
    asked = {"p": p, "d": d, "steps": steps, "seeds": [*seeds], "batch": batch} | options
    if embedding is not None:
        _check_start(where, embedding, len(seeds), p, d)
        numbers = embedding.detach().float().contiguous().numpy().tobytes()
        asked["embedding"] = hashlib.sha256(numbers).hexdigest()
    _claim(where, Path(folder), asked)
    return _run(Path(folder), [*seeds], p, d, steps, batch, embedding, options)


_OPTIONS = ("width", "lr", "weight_decay", "share", "frozen", "every")


def _check_options(where: str, options: dict[str, Any]) -> None:
    for name, value in options.items():
        if name not in _OPTIONS:
            raise TypeError(f"{where}: options must be some of {', '.join(_OPTIONS)}, not {name!r}")
        if not isinstance(value, (int, float)):
            raise TypeError(f"{where}: {name} must be a number, not {_check.describe(value)}")


def _claim(where: str, folder: Path, asked: dict[str, Any]) -> None:
    """Write what the folder is for, or refuse where it is for something else."""
    path = folder / "sweep.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            part = path.with_name(f".{path.name}.{os.getpid()}.part")
            part.write_text(json.dumps(asked))
            os.replace(part, path)
        held = json.loads(path.read_text())
    except OSError as error:
        raise CheckpointError(f"{where}: {path}: {error.strerror or error}") from None
    except ValueError as error:
        raise CheckpointError(f"{where}: {path}: is truncated or no JSON: {error}") from None
    if held != asked:
        differ = (
            sorted(name for name in {*held, *asked} if held.get(name) != asked.get(name))
            if isinstance(held, dict)
            else ["everything"]
        )
        raise CheckpointError(f"{where}: {path}: is of another sweep: {', '.join(differ)} differ")


def _run(
    folder: Path,
    seeds: list[int],
    p: int,
    d: int,
    steps: int,
    batch: int,
    embedding: Tensor | None,
    options: dict[str, Any],
) -> Iterator[dict[str, Tensor]]:
    for begin in range(0, len(seeds), batch):
        done = folder / f"networks-{begin:06}.safetensors"
        if not done.exists():
            own = slice(begin, begin + batch)
            start = embedding
            if embedding is not None and embedding.dim() == 3:
                start = embedding[own]
            _train(done, seeds[own], p, d, steps, options | {"embedding": start})
        yield _read(done)


def _train(
    done: Path, seeds: list[int], p: int, d: int, steps: int, options: dict[str, Any]
) -> None:
    # Of m networks an m-th of the steps is one network's run.
    part, stride = done.with_suffix(".part.safetensors"), -(-steps // len(seeds))
    if part.exists():
        held = _read(part)
    else:
        held = _held(train(len(seeds), p, d, steps=0, seed=seeds, **options))
    while (step := int(held["step"])) < steps:
        state = State(step, held["flat"], held["moments"])
        more = min(stride, steps - step)
        made = _held(train(len(seeds), p, d, steps=more, seed=seeds, state=state, **options))
        held = made | {
            "losses": torch.cat([held["losses"], made["losses"]]),
            "signals": torch.cat([held["signals"], made["signals"]]),
            "diverged": held["diverged"] | made["diverged"],
        }
        if step + more < steps:
            write({part: held})
    kept = {name: held[name] for name in ("flat", "losses", "signals", "diverged")}
    write({done: kept | {"seeds": torch.tensor(seeds)}})
    part.unlink(missing_ok=True)


def _held(made: Training) -> dict[str, Tensor]:
    return {
        **{"flat": made.flat, "moments": made.state.moments, "step": torch.tensor(made.state.step)},
        **{"losses": made.losses, "signals": made.signals, "diverged": made.diverged},
    }


def _read(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    # As _checkpoints.read, which refuses what is not finite: here that is a network that diverged.
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"sweep: {path}: is truncated or can't be read: {error}") from None
