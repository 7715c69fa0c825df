# one command each, from a fresh checkout: `make generate` draws a controlled picture, `make test` runs the tests.
# pip's own settings apply, e.g. PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS to choose a CPU or a CUDA build of torch.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# the pins are for Python 3.11 and later
PINS = $$($(BIN)/python -c "import sys; print('-c constraints.txt' * (sys.version_info >= (3, 11)))")
PIP = $(BIN)/python -m pip install --disable-pip-version-check $(PINS)

MODEL ?= toybox
PROMPT ?= a large red rocket on grass at noon
CONTROL ?= canny=examples/canny.png
SEED ?= 7
OUT ?= out/generate.png
COUNT ?= 1000
TEST_PROCESSES ?= 2
RECIPE ?= recipes/toybox/canny.yaml

.PHONY: help generate demo test kernels bench lint docs notebooks render train clean

help:
	@echo "make generate   draw a picture from PROMPT under CONTROL into OUT"
	@echo "make demo       open the page to draw with, on PORT if given"
	@echo "make test       run the tests"
	@echo "make kernels    compile the GPU kernels for sm_80, sm_89 and sm_90 and print registers, shared memory and spills"
	@echo "make bench      measure this machine's CPU, a few minutes, into benchmarks/results/cpu.json and docs/benchmarks.md"
	@echo "make lint       ruff and mypy"
	@echo "make docs       build the documentation into build/site; make docs SERVE=1 shows it while pages change"
	@echo "make notebooks  run the notebooks and keep what they show"
	@echo "make render     render COUNT scenes of the built-in world into data/toybox"
	@echo "make train      train RECIPE"
	@echo "make clean      remove builds and caches, keep the environment"

$(BIN)/python:
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10) and 'scaleweaver needs Python 3.10 or newer: make PYTHON=python3.11')"
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

# torch goes first and alone: what comes later finds it present and cannot replace its build by another
$(VENV)/.torch: constraints.txt | $(BIN)/python
	$(PIP) torch==2.13.0
	@touch $@

$(VENV)/.installed: pyproject.toml constraints.txt $(VENV)/.torch
	$(PIP) -e .
	@touch $@

$(VENV)/.developer: pyproject.toml constraints.txt $(VENV)/.torch
	$(PIP) -e ".[dev,train,eval,hed,int8,demo,serve,notebooks]"
	@touch $@ $(VENV)/.installed

generate: $(VENV)/.installed
	@$(BIN)/scaleweaver generate "$(PROMPT)" --model "$(MODEL)" --control "$(CONTROL)" --seed $(SEED) --out "$(OUT)"

$(VENV)/.demo: pyproject.toml constraints.txt $(VENV)/.torch
	$(PIP) -e ".[demo]"
	@touch $@ $(VENV)/.installed

demo: $(VENV)/.demo
	$(BIN)/scaleweaver demo --model "$(MODEL)" --open $(if $(PORT),--port $(PORT))

test: $(VENV)/.developer
	$(BIN)/python -m pytest -q -n $(TEST_PROCESSES) --dist worksteal $(PYTEST_ARGS)

# needs no GPU; KERNELS= compiles all configurations, KERNELS="--shipped --into docs/kernels.md" writes the table there
KERNELS ?= --shipped
kernels: $(VENV)/.developer
	$(BIN)/python -m scaleweaver.kernels.compile_gate $(KERNELS)

# on an otherwise idle machine; BENCH=--quick for a first look
BENCH ?=
bench: $(VENV)/.installed
	$(BIN)/python benchmarks/cpu.py --into docs/benchmarks.md $(BENCH)

# kernels/, controls/ and demo/ are scaleweaver.kernels and so on to the type checker too
build/types/scaleweaver:
	mkdir -p $@
	touch $@/__init__.py
	ln -sfn ../../../kernels $@/kernels
	ln -sfn ../../../controls $@/controls
	ln -sfn ../../../demo $@/demo

lint: $(VENV)/.developer build/types/scaleweaver
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy scaleweaver kernels controls demo

$(VENV)/.docs: pyproject.toml constraints.txt $(VENV)/.torch
	$(PIP) -e ".[docs]"
	@touch $@ $(VENV)/.installed

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs $(if $(SERVE),serve,build --strict)

$(VENV)/.notebooks: pyproject.toml constraints.txt $(VENV)/.torch
	$(PIP) -e ".[notebooks,train]"
	@touch $@ $(VENV)/.installed

notebooks: $(VENV)/.notebooks
	$(BIN)/python notebooks/run.py

render: $(VENV)/.installed
	$(BIN)/scaleweaver render toybox --split train --count $(COUNT) --out data/toybox

train: $(VENV)/.developer
	$(BIN)/scaleweaver train $(RECIPE)

clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path "./$(VENV)/*" -prune -exec rm -rf {} +
