# `make run` and `make test` set everything up in .venv; they need python3 (3.11 or newer) and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN_SET_UP := $(VENV)/.set-up-run
TEST_SET_UP := $(VENV)/.set-up-test

# Some machines turn caches of bytecode off, which costs each process here a quarter of a second.
unexport PYTHONDONTWRITEBYTECODE

# Packages as pyproject.toml asks for them and constraints.txt pins them. pip would compile them with
# one core; what does not compile is no Python but templates.
INSTALL = $(BIN)/python -m pip install -q --disable-pip-version-check --no-compile -c constraints.txt
COMPILE = $(BIN)/python -m compileall -q -j 0 $(VENV)/lib >/dev/null 2>&1 || true

# Files of tests side by side, with one thread each. Those of the cluster and the image mostly wait,
# and have processes beyond one for each core (see tests/conftest.py).
SIDE_BY_SIDE := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --dist loadfile --no-loadscope-reorder

.PHONY: help run test test-fast test-all soak format lint clean

help:
	@echo "make run        train the local critics (N=0 and N=2) and compare them: no GPU, minutes"
	@echo "make test       lint, types and tests of everything, in about 20 minutes on two cores"
	@echo "make test-fast  the fast tests only"
	@echo "make test-all   all variants and large grids too, then the soak: 100 minutes"
	@echo "make soak       40 kills in one run, 25 interruptions on Slurm in another, a second image"
	@echo "make format     let ruff mend and format what it can"
	@echo "make lint       ruff, mypy, import rules, Dockerfile and shell scripts"
	@echo "make clean      remove the virtual environment; runs/ stays"

run: $(RUN_SET_UP)
	$(BIN)/python -m job.compare --config configs/critic/critic_local.yaml --unfreeze 0 2

# The image's tests wait for it; it is built while packages are installed and lint runs.
test: $(BIN)/python
	$(BIN)/python tests/container/built.py & $(MAKE) --no-print-directory lint \
	  && $(SIDE_BY_SIDE) -n 5 -m "not all" --budget tests/budget.json

test-fast: $(TEST_SET_UP)
	$(SIDE_BY_SIDE) -n logical --maxprocesses 4 -m "not slow and not all" tests/unit

test-all: lint
	$(SIDE_BY_SIDE) -n 6 --cov job --cov slurm --cov-report term:skip-covered
	$(MAKE) soak

soak: $(TEST_SET_UP)
	SOAK_KILLS=40 $(BIN)/python -m pytest --timeout 7200 -q -k kill tests/distributed/test_resume.py tests/distributed/test_cached_prefix.py
	SOAK_INTERRUPTIONS=25 $(BIN)/python -m pytest --timeout 7200 -q -k many_interruptions tests/cluster
	SOAK=1 $(BIN)/python -m pytest -q -k two_builds tests/container

format: $(TEST_SET_UP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lint: $(TEST_SET_UP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/hadolint Dockerfile
	$(BIN)/shellcheck containers/*.sh

clean:
	rm -rf $(VENV)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Python 3.11 or newer is needed; $(PYTHON) is $$($(PYTHON) --version 2>&1)."; \
	  echo "Name another one: make PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "$(PYTHON) cannot make virtual environments (on Debian: the package python3-venv)."; exit 1; }

$(RUN_SET_UP): $(BIN)/python pyproject.toml constraints.txt
	$(INSTALL) -e '.[train]'
	@$(COMPILE)
	@touch $@

$(TEST_SET_UP): $(BIN)/python pyproject.toml constraints.txt
	$(INSTALL) -e '.[train,dev]'
	@$(COMPILE)
	@touch $@ $(RUN_SET_UP)
