# `make` sets everything up; `make demo` shows it; `make test` proves it.
VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= python3
DEMO_FLAGS ?=

# Files run side by side in one process more than there are cores, at most eight: each loads torch.
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadgroup --no-loadscope-reorder

# Compiled modules are kept: a program does not compile again what it imports.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup dev demo test test-fast lint lock bench clean
setup: $(VENV)/.users

# Always uv, never bare pip: a CPU-only torch from a local wheel has no torchvision that fits, and torch-fidelity needs one.
$(BIN)/uv:
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'maskfed needs Python 3.11 or newer')"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv

$(VENV)/.users: requirements.lock pyproject.toml | $(BIN)/uv
	test -f $(VENV)/.dev || $(BIN)/uv pip sync --quiet --python $(BIN)/python --require-hashes requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --editable .
	touch $@

$(VENV)/.dev: requirements-dev.lock pyproject.toml | $(BIN)/uv
	$(BIN)/uv pip sync --quiet --python $(BIN)/python --require-hashes requirements-dev.lock --compile-bytecode
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --editable .
	touch $@ $(VENV)/.users

dev: $(VENV)/.dev

demo: setup
	$(BIN)/maskfed-server demo $(DEMO_FLAGS)

test: dev
	$(PYTEST)

# What a small change needs: everything but trainings, whole studies and real processes.
test-fast: dev
	$(PYTEST) -m "not slow"

lint: dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: dev
	$(BIN)/python -m benchmarks

COMPILE := $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
	--no-emit-index-url --no-emit-find-links --no-emit-index-annotation --custom-compile-command "make lock" pyproject.toml
lock: | $(BIN)/uv
	$(COMPILE) --output-file requirements.lock
	$(COMPILE) --extra dev --extra simulation --output-file requirements-dev.lock

clean:
	rm -rf $(VENV) build dist runs demo *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
