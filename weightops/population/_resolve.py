"""What runs a population: a program of layers where the model has one, else the model itself."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from weightops import _check, _load, _op
from weightops.ops.population import Program, population_logits
from weightops.population._compile import PROGRAM, compile_or_reason
from weightops.population._products import LARGE, is_large, products
from weightops.spec import WeightSpec
from weightops.tracing.export import Weights, export, read_weights


@dataclass(frozen=True)
class Runner:
    """How a population's samples become outputs.

    Attributes:
        numel: numbers P of a network.
        shared: whether all networks read the same samples.
        outputs: numbers K of one sample's output.
        program: the layers with their code, if the kernels run them.
        reason: why there is none.
        call: else ``(row [P], x [B, ...]) -> output [B, ...]`` of one network.
    """

    numel: int
    shared: bool
    outputs: int
    program: Program | None = None
    code: tuple[int, ...] = ()
    reason: str = ""
    call: Callable[[Tensor, Tensor], Tensor] | None = None

    def by_products(self, flat: Tensor, x: Tensor) -> bool:
        """Whether products of many networks at once are faster than the CPU's kernel: layers are large."""
        if self.program is None or not flat.is_cpu or not is_large(self.program):
            return False
        # Tiles that are as exact are faster still, but only products may be less so.
        exact = flat.dtype == torch.float32 and _op.matmul_precision(flat.dtype) == "highest"
        host = _load.host() if exact else None
        samples = x.shape[0 if self.shared else 1]
        return not (host and host.population_by_tiles(self.code, self.numel, samples))

    def products(self, flat: Tensor, x: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Groups of networks: which ones, and their outputs ``[n, B, K]``."""
        assert self.program is not None
        return products(self.program, self.code, flat, x, self.shared)

    def logits(self, flat: Tensor, x: Tensor) -> Tensor:
        """``[N, B, K]``, differentiable."""
        if self.by_products(flat, x) and len(flat):
            return torch.cat([made for _, made in self.products(flat, x)])
        if self.program is not None:
            return population_logits(flat, x, self.code, self.shared)
        assert self.call is not None
        try:
            made = torch.func.vmap(self.call, (0, None if self.shared else 0))(flat, x)
        except RuntimeError as error:
            if "Batching rule not implemented" not in str(error):
                raise
            rows = [self.call(row, x if self.shared else x[n]) for n, row in enumerate(flat)]
            made = torch.stack(rows)
        return made.flatten(2)


_BATCHED = "torch, batched over networks"
_programs: WeakKeyDictionary[nn.Module, dict] = WeakKeyDictionary()


def resolve(
    where: str, flat: Tensor, model: WeightSpec | nn.Module, x: Tensor
) -> tuple[Runner, Tensor]:
    """Check a population and its samples against the architecture, and find what runs it: with the samples that
    it takes, since programs read tokens as numbers of ``flat``'s dtype.

    A module is traced once for a shape of samples. Samples are shared if the module takes them as they
    are, else every network's own.
    """
    _check.tensor(where, "flat", flat, "[N, P]", 2)
    if flat.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{where}: flat must be float32 or float64, not {flat.dtype}")
    shapes = "[B, ...] or [N, B, ...]"
    _check.tensor(where, "x", x, shapes)
    if x.dim() < 2:
        raise ValueError(f"{where}: x must have shape {shapes}, not {list(x.shape)}")
    _check.same_device(where, "x", x, "flat", flat)
    if x.is_floating_point() and x.dtype != flat.dtype:
        raise TypeError(f"{where}: x must be {flat.dtype} as flat, not {x.dtype}")
    runner = (
        _of_spec(where, model, x)
        if isinstance(model, WeightSpec)
        else _of_module(where, model, flat, x)
    )
    if flat.shape[1] != runner.numel:
        raise ValueError(
            f"{where}: flat has shape {list(flat.shape)}, but the architecture has {runner.numel} weights"
        )
    if not runner.shared:
        _check.size(where, "x's first axis", x.shape[0], flat.shape[0], "networks")
    return runner, _tokens(where, runner.program, flat, x)


def _tokens(where: str, program: Program | None, flat: Tensor, x: Tensor) -> Tensor:
    if program is None or not program.tokens:
        return x
    _check.index_dtype(where, "x", x)
    if fault := _check.index_fault(x, program.tokens):
        raise ValueError(f"{where}: x{fault}")
    return x.to(flat.dtype)


def explain(spec_or_model: WeightSpec | nn.Module, x: Tensor) -> str:
    """What runs and what trains a population of an architecture on samples ``[B, ...]``, and why."""
    where = "explain"
    _check.tensor(where, "x", x, "[B, ...]")
    flat = torch.empty(0, 0, dtype=x.dtype, device=x.device)
    runner = (
        _of_spec(where, spec_or_model, x)
        if isinstance(spec_or_model, WeightSpec)
        else _of_module(where, spec_or_model, flat, x)
    )
    if runner.program is None:
        return (
            "torch.func: networks are mapped one by one, in training too, since no kernel has "
            f"{runner.reason}"
        )
    if runner.by_products(x, x):
        runs = f"products of many networks at once: a linear layer has {LARGE:,} weights or more"
    else:
        kinds = ", ".join(layer.kind.replace("_", " ") for layer in runner.program.layers)
        runs = f"one call for all networks ({_kernel('population_logits', x.device)}): {kinds}"
    return f"{runs}; trained in one call ({_kernel('population_steps', x.device)})"


def _kernel(name: str, device: torch.device) -> str:
    return "C++" if _load.has_kernel(name, device.type) else _BATCHED


def _of_spec(where: str, spec: WeightSpec, x: Tensor) -> Runner:
    program = spec._cache.get(PROGRAM)
    if not isinstance(program, Program):
        why = f"no kernel has {program}" if program else "it was not traced in this process"
        raise ValueError(
            f"{where}: spec_or_model is a spec without layers, as {why}; pass the model itself"
            + ("" if program else ", or what weightops.trace(model, x) makes of it")
        )
    taken = program.taken
    for shared, shape in ((True, x.shape[1:]), (False, x.shape[2:])):
        if tuple(shape) == taken:
            code = tuple(program.encode(spec.offsets))
            return Runner(spec.numel, shared, prod(program.made), program, code)
    raise ValueError(
        f"{where}: x must have shape [B, {', '.join(map(str, taken))}], or that with the networks in "
        f"front, not {list(x.shape)}"
    )


def _of_module(where: str, model: nn.Module, flat: Tensor, x: Tensor) -> Runner:
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"{where}: spec_or_model must be a module or a traced spec, not {_check.describe(model)}"
        )
    known = _programs.setdefault(model, {})
    # A handle's number is never given twice.
    hooks = tuple((name, *handles) for name, handles in _hooks(model).items())
    key = (repr(model), hooks, tuple(x.shape[1:]), x.dtype, x.shape[0] == flat.shape[0])
    if key not in known:
        known[key] = _trace(where, model, flat, x)
    return known[key]


def _trace(where: str, model: nn.Module, flat: Tensor, x: Tensor) -> Runner:
    weights = read_weights(model)
    device = next((each.device for each in model.state_dict().values()), x.device)
    fallback: Runner | None = None
    faults: list[ValueError] = []
    own = x.dim() > 2 and x.shape[0] == flat.shape[0]
    for shared, shape in ((True, x.shape[1:]), *([(False, x.shape[2:])] if own else [])):
        samples = torch.zeros(2, *shape, dtype=x.dtype, device=device)
        try:
            exported = export(where, model, (samples,), {})
        except ValueError as fault:
            faults.append(fault)
            continue
        program = compile_or_reason(exported, model, weights.names)
        if isinstance(program, Program):
            code = tuple(program.encode(weights.offsets))
            return Runner(weights.numel, shared, prod(program.made), program, code)
        if fallback is None:
            call = _caller(model, weights)
            made = _outputs(where, exported)
            if hooks := _hooks(model):
                program += (
                    f" (forward hooks are traced with the model: of {', '.join(map(repr, hooks))})"
                )
            fallback = Runner(weights.numel, shared, made, reason=program, call=call)
    if fallback is None:
        raise faults[0]
    return fallback


def _hooks(model: nn.Module) -> dict[str, list[int]]:
    """The modules that have hooks around their forward, with the handles' numbers."""
    found = {
        name: [*module._forward_pre_hooks, *module._forward_hooks]
        for name, module in model.named_modules()
    }
    return {name: handles for name, handles in found.items() if handles}


def _outputs(where: str, exported: torch.export.ExportedProgram) -> int:
    (outputs,) = exported.graph.output_node().args
    values = [each.meta.get("val") for each in outputs if hasattr(each, "meta")]
    if len(values) != 1 or not isinstance(values[0], Tensor) or values[0].dim() == 0:
        raise ValueError(f"{where}: spec_or_model must return one tensor [B, ...]")
    return prod(values[0].shape[1:])


def _caller(model: nn.Module, weights: Weights) -> Callable[[Tensor, Tensor], Tensor]:
    """One network as a function of its row, in eval mode."""
    own = copy.deepcopy(model).eval()
    return lambda row, x: torch.func.functional_call(own, weights.views(row), (x,))
