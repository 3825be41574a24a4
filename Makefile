# Each target makes the environment it needs. `make` alone lists the targets.

PYTHON ?= python3
OUTPUT ?= runs/quickstart
PYTEST_ARGS ?=

VENV := .venv
PY := $(VENV)/bin/python
# A change in the requirements, or of the checkout's place (console scripts hold its path), installs again.
HASH := $(shell { pwd; cat requirements.txt requirements-dev.txt requirements-cloud.txt; } | cksum | cut -d ' ' -f 1)
STAMP := $(VENV)/.installed-$(HASH)
# Twice quiet: errors only, no notes about the machine.
PIP := $(PY) -m pip --disable-pip-version-check install --quiet --quiet

.DEFAULT_GOAL := help
.PHONY: help env demo test soak check format clean

help: ## list the targets
	@echo "usage: make TARGET [VARIABLE=value]"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-8s %s\n", $$1, $$2 }' Makefile
	@echo "variables: PYTHON=$(PYTHON)  OUTPUT=$(OUTPUT)  PYTEST_ARGS=\"-k name\""

env: $(STAMP) ## make or update the environment in .venv

demo: $(STAMP) ## train, score, register and show a small model on two CPU ranks, in OUTPUT
	$(PY) -m pretrain demo --set output="$(OUTPUT)"

# Two files at a time, the folders of long tests first: most of them wait for processes to start.
test: $(STAMP) ## run the tests (PYTEST_ARGS narrows them)
	$(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

soak: $(STAMP) ## run the fault tables in full, of which `test` runs a part (long; never timed in one go)
	$(PY) -m pytest -m soak $(PYTEST_ARGS)

check: $(STAMP) ## formatting, lint and types
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

format: $(STAMP) ## format the code and fix what the linter can
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

clean: ## remove the environment and the tools' caches; runs stay
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(STAMP):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "error: PYTHON=$(PYTHON) is not Python 3.11 or newer; install one and run: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" >&2; \
	  exit 1; }
	@if [ "$$(cat $(VENV)/.checkout 2>/dev/null)" != "$$(pwd)" ]; then rm -rf $(VENV); fi
	@test -x $(PY) || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "error: $(PYTHON) cannot make environments; on Debian and Ubuntu: apt-get install python3-venv" >&2; \
	  exit 1; }
	@pwd > $(VENV)/.checkout
	@echo "Installing into $(VENV): about 5 minutes and 3 GB (more where pip brings CUDA). Later calls are fast."
	@echo "  1/3 torch"
	@$(PIP) --constraint requirements.txt torch
	@echo "  2/3 DeepSpeed, MLflow, diffusers, transformers and the rest of requirements.txt"
	@$(PIP) --requirement requirements.txt
	@echo "  3/3 the clients and tools of requirements-cloud.txt and requirements-dev.txt"
	@$(PIP) --requirement requirements-cloud.txt --requirement requirements-dev.txt
	@rm -f $(VENV)/.installed-*
	@touch $@
