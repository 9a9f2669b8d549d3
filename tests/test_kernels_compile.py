"""GPU kernels without a GPU: built for every architecture, within their registers, nothing spilled."""

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import weightops

LIBRARY = Path(weightops.__file__).parent / "_weightops_cuda.so"
ARCHITECTURES = {"sm_80", "sm_90", "sm_100"}


def cuobjdump() -> str | None:
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.submodule_search_locations:
        shipped = Path(triton.submodule_search_locations[0], "backends/nvidia/bin/cuobjdump")
        if shipped.exists():
            return str(shipped)
    return shutil.which("cuobjdump")


@pytest.fixture(scope="module")
def usage() -> dict[tuple[str, str], dict[str, int]]:
    """(architecture, kernel) -> registers, stack and local memory in bytes."""
    if not LIBRARY.exists():
        assert os.environ.get("WEIGHTOPS_CUDA") != "1", "the CUDA library was required"
        pytest.skip("the CUDA library was not built: no nvcc")
    tool = cuobjdump()
    if tool is None:
        pytest.skip("cuobjdump is not installed")
    text = subprocess.check_output(
        [tool, "-res-usage", LIBRARY], text=True, stderr=subprocess.STDOUT
    )
    found: dict[tuple[str, str], dict[str, int]] = {}
    architecture = kernel = ""
    for line in text.splitlines():
        if each := re.search(r"arch = (sm_\d+)", line):
            architecture = each.group(1)
        elif each := re.search(r"Function (\S+):", line):
            kernel = each.group(1)
        elif "REG:" in line:
            found[architecture, kernel] = {
                k: int(v) for k, v in re.findall(r"([A-Z]+):(\d+)", line)
            }
    return found


def test_every_architecture_has_every_kernel(usage: dict) -> None:
    kernels = {kernel for _, kernel in usage}
    assert {re.search(r"(load_maps|permute_kernel|merge_kernel)", k).group(1) for k in kernels} == {
        "load_maps",
        "permute_kernel",
        "merge_kernel",
    }
    assert {architecture for architecture, _ in usage} >= ARCHITECTURES
    assert {(a, k) for a in ARCHITECTURES for k in kernels} <= set(usage)


def test_no_kernel_spills_and_blocks_fit(usage: dict) -> None:
    for (architecture, kernel), used in usage.items():
        where = f"{kernel} on {architecture}: {used}"
        assert used["STACK"] == 0, where
        assert used["LOCAL"] == 0, where
        # A multiprocessor has 65,536: enough for three blocks of 256 threads, or one of 1024.
        assert used["REG"] <= (64 if "load_maps" in kernel else 85), where
