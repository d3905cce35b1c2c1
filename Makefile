# make quickstart   the whole chain on a synthetic world that it draws itself (no GPU, under 15 minutes on 2 cores)
# make families     every family's tiny config, trained, bundled and scored; a report with images
# make photos DATA=DIR   the same on your photos (captions.json and images/), with two pretrained backbones; SEED=0
# make test         every test this machine can run
# make test-fast    the tests that take less than a second each
# make fuzz         the tests of random cases, with ten times as many: half an hour
# make test-gpu     what only a machine with a GPU can test; WHEELS=DIR, MULTI=1 for several devices
# make coverage     the fast tests, and which lines they reach: docs/coverage.md
# make checks       format, lint, types, import contracts, spelling
# make docs         the documentation as a site: build/docs/index.html

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PACKAGES := trainer models data_pipeline eval tools sightline.py sightline_packages.py

# The tests on a cluster mostly wait, so one process more than cores; each takes up to 3 GB.
WORKERS := $(shell echo $$(( $$(nproc) < 3 ? $$(nproc) + 1 : 4 )))

# A killed build of a DeepSpeed op leaves a lock on which every later start hangs; keep builds with the environment.
export TORCH_EXTENSIONS_DIR := $(CURDIR)/$(VENV)/torch_extensions
export TOKENIZERS_PARALLELISM := false
# Without bytecode each of hundreds of processes would compile this project anew.
unexport PYTHONDONTWRITEBYTECODE
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: quickstart families photos demo test test-fast fuzz test-gpu test-versions coverage pictures docs docs-links dist checks format bench-data bench-step bench-train bench-gpu bench-checkpoint bench-merge bench-large bench-decode bench-eval bench-engine bench-scale bench-serve chaos environments interop lmms open-clip clean

quickstart: $(READY)
	@find $(TORCH_EXTENSIONS_DIR) -name lock -delete 2>/dev/null || true
	$(BIN)/python -m tools.quickstart

families: $(READY)
	$(BIN)/python -m tools.families

SEED ?= 0
photos: $(READY)
	@test -n "$(DATA)" || { echo "make photos DATA=DIR [SEED=0]: a folder with captions.json and images/"; exit 2; }
	$(BIN)/python -m tools.photos $(DATA) --seed $(SEED) $(ARGUMENTS)

demo: $(READY)
	$(BIN)/sightline demo runs/quickstart/bundle --examples runs/quickstart/world/held_out/images

test: $(READY)
	$(BIN)/python -m pytest -q --numprocesses $(WORKERS) --no-loadscope-reorder

test-fast: $(READY)
	$(BIN)/python -m pytest -q -m "not slow" --numprocesses 2 --no-loadscope-reorder

fuzz: $(READY)
	SIGHTLINE_FUZZ=1 $(BIN)/python -m pytest -q -m fuzz --numprocesses 2 $(ARGUMENTS)

# On a machine with a GPU; needs no network and no environment of ours. MULTI=1: the tests for several devices.
test-gpu:
	$(PYTHON) -m tools.dev.gpu_tests $(if $(WHEELS),--wheels $(WHEELS)) $(if $(MULTI),--multi) $(ARGUMENTS)

# The fast tests on the lowest versions that setup.py allows, or on the newest, in an environment of their own:
# make test-versions SET=lowest [KEEP=torch==2.13.0]   KEEP: a version that is tested in place of the bound
SET ?= newest
test-versions: $(READY)
	rm -rf build/$(SET) && mkdir -p build && $(PYTHON) -m venv build/$(SET)
	if [ $(SET) = lowest ]; then $(BIN)/python -m tools.dev.version_set $(if $(KEEP),--keep $(KEEP)) > build/$(SET).txt; \
		else echo "$(or $(KEEP),torch)" > build/$(SET).txt; fi
	build/$(SET)/bin/python -m pip install --quiet --constraint build/$(SET).txt --editable '.[dev]'
	build/$(SET)/bin/sightline versions
	PATH="$(CURDIR)/build/$(SET)/bin:$(PATH)" build/$(SET)/bin/python -m pytest -q -m "not slow" --numprocesses 2

# Which lines the fast tests reach, also in the processes that they start: docs/coverage.md.
coverage: $(READY)
	$(BIN)/python -m pytest -q -m "not slow" --numprocesses 2 --no-loadscope-reorder \
		--cov --cov-report=json:build/coverage.json
	$(BIN)/python -m tools.dev.coverage_page build/coverage.json

# The pictures of reports and pages in docs/images, out of a finished quickstart. Needs chromium.
pictures: $(READY)
	$(BIN)/python -m tools.dev.pictures $(ARGUMENTS)

