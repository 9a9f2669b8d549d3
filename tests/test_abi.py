"""The libraries need nothing of torch but the C shims of the oldest torch they are to run on."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import weightops

FOLDER = Path(weightops.__file__).parent
HEADERS = Path(torch.__file__).parent / "include" / "torch" / "csrc"
OLDEST = (2, 10)


def undefined(library: Path) -> set[str]:
    out = subprocess.check_output(["nm", "-D", "--undefined-only", library], text=True)
    return {line.split()[-1].split("@")[0] for line in out.splitlines()}


def shims_younger_than_the_oldest_torch() -> set[str]:
    """Names that torch's own header declares only for later versions."""
    names: set[str] = set()
    later = False
    for line in (HEADERS / "stable" / "c" / "shim.h").read_text().splitlines():
        if version := re.match(r"#if TORCH_FEATURE_VERSION >= TORCH_VERSION_(\d+)_(\d+)_", line):
            later = tuple(map(int, version.groups())) > OLDEST
        elif line.startswith("#endif"):
            later = False
        elif later:
            names |= set(re.findall(r"\b((?:aoti_)?torch_\w+)\(", line))
    return names


@pytest.mark.skipif(shutil.which("nm") is None, reason="binutils are not installed")
@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_only_shims_of_the_oldest_torch_are_needed(name: str) -> None:
    library = FOLDER / f"_weightops_{name}.so"
    if not library.exists():
        pytest.skip(f"{library.name} was not built")
    needed = undefined(library)
    shims = {s for s in needed if s.startswith(("aoti_torch_", "torch_"))}
    assert "torch_call_dispatcher" in shims
    assert not shims & shims_younger_than_the_oldest_torch()
    assert not [s for s in needed if s.startswith("_Z") and re.search("c10|2at|5torch", s)]
