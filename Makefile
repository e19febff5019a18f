# Each target installs what it needs into .venv, once; uv makes a repeated install take seconds.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
ARGS   ?=
TAG    ?= $(shell git rev-parse --short HEAD 2>/dev/null || echo dev)
CPU_IMAGE ?= dpldm/cpu:$(TAG)
GPU_IMAGE ?= dpldm/gpu:$(TAG)
# All Flyte temporary folders in one place (docs/pitfalls.md): private intermediates never land in a shared /tmp.
export TMPDIR := $(CURDIR)/.flyte-work
export MLFLOW_DISABLE_TELEMETRY := true

.PHONY: release sweep resample test check slow ui verify lint types lock package register mutants clean
.DEFAULT_GOAL := help
help:  ## what can be made
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/'

$(BIN)/uv:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
$(VENV)/.release: requirements/release.txt | $(BIN)/uv
	VIRTUAL_ENV=$(VENV) $(BIN)/uv pip install --quiet --compile-bytecode --require-hashes -r requirements/release.txt
	@touch $@
$(VENV)/.dev: requirements/dev.txt | $(BIN)/uv
	VIRTUAL_ENV=$(VENV) $(BIN)/uv pip install --quiet --compile-bytecode --require-hashes -r requirements/dev.txt
	@touch $@ $(VENV)/.release
$(TMPDIR):
	@mkdir -p -m 700 $@

release: $(VENV)/.release | $(TMPDIR)  ## make a release: make release ARGS="--dataset mnist --epsilon 10"
	$(BIN)/pyflyte run workflows/release.py release_pipeline $(ARGS)
sweep: $(VENV)/.release | $(TMPDIR)  ## releases at several epsilons and their curve: ARGS="--epsilons '[1, 3, 10]'"
	$(BIN)/pyflyte run workflows/sweep.py sweep_pipeline $(ARGS)
resample: $(VENV)/.release | $(TMPDIR)  ## more images from a published bundle: ARGS="--bundle releases/<id>"
	$(BIN)/pyflyte run workflows/release.py resample_pipeline $(ARGS)
verify: $(VENV)/.release  ## recompute the promise of a bundle: make verify BUNDLE=releases/<id>
	$(BIN)/python -m dpldm_core.release.verify $(ARGS) $(BUNDLE)
ui: $(VENV)/.release  ## the MLflow server on the run's store, at http://127.0.0.1:5000
	$(BIN)/mlflow server --backend-store-uri $${MLFLOW_TRACKING_URI:-sqlite:///$(CURDIR)/mlflow.db} --host 127.0.0.1 --port $${PORT:-5000} --workers 1
test: $(VENV)/.dev | $(TMPDIR)  ## the default tests, under 10 minutes on 2 cores
	$(BIN)/python -m pytest
slow: $(VENV)/.dev | $(TMPDIR)  ## statistical, server, container-protocol and quality tests
	$(BIN)/python -m pytest -m slow --timeout=3600
mutants: $(VENV)/.dev | $(TMPDIR)  ## break the promise on purpose, in copies: every mutant must be noticed by its tests
	$(BIN)/python -m tests.mutants.run $(ARGS)
lint: $(VENV)/.dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
types: $(VENV)/.dev
	$(BIN)/mypy
check: lint types test  ## everything that must hold before a commit
lock: | $(BIN)/uv  ## pin again from the ranges in pyproject.toml
	$(BIN)/uv pip compile -q --generate-hashes --no-emit-index-url --no-header --python-version 3.11 pyproject.toml -o requirements/release.txt
	$(BIN)/uv pip compile -q --generate-hashes --no-emit-index-url --no-header --python-version 3.11 --extra dev -c requirements/release.txt pyproject.toml -o requirements/dev.txt
package: $(VENV)/.release | $(TMPDIR)  ## dpldm.tgz for flytectl
	$(BIN)/pyflyte --pkgs workflows package --image $(CPU_IMAGE) --image cpu=$(CPU_IMAGE) --image gpu=$(GPU_IMAGE) -f -o dpldm.tgz
register: $(VENV)/.release | $(TMPDIR)  ## register with the cluster of flyte.config (ARGS=--dry-run to try)
	$(BIN)/pyflyte --config flyte.config register --copy none --version $(TAG) --image $(CPU_IMAGE) --image cpu=$(CPU_IMAGE) --image gpu=$(GPU_IMAGE) $(ARGS) workflows
clean:  ## remove private intermediate files and caches, when nothing runs
	rm -rf .flyte-work .pytest_cache .mypy_cache .ruff_cache dpldm.tgz
