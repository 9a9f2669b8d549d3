"""Training in stages that can stop anywhere and go on as if it had not."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from math import cos, pi
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from weightops._checkpoints import CheckpointError, read_described, write_described
from weightops._progress import track


class Training:
    """The state of a training and its checkpoint: model, optimizer, random numbers, losses.

    Args:
        where: the function that messages name.
        model: all modules, whichever stage trains them.
        run: what makes a run this one, for JSON; a checkpoint of another run is refused.
        generator: of all random numbers that stages draw.
        path: of the checkpoint, from which training goes on where it exists; ``None`` for none.
        every: steps between checkpoints.
        progress: show bars.
    """

    def __init__(
        self,
        where: str,
        model: nn.Module,
        run: Mapping[str, Any],
        generator: torch.Generator,
        *,
        path: Path | None,
        every: int,
        progress: bool,
    ) -> None:
        self.where = where
        self.model, self.run, self.generator = model, json.loads(json.dumps(run)), generator
        self.path, self.every, self.progress = path, every, progress
        self.losses: dict[str, Tensor] = {}
        self._done: list[str] = []
        self._step = 0
        self._resumed: dict[str, Tensor] = {}
        if path is not None and path.exists():
            self._read(path)

    def stage(
        self,
        name: str,
        loss: Callable[[], Tensor],
        parameters: Iterable[nn.Parameter],
        *,
        steps: int,
        rate: float,
        averaged: nn.Module | None = None,
        decay: float = 0.0,
    ) -> None:
        """Minimise ``loss()`` by AdamW, whose rate falls along a cosine, unless this stage is over already.

        ``averaged`` gets the moving averages of its parameters in the end.
        """
        if name in self._done:
            return
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=rate, fused=True)
        average = (
            None
            if averaged is None
            else AveragedModel(averaged, multi_avg_fn=get_ema_multi_avg_fn(decay))
        )
        losses = self.losses.setdefault(name, torch.full((steps,), torch.nan))
        if self._resumed:
            _load_optimizer(optimizer, _under("optimizer", self._resumed))
            if average is not None:
                average.load_state_dict(_under("average", self._resumed))
            self._resumed = {}
        for step in track(range(self._step, steps), name, enabled=self.progress):
            optimizer.param_groups[0]["lr"] = rate * (1 + cos(pi * step / steps)) / 2
            optimizer.zero_grad()
            value = loss()
            value.backward()
            optimizer.step()
            if average is not None and averaged is not None:
                average.update_parameters(averaged)
            losses[step] = value.detach()
            if self.path is not None and (step + 1) % self.every == 0 and step + 1 < steps:
                self._write(self.path, step + 1, optimizer, average)
        if average is not None and averaged is not None:
            averaged.load_state_dict(_under("module", average.state_dict()))
        self._done.append(name)
        self._step = 0
        if self.path is not None:
            self._write(self.path, 0)

    def _write(
        self,
        path: Path,
        step: int,
        optimizer: torch.optim.Optimizer | None = None,
        average: AveragedModel | None = None,
    ) -> None:
        parts: dict[str, Mapping[str, Tensor]] = {
            "model": self.model.state_dict(),
            "losses": self.losses,
            "random": {"state": self.generator.get_state()},
        }
        if optimizer is not None:
            parts["optimizer"] = {
                f"{n}.{key}": tensor
                for n, state in optimizer.state_dict()["state"].items()
                for key, tensor in state.items()
            }
        if average is not None:
            parts["average"] = average.state_dict()
        tensors = {
            f"{part}.{name}": t for part, named in parts.items() for name, t in named.items()
        }
        write_described(
            self.where, path, tensors, {"run": self.run, "done": self._done, "step": step}
        )

    def _read(self, path: Path) -> None:
        tensors, description = read_described(self.where, path)
        if "run" not in description:
            raise CheckpointError(
                f"{self.where}: {path}: is no checkpoint of a training, but a trained model"
            )
        for name, value in self.run.items():
            if (given := description["run"].get(name)) != value:
                raise CheckpointError(
                    f"{self.where}: {path}: is a checkpoint of another training, whose {name} is {given}, not {value}"
                )
        self.model.load_state_dict(_under("model", tensors))
        self.losses = _under("losses", tensors)
        self.generator.set_state(tensors["random.state"])
        self._done, self._step = description["done"], description["step"]
        self._resumed = tensors if self._step else {}


def _under(part: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    prefix = f"{part}."
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


def _load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        n, key = name.split(".")
        state.setdefault(int(n), {})[key] = tensor
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
