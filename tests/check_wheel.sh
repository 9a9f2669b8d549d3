#!/usr/bin/env bash
# check_wheel.sh PYTHON WHEEL TORCH...: the op tests against one wheel, in a fresh environment for each
# torch requirement, with its kernels and without.
set -euo pipefail
python=$1 wheel=$(realpath "$2")
shift 2
tests=$(realpath "$(dirname "$0")")
for torch in "$@"; do
  env=$(mktemp -d)
  "$python" -m venv "$env"
  "$env/bin/pip" install -q "$torch" "$wheel" pytest hypothesis
  cp -r "$tests" "$env/tests"
  printf '[pytest]\naddopts = -q --import-mode=importlib --strict-markers\nmarkers =\n  slow: x\n  gpu: x\n' > "$env/pytest.ini"
  (
    cd "$env"
    bin/python -m weightops.info
    WEIGHTOPS_REQUIRE_NATIVE=1 bin/python -m pytest tests/ops tests/test_spec.py tests/test_transforms.py -m "not slow"
    WEIGHTOPS_DISABLE_NATIVE=1 bin/python -m pytest tests/ops tests/test_spec.py -m "not slow"
  )
  rm -rf "$env"
done
