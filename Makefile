# A machine with Python (3.11 or newer) and pip needs no other step.
#   make demo      train, save, verify and serve the bundled models, and print the table
#   make check     style, types, layout and the fast unit tests: before each commit
#   make test      unit tests with line coverage, then integration with vLLM in its own environment
#   make lint      style, types and the layout rules
#   make families  the family table: every family trained, verified, reloaded and served (FAMILIES="gemma3" for some)
#   make accuracy  train one model of the accuracy study again, ROW=w4g128/grace/0 (a GPU; OPTIONS="--size cpu" without)
#   make floors    unit tests with the oldest dependencies that pyproject.toml allows, in an environment of their own
#   make faults    about 100 faults injected into tiny runs (kills, full disks, damage, signals), and the table
#   make bench     speed and memory, grace data check, loading
PYTHON ?= python3
TRAIN := .venv/train
SERVE := .venv/serve
TRAIN_BUILT := $(TRAIN)/.built
SERVE_BUILT := $(SERVE)/.built
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(TRAIN)/bin/python -m pytest -q -n $(WORKERS) --dist
BUILDER := integration/env/build.py integration/env/mend.py

.PHONY: demo check test unit integration faults families floors lint bench accuracy env clean
.DEFAULT_GOAL := env

env:
	@$(MAKE) --no-print-directory -j2 $(TRAIN_BUILT) $(SERVE_BUILT)

$(TRAIN_BUILT): $(BUILDER) integration/env/train.txt pyproject.toml grace_plugin/cli/register_grace.py
	@$(PYTHON) integration/env/build.py train $(TRAIN) && touch $@

$(SERVE_BUILT): $(BUILDER) integration/env/serve.txt integration/env/dense_int4.py
	@$(PYTHON) integration/env/build.py serve $(SERVE) && touch $@

demo: env
	@$(TRAIN)/bin/grace demo --serve_python $(SERVE)/bin/python

check: $(TRAIN_BUILT)
	$(TRAIN)/bin/ruff check . && $(TRAIN)/bin/ruff format --check . && $(TRAIN)/bin/mypy
	$(PYTEST) worksteal tests -m "not slow"

test: unit integration

unit: $(TRAIN_BUILT)
	$(PYTEST) loadfile tests --cov=grace_plugin --cov-report= --durations=50 --durations-min=1
	TRITON_INTERPRET=1 $(PYTEST) worksteal tests/losses/test_fused_chunks_triton.py tests/losses/test_losses_triton.py \
		tests/quantizer/test_fake_quant_triton.py tests/quantizer/test_grouped_triton.py \
		--cov=grace_plugin --cov-append --cov-report=term-missing:skip-covered --cov-fail-under=95

integration: env
	GRACE_SERVE_PYTHON=$(CURDIR)/$(SERVE)/bin/python $(PYTEST) loadfile integration

faults: $(TRAIN_BUILT)
	OMP_NUM_THREADS=1 $(TRAIN)/bin/python -m integration.faults --output benchmarks/results/faults.json

families: env
	$(TRAIN)/bin/python -m integration.families $(FAMILIES) --serve-python $(SERVE)/bin/python

floors:
	@$(PYTHON) integration/env/build.py floors .venv/floors
	$(subst $(TRAIN),.venv/floors,$(PYTEST)) loadfile tests --ignore=tests/benchmarks \
		--deselect tests/test_upstream_names.py::test_tested_versions__installed__are_those_named

lint: $(TRAIN_BUILT)
	$(TRAIN)/bin/ruff check .
	$(TRAIN)/bin/ruff format --check .
	$(TRAIN)/bin/mypy
	$(TRAIN)/bin/python -m pytest tests/test_layout.py -q

bench: $(TRAIN_BUILT)
	$(TRAIN)/bin/python -m benchmarks.speed
	$(TRAIN)/bin/python -m benchmarks.data

accuracy: $(TRAIN_BUILT)
	$(TRAIN)/bin/python -m benchmarks.accuracy $(ROW) --again $(OPTIONS)

clean:
	rm -rf build dist .coverage .pytest_cache .ruff_cache .mypy_cache
