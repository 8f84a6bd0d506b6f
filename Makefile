# What a newcomer types: `make demo`, `make test`. What a developer types: `make check`, `make bench`, `make docs`.
# Every target makes and fills `.venv` itself; stamps inside it make repeated calls quick. Where pip fetches from is
# the machine's own configuration.

PYTHON ?= $(shell for python in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$python; break; }; done)
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2
BENCH_ARGS ?= --out bench-out
SECONDS ?= 60
SEED   ?= 0

.DEFAULT_GOAL := help
.PHONY: help demo test test-full test-slurm test-exhaustive fuzz check format bench docs clean

help:
	@echo "make demo       train on 4 virtual nodes, lose one for good, recover, compare bit for bit"
	@echo "make test       the test suite, without the tests that take minutes"
	@echo "make test-full  the tests that take minutes     make test-slurm  job scripts on a real Slurm cluster on this host"
	@echo "make test-exhaustive  every fault at every system call, and 50,000 hostile inputs: hours"
	@echo "make fuzz       histories of a simulated cluster, for SECONDS=60 from SEED=0"
	@echo "make check      ruff, mypy and the quick tests        make format     let ruff rewrite"
	@echo "make bench      figures against memcpy, torch.save, DCP, gloo, NVRx"
	@echo "make docs       regenerate docs/configuration.md, make the site docs/_site (warnings are errors)"

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed; name it with PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# The stamp is written last, so an install that was interrupted is done again.
$(VENV)/.base: pyproject.toml constraints.txt resilience/snapshot/streaming.c | $(BIN)/python
	@echo "installing into $(VENV), once; torch is large"
	$(PIP) -e .
	@touch $@

$(VENV)/.test: pyproject.toml constraints.txt resilience/snapshot/streaming.c | $(BIN)/python
	@echo "installing into $(VENV), once; torch is large"
	$(PIP) -e ".[test]"
	@touch $@ $(VENV)/.base

$(VENV)/.docs: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing into $(VENV), once; torch is large"
	$(PIP) -e ".[docs]"
	@touch $@ $(VENV)/.base

demo: $(VENV)/.base
	$(BIN)/resilience drill --nodes 4 --spares 1 --type local --save-every 5 --persist-every 20 --train-iters 60 \
		--fault lose:node=2@33 --workdir demo-out --report demo-out/report.html

test: $(VENV)/.test
	$(PYTEST) -m "not long" $(PYTEST_ARGS)

test-full: $(VENV)/.test
	$(PYTEST) -m "long and not slurm and not exhaustive" $(PYTEST_ARGS)

# Every fault at every call, and more than 50,000 hostile inputs: some three hours on two cores.
test-exhaustive: $(VENV)/.test
	$(PYTEST) -m exhaustive $(PYTEST_ARGS)

# Debian's packages; where they cannot be installed the tests say so and are skipped. One cluster: one process.
test-slurm: $(VENV)/.test
	@command -v slurmctld >/dev/null || { apt-get -qq update && \
		apt-get -qq install -y --no-install-recommends slurm-wlm munge; } || echo "Slurm cannot be installed here"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slurm $(PYTEST_ARGS)

fuzz: $(VENV)/.base
	OMP_NUM_THREADS=1 $(BIN)/python -m resilience.drill.simulator --seconds $(SECONDS) --seed $(SEED) --workers 2

check: $(VENV)/.test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python docs/generate_configuration.py --check
	$(PYTEST) -m "not long and not drill and not slurm"

format: $(VENV)/.test
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.base
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks $(BENCH_ARGS)

docs: $(VENV)/.docs
	$(BIN)/python docs/generate_configuration.py
	$(BIN)/sphinx-build -W --keep-going -q -b html docs docs/_site
	@echo "docs/_site/index.html"

clean:
	rm -rf $(VENV) .venv-nvrx* .venv-peers* .venv-megatron* demo-out bench-out docs/_site .pytest_cache .mypy_cache .ruff_cache .hypothesis
