# Every target does its own set-up: only Python >= 3.11 and make are needed.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
RESULTS ?= results/recovery

.PHONY: help venv recovery test test-slow test-long lint format docs

help:
	@echo "make recovery   run the recovery study on its default settings and draw its figures"
	@echo "make test       all tests that take seconds"
	@echo "make test-slow  the tests that take minutes: rates, coverage, reference comparisons at size"
	@echo "make test-long  benchmarks at small sizes, long trainings: before a release"
	@echo "make lint       format check, lint, types, import contract"
	@echo "make format     let ruff format and repair what it can"
	@echo "make docs       build the documentation, site/index.html"
	@echo "make venv       only create $(VENV) and install into it"

venv: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "PYTHON: expected Python 3.11 or newer, got " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $(STAMP)

recovery: $(STAMP)
	$(BIN)/python simulations/recovery.py --output $(RESULTS)
	$(BIN)/python figures/recovery.py $(RESULTS)

test: $(STAMP)
	$(BIN)/python -m pytest -m "not slow"

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m "slow and not long"

test-long: $(STAMP)
	$(BIN)/python -m pytest -m long

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
