# Every target sets up what it needs: `make demo` and `make test` work in a fresh clone, in any order, as often as you like.
# The environment lives in .venv and is built again only when pyproject.toml or the pinned list changes.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do command -v $$p && break; done)
WORKERS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$((n < 8 ? n : 8)))
BIN := .venv/bin
READY := .venv/ready
PINS := .ci/requirements.txt
PIP := $(BIN)/python -m pip install --disable-pip-version-check

.PHONY: help setup demo demo-attribution test check format docs benchmark clean

help:  ## what can be made
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 26

setup: $(READY)  ## the environment (.venv) with everything pinned; other targets do this themselves

$(READY): pyproject.toml $(PINS)
	@echo "==> environment in .venv, with $(PYTHON)"
	@$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), f"the pinned set needs Python 3.11 or newer, not {sys.version}"'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "==> 1 of 3: PyTorch"
	@$(PIP) -c $(PINS) $$(grep '^torch==' $(PINS))
	@echo "==> 2 of 3: $$(grep -c == $(PINS)) pinned packages (a minute or two)"
	@$(PIP) -qq --no-deps -r $(PINS)
	@echo "==> 3 of 3: persample itself, editable"
	@$(PIP) -qq --no-deps --no-build-isolation -e .
	@touch $@

demo: $(READY)  ## real data: what per-sample gradients tell about digits; writes build/demo.png
	@mkdir -p build
	@$(BIN)/python examples/demo.py

demo-attribution: $(READY)  ## which training samples made a prediction: attribution methods measured on digits
	@mkdir -p build
	@$(BIN)/python examples/attribution.py

test: $(READY)  ## the whole test suite, documentation and examples included
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS)

check: $(READY)  ## format, lint, types, and the site without a warning
	@echo "==> ruff format"; $(BIN)/ruff format --check --output-format concise .
	@echo "==> ruff check"; $(BIN)/ruff check --output-format concise .
	@echo "==> mypy --strict"; $(BIN)/mypy
	@echo "==> sphinx"; $(BIN)/sphinx-build -W --keep-going -q -j auto -D nb_execution_mode=off docs build/docs-check
	@echo "all checks passed"

format: $(READY)  ## format the code, and fix what ruff can fix
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

docs: $(READY)  ## the site, examples executed, in build/docs/index.html
	@$(BIN)/sphinx-build -W --keep-going -j auto docs build/docs
	@echo "open build/docs/index.html"

benchmark: $(READY)  ## every engine and peer against one backward pass, interleaved (long)
	@cd tests && ../$(BIN)/python -m benchmarks

clean:  ## remove the environment and everything built
	@rm -rf .venv build .pytest_cache .mypy_cache .ruff_cache .hypothesis
