# Targets: test, test-export, fuzz, compat, newest, demo, bench, lint, docs, compile-report, sanitize (each makes .venv on
# first use); gpu-report (.venv where there is one, else $(PYTHON)) and test-gpu ($(PYTHON) as it is).

PYTHON ?= python3
VENV ?= .venv
TORCH ?= 2.13.0
TORCHVISION ?= 0.28.0
# parallel test processes, one thread each
JOBS ?= 2
# calls of each operator that `make fuzz` draws
FUZZ_EXAMPLES ?= 20000
# where gpu-report writes, and how many seconds it may take
OUT ?= build/gpu-report
BUDGET ?= 480
# what pytest runs, and any further options
TESTS ?= tests
PYTEST_ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
PYTEST = pytest $(TESTS) --durations=15 $(PYTEST_ARGS)
PACKAGES := bench export models fused kernels

.PHONY: test test-export fuzz compat newest demo bench lint docs compile-report sanitize gpu-report test-gpu clean build/typing
.DEFAULT_GOAL := test

# torch comes first and is named again below, so that nothing pulls in another one
$(VENV)/torch: Makefile tests/compat/newest.txt tests/compat/alone.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip 'setuptools>=77'
	$(PIP) torch==$(TORCH)
	$(PIP) --no-deps torchvision==$(TORCHVISION) --requirement tests/compat/newest.txt --requirement tests/compat/alone.txt
	touch $@

# without build isolation, the compiled part is built against this torch
$(VENV)/ready: $(VENV)/torch pyproject.toml setup.py $(wildcard csrc/*/*)
	$(PIP) --no-build-isolation --editable '.[demo,dev]' torch==$(TORCH)
	touch $@

test: $(VENV)/ready
	OMP_NUM_THREADS=1 $(BIN)/$(PYTEST) -n $(JOBS) --dist loadgroup

# every reference system as an ONNX file, not one of each kind alone
test-export: TESTS = tests/export
test-export: export MMFUSE_EXPORT := all
test-export: test

fuzz: TESTS = tests/fuzz/test_fuzz.py
fuzz: export FUZZ_EXAMPLES := $(FUZZ_EXAMPLES)
fuzz: test

# The rules of accelerate() in the oldest and the newest supported releases of the libraries that they replace code of.
# An environment of such releases has its own packages first, and the rest, torch among it, from .venv.
define environment
$(BIN)/python -m venv --clear $(1)
$(BIN)/python -c "import site; print(f'import site; site.addsitedir({site.getsitepackages()[0]!r})')" \
  > $$(echo $(1)/lib/python*/site-packages)/shared.pth
$(1)/bin/python -m pip install --quiet --disable-pip-version-check $(2) torch==$(TORCH)
endef

build/compat/%/ready: tests/compat/%.txt $(VENV)/ready
	$(call environment,$(@D),--requirement $<)
	touch $@

compat: TESTS = $(addprefix tests/fused/test_,accelerate.py accelerate_coca.py accelerate_cosmos.py accelerate_qformers.py accelerate_stems.py losses.py quantizer.py tools.py upstream.py)
compat: build/compat/oldest/ready build/compat/newest/ready
	for ready in $^; do OMP_NUM_THREADS=1 $$(dirname $$ready)/bin/python -m $(PYTEST) -n $(JOBS) --dist loadgroup || exit; done

# which rules the releases of today leave
newest: $(VENV)/ready
	$(call environment,build/compat/today,--upgrade $(shell sed 's/==.*//' tests/compat/newest.txt))
	build/compat/today/bin/python -m mmfuse.fused.acceleration.upstream

demo: $(VENV)/ready
	$(BIN)/mmfuse demo

bench: $(VENV)/ready
	$(BIN)/mmfuse bench

# with the oldest Triton that is supported, too; COMPILE_REPORT=--plainest compiles every variant for sm_90 with the newest alone
OLDEST_TRITON := 3.6
COMPILE_REPORT ?=

