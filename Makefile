# Only a door: each target is one plain command line, echoed as it runs, that also works alone (README.md).
#
#   make run                                                        the whole tiny pipeline
#   make env PYTHON=python3.13                                      with another Python
#   make env TORCH_INDEX=https://download.pytorch.org/whl/cpu       Linux without a GPU: PyTorch's smaller CPU wheels

PYTHON ?= python3
TORCH_INDEX ?=
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Every notebook must run; outputs are compared in cells tagged NBVAL_CHECK_OUTPUT.
NBVAL := --nbval-lax --nbval-current-env --nbval-cell-timeout=900

.DEFAULT_GOAL := help
.PHONY: help env run pretrain artifacts demo lab notebooks test test-fast test-hard lint clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

env: $(STAMP) ## make .venv and install the pinned requirements and this package

# The stamp is newer than both files as long as what they ask for is installed.
$(STAMP): requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -r requirements.txt
	$(BIN)/python -m pip install --no-deps --no-build-isolation -e .
	@touch $(STAMP)

run: env ## the whole tiny pipeline, s0 to s3 and the reranker; prints the stage table
	HF_HUB_OFFLINE=1 $(BIN)/q3vl-mini run --preset tiny

pretrain: env ## pre-train the small backbone Q3VL-tiny again (hours)
	HF_HUB_OFFLINE=1 $(BIN)/q3vl-mini pretrain

artifacts: env ## train and measure again all that is shipped: backbone, adapters, results, README's table (hours)
	HF_HUB_OFFLINE=1 $(BIN)/python scripts/remake_artifacts.py

demo: env ## the search demo in a browser
	HF_HUB_OFFLINE=1 $(BIN)/q3vl-mini demo

lab: env ## the course in JupyterLab
	HF_HUB_OFFLINE=1 $(BIN)/jupyter lab notebooks

notebooks: env ## execute the notebooks again, outputs and figures included
	HF_HUB_OFFLINE=1 $(BIN)/python scripts/run_notebooks.py

test: env lint ## every check, every test but the hard ones, every notebook
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 --dist loadfile tests notebooks $(NBVAL)

test-fast: env ## the tests that take seconds
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not notebook and not browser and not hard"

test-hard: env ## the tests that take minutes: killed runs, the demo under load, other Pythons (Q3VL_MINI_PYTHONS=path:path)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m hard

lint: env ## style (ruff) and levels (import-linter)
	$(BIN)/ruff check .
	$(BIN)/lint-imports

clean: ## remove caches and builds; keeps .venv and runs/
	rm -rf build dist *.egg-info test-results .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +
