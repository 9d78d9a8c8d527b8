PYTHON ?= python3
BIN := .venv/bin
# Keeps glibc from giving large tensors back to the kernel after every operation (docs/decisions.md).
export MALLOC_MMAP_THRESHOLD_ := 33554432
export MALLOC_TRIM_THRESHOLD_ := 4294967296

# Every worker and every program that a test starts would compile the package anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-slow test-real test-gpu check bench bench-gpu

demo: .venv/ready
	$(BIN)/bridges demo

test: .venv/ready
	$(BIN)/python -m pytest -m "not slow and not real"

test-slow: .venv/ready
	$(BIN)/python -m pytest -m "slow and not real" --durations 15

# Skips everything where there is no GPU.
test-gpu: .venv/ready
	$(BIN)/python -m pytest -n0 -m gpu tests/gpu

# Downloads a real model once, into ~/.cache/sparse-bridges or $$BRIDGES_CACHE.
test-real: .venv/ready
	$(BIN)/python examples/get_smollm2.py
	$(BIN)/python -m pytest -m real tests/real

check: .venv/ready
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/pyright && $(BIN)/lint-imports

# Writes benchmarks/RESULTS.md; under 15 minutes on two idle cores.
bench: .venv/ready
	$(BIN)/python benchmarks/record.py

# Does nothing where there is no GPU.
bench-gpu: .venv/ready
	$(BIN)/python benchmarks/record.py --gpu

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -c constraints.txt -e ".[fast,dev]" || $(BIN)/pip install --quiet -c constraints.txt -e ".[dev]"
	touch .venv/ready
