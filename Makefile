# demo, test: all that a fresh machine needs is Python >= 3.11 with pip, and make.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
JOBS ?= 2
PYTEST_ARGS ?=
DEMO_ARGS ?=
BENCH_ARGS ?=
BENCHMARKS := $(wildcard benchmarks/*.py)
# pip runs again only when one of these changes.
WHAT_IT_NEEDS := pyproject.toml setup.py constraints.txt

.PHONY: demo setup test test-all lint format types docs bench coverage mutants clean oldest

demo: $(VENV)/.base  ## compress the embedded demo model, before and after
	$(BIN)/tensorllm compress --model demo --mode hybrid $(DEMO_ARGS)

setup: $(VENV)/.dev  ## the environment for development

test: $(VENV)/.dev  ## the tests that take no more than some seconds each
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "not slow" $(PYTEST_ARGS)

test-all: $(VENV)/.dev  ## all tests, one process per core of a small machine
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(PYTEST_ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(VENV)/.dev
	$(BIN)/mypy

docs: $(VENV)/.dev  ## the documentation, into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

oldest:  ## the tests with the oldest versions that pyproject.toml allows, in .venv-oldest
	PYTHON=$(PYTHON) JOBS=$(JOBS) scripts/test_oldest.sh

bench: $(VENV)/.dev  ## every benchmark, each beside its peer in one run; BENCH_ARGS=--quick only tries them
	failed=; for script in $(BENCHMARKS); do \
		$(BIN)/python $$script $(BENCH_ARGS) || failed="$$failed $$script"; done; \
	test -n "$(BENCH_ARGS)" || { PYTHONPATH=benchmarks $(BIN)/python scripts/make_scaling_figures.py && PYTHONPATH=benchmarks $(BIN)/python scripts/fill_numbers.py; } \
		|| failed="$$failed pages"; \
	test -z "$$failed" || { echo "failed or missed a target:$$failed"; exit 1; }

coverage: $(VENV)/.dev  ## lines and branches that no test reaches, in htmlcov/
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal --cov --cov-report=html --cov-report=term:skip-covered $(PYTEST_ARGS)

mutants: $(VENV)/.dev  ## changes to tensors/ and metrics.py that no test notices; a quarter of an hour
	OMP_NUM_THREADS=1 $(BIN)/mutmut run --max-children $(JOBS)
	$(BIN)/python scripts/mutants.py

clean:
	rm -rf $(VENV) mutants build dist site *.egg-info

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "tensorllm needs Python >= 3.11 on the PATH (or PYTHON=...)"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.base: $(WHAT_IT_NEEDS) | $(BIN)/python
	@echo "Installing into $(VENV): some minutes the first time"
	$(BIN)/python -m pip install -q -c constraints.txt -e .
	touch $@

$(VENV)/.dev: $(WHAT_IT_NEEDS) | $(BIN)/python
	@echo "Installing into $(VENV), with the developer's tools: some minutes the first time"
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@ $(VENV)/.base
