# `make example` and `make test` need nothing but Python >= 3.11, git and make.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: example example-cde example-cnf example-gru example-sde test lint format benchmark site docs dist clean

# Installed anew whenever the dependencies change.
$(VENV)/installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("diffrax-deer needs Python 3.11 or later: make PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[tests,examples]'
	touch $@

example: $(VENV)/installed
	$(BIN)/python examples/hamiltonian_nn.py

example-cde: $(VENV)/installed
	$(BIN)/python examples/neural_cde.py

example-cnf: $(VENV)/installed
	$(BIN)/python examples/cnf.py

example-sde: $(VENV)/installed
	$(BIN)/python examples/neural_sde.py

example-gru: $(VENV)/installed
	$(BIN)/python examples/gru_long_sequence.py

# Each process takes files that follow one another, and so compiles what these share once.
test: $(VENV)/installed
	$(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(VENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pyright --verifytypes diffrax_deer --ignoreexternal

format: $(VENV)/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(VENV)/docs-installed: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	touch $@

# Strict: what links nowhere is an error.
site: $(VENV)/docs-installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

# The examples in it as well, and the site in a browser.
docs: site
	$(BIN)/python -m pytest -n 2 tests/test_docs.py tests/test_site.py

# In an environment of its own, as whoever installs it has.
dist: $(VENV)/installed
	rm -rf dist build/fresh
	$(BIN)/python -m pip install --quiet build twine
	$(BIN)/python -m build --outdir dist .
	$(BIN)/python -m twine check --strict dist/*
	$(BIN)/python -m venv build/fresh
	build/fresh/bin/python -m pip install --quiet dist/*.whl
	$(BIN)/python tests/blocks.py README.md > build/fresh/quick_start.py
	cd build/fresh && bin/python quick_start.py

benchmark: $(VENV)/installed
	$(BIN)/python -m benchmarks --suite quick

clean:
	rm -rf $(VENV) build dist site
