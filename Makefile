# Every target sets up what it needs in $(VENV); nothing has to be installed first but Python >= 3.10.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin

.PHONY: quickstart test lint format typecheck check bench bench-unlearning gpu docs wheel clean

quickstart: $(VENV)/.examples  ## Unlearn two authors and keep the rest: a table and a figure in quickstart-out/.
	$(BIN)/python examples/quickstart.py $(ARGS)

test: $(VENV)/.dev  ## The test suite, without a GPU.
	$(BIN)/python -m pytest -n auto $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

typecheck: $(VENV)/.dev
	$(BIN)/mypy

check: lint typecheck test  ## Everything that has to pass before a commit.

bench: $(VENV)/.examples  ## The cost of a step against the weighted sum and the original code's way.
	$(BIN)/python benchmarks/step_bench.py $(ARGS)

docs:  ## docs/api.md from the docstrings.
	$(PYTHON) docs/make_api.py

bench-unlearning: $(VENV)/.bench  ## Does it forget better? Minutes; hours with ARGS="--form full"; see docs/benchmarks.md.
	$(BIN)/python benchmarks/unlearning_bench.py $(ARGS)

gpu:  ## All that is claimed of a GPU, proved and measured in minutes, with what $(PYTHON) has; see docs/gpu.md.
	$(PYTHON) benchmarks/gpu_bench.py $(ARGS)

wheel: $(VENV)/.dev  ## One abi3 wheel in dist/, with the CUDA kernels too under BLUR_OPTIM_CUDA=1 (needs nvcc).
	BLUR_OPTIM_BUILD=1 $(BIN)/python -m pip wheel --disable-pip-version-check --no-deps --wheel-dir dist .

clean:
	rm -rf $(VENV) build dist *.egg-info quickstart-out unlearning-bench gpu-results

# torch first and pinned: an open range would let pip choose a newer build, of several GB.
$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)

$(VENV)/.examples: pyproject.toml setup.py | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[examples]'
	touch $@

$(VENV)/.bench: pyproject.toml setup.py | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[bench]'
	touch $@

$(VENV)/.dev: pyproject.toml setup.py | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@ $(VENV)/.examples
