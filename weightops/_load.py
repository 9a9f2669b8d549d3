"""The one place that loads compiled libraries, and remembers why one was not loaded."""

from __future__ import annotations

import importlib
import json
import os
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

_HERE = Path(__file__).parent
#: where the libraries lie; another build (with sanitizers, say) can be tried in their place
_LIBRARIES = Path(os.environ.get("WEIGHTOPS_LIBRARY_DIR", _HERE))

#: library -> why it is not loaded, or ``None`` where it is
reasons: dict[str, str | None] = {}

_DISABLED = "WEIGHTOPS_DISABLE_NATIVE is set"


def _disabled() -> bool:
    return bool(os.environ.get("WEIGHTOPS_DISABLE_NATIVE"))


def _load(name: str) -> str | None:
    if _disabled():
        return _DISABLED
    path = _LIBRARIES / f"_weightops_{name}.so"
    if not path.exists():
        return build().get("reason") or f"{path.name} was not built"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return str(error).splitlines()[0]
    return None


@cache
def build() -> dict[str, Any]:
    """What setup.py wrote down about the build: compilers, architectures, or why there was none."""
    path = _HERE / "_build.json"
    return json.loads(path.read_text()) if path.exists() else {"reason": "built without setup.py"}


def load() -> None:
    """Load every library that this torch can use; called once, after all ops are declared."""
    reasons["cpu"] = _load("cpu")
    reasons["cuda"] = _load("cuda") if torch.version.cuda else "torch was built without CUDA"


@cache
def host() -> ModuleType | None:
    """The pybind11 module: numpy in, numpy out."""
    if _disabled():
        reasons["host"] = _DISABLED
        return None
    try:
        _host = importlib.import_module("weightops._host")
    except ImportError as error:
        reasons["host"] = str(error)
        return None
    reasons["host"] = None
    return _host


def has_kernel(op: str, device_type: str) -> bool:
    """Whether a compiled kernel serves ``op`` on ``device_type``."""
    key = device_type.upper()
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"weightops::{op}", key)
