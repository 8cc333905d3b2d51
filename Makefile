# Every target sets up what it needs; nothing has to be installed or activated first.
#   PYTHON       interpreter to build the environment from (3.11 or newer)
#   VENV         folder of the environment
#   TORCH_INDEX  package index to take torch from; without it, a torch that is already there is kept, else a CPU build
#                is installed
#   WORKERS      processes that share the tests; 0 runs them in one

PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
  $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
TORCH_INDEX ?=
WORKERS ?= 2

BIN := $(VENV)/bin
STAMP := $(VENV)/.fmg-installed
PINS := $(VENV)/constraints.txt
# Tools are run as modules: one that comes with the interpreter's own packages has no script in the environment.
RUN := $(BIN)/python -m
LINT_IMPORTS := $(BIN)/python -c 'from importlinter.cli import lint_imports_command; lint_imports_command()'
# One thread per process: the tests' tensors are too small to share. Files stay whole, because their tests share fixtures,
# and in order: those with slow tests come first (tests/conftest.py), so that all processes end at about the same time.
PYTEST := OMP_NUM_THREADS=1 $(RUN) pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder
PIP := $(RUN) pip --no-input --disable-pip-version-check
TORCH_PIN := $(shell sed -n 's/^torch==//p' constraints.txt)
TORCH_MIN := $(shell sed -n 's/^ *"torch>=\(.*\)",$$/\1/p' pyproject.toml)
CPU_INDEX := https://download.pytorch.org/whl/cpu

# Prints the version of the torch that an interpreter has, and fails when there is none or it is older than the range.
TORCH_VERSION := -c 'from importlib.metadata import version; import sys; v = version("torch"); print(v); \
  sys.exit([int(n) for n in v.split(".")[:2]] < [int(n) for n in "$(TORCH_MIN)".split(".")[:2]])' 2>/dev/null

# Folder that an interpreter imports torch from, found without importing it.
TORCH_FOLDER := -c 'from importlib.util import find_spec; from pathlib import Path; \
  print(Path(find_spec("torch").origin).parents[1])'

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-transformers rtx check lint types fast-tests gpu-check docs format clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 26

setup: $(STAMP) ## build the environment in .venv

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || \
	  { echo "error: no Python 3.11 or newer found. Name one: make PYTHON=/path/to/python3." >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	@set -e; \
	if test -n "$(TORCH_INDEX)"; then \
	  $(PIP) install --index-url $(TORCH_INDEX) "torch==$(TORCH_PIN)"; \
	elif $(BIN)/python $(TORCH_VERSION) >/dev/null; then \
	  echo "keeping torch of $(VENV)"; \
	elif $(PYTHON) $(TORCH_VERSION) >/dev/null; then \
	  echo "keeping torch of $(PYTHON)"; \
	  site=$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'); \
	  $(PYTHON) $(TORCH_FOLDER) >"$$site/host-torch.pth"; \
	else \
	  $(PIP) install "torch==$(TORCH_PIN)+cpu" || $(PIP) install --index-url $(CPU_INDEX) "torch==$(TORCH_PIN)"; \
	fi; \
	{ sed '/^torch==/d' constraints.txt; echo "torch==$$($(BIN)/python $(TORCH_VERSION))"; } >$(PINS); \
	$(PIP) install --constraint $(PINS) --editable '.[dev]'; \
	touch $(STAMP)

demo: setup ## train on the CPU, compare with the base, export, verify the export and generate from it
	@set -e; n=1; while test -e runs/demo-$$n; do n=$$((n + 1)); done; run=runs/demo-$$n; \
	$(BIN)/fmg train --run $$run; \
	$(BIN)/fmg eval $$run --against base; \
	$(BIN)/fmg export $$run --verify quick; \
	$(BIN)/fmg generate 'a red circle left' 'a blue square right' 'a green triangle top' --num 4 --sheet --time \
	  --from $$run/artifact --out $$run/images; \
	echo; echo "Images: $$run/before_after.png and $$run/curve.png"

test: setup ## the whole test suite, without the tests that need a GPU
	$(PYTEST) -m "not gpu and not rtx"

rtx: setup ## TensorRT-RTX engines of the embedded model, built on the CPU; installs the package (95 MB) first
	$(PIP) install --constraint $(PINS) --editable '.[dev,trt-rtx]'
	$(RUN) pytest -m rtx

test-transformers: setup ## the tests of the rewards under the pinned and the newest transformers
	PYTHON=$(BIN)/python scripts/test_transformers.sh

check: setup ## format, lint, types, layers and the fast tests, side by side
	@$(MAKE) --no-print-directory --jobs=3 lint types fast-tests

lint: setup
	$(RUN) ruff format --check .
	$(RUN) ruff check .
	$(LINT_IMPORTS)

types: setup
	$(RUN) mypy

fast-tests: setup
	$(PYTEST) -m "not slow and not gpu and not rtx" tests/unit

gpu-check: setup ## throughput, memory against the plan, latency and the GPU's tests; JSON in benchmarks/results
	$(BIN)/python benchmarks/gpu_check.py
	$(BIN)/python benchmarks/gpu_export.py
	$(RUN) pytest -m gpu

docs: setup ## the documentation site, in build/site; nothing is fetched
	NO_MKDOCS_2_WARNING=1 $(RUN) mkdocs build --strict
	@echo 'To read it with search: $(BIN)/python -m http.server -d build/site'

format: setup ## rewrite the sources in the project's style
	$(RUN) ruff format .
	$(RUN) ruff check --fix .

clean: ## remove the environment and every cache
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
