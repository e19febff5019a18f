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

.PHONY: release resample test check slow ui verify lint types lock package register mutants clean
.DEFAULT_GOAL := help
help:  ## what can be made
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/'

$(BIN)/uv:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
$(VENV)/.release: requirements/release.txt | $(BIN)/uv
	VIRTUAL_ENV=$(VENV) $(BIN)/uv pip install --quiet --require-hashes -r requirements/release.txt
	@touch $@
$(VENV)/.dev: requirements/dev.txt | $(BIN)/uv
	VIRTUAL_ENV=$(VENV) $(BIN)/uv pip install --quiet --require-hashes -r requirements/dev.txt
	@touch $@ $(VENV)/.release
$(TMPDIR):
	@mkdir -p -m 700 $@
