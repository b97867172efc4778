# `make example` and `make test` need nothing but Python >= 3.11, git and make.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: example example-gru test lint format benchmark clean

# Installed anew whenever the dependencies change.
$(VENV)/installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("diffrax-deer needs Python 3.11 or later: make PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[tests,examples]'
	touch $@

example: $(VENV)/installed
	$(BIN)/python examples/hamiltonian_nn.py

example-gru: $(VENV)/installed
	$(BIN)/python examples/gru_long_sequence.py

test: $(VENV)/installed
	$(BIN)/python -m pytest -n 2

lint: $(VENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

benchmark: $(VENV)/installed
	$(BIN)/python -m benchmarks --suite quick

clean:
	rm -rf $(VENV)
