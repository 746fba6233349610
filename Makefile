# The commands of this checkout. Needs python3.11 (or newer), make and git; all else goes to .venv.
# Variables: MINUTES=5 (make run, make bench), RUN=directory (make run), REPO=path, GRID=full (make
# bench), TESTS="-k pattern" (make test), PYTHON=interpreter (make setup).

PYTHON ?= $(shell command -v python3.11 || command -v python3)
MINUTES ?= 5
ifndef RUN
RUN := runs/galaxies-$(shell date +%Y%m%d-%H%M%S)
endif

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
PINNED := -c constraints.txt

.PHONY: help setup run test lint format bench results docs clean

help: ## list these commands
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 16

setup: .venv/.ready ## .venv from the pinned constraints

# torch comes first and alone, so that nothing later can pull another build of it; hatchling is
# pinned like the rest, hence no build isolation.
.venv/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) install -q --upgrade $(PINNED) pip
	$(PIP) install -q $(PINNED) torch
	$(PIP) install -q $(PINNED) --group dev
	$(PIP) install -q $(PINNED) --no-build-isolation -e .
	@touch $@

.venv/.docs: .venv/.ready
	$(PIP) install -q $(PINNED) --no-build-isolation -e '.[docs]'
	@touch $@

.venv/.bench: .venv/.ready benchmarks/constraints-peers.txt
	$(PIP) install -q $(PINNED) --group bench
	$(PIP) install -q $(PINNED) -r benchmarks/constraints-peers.txt
	@touch $@

run: setup ## fit the built-in galaxy table for MINUTES and write a report
	@mkdir -p $(dir $(RUN))
	$(BIN)/rootflow fit galaxies --minutes $(MINUTES) --out $(RUN)
	@echo "report: $(RUN)/report.html"

test: setup ## the whole test suite, then the linters
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal --cov=rootflow --doctest-modules tests src $(TESTS)
	@$(MAKE) --no-print-directory lint

lint: setup ## ruff, mypy --strict and the import floors
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup ## mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/.bench ## benchmark tables, MINUTES a flow; GRID=full, REPO=path for more
	$(BIN)/python benchmarks/tables.py --minutes $(MINUTES)
	$(BIN)/python benchmarks/zoo.py $(if $(filter full,$(GRID)),,--quick)
	$(if $(REPO),$(BIN)/python benchmarks/published.py --repo $(REPO),@echo "published code: not run, give REPO=path")

results: setup ## docs/results.md from docs/results.jsonl
	$(BIN)/rootflow reproduce --results --store docs/results.jsonl > docs/results.md

docs: .venv/.docs ## the site, into docs/_build/html; a warning is an error
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs docs/_build/html
	@echo "site: docs/_build/html/index.html"

clean: ## remove the environment and caches, never runs/
	rm -rf .venv docs/_build .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache .coverage