checks: $(READY)
	$(BIN)/ruff format --check $(PACKAGES) tests setup.py
	$(BIN)/ruff check $(PACKAGES) tests setup.py
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell

# Warnings are errors. The reference imports every module, which takes most of the minute.
docs: $(READY)
	$(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going --builder html docs build/docs
	@echo "build/docs/index.html"

# Needs the internet: asks for each address that the documentation names.
docs-links: $(READY)
	$(BIN)/python -m sphinx --quiet --builder linkcheck docs build/links

dist: $(READY)
	rm -rf dist && $(BIN)/python -m build --outdir dist .

format: $(READY)
	$(BIN)/ruff format $(PACKAGES) tests setup.py
	$(BIN)/ruff check --fix $(PACKAGES) tests setup.py

bench-data: $(READY)
	$(BIN)/python -m tools.bench.data

bench-step: $(READY)
	$(BIN)/python -m tools.bench.step

# make bench-train [ARGUMENTS='--vision DIR --language DIR']   weights are drawn where no directories are given
bench-train: $(READY)
	$(BIN)/python -m tools.bench.train $(ARGUMENTS)

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

# Beside lmms-eval's own llava_hf where `make lmms` has made an environment with it.
bench-eval: $(READY)
	$(or $(wildcard build/lmms/bin/python),$(BIN)/python) -m tools.bench.evaluate runs/quickstart/bundle $(ARGUMENTS)

# 2 to 1,024 ranks, simulated one process at a time: 10 minutes, 3 GB of disk meanwhile
bench-scale: $(READY)
	$(BIN)/python -m tools.bench.scale

# make bench-serve [ARGUMENTS='--peer "transformers serve runs/quickstart/merged/lora --device cpu --port PORT"']
bench-serve: $(READY)
	$(BIN)/python -m tools.bench.serve runs/quickstart/merged/lora $(ARGUMENTS)

bench-engine: $(READY)
	$(BIN)/python -m tools.bench.engine runs/quickstart/merged/lora

bench-checkpoint: $(READY)
	$(BIN)/python -m tools.bench.checkpoint

chaos: $(READY)
	$(BIN)/python -m tools.chaos $(ARGUMENTS)

# What `sightline export` writes, opened by transformers 4.57 and 5, vLLM, lmms-eval and llama.cpp, each in an environment of
# its own below build/interop (5 GB). Not a part of `make test`. ARGUMENTS=vLLM: that program alone.
interop: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.support.interop $(ARGUMENTS)

# Bundles made with torchvision and without it, on a CPU with AVX512-BF16 and on one without: two environments, half an hour.
environments: $(READY)
	$(BIN)/python -m tests.support.environments

# lmms-eval with its own tasks, in an environment of its own, asks a bundle through our entry point. lmms-eval 0.7.3 pins
# wandb below what constraints.txt has, and brings a torchvision that a CPU's torch cannot load: neither is needed. It reaches
# into a module of filelock that 4.3 has no more, and its llava_hf imports decord. bitsandbytes is for NF4 bundles.
# WHEELS=DIR: a folder with a torch to take, such as a CPU's.
lmms: $(READY)
	rm -rf build/lmms && mkdir -p build && $(PYTHON) -m venv build/lmms
	build/lmms/bin/python -m pip install --quiet $(if $(WHEELS),--find-links $(WHEELS)) \
		torch==$$($(BIN)/python -c 'import torch; print(torch.__version__)') 'lmms-eval>=0.7.3' 'transformers>=5.23,<5.24' \
		'filelock<4.3' decord 'bitsandbytes>=0.50,<0.51'
	build/lmms/bin/python -m pip uninstall --quiet --yes torchvision
	build/lmms/bin/python -m pip install --quiet --no-deps .
	SIGHTLINE_LMMS=$(CURDIR)/build/lmms/bin/python $(BIN)/python -m pytest -q -n0 tests/eval/test_lmms_end_to_end.py

# open_clip in a separate folder, to compare its features with ours: with a CPU's torch the torchvision that it
# brings cannot be loaded, and transformers would try to.
open-clip: $(READY)
	$(BIN)/python -m pip install --quiet --upgrade --no-deps --target $(VENV)/open_clip \
		open_clip_torch timm torchvision ftfy wcwidth

# The environment: made once, and again when one of its sources changes. constraints.txt pins what was tested together.
$(READY): setup.py constraints.txt
	@echo "making the environment in $(VENV) (about 3 minutes)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --constraint constraints.txt --editable '.[dev,docs]' 2> $(VENV)/install.log \
		| grep --line-buffered -E '^(Collecting|Building|Installing|Successfully)' \
		|| { tail -n 30 $(VENV)/install.log; exit 1; }
	@touch $@

clean:
	rm -rf $(VENV) runs build *.egg-info
