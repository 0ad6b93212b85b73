# Every target makes .venv and installs on its own; a second call installs nothing (stamp files), and no activated
# environment is needed. PYTHON chooses the interpreter, LOCK the platform: `make install LOCK=requirements/cuda.lock`.

PYTHON ?= $(shell command -v python3.11 || command -v python3 || echo python3.11)
VENV := .venv
LOCK ?= requirements/cpu.lock
WORKERS ?= 2
BIN := $(VENV)/bin
DEPENDENCIES := $(VENV)/.dependencies
INSTALLED := $(VENV)/.installed

export OMP_NUM_THREADS ?= 1
export PYTHONNOUSERSITE := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# What is imported is compiled when it is first imported, and kept: compiling all of it takes minutes.
unexport PYTHONPATH VIRTUAL_ENV PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help install demo test test-gpu check bench chaos clean

help:
	@echo "make install   create $(VENV) from $(LOCK)"
	@echo "make demo      train a tiny model on this machine and show that it learned"
	@echo "make test      run the tests (WORKERS=2 processes at a time)"
	@echo "make test-gpu  run the tests that need a CUDA device (LOCK=requirements/cuda.lock)"
	@echo "make check     lint, format and type check"
	@echo "make bench     measure ratios (NAMES='head sampler/k5' and JSON=FILE choose and save)"
	@echo "make chaos     kill and hang real processes and look what survives"

install: $(INSTALLED)

$(VENV)/pyvenv.cfg:
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found: install Python 3.11 or newer and call make PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

# The stamp holds what was installed: another lock, or a changed one, installs again; a mere checkout does not. Unpacking
# takes most of the time and the packages of a lock are independent files: two at a time.
$(DEPENDENCIES): $(LOCK) $(VENV)/pyvenv.cfg
	@if cmp -s $(LOCK) $@; then touch $@; else \
		echo "installing $$(wc -l < $(LOCK)) packages into $(VENV) (about 2 minutes) ..." && \
		xargs -P 2 -n 60 $(BIN)/python -m pip install --quiet --no-deps --no-compile < $(LOCK) && cp $(LOCK) $@; fi

$(INSTALLED): pyproject.toml requirements/smoke.py $(DEPENDENCIES)
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	$(BIN)/python requirements/smoke.py
	@touch $@

demo: $(INSTALLED)
	$(BIN)/python -m orchestration demo $(ARGS)

test: $(INSTALLED)
	$(BIN)/python -m pytest -q -m "not chaos and not gpu" -n $(WORKERS) $(ARGS)

check: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(INSTALLED)
	$(BIN)/python -m tests.benchmarks $(NAMES) $(if $(JSON),--json $(JSON))

# The expression takes everything in tests/chaos, marked or not, and what is marked elsewhere.
chaos: $(INSTALLED)
	$(BIN)/python -m pytest -q -k chaos $(ARGS)

test-gpu: $(INSTALLED)
	$(BIN)/python -m pytest -q -m gpu $(ARGS)

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache softgrpo.egg-info
