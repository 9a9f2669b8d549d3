"""Deriving specs of models as large as users have them, and proving one."""

from __future__ import annotations

import pytest
import torch
from architectures import GPT, resnet50
from torch import nn

import weightops


def resnet() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return resnet50(64), torch.randn(2, 3, 64, 64)


def transformer() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return GPT(depth=12, dim=768, heads=12), torch.randint(7, (2, 8))


MODELS = {"resnet50": resnet, "12-block transformer": transformer}


@pytest.mark.parametrize("name", MODELS)
def test_trace(name: str, benchmark) -> None:
    benchmark.group = f"trace {name}"
    model, inputs = MODELS[name]()
    spec = benchmark.pedantic(lambda: weightops.trace(model, inputs), rounds=2)
    assert len(spec.labels) > 12
    assert spec.unverified


def test_verify(benchmark) -> None:
    benchmark.group = "verify resnet50"
    model, inputs = resnet()
    spec = weightops.trace(model, inputs)
    found = benchmark.pedantic(lambda: weightops.verify(spec, model, inputs), rounds=1)
    assert found.error < 1e-9
    assert found.moved > 0.99
    benchmark.extra_info["error"] = found.error
