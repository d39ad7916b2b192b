# The two commands a newcomer needs: `make train` and `make test`. `make` alone lists them all.
#
# Every target first sets up its own virtual environment in .venv (about 2 GB, some minutes, once). It is
# installed again only when pyproject.toml changes. Your own Python: `make train PYTHON=python3.12`.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# How tests run: three processes, one torch thread each; many tests wait for processes of their own.
PYTEST_ARGS ?= -n 3 --dist loadfile
# Python may keep what it compiles, also where a container says otherwise: every process that is started would compile
# millrace anew, for most of a second.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help train cluster-demo test test-long lint format types contract bench check clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

train: $(VENV)/.installed-zoo  ## train the digit reader, with a progress bar (ARGS="--set epochs=2" for options)
	$(BIN)/millrace train digits $(ARGS)

cluster-demo: $(VENV)/.installed-cluster  ## train digits in 4 replicas on a local Ray cluster, one of which is killed every 3 seconds
	$(BIN)/millrace train digits --replicas 4 --cluster local --chaos 3 $(ARGS)

test: $(VENV)/.installed-test  ## run the tests, except the long ones (ARGS="tests/graph -k save" for some)
	$(BIN)/python -m pytest $(PYTEST_ARGS) $(ARGS)

test-long: $(VENV)/.installed-test  ## run the tests that the usual run leaves out for their time
	$(BIN)/python -m pytest $(PYTEST_ARGS) -m long $(ARGS)

lint: $(VENV)/.installed-dev  ## check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.installed-dev  ## put the style right
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(VENV)/.installed-dev  ## check the types, strictly
	$(BIN)/mypy

contract: $(VENV)/.installed-dev  ## check which room may import which
	$(BIN)/lint-imports

check: lint types contract test  ## everything that has to pass before a change lands

bench: $(VENV)/.installed-test  ## measure against eager PyTorch and torch.compile (ARGS="--jax VENV --tf VENV")
	$(BIN)/python -m bench $(ARGS)

clean:  ## remove the virtual environment and every cache (runs/ stays)
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# -- setting up ---------------------------------------------------------------------------------------------

$(VENV)/.made:
	@command -v $(PYTHON) >/dev/null || { \
	  echo "make: there is no '$(PYTHON)' here. Install Python 3.11 or newer, or name yours: make PYTHON=/path/to/python"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "make: millrace needs Python 3.11 or newer, and '$(PYTHON)' is $$($(PYTHON) -V). Name another: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "make: this Python cannot make virtual environments (on Debian and Ubuntu: apt install python3-venv)"; exit 1; }
	@echo "==> making a virtual environment in $(VENV) with $$($(PYTHON) -V)"
	@$(PYTHON) -m venv --clear $(VENV)
	@touch $@

# What contains what: dev > test > cluster > zoo; so one install marks the smaller ones as done too.
$(VENV)/.installed-zoo: EXTRA := zoo
$(VENV)/.installed-cluster: EXTRA := zoo,ray
$(VENV)/.installed-test: EXTRA := test
$(VENV)/.installed-dev: EXTRA := dev
$(VENV)/.installed-cluster $(VENV)/.installed-test $(VENV)/.installed-dev: ALSO := $(VENV)/.installed-zoo
$(VENV)/.installed-test $(VENV)/.installed-dev: ALSO += $(VENV)/.installed-cluster
$(VENV)/.installed-dev: ALSO += $(VENV)/.installed-test

$(VENV)/.installed-%: pyproject.toml $(VENV)/.made
	@echo "==> installing millrace[$(EXTRA)] into $(VENV) (the first time this fetches PyTorch: some minutes)"
	@$(BIN)/python -m pip install --disable-pip-version-check --editable '.[$(EXTRA)]'
	@touch $@ $(ALSO)
	@echo "==> ready"
