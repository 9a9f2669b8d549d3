"""Specs derived from models: which axes of the weights permute together, read off the exported graph."""

from __future__ import annotations

from typing import Any

from torch import nn

from weightops.spec import WeightSpec
from weightops.tracing.graph import derive

__all__ = ["trace"]


def trace(model: nn.Module, *example_inputs: Any, **kwargs: Any) -> WeightSpec:
    return derive("trace", model, example_inputs, kwargs).spec