compile-report: $(VENV)/ready build/triton-$(OLDEST_TRITON)
	$(BIN)/mmfuse compile-report --also build/triton-$(OLDEST_TRITON) $(COMPILE_REPORT)

build/triton-$(OLDEST_TRITON):
	$(PIP) --no-deps --target $@.new 'triton==$(OLDEST_TRITON).*' && mv $@.new $@

lint: $(VENV)/ready build/typing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/ready build/typing
	$(BIN)/mkdocs build --strict

# The CPU part, and with MMFUSE_ORT_INCLUDE that for onnxruntime, under the sanitizers of addresses and of undefined
# behaviour, beside the installed ones. The first report ends the process. LD_PRELOAD: Python itself is built without
# them, and exceptions are thrown to a libtorch that is.
SANITIZED := build/sanitized/_C_cpu.so $(if $(MMFUSE_ORT_INCLUDE),build/sanitized/_C_ort.so)
SANITIZERS := -O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all
SANITIZED_TESTS := tests/csrc $(if $(MMFUSE_ORT_INCLUDE),tests/export/test_ort_library.py) $(addprefix tests/kernels/test_,codebook.py few_query.py max_query.py negatives.py patch.py points.py topk.py)
CPU_FLAGS := -std=c++20 -fPIC -fvisibility=hidden -fopenmp-simd -fno-trapping-math -DTORCH_TARGET_VERSION=0x020b000000000000
TORCH_DIR = $(shell $(BIN)/python -c "from importlib.util import find_spec as f; print(*f('torch').submodule_search_locations)")

sanitize: $(VENV)/ready
	$(MAKE) --jobs $(JOBS) $(SANITIZED)
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 MMFUSE_LIBRARY_DIR=$(CURDIR)/build/sanitized \
	  OMP_NUM_THREADS=2 $(BIN)/python -m pytest $(SANITIZED_TESTS) -x -q -k "(csrc or cpu) and not compiles and not opcheck and not library or test_ort_library"

build/sanitized/_C_cpu.so: $(patsubst csrc/cpu/%.cpp,build/sanitized/%.o,$(wildcard csrc/cpu/*.cpp))
	$(CXX) -shared $(SANITIZERS) $^ -o $@ -L$(TORCH_DIR)/lib -Wl,--no-as-needed -ltorch

build/sanitized/_C_ort.so: $(wildcard csrc/ort/* csrc/*.h csrc/cpu/*.h) Makefile
	@mkdir -p $(@D)
	$(CXX) -shared $(CPU_FLAGS) $(SANITIZERS) -isystem $(MMFUSE_ORT_INCLUDE) $(filter %.cpp,$^) -o $@

build/sanitized/%.o: csrc/cpu/%.cpp $(wildcard csrc/*.h csrc/cpu/*.h) Makefile
	@mkdir -p $(@D)
	$(CXX) $(CPU_FLAGS) $(SANITIZERS) -isystem $(TORCH_DIR)/include -c $< -o $@

# what reads the sources does not follow package_dir: show it the folders in the shape they install in
build/typing:
	rm -rf $@ && mkdir -p $@/mmfuse
	ln -s $(CURDIR)/mmfuse/* $(addprefix $(CURDIR)/,$(PACKAGES)) $@/mmfuse

# the first command on a GPU: what the kernels do there, within BUDGET seconds
gpu-report:
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) tests/gpu_report.py --out $(OUT) --budget $(BUDGET)

# Nothing from a network: torch and pytest are there already. Where pip cannot install, the checkout itself is imported.
test-gpu: export PIP_BREAK_SYSTEM_PACKAGES := 1
test-gpu:
	if ! $(PYTHON) -m pip install --quiet --no-index --no-deps --no-build-isolation --editable .; then \
	  $(PYTHON) setup.py --quiet build_ext --inplace; export PYTHONPATH=$(CURDIR); \
	fi; \
	$(PYTHON) tests/peers.py && $(PYTHON) -m $(PYTEST)

clean:
	rm -rf $(VENV) build dist *.egg-info mmfuse/*.so mmfuse/_build_info.json
