"""A model as a graph of aten ops, and its weights as tensors of the state dict."""

from __future__ import annotations

import logging
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from weightops.tracing.rules import find_rule


def export(
    where: str, model: nn.Module, inputs: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> torch.export.ExportedProgram:
    """The model in eval mode as a graph, nothing decomposed.

    Raises:
        ValueError: ``torch.export`` fails; names the module and the line that it failed at.
    """
    with _quiet(), _evaluating(model):
        try:
            return torch.export.export(model, inputs, dict(kwargs))
        except Exception as error:
            message = next(filter(None, str(error).splitlines()), type(error).__name__)
            raise ValueError(
                f"{where}: torch.export can't export {type(model).__name__}"
                f"{_place(model, error)}: {message}"
            ) from error


def decompose(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The graph in ops that have a rule of their own, or have no decomposition."""
    with _quiet():
        return program.run_decompositions(dict(_decompositions()))


@cache
def _decompositions() -> dict[Any, Any]:
    """Those of ops without a rule of their own."""
    table = torch.export.default_decompositions()
    return {op: decomposition for op, decomposition in table.items() if not find_rule(op)}


@contextmanager
def _quiet() -> Iterator[None]:
    # What fails is raised; torch logs it, too.
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode for every module, and no fused kernel that hides a transformer layer's parts."""
    training = {module: module.training for module in model.modules()}
    fastpath = torch.backends.mha.get_fastpath_enabled()
    model.eval()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
        for module, mode in training.items():
            module.training = mode


def _place(model: nn.Module, error: BaseException) -> str:
    """The innermost of the model's modules that was running, with file and line."""
    names = {id(module): name for name, module in model.named_modules()}
    found = ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        name = names.get(id(frame.f_locals.get("self")))
        if name is not None and frame.f_code.co_name == "forward":
            kind = type(frame.f_locals["self"]).__name__
            file = frame.f_code.co_filename
            found = f" (in module {name or 'itself'!r}, {kind}, {file}:{line})"
    return found


@dataclass(frozen=True)
class Weights:
    """The floating tensors of a model's state dict.

    Attributes:
        shapes: name -> shape, of all that a spec names: the first name of tied tensors.
        names: every name, of buffers out of the state dict too -> the name in ``shapes``.
        overlapping: names whose memory another tensor shares in another layout.
        statistics: names of buffers that are running statistics.
    """

    shapes: dict[str, tuple[int, ...]]
    names: dict[str, str]
    overlapping: dict[str, str]
    statistics: set[str]

    @property
    def offsets(self) -> dict[str, int]:
        """Where the tensors of ``shapes`` start in a network's row, as a spec without parts lays them out."""
        starts = accumulate(map(prod, self.shapes.values()), initial=0)
        return dict(zip(self.shapes, starts, strict=False))

    @property
    def numel(self) -> int:
        """Numbers of a network's row."""
        return sum(map(prod, self.shapes.values()))

    def views(self, row: Tensor) -> dict[str, Tensor]:
        """A network's row as tensors by every name, tied ones the same."""
        pieces = row.split([prod(shape) for shape in self.shapes.values()])
        held = {
            name: piece.view(shape)
            for (name, shape), piece in zip(self.shapes.items(), pieces, strict=True)
        }
        return {name: held[of] for name, of in self.names.items()}


def read_weights(model: nn.Module) -> Weights:
    """Find tied tensors, views of one storage, and running statistics."""
    shapes: dict[str, tuple[int, ...]] = {}
    names: dict[str, str] = {}
    overlapping: dict[str, str] = {}
    seen: dict[tuple, str] = {}
    spans: dict[int, list[tuple[int, int, str]]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor) or not (
            tensor.is_floating_point() or tensor.is_complex()
        ):
            continue
        storage = tensor.untyped_storage()._cdata
        key = (storage, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and key in seen:
            names[name] = seen[key]
            continue
        shapes[name], names[name], seen[key] = tuple(tensor.shape), name, name
        begin = int(tensor.storage_offset()) * tensor.element_size()
        reach = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) + 1
        end = begin + int(reach) * tensor.element_size()
        for first, last, other in spans.get(storage, ()):
            if tensor.numel() and first < end and begin < last:
                overlapping[name], overlapping[other] = other, name
        spans.setdefault(storage, []).append((begin, end, name))
    return Weights(shapes, names, overlapping, _statistics(model))


def _statistics(model: nn.Module) -> set[str]:
    """Buffers that follow the data or the weights, unlike constant tables.

    Those are all buffers of a module that has a ``running_mean`` (batch norm, also frozen), and the
    singular vectors of spectral norm.
    """
    found: set[str] = set()
    for path, module in model.named_modules(remove_duplicate=False):
        own = [name for name, _ in module.named_buffers(recurse=False)]
        if "running_mean" in own:
            picked = own
        else:
            picked = [name for name in own if name in ("_u", "_v", "weight_u", "weight_v")]
        found |= {f"{path}.{name}" if path else name for name in picked}
    return found
