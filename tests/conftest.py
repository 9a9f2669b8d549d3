"""Fixtures that every test file shares."""

import os

import pytest
import torch

from weightops import _load
from weightops.ops.manifold import choice

torch.set_num_threads(2)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(autouse=True)
def small_calls_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests are mostly small: the kernels serve them all the same."""
    monkeypatch.setattr(choice, "by_torch", lambda *_: False)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA GPU"))


def pytest_report_header() -> str:
    loaded = {name: reason or "loaded" for name, reason in _load.reasons.items()}
    return f"weightops libraries: {loaded}; torch {torch.__version__}"


def pytest_configure() -> None:
    # `make test` must not pass quietly on the references alone.
    if os.environ.get("WEIGHTOPS_REQUIRE_NATIVE") == "1":
        assert _load.reasons["cpu"] is None, _load.reasons
        assert _load.host() is not None, _load.reasons
