# Everything runs in an environment of its own, made on first use.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin

.PHONY: demo test lint bootstrap bench-memory bench-device

demo: bootstrap  ## Pretrain a small Llama on text that is on this machine.
	$(BIN)/python -m examples.llama

test: bootstrap  ## The whole test suite.
	$(BIN)/python -m pytest -n 2 --dist worksteal

lint: bootstrap
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

bench-memory: bootstrap  ## Transient memory of the update, vmapped and in slices.
	$(BIN)/python -m benchmarks.update_memory

bench-device: bootstrap  ## The checks and figures that want a GPU or TPU.
	$(BIN)/python -m benchmarks.device

bootstrap: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@
