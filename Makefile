# Everything a person or CI does here. `make demo` and `make test` set themselves up: on a fresh machine with
# Python 3.11+, g++ and make, `git clone` and one of them is all.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin
BUILD_INPUTS := requirements-dev.txt pyproject.toml setup.py CMakeLists.txt $(shell find csrc -type f)

.PHONY: install demo test lint bench bench-avx2 bench-index accuracy gpu-check gpu-build gpu-test gpu-sanitize gpu-bench clean

install: $(VENV)/.installed

$(VENV)/.installed: $(BUILD_INPUTS)
	test -x $(RUN)/python || $(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install --quiet --upgrade pip
	$(RUN)/python -m pip install --quiet -r requirements-dev.txt
	$(RUN)/python -m pip install --quiet --no-build-isolation --no-deps --editable .
	touch $@

demo: install
	$(RUN)/memad-fast demo

# A file is the share of one process, since its tests share what they compile; four hold enough of them in memory. A
# process computes on one thread but where a test asks for more.
test: export OMP_NUM_THREADS ?= 1
test: export OMP_WAIT_POLICY ?= passive
test: install
	$(RUN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile $(ARGS)

lint: install
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy

bench: install
	$(RUN)/python -m pytest benchmarks $(ARGS)

# The same with every library held to AVX2: ours, and the peers by the variables that each of them reads.
bench-avx2: export MEMAD_FAST_ISA := avx2
bench-avx2: export ATEN_CPU_CAPABILITY := avx2
bench-avx2: export ONEDNN_MAX_CPU_ISA := AVX2
bench-avx2: export MKL_ENABLE_INSTRUCTIONS := AVX2
bench-avx2: export OPENBLAS_CORETYPE := Haswell
bench-avx2: export FAISS_SIMD_LEVEL := AVX2
bench-avx2: bench

# Large memories beside FAISS, up to 10 M rows: 16 GB of RAM, 12 GB of disk, an hour; ARGS="--only 1000000x64".
bench-index: install
	$(RUN)/python -m benchmarks.index $(ARGS)

# What the systems achieve on real images: `make accuracy DATA=a/folder/of/sets`, ARGS="--only bottle --seeds 0".
accuracy: install
	$(RUN)/python -m benchmarks.accuracy sets --data $(DATA) $(ARGS)

# The GPU targets run in the Python that is there (a GPU machine brings its own torch for CUDA), offline. Each takes less
# than ten minutes; the build is for the machine's own card. compute-sanitizer sees every tensor as an allocation of its
# own, so that what lies beyond one is not another's.
gpu-check: gpu-test gpu-sanitize

gpu-build:
	$(PYTHON) benchmarks/require_gpu.py
	MEMAD_FAST_BUILD_CUDA=1 TORCH_CUDA_ARCH_LIST="$${TORCH_CUDA_ARCH_LIST:-$$($(PYTHON) benchmarks/require_gpu.py --architecture)}" \
	  $(PYTHON) setup.py --quiet build_ext --inplace

# Most of the time Triton compiles: on several cores, where pytest-xdist is installed.
gpu-test: gpu-build
	$(PYTHON) -m pytest tests/gpu -m gpu -rs --durations=10 \
	  $$($(PYTHON) -c "import xdist" 2>/dev/null && printf '%s' '-n 6 --dist loadfile') $(ARGS)

SANITIZED = $(PYTHON) -m pytest tests/gpu/test_sanitized.py -v
gpu-sanitize: export PYTORCH_NO_CUDA_MEMORY_CACHING := 1
gpu-sanitize: gpu-build
	compute-sanitizer --tool memcheck --report-api-errors no --error-exitcode 1 $(SANITIZED)
	compute-sanitizer --tool racecheck --error-exitcode 1 $(SANITIZED)

gpu-bench: gpu-build
	PYTHONPATH=. $(PYTHON) benchmarks/gpu_bench.py $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info runs .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	rm -f memad_fast/*.so memad_fast/kernels
