"""Builds the compiled kernels with CMake; where that can't be done, the wheel is pure Python.

Environment:
    WEIGHTOPS_SKIP_NATIVE=1     build the pure-Python wheel
    WEIGHTOPS_REQUIRE_NATIVE=1  fail instead of building the pure-Python wheel
    WEIGHTOPS_CUDA=1|0          build the CUDA kernels, or not (default: where nvcc is found)
    WEIGHTOPS_SANITIZE=1        build with the address and undefined-behaviour sanitizers
    MAX_JOBS                    parallel compilations
"""

import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()


def flag(name, default=False):
    value = os.environ.get(f"WEIGHTOPS_{name}")
    return default if value is None else value.upper() in ("1", "ON", "TRUE", "YES")


def torch_root():
    # torch is found, not imported: an import costs seconds and may start a GPU.
    spec = importlib.util.find_spec("torch")
    return Path(spec.submodule_search_locations[0]) if spec else None


def reason_for_pure_python():
    if flag("SKIP_NATIVE"):
        return "WEIGHTOPS_SKIP_NATIVE is set"
    if torch_root() is None:
        return "torch was not found by the build (install it first, then use --no-build-isolation)"
    if shutil.which("cmake") is None:
        return "cmake was not found by the build"
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        return "no C++ compiler was found by the build"
    return ""


class CMakeBuild(build_ext):
    def run(self):
        destination = Path(self.get_ext_fullpath("weightops._native")).parent.resolve()
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        cuda = flag("CUDA", default=shutil.which("nvcc") is not None)
        options = {
            "CMAKE_INSTALL_PREFIX": destination,
            "WEIGHTOPS_TORCH_ROOT": torch_root(),
            "WEIGHTOPS_CUDA": "ON" if cuda else "OFF",
            "WEIGHTOPS_SANITIZE": "ON" if flag("SANITIZE") else "OFF",
            "Python_EXECUTABLE": sys.executable,
        }
        # Only numpy users of assign need the pybind11 module; torch users never do.
        if importlib.util.find_spec("pybind11"):
            import pybind11

            options["pybind11_DIR"] = pybind11.get_cmake_dir()
        else:
            options["WEIGHTOPS_HOST"] = "OFF"
        generator = ["-GNinja"] if shutil.which("ninja") else []
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count()))
        arguments = [f"-D{name}={value}" for name, value in options.items()]
        subprocess.check_call(["cmake", str(ROOT), *generator, *arguments], cwd=build)
        subprocess.check_call(["cmake", "--build", ".", "--parallel", jobs], cwd=build)
        subprocess.check_call(["cmake", "--install", "."], cwd=build)
        compiler = subprocess.check_output([os.environ.get("CXX", "c++"), "--version"], text=True)
        facts = {
            "compiler": compiler.splitlines()[0],
            "cuda": cuda,
            "torch_headers": importlib.metadata.version("torch"),
        }
        (destination / "_build.json").write_text(json.dumps(facts, indent=2))

    def get_outputs(self):
        return []

    def get_output_mapping(self):
        return {}


class PurePython(build_py):
    def run(self):
        super().run()
        if not self.editable_mode:
            package = Path(self.build_lib) / "weightops"
            for library in package.glob("*.so"):  # of an earlier build in this tree
                library.unlink()
            (package / "_build.json").write_text(json.dumps({"reason": REASON}, indent=2))


REASON = reason_for_pure_python()
if REASON:
    print(f"weightops: building without compiled kernels: {REASON}", file=sys.stderr)
    if flag("REQUIRE_NATIVE"):
        raise SystemExit("weightops: WEIGHTOPS_REQUIRE_NATIVE is set, but " + REASON)

setup(
    ext_modules=[] if REASON else [Extension("weightops._native", sources=[])],
    cmdclass={"build_py": PurePython} if REASON else {"build_ext": CMakeBuild},
)
