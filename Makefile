# Everything runs in .venv, which the first target makes. A second run starts at once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The CPU build is enough: for it on an ordinary machine, set PIP_INDEX_URL=https://download.pytorch.org/whl/cpu
# and PIP_EXTRA_INDEX_URL=https://pypi.org/simple before `make`.
TORCH ?= torch==2.13.0
SOURCES := $(wildcard pyproject.toml setup.py backends/kernel/cpu/*.cpp backends/kernel/cpu/*.h)
# At most one thread per core in all: each of two test processes computes on one.
TEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal -q

.PHONY: help demo test test-fast test-all bench-peers check docs dev clean

help:  ## say what there is
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

demo: $(VENV)/.installed  ## compile the real MiniLM to 64:2:5, for kernels and ONNX, and prove it
	$(BIN)/sparsec compile demo:minilm --pattern 64:2:5 --backend kernel,onnx -o minilm.sparsec --force
	$(BIN)/sparsec verify minilm.sparsec

test: $(VENV)/.installed-dev  ## the tests: under ten minutes on 2 cores
	$(TEST) -m "not slow"

test-fast: $(VENV)/.installed-dev  ## the core only: about a minute
	$(TEST) -m "not slow" tests/core tests/passes

test-all: $(VENV)/.installed-rtx $(VENV)/.installed-docs  ## every test, and the benches with their bounds
	$(TEST)
	OMP_NUM_THREADS=1 $(BIN)/python tests/bench/bench_cpu_linear.py
	OMP_NUM_THREADS=1 $(BIN)/python tests/bench/bench_cpu_int8.py
	OMP_NUM_THREADS=1 $(BIN)/python tests/bench/bench_cpu_strips.py
	OMP_NUM_THREADS=1 $(BIN)/python tests/bench/bench_explain.py
	$(BIN)/python tests/bench/bench_compile.py
	OMP_NUM_THREADS=1 $(BIN)/python tests/bench/bench_ort.py
	OMP_NUM_THREADS=1 $(BIN)/python tests/bench/bench_onnx_load.py
	$(BIN)/python tests/bench/bench_onnx_export.py
	$(BIN)/python tests/bench/bench_permute.py
	OMP_NUM_THREADS=1 $(BIN)/python tests/bench/bench_gram.py
	$(BIN)/python tests/bench/bench_gpu_load.py
	$(BIN)/python tests/bench/bench_oneshot_quality.py --quick

bench-peers: $(VENV)/.installed-dev  ## one-shot pruning against llm-compressor, modelopt and onnxsim: half an hour, network
	$(BIN)/python tests/bench/peers.py --markdown peers.md

check: $(VENV)/.installed-dev  ## style, types, layering
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p sparsec
	$(BIN)/pytest -q tests/core/test_layering.py

docs: $(VENV)/.installed-docs  ## the documentation as a site in build/site; every warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict -q

dev: $(VENV)/.installed-dev  ## an editable install with all developer tools

clean:  ## remove what was built
	rm -rf $(VENV) build *.egg-info minilm.sparsec sparsec/passes sparsec/backends sparsec/*.so backends/kernel/cpu/*.so

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python $(SOURCES)
	$(BIN)/pip install -q --disable-pip-version-check "$(TORCH)"
	$(BIN)/pip install -q --disable-pip-version-check -e ".[demo]"
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed  # 72 MB of it for NVRTC: the tests compile CUDA kernels, without a GPU
	$(BIN)/pip install -q --disable-pip-version-check -e ".[demo,dev]"
	ln -sfn ../passes sparsec/passes  # for editors and type checkers; git ignores them
	ln -sfn ../backends sparsec/backends
	touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(BIN)/pip install -q --disable-pip-version-check -e ".[demo,docs]"
	touch $@

$(VENV)/.installed-rtx: $(VENV)/.installed-dev  # 95 MB: test-all builds TensorRT engines, without a GPU
	$(BIN)/pip install -q --disable-pip-version-check -e ".[rtx]"
	touch $@
