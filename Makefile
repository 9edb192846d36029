# Needs git, make and Python 3.10 or newer with venv. Every target makes .venv by itself.
#
#   make demo PYTHON=python3.12        another interpreter for .venv
#   make test ARGS="-k gallery"        more arguments for the command that runs
#   make bench NAME=gallery            one benchmark
#   make fuzz FUZZ_S=7200              two hours of odd arguments and damaged files

PYTHON ?= python3
ARGS ?=
NAME ?=
FUZZ_S ?= 75
# One more than processors: tests of cameras and servers wait a lot.
WORKERS ?= $(shell echo $$(($$(getconf _NPROCESSORS_ONLN) + 1)))

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test fuzz bench gpu check format clean

help:  ## Show this list.
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-7s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(STAMP)  ## Run the whole path on synthetic people into demo/.
	$(BIN)/upperson demo $(ARGS)

test: $(STAMP)  ## Run all tests.
	$(BIN)/python -m tests.sessions -q -n $(WORKERS) --maxprocesses 4 --dist worksteal --durations=15 --durations-min=1 $(ARGS)

fuzz: $(STAMP)  ## Try odd arguments and damaged files for FUZZ_S=75 seconds; hours find more.
	UPPERSON_FUZZ_S=$(FUZZ_S) $(BIN)/python -m pytest -q -n logical --maxprocesses 4 tests/fuzz $(ARGS)

bench: $(STAMP)  ## Compare us with others: all of benchmarks/, or NAME=gallery ARGS="--rows 10000".
	$(BIN)/python -m benchmarks $(NAME) $(ARGS)

gpu: $(STAMP)  ## On an NVIDIA GPU: its tests, then towers and training measured into docs/gpu-<card>.md.
	@$(BIN)/python -m benchmarks.gpu --check
	@$(BIN)/python -m pytest -q -n 0 tests/gpu; failed=$$?; \
		$(BIN)/python -m benchmarks.gpu $(ARGS) && exit $$failed

check: $(STAMP)  ## Lint, format check, strict types, import rules. Changes nothing.
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy
	$(BIN)/lint-imports

format: $(STAMP)  ## Format the code and fix what the linter can fix.
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

clean:  ## Remove .venv, caches and build outputs. Keeps demo/, runs/ and bundles.
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is written last, so an interrupted install is started again by the next make.
$(STAMP): pyproject.toml
	@rm -f $@
	@command -v $(PYTHON) >/dev/null || { \
		echo "error: $(PYTHON) is not there: install Python 3.10 or newer, or name one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
		echo "error: Python 3.10 or newer is needed, found $$($(PYTHON) -V 2>&1): name another one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "error: $(PYTHON) cannot make virtual environments: run  apt install python3-venv" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -e '.[all,dev]'
	$(BIN)/python -m pip install --no-deps 'trackers>=2.6'
	@$(BIN)/python tests/helpers/real_tensorrt.py install
	@touch $@
