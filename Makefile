# make demo        the built-in model on problems it never saw, decoded in every way
# make test        all tests that need no GPU, but those of test-slow; then those of kernels as PTX for sm_90, executed
# make test-slow   those that take minutes: thousands of bad inputs, and PTX for sm_80, in other orders, without each barrier
# make lint        formatting, lint and types
#
# Each makes its own virtual environment on first use: some minutes and 1 to 6 GB, nearly all of it torch. To be given:
# PYTHON (3.11 or newer), VENV, and TORCH_INDEX=URL, a package index to take another build of torch from.

PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
BIN := $(VENV)/bin
# Python's own warnings are off: setuptools has one about every editable install.
PIP := PYTHONWARNINGS=ignore $(BIN)/python -m pip --disable-pip-version-check install
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)
GPU := { [ -e /dev/nvidiactl ] || [ -e /dev/kfd ] || command -v nvidia-smi >/dev/null; }
JOBS ?= auto
PTX_TESTS := tests/kernels tests/verify/test_cases.py tests/verify/test_emulation.py \
	tests/ptx/test_emulator.py tests/ptx/test_removed_barriers.py \
	tests/engine/test_block_causal.py::test_executed_ptx_decodes_the_same

.PHONY: demo test test-slow lint format clean

demo: $(VENV)/.ready
	$(BIN)/fastdllm-triton demo

test: $(VENV)/.ready
	$(BIN)/python -m pytest -n $(JOBS)
	$(BIN)/python -m pytest -n $(JOBS) --ptx sm_90 $(PTX_TESTS)

test-slow: $(VENV)/.ready
	$(BIN)/python -m pytest -n $(JOBS) -m slow
	$(BIN)/python -m pytest -n $(JOBS) --ptx sm_90 -m "slow and not gpu" $(PTX_TESTS)
	$(BIN)/python -m pytest -n $(JOBS) --ptx sm_80 $(PTX_TESTS)
	$(BIN)/python -m pytest -n $(JOBS) --ptx sm_90 --ptx-seed 1 tests/kernels

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Without a GPU, torch is the CPU build where the package index has it: a tenth of the size.
# A CUDA build of torch brings the triton it was made with; a CPU build brings none.
$(VENV)/.ready: setup.py constraints.txt
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || \
		{ echo "Python 3.11 or newer is needed, and $(PYTHON) is none: give another, as in make demo PYTHON=python3.12"; exit 1; }
	@echo "Installing torch, triton and what else is needed into $(VENV), once: 1 to 6 GB, some minutes."
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) --quiet --upgrade pip setuptools wheel
	@if [ -z "$(TORCH_INDEX)" ] && [ "$$(uname)" = Linux ] && ! $(GPU) && \
		echo "No GPU here: looking for the CPU build of torch." && $(PIP) "torch==$(TORCH)+cpu" 2>/dev/null; then :; \
	else \
		echo "Installing torch $(TORCH); TORCH_INDEX=URL would take it from another package index."; \
		$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) --constraint constraints.txt torch; \
	fi
	@$(BIN)/python -c "import triton" 2>/dev/null || [ "$$(uname)" != Linux ] || $(PIP) triton==3.6.0
	@echo "Installing fastdllm-triton, and what its tests need."
	@$(PIP) --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
