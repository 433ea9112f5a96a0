# make demo: the main job, offline.   make test: the test suite.   Both set .venv up first.
PYTHON ?= python3
# Extra pip arguments, such as an --index-url with the build of torch that fits your machine.
PIP_ARGS ?=
BIN := .venv/bin
# One thread per test process, and the working folder kept off the import path (see CONTRIBUTING).
TEST_ENV := OMP_NUM_THREADS=1 PYTHONSAFEPATH=1
# Triton decides at its import whether it interprets, so its kernels' tests have their own process.
INTERPRET := $(TEST_ENV) TRITON_INTERPRET=1

.PHONY: help setup demo test test-all clients test-clients aot soak resume lint format clean
help:
	@sed -n '1p' Makefile

setup: .venv/.ready
.venv/.ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "gptopt needs Python >= 3.11: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) -c constraints.txt -e '.[train,export,dev]'
	touch $@

demo: setup
	$(BIN)/gptopt demo --out demo --force

# Tests of a file stay in one process, for they share what its fixtures have made.
test: setup
	$(TEST_ENV) $(BIN)/pytest -n 2 --dist loadfile -m 'not slow'
	$(INTERPRET) $(BIN)/pytest -n 2 -m 'not slow' tests/kernels/triton

test-all: setup
	$(TEST_ENV) $(BIN)/pytest -n 2 --dist loadfile
	$(INTERPRET) $(BIN)/pytest -n 2 tests/kernels/triton

# The programs that exported folders run in, one environment each, in .clients or $GPTOPT_CLIENTS; they
# need Node.js and Chromium (Debian: apt-get install nodejs npm chromium). test-clients fails on a missing one.
clients: setup
	$(BIN)/python -P -m gptopt.export.clients.environments $(PIP_ARGS)

test-clients: setup
	$(TEST_ENV) $(BIN)/pytest tests/clients/matrix.py tests/clients/samples.py

# What every kernel costs on every GPU, for which none is needed: an hour of one core the first time;
# then only what has another kernel or configuration than its row in the table.
WORKERS ?= 1
aot: setup
	$(BIN)/gptopt doctor --kernels --compile-only --workers $(WORKERS) --output bench/results/aot.json
	$(BIN)/python -P -m gptopt.kernels.compiled bench/results/aot.json

# Runs killed at random moments and on disks that fill up, for 18 minutes: what survived.
MINUTES ?= 18
soak: setup
	$(TEST_ENV) $(BIN)/python -P -m gptopt.bench.soak --minutes $(MINUTES)

# Every kill of the table of exact resume, bit for bit beside runs never killed.
resume: setup
	$(TEST_ENV) $(BIN)/python -P -m gptopt.bench.resume

# mypy sees gptopt.kernels only in a built tree, where the folders lie as they are imported.
lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/lint
	$(BIN)/python -c 'from setuptools import setup; setup()' --quiet build_py --build-lib build/lint
	cd build/lint && ../../$(BIN)/mypy --config-file ../../pyproject.toml -p gptopt

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf build dist demo .venv *.egg-info
