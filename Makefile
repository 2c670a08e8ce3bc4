# `make demo` and `make test` do all the set-up themselves; a second run starts at once.
.DEFAULT_GOAL := help
.PHONY: help setup setup-dev demo test check lint format bench fuzz clean

PY := .venv/bin/python
# One thread a test process: two of them on two cores would otherwise fight over four.
TEST_ENV := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
WORKERS ?= 2

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup:  ## make .venv with lavish and torch (the CPU build where there is no NVIDIA GPU)
	@scripts/setup

setup-dev:
	@scripts/setup --dev

demo: setup  ## ask the bundled pocket model about a bundled picture
	@$(PY) scripts/demo.py

test: check  ## everything that CI runs: lint, format, types, layers, all tests
	@$(TEST_ENV) $(PY) -m pytest -n $(WORKERS) -m "not gpu" --ignore=tests/test_layers.py

check: setup-dev  ## the quick part of it: lint, format, types, layers
	@scripts/check

lint: setup-dev  ## ruff, with the fixes it can make itself
	@$(PY) -m ruff check --fix .

format: setup-dev  ## ruff format
	@$(PY) -m ruff format .

bench: setup-dev  ## run the benchmarks that need no GPU
	@for script in benchmarks/*.py; do \
		case "$$script" in *gpu*|*/_*) continue;; esac; \
		echo "== $$script"; $(PY) "$$script" || exit 1; done

fuzz: setup-dev  ## 100,000 mutated checkpoints through every reader; faults go to output/fuzz
	@$(TEST_ENV) $(PY) scripts/fuzz.py --inputs $(or $(INPUTS),100000)

clean:  ## remove caches and outputs; .venv stays (rm -r .venv removes it)
	@rm -rf demo .pytest_cache .ruff_cache .hypothesis build dist
	@find . -path ./.venv -prune -o -name __pycache__ -type d -exec rm -rf {} +
