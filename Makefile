# make demo        the built-in model on problems it never saw, decoded in every way
# make test        all tests that need no GPU
# make test-slow   those that take minutes: thousands of bad inputs
# make lint        formatting, lint and types
#
# Each makes its own virtual environment on first use; PYTHON and VENV can be given.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Python's own warnings are off: setuptools has one about every editable install.
PIP := PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --disable-pip-version-check
JOBS ?= auto

.PHONY: demo test test-slow lint format clean

demo: $(VENV)/.ready
	$(BIN)/fastdllm-triton demo

test: $(VENV)/.ready
	$(BIN)/python -m pytest -n $(JOBS)

test-slow: $(VENV)/.ready
	$(BIN)/python -m pytest -n $(JOBS) -m slow

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# A CUDA build of torch brings the triton it was made with; a CPU build brings none.
$(VENV)/.ready: setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip setuptools wheel
	$(PIP) --constraint constraints.txt torch
	$(BIN)/python -c "import triton" 2>/dev/null || [ "$$(uname)" != Linux ] || $(PIP) triton==3.6.0
	$(PIP) --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
