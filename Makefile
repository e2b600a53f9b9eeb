# Each target makes its own virtual environment and installs what it needs: nothing has to be set up first.
#
#   make test PYTHON=python3.12      another interpreter (3.10 or newer)
#   make test TORCH_INDEX=URL        another index for torch; empty: whatever build pip's own index holds
#   make demo ARGS="--rank 4"       arguments of the demo (of pytest for `make test`, of the suite for `make test-peft`)

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
WORKERS ?= 4

# CPU builds of torch live in an index of their own; on Linux pip's usual index holds CUDA builds of several gigabytes.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

# On Linux the build is part of the version (2.13.0+cpu), so that no other build is ever taken by mistake.
TORCH_VERSION := $(shell sed -n 's/^torch==//p' constraints.txt)
TORCH_BUILD := $(if $(filter Linux,$(shell uname -s)),$(filter cpu cu% rocm% xpu,$(notdir $(patsubst %/,%,$(TORCH_INDEX)))))
TORCH := torch==$(TORCH_VERSION)$(if $(TORCH_BUILD),+$(TORCH_BUILD))

BIN := $(VENV)/bin
# pip draws its progress bars on a terminal and keeps quiet in a log.
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input $(shell [ -t 2 ] || echo --quiet)
# Only what is imported gets compiled, then: that halves the time of an install.
INSTALL := $(PIP) install --constraint constraints.txt --no-compile

# Tests need no network. Several processes share the cores: one thread each, and none that spins while it waits.
tests test-peft test-distributed: export HF_HUB_OFFLINE = 1
tests test-peft test-distributed: export TOKENIZERS_PARALLELISM = false
tests test-peft test-distributed: export OMP_NUM_THREADS = 1
tests test-peft test-distributed: export OMP_WAIT_POLICY = PASSIVE
# Each process would compile torch, transformers and the tests anew where this is set, as images of containers do.
tests test-peft test-distributed: export PYTHONDONTWRITEBYTECODE =

.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help demo serve-demo test tests lint types format test-peft test-distributed docs kernels-check bench clean build/tree

help:  ## this list
	@echo "usage: make TARGET"
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1|\2/p' $(MAKEFILE_LIST) | while IFS='|' read -r name text; do \
	    printf '%-16s %s\n' "$$name" "$$text"; done

demo: $(VENV)/.demo  ## domains that come and go, against one adapter for all (writes runs/demo/)
	$(BIN)/python examples/demo.py $(ARGS)

serve-demo: $(VENV)/.serve  ## a tiny model with three adapters as OpenAI's API, and a curl line (ARGS="--port 8000")
	$(BIN)/python examples/serve_demo.py $(ARGS)

test: lint tests  ## lint, then the tests

lint: $(VENV)/.lint  ## ruff check, ruff format --check, mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@$(MAKE) --no-print-directory types

tests: $(VENV)/.test
	$(BIN)/python -m pytest -n logical --maxprocesses $(WORKERS) $(ARGS)
ifndef ARGS
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n logical --maxprocesses $(WORKERS) tests/kernels/interpreted
endif

kernels-check: $(VENV)/.test  ## compile the Triton kernels for GPUs that need not be there (ARGS=--subset: a part)
	$(BIN)/python kernels/check.py $(ARGS)

# matplotlib, for the plot, comes with the tests.
bench: export OMP_NUM_THREADS = 1
bench: export OMP_WAIT_POLICY = PASSIVE
bench: $(VENV)/.test  ## time the operation, layers and models on one CPU thread (writes runs/bench/)
	$(BIN)/python kernels/bench/cpu.py $(ARGS)
ifndef ARGS
	$(BIN)/python kernels/bench/models.py
	$(BIN)/python kernels/bench/mixtures.py
	$(BIN)/python kernels/bench/compiled.py
endif

test-peft: $(VENV)/.test  ## PEFT's own test suite on the types of this package
	$(BIN)/python tests/peft_suite/run.py $(ARGS)

test-distributed: $(VENV)/.distributed  ## train under DDP, FSDP2 and DeepSpeed, two processes on the CPU against one
	$(BIN)/python -m pytest tests/distributed $(ARGS)

docs: $(VENV)/.docs build/tree  ## the documentation as a site, strictly checked (writes build/site/)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --config-file docs/site/mkdocs.yml
	@echo "==> build/site/index.html"

types: $(VENV)/.lint build/tree
	cd build/tree && "$(abspath $(BIN))/mypy" --config-file ../../setup.cfg --cache-dir ../../.mypy_cache --package mixadapters

# mypy and mkdocstrings know nothing of package_dir: they read links that lie as the package is installed.
build/tree:
	@rm -rf $@ && mkdir -p $@/mixadapters
	@ln -s "$(CURDIR)"/mixadapters/* $@/mixadapters/
	@ln -s "$(CURDIR)/kernels/ops" $@/mixadapters/kernels
	@ln -s "$(CURDIR)/tasks" $@/mixadapters/tasks

format: $(VENV)/.lint  ## sort imports and format the code in place
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .

clean:  ## remove the virtual environment, caches and build products (keeps runs/)
	rm -rf $(VENV) .cache build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	    echo "error: PYTHON=$(PYTHON) is no Python 3.10 or newer; name one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@echo "==> virtual environment in $(VENV)"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	    echo "error: '$(PYTHON) -m venv' failed; on Debian and Ubuntu install python3-venv" >&2; exit 1; }
	@touch $@

$(VENV)/.torch: constraints.txt | $(VENV)/.made
	@echo "==> $(TORCH)"
	@$(INSTALL) --no-deps --retries 2 --timeout 30 $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) '$(TORCH)' || { \
	    echo "error: found no $(TORCH). Name an index that holds it, make TORCH_INDEX=URL ...;" >&2; \
	    echo "       'make TORCH_INDEX= ...' takes the build of pip's own index, a CUDA one on Linux" >&2; exit 1; }
	@touch $@

$(VENV)/.demo: EXTRAS = [demo]
$(VENV)/.serve: EXTRAS = [serve]
$(VENV)/.test: EXTRAS = [test]
$(VENV)/.distributed: EXTRAS = [distributed,test]
$(VENV)/.docs: EXTRAS = [docs]
$(VENV)/.demo $(VENV)/.serve $(VENV)/.test $(VENV)/.distributed $(VENV)/.docs: setup.cfg pyproject.toml constraints.txt $(VENV)/.torch
	@echo "==> mixadapters$(EXTRAS) and what it needs"
	@$(INSTALL) --editable '.$(EXTRAS)'
	@touch $@

# torch and numpy are here for their annotations: mypy skips the other dependencies.
$(VENV)/.lint: constraints.txt $(VENV)/.torch
	@echo "==> ruff and mypy"
	@$(INSTALL) mypy ruff numpy torch
	@touch $@
