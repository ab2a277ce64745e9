# Two commands do everything on a bare machine with Python and make:  make demo,  make test.
PYTHON ?= python3
BIN := .venv/bin
# Two workers of one thread each; the tests of a file stay together, because they share what takes long to make.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

.PHONY: help setup demo test slow check docs lab bench bench-gpu

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' Makefile

setup: .venv/done  ## a virtual environment with everything

.venv/done: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

demo: setup  ## train five models on the standard library's source and compare them: runs/demo/report.html
	$(BIN)/miras demo --out runs/demo

test: setup  ## the test suite, some minutes
	$(PYTEST)

slow: setup  ## the tests that take long
	$(PYTEST) -m slow

check: setup  ## format, lint, types and tests: what has to be green before a commit
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(PYTEST)

docs: setup  ## the map of the design space, from the docstrings, and the tables of docs/results.md
	OMP_NUM_THREADS=1 $(BIN)/python docs/generate.py
	OMP_NUM_THREADS=1 $(BIN)/python docs/results.py

lab: setup  ## the lab's pictures and tables: docs/lab.md, docs/lab/; some minutes
	OMP_NUM_THREADS=1 $(BIN)/python docs/lab.py

bench: setup  ## speed and memory of the layers on this machine, beside peers: runs/bench
	$(BIN)/miras bench

bench-gpu: setup  ## what the kernels reach on this machine's GPU: benchmarks/results/<device>.md
	$(BIN)/python benchmarks/gpu.py
