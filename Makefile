# `demo` and `test` each make a fresh virtual environment of their own; nothing else is needed.
# `gpu` and `sanitize` use PYTHON as it is, which must have torch and Triton; `gpu` needs pytest,
# pytest-xdist, pytest-benchmark and hypothesis too.
# The other targets use the environment that `test` left, and make it if it is not there.
#
#   PYTHON=python3.12       the interpreter that makes the environments
#   TORCH_INDEX_URL=...     where torch comes from, for example https://download.pytorch.org/whl/cpu
#                           (the torch on PyPI for Linux brings gigabytes of CUDA libraries)
#   PIP_FLAGS=...           further options of every `pip install`
#   PYTEST_FLAGS=...        replaces the options of pytest

PYTHON ?= python3
TORCH_INDEX_URL ?=
PIP_FLAGS ?=
PYTEST_FLAGS ?= -n 2 --dist worksteal

DEMO_VENV := .venv-demo
TEST_VENV := .venv-test

# $(call fresh_venv,folder,what to install). torch goes first and alone, so that it, and only it,
# comes from TORCH_INDEX_URL. The file `ready` tells a whole environment from a broken one.
define fresh_venv
$(PYTHON) -m venv --clear $(1)
$(1)/bin/python -m pip install $(PIP_FLAGS) $(if $(TORCH_INDEX_URL),--index-url $(TORCH_INDEX_URL)) \
	-c constraints.txt torch
$(1)/bin/python -m pip install $(PIP_FLAGS) -c constraints.txt $(2)
touch $(1)/ready
endef

.PHONY: help demo test test-all bench gpu sanitize lint docs check compile-table wheel clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 16

demo:  ## install into a fresh environment, run `shaped-attn demo`: 3 minutes after that
	rm -rf build  # setuptools would pack deleted modules that are still in there
	$(call fresh_venv,$(DEMO_VENV),".[train]")
	$(DEMO_VENV)/bin/shaped-attn demo

test:  ## install into a fresh environment, run the tests that are not slow
	$(call fresh_venv,$(TEST_VENV),-e ".[test]")
	$(TEST_VENV)/bin/pytest $(PYTEST_FLAGS) -m "not slow"

test-all: | $(TEST_VENV)/ready  ## run every test
	$(TEST_VENV)/bin/pytest $(PYTEST_FLAGS)

bench: | $(TEST_VENV)/ready  ## time the operator beside its peers, small on a CPU
	$(TEST_VENV)/bin/pytest bench

gpu:  ## test the operator on this machine's GPU and time it, in 5 minutes; write reports as JSON
	$(PYTHON) tests/run_on_gpu.py

sanitize:  ## run the Hopper kernels, small, under compute-sanitizer, on a Hopper GPU
	$(PYTHON) tests/sanitize.py

$(TEST_VENV)/ready:
	$(call fresh_venv,$(TEST_VENV),-e ".[test]")

lint: | $(TEST_VENV)/ready  ## ruff
	$(TEST_VENV)/bin/python -m pip install -q $(PIP_FLAGS) -c constraints.txt -e ".[dev]"
	$(TEST_VENV)/bin/ruff check .

docs: | $(TEST_VENV)/ready  ## build the documentation into site/
	$(TEST_VENV)/bin/python -m pip install -q $(PIP_FLAGS) -c constraints.txt -e ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(TEST_VENV)/bin/mkdocs build --strict

check: | $(TEST_VENV)/ready  ## print the fidelity table
	$(TEST_VENV)/bin/shaped-attn check

compile-table: | $(TEST_VENV)/ready  ## compile every kernel for every target, rewrite the table
	env -u TRITON_INTERPRET $(TEST_VENV)/bin/python -m shaped_attn.kernels.compile_gate --write

wheel: | $(TEST_VENV)/ready  ## build sdist and wheel into dist/
	rm -rf build dist
	$(TEST_VENV)/bin/python -m build --no-isolation

clean:  ## remove environments, builds and caches
	rm -rf .venv-demo .venv-test build dist site *.egg-info .pytest_cache .ruff_cache .hypothesis
	find bench kernels shaped_attn tests -name __pycache__ -prune -exec rm -rf {} +
