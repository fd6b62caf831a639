# Targets: test, demo, bench, lint, docs, compile-report (each makes .venv on first use), and test-gpu (uses $(PYTHON) as
# it is).

PYTHON ?= python3
VENV ?= .venv
TORCH ?= 2.13.0
TORCHVISION ?= 0.28.0
# parallel test processes, one thread each
JOBS ?= 2
# what pytest runs, and any further options
TESTS ?= tests
PYTEST_ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
PYTEST := pytest $(TESTS) --durations=15 $(PYTEST_ARGS)
PACKAGES := bench export models fused kernels

.PHONY: test demo bench lint docs compile-report test-gpu clean build/typing
.DEFAULT_GOAL := test

# torch comes first and is named again below, so that nothing pulls in another one
$(VENV)/torch: Makefile
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip 'setuptools>=77'
	$(PIP) torch==$(TORCH)
	$(PIP) --no-deps torchvision==$(TORCHVISION) timm==1.0.31 open_clip_torch==3.3.0 torchscale==0.3.0
	touch $@

# without build isolation, the compiled part is built against this torch
$(VENV)/ready: $(VENV)/torch pyproject.toml setup.py $(wildcard csrc/*/*)
	$(PIP) --no-build-isolation --editable '.[demo,dev]' torch==$(TORCH)
	touch $@

test: $(VENV)/ready
	OMP_NUM_THREADS=1 $(BIN)/$(PYTEST) -n $(JOBS) --dist loadgroup

demo: $(VENV)/ready
	$(BIN)/mmfuse demo

bench: $(VENV)/ready
	$(BIN)/mmfuse bench

compile-report: $(VENV)/ready
	$(BIN)/mmfuse compile-report

lint: $(VENV)/ready build/typing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/ready build/typing
	$(BIN)/mkdocs build --strict

# what reads the sources does not follow package_dir: show it the folders in the shape they install in
build/typing:
	rm -rf $@ && mkdir -p $@/mmfuse
	ln -s $(CURDIR)/mmfuse/* $(addprefix $(CURDIR)/,$(PACKAGES)) $@/mmfuse

# Nothing from a network: torch and pytest are there already. Where pip cannot install, the checkout itself is imported.
test-gpu: export PIP_BREAK_SYSTEM_PACKAGES := 1
test-gpu:
	if ! $(PYTHON) -m pip install --quiet --no-index --no-deps --no-build-isolation --editable .; then \
	  $(PYTHON) setup.py --quiet build_ext --inplace; export PYTHONPATH=$(CURDIR); \
	fi; \
	$(PYTHON) tests/peers.py && $(PYTHON) -m $(PYTEST)

clean:
	rm -rf $(VENV) build dist *.egg-info mmfuse/*.so mmfuse/_build_info.json
