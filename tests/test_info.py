"""What is loaded is told, and importing stays cheap and never needs a compiler or a GPU."""

import json
import os
import subprocess
import sys

from weightops import _op


def python(*arguments: str, **environment: str) -> str:
    return subprocess.check_output(
        [sys.executable, *arguments], text=True, env=os.environ | environment
    )


def test_info_names_every_op_and_its_backend() -> None:
    facts = json.loads(python("-m", "weightops.info", "--json"))
    assert set(facts["ops"]) == {name for name in _op.names if not name.endswith("_into")}
    text = python("-m", "weightops.info")
    assert all(name in text for name in facts["ops"])


def test_without_libraries_the_reason_is_told_and_everything_is_reference() -> None:
    facts = json.loads(python("-m", "weightops.info", "--json", WEIGHTOPS_DISABLE_NATIVE="1"))
    assert facts["libraries"]["cpu"] == "WEIGHTOPS_DISABLE_NATIVE is set"
    assert None not in facts["libraries"].values()
    by = {name: backends["cpu"] for name, backends in facts["ops"].items()}
    assert {n for n, each in by.items() if each != "scipy" and "(plain torch)" not in each} == set()


def test_missing_libraries_are_no_error(tmp_path: os.PathLike) -> None:
    facts = json.loads(
        python("-m", "weightops.info", "--json", WEIGHTOPS_LIBRARY_DIR=str(tmp_path))
    )
    assert facts["libraries"]["cpu"] is not None


def test_import_is_cheap_beyond_torch() -> None:
    code = (
        "import torch, time, sys; began = time.perf_counter(); import weightops; "
        "heavy = {'scipy', 'matplotlib', 'rich', 'triton'} & set(sys.modules); "
        "print(time.perf_counter() - began, heavy or '')"
    )
    runs = [python("-c", code).split() for _ in range(3)]
    assert all(len(run) == 1 for run in runs), runs
    assert min(float(run[0]) for run in runs) < 0.3
