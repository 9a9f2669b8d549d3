"""``python -m weightops.info [--json]``: what is installed, what was built, and which kernel serves what."""

from __future__ import annotations

import argparse
import json
import platform
from typing import Any

import torch
from torch import Tensor, nn

import weightops
from weightops import _load, _op
from weightops.ops.manifold import choice
from weightops.spec import WeightSpec


def collect() -> dict[str, Any]:
    """Versions, libraries (``None``: loaded; else why not), and per op the backend of each device."""
    host = _load.host()
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "weightops": weightops.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "instruction_set": host.isa if host else None,
        "gpus": gpus,
        "build": _load.build(),
        "libraries": dict(_load.reasons),
        "ops": {name: _backends(name) for name in _op.names if not name.endswith("_into")},
    }


def _backends(name: str) -> dict[str, str]:
    cpu = "C++" if _load.has_kernel(name, "cpu") else "reference (plain torch)"
    cuda = "CUDA C++" if _load.has_kernel(name, "cuda") else "reference (plain torch)"
    cuda = _op.served.get((name, "cuda"), cuda)
    cpu = _op.served.get((name, "cpu"), cpu)
    if cpu in _op.names:
        cpu = _backends(cpu)["cpu"]
    if name in ("assign", "match_weights"):
        # Solved on the host wherever the tensors are.
        cpu = cuda = "C++" if _load.has_kernel(name, "cpu") else "scipy"
    return {"cpu": cpu, "cuda": cuda}


def manifold(x: Tensor, coeffs: Tensor, weight: Tensor, *, index: Tensor | None = None) -> str:
    """Which way :func:`weightops.manifold_linear` takes these arguments on a CPU, and why.

    Args:
        x, coeffs, weight, index: as for :func:`weightops.manifold_linear`; only shapes, dtypes and whether
            gradients are asked for matter.
    """
    bases, outputs, inputs = weight.shape
    rows = x.numel() // max(1, inputs)
    contexts = len(coeffs) if coeffs.dim() == 2 else 1
    of_item = torch.arange(contexts) if index is None else index
    groups = (torch.bincount(of_item, minlength=contexts) * (rows // max(1, len(of_item)))).tolist()
    if choice.by_torch(x, coeffs, weight, index):
        return (
            f"torch: one product of its own with all {bases} bases, mixed by the coefficients: {rows} rows are too "
            "few to repay packing"
        )
    host = _load.host()
    if host is None:
        return "the reference (plain torch): there is no compiled library"
    precision = _op.matmul_precision(x.dtype)
    parts = {torch.bfloat16: 1, torch.float16: 2, torch.float64: 0}.get(
        x.dtype, {"medium": 1, "high": 2}.get(precision, 3)
    )
    regime, parts = host.manifold_regime(rows, bases, parts, [size for size in groups if size])
    kernel = (
        f"bfloat16 tiles, {parts * (parts + 1) // 2} products a multiplication"
        if parts
        else f"multiply-adds ({host.isa})"
    )
    used = sum(size > 0 for size in groups)
    what = {
        "few rows": f"all {bases} bases are read once where they lie: {rows} rows are less work than that",
        "bases": f"one product of {rows} rows and a depth of {bases} x {inputs}, scaled by the "
        f"coefficients: {used} contexts have too few rows each for weights of their own",
        "weights": f"a product of its own for each of {used} contexts, whose {outputs} x {inputs} weights are made "
        f"while they are packed: instead of {bases} multiplications a row and weight, one",
    }[regime]
    return f"{regime}: {what}; {'float32 vectors' if regime == 'few rows' else kernel}"


def population(spec_or_model: WeightSpec | nn.Module, x: Tensor) -> str:
    """What runs :func:`weightops.population.population_forward` for a model and its samples, what trains it, and why.

    Args:
        spec_or_model: as for :func:`weightops.population.population_forward`.
        x: samples ``[B, ...]``; only shape, dtype and device matter.
    """
    from weightops.population import explain

    return explain(spec_or_model, x)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m weightops.info", description=__doc__)
    parser.add_argument("--json", action="store_true", help="machine-readable")
    show(as_json=parser.parse_args().json)


def show(*, as_json: bool) -> None:
    """Print :func:`collect`."""
    facts = collect()
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    print(f"weightops {facts['weightops']}, torch {facts['torch']}, Python {facts['python']}")
    print(
        f"{facts['machine']}, {facts['threads']} threads, {facts['instruction_set'] or 'no'} kernels"
    )
    print(f"GPUs: {', '.join(facts['gpus']) or 'none'}")
    for name, reason in facts["libraries"].items():
        print(f"library {name:5} {'loaded' if reason is None else 'not loaded: ' + reason}")
    for name, backends in facts["ops"].items():
        print(f"op {name:13} CPU: {backends['cpu']:24} CUDA: {backends['cuda']}")


if __name__ == "__main__":
    main()
