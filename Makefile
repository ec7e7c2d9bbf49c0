# The commands a person types. Each sets up what it needs: a virtual environment, and the extension.

PYTHON ?= python3
VENV ?= .venv
# Further arguments for pip, pytest and the benchmarks, such as PIP_ARGS="--index-url ...",
# TEST_ARGS="-k nearest_code", BENCH_ARGS=--quick, OFFLINE_ARGS="-k attention".
PIP_ARGS ?=
TEST_ARGS ?=
BENCH_ARGS ?=
OFFLINE_ARGS ?=

# Tests of the C++ kernels that silently ran the reference would be worth nothing.
export MMFAST_REQUIRE_EXTENSION ?= 1

python := $(VENV)/bin/python
pip := $(python) -m pip install --disable-pip-version-check --quiet $(PIP_ARGS) -c .ci/constraints.txt
extras := triton,test,bench,train,examples,integrations,lint
# pytest exits with 5 when TEST_ARGS select nothing in a file.
none_selected := $(if $(TEST_ARGS),|| test $$$$? -eq 5)
interpreted := tests/test_triton.py tests/test_triton_hopper.py tests/test_nearest_code_work.py
workers := --numprocesses auto --maxprocesses 8 --dist worksteal
sources := $(shell find csrc -name '*.cpp' -o -name '*.h')

installed := $(VENV)/.mmfast-installed
built := $(VENV)/.mmfast-built

.PHONY: help setup test bench memcheck offline lint types abi clean

help:
	@echo 'make setup   make $(VENV) and build mmfast there; the commands below do it by themselves'
	@echo 'make test    the whole test suite             TEST_ARGS="-k nearest_code"'
	@echo 'make bench   the benchmarks                   BENCH_ARGS="--quick"'
	@echo 'make memcheck  every op under compute-sanitizer, on a GPU'
	@echo 'make offline   what the Triton kernels compile to for GPUs, held to budgets; hours'
	@echo 'make lint    ruff: rules and formatting'
	@echo 'make types   mypy'
	@echo 'make abi     does the extension keep to the stable ABI of torch 2.11?'
	@echo 'make clean   remove what was built; $(VENV) stays'

setup: $(built)

$(installed): pyproject.toml setup.py .ci/constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and \
	    f"mmfast needs Python 3.11 or newer, $(PYTHON) is {v[0]}.{v[1]}; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(pip) setuptools wheel pybind11 torch
	MMFAST_NO_EXTENSION=1 $(pip) --no-build-isolation --editable '.[$(extras)]'
	@touch $(installed)

$(built): $(installed) $(sources)
	$(python) setup.py --quiet build_ext --inplace
	@touch $(built)

# Triton decides at import whether it interprets, so that its interpreter has processes of its own.
# Processes share the cores: idle threads of one must not spin. They share bytecode too, which
# takes seconds of each to compile again. Who is done with its tests takes some of another's.
test: $(built)
	@if $(python) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
	    set -ex; \
	    $(python) -m pytest $(TEST_ARGS); \
	else \
	    export OMP_WAIT_POLICY=passive; \
	    unset PYTHONDONTWRITEBYTECODE; \
	    set -ex; \
	    $(python) -m pytest $(workers) $(addprefix --ignore=,$(interpreted)) $(TEST_ARGS); \
	    TRITON_INTERPRET=1 $(python) -m pytest $(workers) $(interpreted) $(TEST_ARGS) \
	        $(none_selected); \
	fi

bench: $(built)
	$(python) -m benchmarks $(BENCH_ARGS)

# Memory of its own for every tensor: the allocator's blocks would hide what is beyond one.
memcheck: $(built)
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 9 \
	    $(python) tests/small_ops.py cuda

offline: $(installed)
	$(python) -m mmfast.kernels.offline $(OFFLINE_ARGS)

lint: $(installed)
	$(python) -m ruff check .
	$(python) -m ruff format --check .

types: $(installed)
	$(python) -m mypy

abi: $(built)
	$(VENV)/bin/torch-abi-audit --verbose --check torch mmfast/_C*.so
	$(python) -m pytest --quiet tests/test_packaging.py -k abi

clean:
	rm -rf build dist *.egg-info mmfast/_C*.so $(built)
