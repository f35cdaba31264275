# Everything a checkout can do, from a machine that has Python (3.10 or newer, with venv) and make.
# CONTRIBUTING.md shows the same commands for machines without make.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
LOCKS := requirements/lock.txt requirements/peers.txt requirements/cuda.txt requirements/triton.txt
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Two threads fighting over a tensor of a few kilobytes are slower than one: a test process gets one
# thread, and there is a process for each core.
TEST_JOBS ?= auto

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-gpu sanitize check bench clean

help:
	@echo "make setup     a virtual environment in $(VENV) with the locked versions"
	@echo "make demo      set up, then the main job: verify, train on real text, generate (minutes)"
	@echo "make test      set up, then the tests that need no GPU"
	@echo "make test-gpu  the tests that need one, with PYTHON's own packages (default: python3)"
	@echo "make sanitize  the small ones of them under compute-sanitizer's memcheck and racecheck"
	@echo "make check     set up, then linter, formatter and type checker"
	@echo "make bench     set up, then time the operator's backends side by side"
	@echo "make clean     back to a fresh clone"

setup: $(READY)

# Made again only when a lock or the package's metadata changes.
$(READY): $(LOCKS) pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; \
	    v >= (3, 10) or sys.exit("Python 3.10 or newer is needed, $(PYTHON) is %d.%d; make PYTHON=… names another" % v[:2])'
	@echo "==> Setting up $(VENV) with $$($(PYTHON) --version): torch and about 50 small packages"
	@start=$$(date +%s); set -e; \
	    test -x $(BIN)/python || $(PYTHON) -m venv $(VENV); \
	    $(PIP) install --quiet --no-compile -r requirements/lock.txt; \
	    $(PIP) install --quiet --no-deps -r requirements/peers.txt -r requirements/cuda.txt; \
    $(BIN)/python -c 'import triton' 2> /dev/null || $(PIP) install --quiet --no-deps -r requirements/triton.txt; \
	    $(PIP) install --quiet --no-deps --no-build-isolation -e .; \
	    touch $@; \
	    echo "==> Set up in $$(( $$(date +%s) - start )) s"

demo: $(READY)
	@echo "==> rwkv7 demo: about 4 minutes on 2 cores, much less on a GPU"
	@start=$$(date +%s); $(BIN)/rwkv7 demo && echo "==> Demo done in $$(( $$(date +%s) - start )) s"

test: $(READY)
	@echo "==> Tests (those marked gpu left out), $(TEST_JOBS) processes of one thread"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not gpu" -n $(TEST_JOBS) --maxprocesses 8 \
	    --timeout 300 --durations 8

# A GPU machine has its own build of torch, so this one sets nothing up.
test-gpu:
	@echo "==> Tests marked gpu, with $$($(PYTHON) --version)"
	OMP_NUM_THREADS=1 PYTHONPATH=src $(PYTHON) -m pytest -m gpu -n $(TEST_JOBS) --maxprocesses 8 \
	    --timeout 300 --durations 8

# compute-sanitizer comes with the CUDA toolkit. It looks at our kernels, not at torch's, and not at what libraries
# ask the driver and it may not know. What they found: docs/kernels.md.
sanitize:
	@for tool in memcheck racecheck; do \
	    echo "==> $$tool, small calls of every kernel, with $$($(PYTHON) --version)"; \
	    PYTHONPATH=src compute-sanitizer --tool $$tool --error-exitcode 1 --report-api-errors no \
	        --kernel-name-exclude regex=at6native $(PYTHON) -m pytest -m gpu \
	        tests/wkv7/test_small_launches.py \
	        tests/nn/fused/test_on_gpu.py::test_the_same_bits_again -k "not long" || exit 1; \
	done

check: $(READY)
	@echo "==> Linter, formatter, type checker"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/rwkv7 bench

clean:
	rm -rf $(VENV) build dist src/*.egg-info rwkv7-demo* .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests examples -name __pycache__ -type d -prune -exec rm -rf {} +
