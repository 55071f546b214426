# make demo          the order board, until Ctrl-C        (SIMULATE=1: with customers; PG=16)
# make demo-check    start it, drive it, report each hop
# make test          import contract, ruff, mypy, and the tests with coverage
#                    (PG=16, PG=container or PG=postgres://... for another server; ARGS='-k name')
# make test-all      the tests on each Python, Django and PostgreSQL there is
# make faults        break the server, the network and the listeners 200 times, account for every
#                    event (SEED=7; FAULTS=1000; MEMORY=1: a million events through one listener)
# make model-check   durable topics: random writers, consumers that crash, every event accounted for
#                    (SEED=7; SECONDS=60; EVENTS=100000)
# make cache-check   caches on two nodes: writers, readers and faults, no read staler than promised
#                    (SEED=7; SECONDS=60)
# make bench         measure it beside others, write docs/benchmarks  (ARGS='--only caches' keeps the rest)
# make bench-quick   the same in three minutes, smaller, into .bench/  (ARGS='--only burst')
# make lint          the first three of make test
# make docs          the documentation, warnings being errors
# make clean         remove what these made
#
# Python 3.11 or newer is all it takes: make demo PYTHON=python3.12
# DATABASE_URL=postgres://... uses that server and not the embedded one.

PYTHON ?= python3
VENV := .venv
PG ?= 18

.DEFAULT_GOAL := help
.PHONY: help venv demo demo-check clean

help:
	@sed -n '/^$$/q; s/^# \{0,1\}//p' Makefile

# ---- the virtual environment -------------------------------------------------------------------

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed: make $(MAKECMDGOALS) PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
	  { rm -rf $(VENV); \
	    echo "$(PYTHON) cannot make virtual environments (Debian, Ubuntu: apt install python3-venv)," >&2; \
	    echo "or name another: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }

# One stamp for each set of extras: installed again only when pyproject.toml changes.
$(VENV)/.installed-%: pyproject.toml | $(VENV)/bin/python
	@echo "Installing django-pgnotify[$*] into $(VENV)"
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[$*]'
	@touch $@

venv: $(VENV)/.installed-demo

# ---- the demo ----------------------------------------------------------------------------------

demo: $(VENV)/.installed-demo
	@exec $(VENV)/bin/python -m example_project.demo --pg $(PG) $(if $(SIMULATE),--simulate)

demo-check: $(VENV)/.installed-demo
	@exec $(VENV)/bin/python -m example_project.demo --check --pg $(PG)

clean:
	rm -rf $(VENV) .venvs .demo .bench build dist *.egg-info docs/_build .coverage .coverage.*
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +

# ---- the tests ---------------------------------------------------------------------------------

.PHONY: lint test test-all test-container docs

# A bare number is a version of the embedded server; DATABASE_URL rules where PG is not given.
ifeq ($(origin PG),file)
TEST_PG :=
else
TEST_PG := --pg=$(if $(filter 16 18,$(PG)),embedded:$(PG),$(PG))
endif

lint: $(VENV)/.installed-lint
	$(VENV)/bin/lint-imports --no-logo
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy

test: lint
	@rm -f .coverage .coverage.*
	$(VENV)/bin/coverage run -m pytest $(TEST_PG) $(ARGS)
	@$(VENV)/bin/coverage combine --quiet
	@$(VENV)/bin/coverage report

test-all: $(VENV)/.installed-test
	$(VENV)/bin/python -m tests.matrix $(MATRIX)

# Where Docker runs, or root may start it: PostgreSQL from an image made of Debian packages.
test-container: $(VENV)/.installed-test
	tests/container/run.sh $(ARGS)

docs: $(VENV)/.installed-docs
	$(VENV)/bin/python -m sphinx -W --keep-going -b html docs docs/_build/html

# ---- the faults --------------------------------------------------------------------------------

.PHONY: faults

FAULTS ?= 200
FAULT_OPTIONS = $(if $(MEMORY),--memory,--faults $(FAULTS)) $(if $(SEED),--seed $(SEED)) $(ARGS)

faults: $(VENV)/.installed-test
	$(VENV)/bin/python -m tests.faults.run $(FAULT_OPTIONS)

.PHONY: model-check

SECONDS ?= 60
EVENTS ?= 100000

model-check: $(VENV)/.installed-test
	$(VENV)/bin/python -m tests.faults.model.run --seconds $(SECONDS) --events $(EVENTS) \
	  $(if $(SEED),--seed $(SEED)) $(ARGS)

.PHONY: cache-check

cache-check: $(VENV)/.installed-test
	$(VENV)/bin/python -m tests.faults.caches.run --seconds $(SECONDS) \
	  $(if $(SEED),--seed $(SEED)) $(ARGS)

# ---- the benchmarks ----------------------------------------------------------------------------

.PHONY: bench bench-quick

BENCH := .venvs/bench

# An environment of its own, because of the peers.
$(BENCH)/.installed: pyproject.toml benchmarks/requirements.txt
	@$(PYTHON) -m venv $(BENCH)
	@echo "Installing django-pgnotify and what it is measured beside into $(BENCH)"
	@$(BENCH)/bin/python -m pip install --quiet --disable-pip-version-check \
	  -e '.[binary,channels]' -r benchmarks/requirements.txt
	@touch $@

bench: $(BENCH)/.installed
	$(BENCH)/bin/python -m benchmarks --out docs/benchmarks $(ARGS)

bench-quick: $(BENCH)/.installed
	$(BENCH)/bin/python -m benchmarks --quick --out .bench $(ARGS)
