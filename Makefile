# `make help` lists what there is. Everything happens in .venv, made here with pinned versions.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help demo audit test lint types unit browser bench full variants continual settings site release versions minimum tables ablation format clean

help: ## Show this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 18

demo: $(VENV)/.demo ## See it work: the synthetic experiment in a few minutes, results in results/demo
	$(BIN)/mdnorm-experiments synthetic --quick --out results/demo

audit: $(VENV)/.audit ## See what an uncorrected and a corrected network know: results/audit/report.html
	$(BIN)/mdnorm-experiments synthetic --quick --methods none,mdn-last-running --seeds 1 --out results/audit/networks
	$(BIN)/mdnorm audit results/audit/networks/metadata.csv --label group --ignore effect --out results/audit \
		--features uncorrected=results/audit/networks/features/none-plain-batch200-seed0.safetensors \
		--features corrected=results/audit/networks/features/mdn-last-running-plain-batch200-seed0.safetensors \
		--prediction prediction_none_batch200 --score score_none_batch200 \
		--prediction prediction_mdn-last-running_batch200 --score score_mdn-last-running_batch200

test: lint types unit ## Run everything that CI runs

lint: $(VENV)/.dev ## Check style (ruff)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev ## Check types (mypy --strict)
	$(BIN)/mypy

unit: $(VENV)/.dev browser ## Run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

browser: ## Install Chromium, for the tests of the page, where that is possible and needed
	@command -v chromium chromium-browser google-chrome > /dev/null || { \
		test "$$(id -u)" = 0 && command -v apt-get > /dev/null && apt-get update -qq && apt-get install -qq -y chromium > /dev/null; } || \
		echo "No Chromium here: the tests of the report in a browser will be skipped."

bench: $(VENV)/.dev ## Run the benchmarks, tables and JSON in results/bench
	$(BIN)/python benchmarks/layer.py --json results/bench/layer.json
	$(BIN)/python benchmarks/distance_correlation.py --json results/bench/distance_correlation.json
	$(BIN)/python benchmarks/residualize.py --rows 1000000 --csv-rows 100000 --json results/bench/residualize.json

full: $(VENV)/.demo ## Run the whole synthetic table (about two hours on two cores), resumable
	$(BIN)/mdnorm-experiments synthetic --methods all --out results/synthetic

variants: $(VENV)/.demo ## Run the harder variants of the synthetic data (an hour), resumable
	$(BIN)/mdnorm-experiments synthetic --variant sites --batch-sizes 4,20 --methods mdn-last-running,mdn-every-running
	$(BIN)/mdnorm-experiments synthetic --variant quadratic --batch-sizes 200 --seeds 3 --methods none,mdn-last-linear,mdn-last-running
	$(BIN)/mdnorm-experiments synthetic --variant variance --batch-sizes 200 --seeds 3 --methods none,mdn-last-running,mdn-last-scale

continual: $(VENV)/.demo ## Run the continual task (an hour), resumable
	$(BIN)/mdnorm-experiments continual --methods all --out results/continual

settings: $(VENV)/.dev ## Run faces, coloured digits, video and MRI with every method (two hours), resumable
	$(BIN)/mdnorm-experiments image
	$(BIN)/mdnorm-experiments digits
	$(BIN)/mdnorm-experiments video
	$(BIN)/mdnorm-experiments mri

site: $(VENV)/.dev ## Build the documentation: build/site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

release: $(VENV)/.dev ## Build wheels and source distributions of both packages, and list all that tests ran with (SBOM): dist/
	rm -rf dist
	$(INSTALL) --editable '.[release]'
	$(BIN)/python -m build --no-isolation
	$(BIN)/python -m build --no-isolation --outdir dist experiments
	$(BIN)/python -m twine check --strict dist/*
	$(BIN)/cyclonedx-py environment --of JSON -o dist/sbom.json $(VENV)

# With the newest versions that PYTHON gets, not the pinned ones, in an environment of its own.
versions: ## Test the layer with another Python: make versions PYTHON=python3.13
	$(PYTHON) -m venv build/versions
	build/versions/bin/python -m pip install --quiet . dcor hypothesis pytest safetensors scipy
	build/versions/bin/python -m pytest -q tests/test_regression.py tests/test_layer.py \
		tests/test_context.py tests/estimators

# pip has no option for the lowest versions, uv has; then the tests may bring their own tools, but change none of them.
MINIMUM := build/minimum/bin
minimum: ## Test with the lowest versions that pyproject.toml allows (Python 3.10 to 3.12 have all of them)
	$(PYTHON) -m venv build/minimum
	$(MINIMUM)/python -m pip install --quiet uv
	$(MINIMUM)/uv pip install --quiet --python $(MINIMUM)/python --resolution lowest-direct \
		'.[audit,design,metrics,tables]' ./experiments
	$(MINIMUM)/uv pip freeze --python $(MINIMUM)/python --exclude-editable | grep -v '^mdnorm' > build/minimum/lowest.txt
	$(MINIMUM)/uv pip install --quiet --python $(MINIMUM)/python --constraint build/minimum/lowest.txt \
		dcor hypothesis 'polars<2' pytest statsmodels
	$(MINIMUM)/python -m pytest -q -W default tests/test_regression.py tests/test_layer.py \
		tests/test_context.py tests/design tests/estimators tests/commands \
		tests/metrics/test_streaming.py tests/metrics/test_group_gaps.py tests/tables/test_streaming_tables.py \
		tests/auditing --ignore tests/auditing/test_page.py experiments/tests/test_experiment_command.py

tables: $(VENV)/.dev ## Compare ways to take metadata out of tables (ten minutes)
	$(BIN)/python benchmarks/table_comparison.py --out results/tables

ablation: $(VENV)/.demo ## Measure what each part of the recipe contributes (half an hour), resumable
	$(BIN)/python benchmarks/synthetic_ablation.py --out results/ablation

format: $(VENV)/.dev ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## Remove the environment and caches (results stay)
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist experiments/build

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# The package and its experiments: two distributions, installed together.
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt
PROJECTS := pyproject.toml experiments/pyproject.toml constraints.txt

$(VENV)/.demo: $(PROJECTS) | $(VENV)/bin/python
	$(INSTALL) --editable . --editable ./experiments
	@touch $@

$(VENV)/.audit: $(PROJECTS) | $(VENV)/bin/python
	$(INSTALL) --editable '.[audit]' --editable ./experiments
	@touch $@ $(VENV)/.demo

$(VENV)/.dev: $(PROJECTS) | $(VENV)/bin/python
	$(INSTALL) --editable '.[dev]' --editable './experiments[image,video,mri]'
	@touch $@ $(VENV)/.demo $(VENV)/.audit
