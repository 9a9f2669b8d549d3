# make demo, make test: everything from a fresh machine. See README.md.
VENV ?= .venv
PYTHON ?= python3
BIN = $(VENV)/bin
SOURCES = setup.py CMakeLists.txt pyproject.toml $(shell find csrc -type f)
# glibc keeps freed pages: a fresh 100 MB output costs more in page faults than in arithmetic. Large
# tensors lie in huge pages: looking up small ones is up to a sixth of a layer. The benchmarks run every
# implementation under these settings.
ALLOCATOR = THP_MEM_ALLOC_ENABLE=1 MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=8589934592 MALLOC_TOP_PAD_=1073741824

.PHONY: demo reproduce-manifold reproduce-connectivity reproduce-generation reproduce-circles reproduce-prediction reproduce-inr reproduce-optimizer test slow bench wheel wheel-check sanitize gpu gpu-manifold lint format clean build

build: $(VENV)/built

$(VENV)/ready: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt setuptools wheel cmake ninja pybind11 build \
		numpy scipy rich matplotlib mlxtend scikit-learn lapx nfn einops safetensors diffusers triton \
		pytest pytest-benchmark pytest-xdist hypothesis expecttest ruff mypy clang-format pre-commit graphviz tqdm
	# timm without torchvision, whose wheels load only into the torch that they were built with
	# (bench/condconv.py), and rebasin, whose dependencies would bring a torch of their own.
	$(BIN)/pip install -q -c constraints.txt --no-deps timm rebasin torchview
	touch $@

$(VENV)/built: $(VENV)/ready $(SOURCES)
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/pip install -q -c constraints.txt --no-build-isolation --no-deps -e .
	touch $@

demo: build
	$(BIN)/python examples/demo.py

reproduce-manifold: build
	$(BIN)/python examples/reproduce_manifold.py

reproduce-connectivity: build
	$(BIN)/python examples/reproduce_connectivity.py

reproduce-generation: build
	$(BIN)/python examples/reproduce_d2nwg.py

reproduce-circles: build
	$(BIN)/python examples/reproduce_circles.py

reproduce-inr: build
	$(BIN)/python examples/reproduce_inr.py

reproduce-prediction: build
	$(BIN)/python examples/reproduce_unf_zoo.py

reproduce-optimizer: build
	$(BIN)/python examples/reproduce_unf_optimizer.py

# Two processes, whose threads do not spin while they wait. Then the transforms without compiled
# libraries; what is traced there is the same.
PYTEST = OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 2 --dist worksteal

test: build
	$(PYTEST)
	WEIGHTOPS_REQUIRE_NATIVE= WEIGHTOPS_DISABLE_NATIVE=1 $(PYTEST) -q tests/test_transforms.py -k "not traced"

slow: build
	$(BIN)/python -m pytest -m slow

bench: build
	$(ALLOCATOR) $(BIN)/python -m pytest bench --benchmark-only --benchmark-json=bench.json -q
	$(BIN)/python bench/report.py bench.json --save bench/results

wheel: build
	PATH="$(abspath $(BIN)):$$PATH" WEIGHTOPS_REQUIRE_NATIVE=1 $(BIN)/python -m build -q --wheel --no-isolation

# One wheel under several torch: make wheel-check TORCH="torch==2.13.0 torch"
TORCH ?= torch==2.13.0
wheel-check: wheel
	tests/check_wheel.sh $(PYTHON) dist/weightops-*.whl $(TORCH)

# The kernels' cores alone, then the library under Python, with the address, undefined-behaviour and
# thread sanitizers.
sanitize: build
	$(BIN)/python tests/sanitize.py

# On a machine with a GPU whose own Python has torch: build in place, GPU tests, benchmarks; under
# 9 minutes. Results: gpu-tests.txt and bench.json in $$OUT (default: build/gpu).
OUT ?= build/gpu
HERE = PYTHONPATH=.:$$PYTHONPATH
gpu:
	mkdir -p $(OUT)
	WEIGHTOPS_CUDA=1 WEIGHTOPS_REQUIRE_NATIVE=1 $(PYTHON) setup.py -q build_ext --inplace
	$(HERE) $(PYTHON) -m weightops.info --json > $(OUT)/info.json
	$(HERE) timeout 240 $(PYTHON) -m pytest tests/test_gpu.py -m gpu -q 2>&1 | tee $(OUT)/gpu-tests.txt
	$(HERE) WEIGHTOPS_BENCH_GPU=1 timeout 240 $(PYTHON) -m pytest bench/bench_permute.py -q \
		--benchmark-only --benchmark-json=$(OUT)/bench.json
	$(HERE) $(PYTHON) bench/report.py $(OUT)/bench.json --save $(OUT)

# There too, and nothing needs to be built: the manifold ops, whose kernels Triton compiles as they are tested.
gpu-manifold:
	mkdir -p $(OUT)
	$(HERE) timeout 540 $(PYTHON) -m pytest tests/test_gpu_manifold.py -m gpu -q 2>&1 | tee $(OUT)/gpu-manifold-tests.txt

lint: build
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*')

format: build
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files 'csrc/*')

clean:
	rm -rf build dist *.egg-info weightops/*.so weightops/_build.json
