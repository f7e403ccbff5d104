# Two commands for a newcomer: `make reproduce` and `make test`. Both make the environment first if need be.
# Another build of torch than the package index gives by default: PIP_ARGS="--extra-index-url URL".

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
ARGS ?=
# One process a core, each with one thread: small matrices gain nothing from more, and threads of two processes collide.
SIDE_BY_SIDE := OMP_NUM_THREADS=1 $(BIN)/pytest -n logical --maxprocesses 8

.DEFAULT_GOAL := help
.PHONY: help reproduce quick test test-slow test-model test-quant lint check figures notebooks clean

help:  ## what there is
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /: /' | column -t -s:

reproduce: $(INSTALLED)  ## check the theory, fine-tune a real model, write the report (10 minutes; ARGS=--quick: 3)
	$(BIN)/diablo-theory reproduce $(ARGS)

test: $(INSTALLED)  ## the default tests: no network, no pretrained model
	$(SIDE_BY_SIDE) -m "not model and not slow" $(ARGS)

test-slow: $(INSTALLED)  ## mutants of the library, which the tests must find, pairs of processes, notebooks
	$(SIDE_BY_SIDE) -m slow $(ARGS)

test-model: $(INSTALLED)  ## the tests on the real pretrained model
	$(BIN)/pytest -m model $(ARGS)

# Not part of the environment: torchao writes warnings to the terminal whenever peft is imported.
test-quant: $(INSTALLED)  ## the tests on quantised models, for which it installs the extra `quant`
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e '.[quant]'
	$(SIDE_BY_SIDE) tests/tuner/test_quantised.py tests/methods/test_quantised_bases.py tests/quantise tests/finetune/planning/test_plan_quantised.py $(ARGS)

lint: $(INSTALLED)  ## format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

check: lint test test-slow test-model test-quant  ## everything that CI runs

figures: $(INSTALLED)  ## draw the figures of the saved results again
	$(BIN)/python figures/make_figures.py

notebooks: $(INSTALLED)  ## run the notebooks again and keep their output (3 minutes; the last one needs the model)
	$(BIN)/python notebooks/execute.py

clean:  ## remove the environment (results and the model cache stay)
	rm -rf $(VENV)

# The stamp is made last, so that an interrupted installation is done again.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "diablo-theory needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version). Use make PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e '.[dev]'
	@touch $@
