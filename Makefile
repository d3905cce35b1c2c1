# make quickstart   the whole chain on a small world that it draws itself (no GPU, under 15 minutes on 2 cores)
# make families     every family's tiny twin, trained, bundled and scored; a report with pictures
# make test         every test this machine can run
# make checks       format, lint, types, import contracts

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PACKAGES := trainer models data_pipeline eval tools sightline.py

# The tests on a cluster mostly wait, so one process more than cores; each takes up to 3 GB.
WORKERS := $(shell echo $$(( $$(nproc) < 3 ? $$(nproc) + 1 : 4 )))

# A killed build of a DeepSpeed op leaves a lock on which every later start hangs; keep builds with the environment.
export TORCH_EXTENSIONS_DIR := $(CURDIR)/$(VENV)/torch_extensions
export TOKENIZERS_PARALLELISM := false
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: quickstart families demo test test-fast checks format bench-data bench-step bench-gpu bench-checkpoint bench-merge bench-large bench-decode chaos open-clip clean

quickstart: $(READY)
	@find $(TORCH_EXTENSIONS_DIR) -name lock -delete 2>/dev/null || true
	$(BIN)/python -m tools.quickstart

families: $(READY)
	$(BIN)/python -m tools.families

demo: $(READY)
	$(BIN)/sightline demo runs/quickstart/bundle --examples runs/quickstart/world/held_out/images

test: $(READY)
	$(BIN)/python -m pytest -q --numprocesses $(WORKERS) --no-loadscope-reorder

test-fast: $(READY)
	$(BIN)/python -m pytest -q -m "not slow"

checks: $(READY)
	$(BIN)/ruff format --check $(PACKAGES) tests setup.py
	$(BIN)/ruff check $(PACKAGES) tests setup.py
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY)
	$(BIN)/ruff format $(PACKAGES) tests setup.py
	$(BIN)/ruff check --fix $(PACKAGES) tests setup.py

bench-data: $(READY)
	$(BIN)/python -m tools.bench.data

bench-step: $(READY)
	$(BIN)/python -m tools.bench.step

# make bench-gpu PICTURES=DIR [WHEELS=DIR] [PYTHON=...]   on a machine with a GPU; needs no network and no environment of ours
bench-gpu:
	@test -n "$(PICTURES)" || { echo "make bench-gpu PICTURES=DIR: a folder of photos (JPEG or PNG)"; exit 2; }
	$(PYTHON) -m tools.bench.gpu --pictures $(PICTURES) $(if $(WHEELS),--wheels $(WHEELS)) $(ARGUMENTS)

bench-merge: $(READY)
	$(BIN)/python -m tools.bench.merge

bench-large: $(READY)
	$(BIN)/python -m tools.bench.large

bench-decode: $(READY)
	$(BIN)/python -m tools.bench.decode runs/quickstart/bundle

bench-checkpoint: $(READY)
	$(BIN)/python -m tools.bench.checkpoint

chaos: $(READY)
	$(BIN)/python -m tools.chaos

# open_clip apart from everything else, to compare its features with ours: beside a CPU's torch the torchvision that it
# brings cannot be loaded, and transformers would try to.
open-clip: $(READY)
	$(BIN)/python -m pip install --quiet --upgrade --no-deps --target $(VENV)/open_clip \
		open_clip_torch timm torchvision ftfy wcwidth

# The environment: made once, and again when what it is made from changes. constraints.txt pins what was tested together.
$(READY): setup.py constraints.txt
	@echo "making the environment in $(VENV) (about 3 minutes)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --constraint constraints.txt --editable '.[dev]' 2> $(VENV)/install.log \
		| grep --line-buffered -E '^(Collecting|Building|Installing|Successfully)' \
		|| { tail -n 30 $(VENV)/install.log; exit 1; }
	@touch $@

clean:
	rm -rf $(VENV) runs build *.egg-info
