# `make demo` and `make test` are all that a newcomer types; `make help` lists the rest.

PYTHON ?= python3
VENV ?= .venv
# E.g. --system-site-packages, to use the torch that a machine has already.
VENV_FLAGS ?=
# One release is named because a bare "torch" may bring a newer one than was tested here.
TORCH ?= torch==2.13.0
# PyTorch's own index of CPU builds; on Linux the ordinary one carries gigabytes of CUDA.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
# The releases that were tested, of all else; empty for the newest that pyproject.toml allows.
CONSTRAINTS ?= constraints.txt
DEMO_OUTPUT ?= demo-output
PYTEST_FLAGS ?= -n auto --maxprocesses 8

BIN := $(VENV)/bin
CSRC := $(wildcard $(foreach d,csrc csrc/* csrc/*/* tests/emulator,$(foreach e,cpp h cu cuh,$(d)/*.$(e))))
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check
INSTALL_TESTED := $(PIP_INSTALL) $(addprefix --constraint ,$(CONSTRAINTS))
# What `make matrix` tries beside `make demo`, and with which Pythons if not all: versions or paths.
MATRIX_TARGET ?= test
MATRIX_PYTHONS ?=

.DEFAULT_GOAL := help
# Without `slow` and what builds or trains.
QUICK := tests/unit tests/golden/test_eval.py tests/golden/test_fill.py
QUICK_FLAGS := -q -m 'not slow' $(addprefix --ignore=tests/unit/,baselines benchmarks/test_gpu_suite.py \
    benchmarks/test_plan.py benchmarks/test_training.py checkpoint/test_carried_configs.py ci csrc \
    model/test_crnn_prior.py ops/test_extension.py reading test_reproduce.py \
    training/evaluation/test_evaluate.py training/loop/test_photographs.py training/loop/test_runs.py \
    training/losses/test_table3_losses.py training/synthesis/test_camera.py training/test_any_bytes.py)

.PHONY: help demo check test matrix constraints launches wheel docs lint format types bench \
    gpu-bundle fonts system-deps clean

help:  ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.package  ## set up, then double the size of the crops in examples/
	@$(BIN)/python examples/demo.py $(DEMO_OUTPUT)

check: lint types  ## style, types, import rules and the quick tests: under two minutes
	$(BIN)/python -m pytest $(PYTEST_FLAGS) $(QUICK_FLAGS) $(QUICK)

test: lint types  ## set up with all tools, then lint, types and every test
	$(BIN)/python -m pytest $(PYTEST_FLAGS) --durations=25

# Variables, such as TORCH=torch==2.11.0, CONSTRAINTS= and PYTEST_FLAGS, reach the clones.
matrix:  ## `make demo` and MATRIX_TARGET with each Python here, in clean clones; a table
	$(PYTHON) .ci/matrix.py $(MATRIX_TARGET) $(MATRIX_PYTHONS)

# One resolution for all extras and Pythons. A build of PyTorch names the CUDA packages and often the
# Triton and the setuptools that it needs, so the former are left out and the latter are limits.
constraints: $(VENV)/.made  ## renew constraints.txt: the newest releases that pyproject.toml allows
	$(PIP_INSTALL) -qq --upgrade --target build/uv uv
	printf '%s\n' '$(TORCH)' 'triton>=3.6' > build/uv/overrides.txt
	build/uv/bin/uv pip compile --quiet --system-certs --universal --python-version 3.10 \
	    --all-extras --no-annotate --custom-compile-command 'make constraints' \
	    --overrides build/uv/overrides.txt pyproject.toml > build/uv/resolved.txt
	sed -E '/^(torch==|cuda-|nvidia-)/d; s/^(setuptools|triton)==/\1<=/' build/uv/resolved.txt \
	    > constraints.txt

# .venv with another Triton in front of its own.
launches: $(VENV)/.tools  ## prove every kernel launch without a GPU, e.g. with TRITON=3.6.0
	@test -n '$(TRITON)' || { echo "Name a release: make launches TRITON=3.6.0" >&2; exit 1; }
	@test -d build/triton-$(TRITON) || $(PIP_INSTALL) -qq --no-deps \
	    --target build/triton-$(TRITON) 'triton==$(TRITON)'
	PYTHONPATH=build/triton-$(TRITON) $(BIN)/python -m pytest $(PYTEST_FLAGS) tests/launches

lint: $(VENV)/.tools  ## check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CSRC)

format: $(VENV)/.tools  ## mend what `make lint` can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CSRC)

# The folder map exists only in an installed package, so that is what the next two read.
wheel: $(VENV)/.tools
	@rm -rf build/lib* build/bdist* build/wheel build/installed
	$(BIN)/python -m pip wheel -qq --no-deps --no-build-isolation --wheel-dir build/wheel .
	$(PIP_INSTALL) -qq --no-deps --no-compile --target build/installed build/wheel/*.whl

types: wheel  ## check types and imports of the installed wheel
	MYPYPATH=build/installed $(BIN)/mypy -p lemma_fast
	cp pyproject.toml build/installed
	cd build/installed && $(abspath $(BIN))/lint-imports

docs: wheel $(VENV)/.docs  ## build the documentation site into build/site; warnings are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict

bench: $(VENV)/.tools  ## time the operations and the model
	$(BIN)/python -m pytest benchmarks --benchmark-only \
	    -o python_files='bench_*.py' -o python_functions='bench_*'

# BUNDLE_FLAGS=--build adds the compiled operations, for which nvcc must be here.
gpu-bundle: $(VENV)/.tools  ## make build/gpu-bundle: what a GPU machine without a network lacks
	$(BIN)/python benchmarks/gpu_bundle.py $(BUNDLE_FLAGS) build/gpu-bundle

fonts:  ## install the Debian fonts and the word list that synthetic crops are drawn from
	.ci/apt-install training/fonts/train.txt training/fonts/test.txt .ci/synthesis-packages.txt

system-deps:  ## install Tesseract and a few fonts for the tests, where that is possible
	@.ci/apt-install tests/apt-packages.txt || echo "The tests that need these are skipped."

clean:  ## remove what make has made
	rm -rf .venv build dist demo-output lemma_fast.egg-info .mypy_cache .ruff_cache .pytest_cache

# Stamps: a step is done again only when what it depends on has changed.

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || { \
	    echo "lemma-fast needs Python 3.10 to 3.13; $(PYTHON) is" \
	        "$$($(PYTHON) --version 2>&1 || true). Name another: make PYTHON=python3.12 ..." >&2; \
	    exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	    echo "$(PYTHON) cannot make virtual environments." \
	        "On Debian and Ubuntu: sudo apt-get install python3-venv" >&2; \
	    exit 1; }
	$(PYTHON) -m venv $(VENV_FLAGS) $(VENV)
	$(INSTALL_TESTED) -qq --upgrade 'setuptools>=77' wheel ninja
	@touch $@

# A torch that can be imported is left alone. An index that does not answer costs pip minutes of
# retries, so it is asked first.
$(VENV)/.torch: $(VENV)/.made
	@if $(BIN)/python -W ignore -c 'import torch' 2>/dev/null; then \
	    echo "torch is installed already."; \
	elif nvidia-smi -L >/dev/null 2>&1; then \
	    echo "CUDA device found: installing $(TORCH), the default build."; \
	    $(INSTALL_TESTED) '$(TORCH)'; \
	elif $(BIN)/python -c 'import sys, urllib.request as r; r.urlopen(sys.argv[1], timeout=5)' \
	        '$(TORCH_INDEX)/torch/' >/dev/null 2>&1; then \
	    echo "No CUDA device: installing $(TORCH) from the index of CPU builds."; \
	    $(INSTALL_TESTED) --extra-index-url '$(TORCH_INDEX)' '$(TORCH)'; \
	else \
	    echo "No CUDA device, and no index of CPU builds at '$(TORCH_INDEX)':" \
	        "installing the $(TORCH) that pip is set up for."; \
	    $(INSTALL_TESTED) '$(TORCH)'; \
	fi
	@touch $@

# The C++ extension is built with it. Without a compiler it does without, and says so here, because
# pip keeps what a build says to itself.
$(VENV)/.package: $(VENV)/.torch pyproject.toml setup.py $(CSRC) $(CONSTRAINTS)
	$(INSTALL_TESTED) -qq --no-build-isolation --editable .
	@if [ -f lemma_fast/_C.missing.txt ]; then \
	    echo "Installed without the C++ extension, which the reference does not need:" \
	        "$$(cat lemma_fast/_C.missing.txt)" >&2; \
	fi
	@touch $@

$(VENV)/.tools: $(VENV)/.package
	$(INSTALL_TESTED) -qq --no-build-isolation --editable '.[dev,eval,onnx,train,triton]'
	@touch $@

$(VENV)/.docs: $(VENV)/.tools
	$(INSTALL_TESTED) -qq --no-build-isolation --editable '.[docs]'
	@touch $@
