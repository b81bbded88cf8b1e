# `make help` lists the targets. A target that needs .venv makes it first.
SHELL := bash
PYTHON ?= python3
PY := .venv/bin/python
STAMP := .venv/.installed
NPROC ?= 1
SEEDS ?= 0
RUNS ?= runs
# The build of torch: cu126 or cu128 for an older driver, or the address of a mirror of one. Empty = pip's usual index.
TORCH_INDEX ?=
TORCH_URL = $(if $(findstring ://,$(TORCH_INDEX)),$(TORCH_INDEX),https://download.pytorch.org/whl/$(TORCH_INDEX))
TORCH_PINS = $(shell grep -E '^torch(vision)?==' requirements.txt)
export PYTHONUNBUFFERED := 1

# make takes any variable, so a misspelt one would do nothing.
VARIABLES := ARGS BUDGET CASES CLUSTER CONFIG CONFIGS DATA EXPERIMENT EXPORT FOLDS JOBS MINUTES MODELS NAME NPROC PYTHON RUNS SEED \
	SEEDS SIMD STUDY_SEEDS TORCH_INDEX
UNKNOWN := $(filter-out $(VARIABLES) PY SHELL,$(foreach v,$(.VARIABLES),$(if $(filter command,$(firstword $(origin $v))),$v)))
$(if $(UNKNOWN),$(error no target reads $(UNKNOWN). Variables are $(VARIABLES); values of configs go into ARGS="a.b=1"))

.DEFAULT_GOAL := help
.PHONY: help install data demo test test-slurm test-package soak fuzz check format requirements docs docs-serve docs-reference
.PHONY: golden study tensorboard stage-1 stage-2 stage-3
.PHONY: submit submit-1 submit-2 submit-3 plan doctor status clean

help:  ## list the targets
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

install: $(STAMP)  ## make .venv with the pinned packages and the command .venv/bin/vmp (the other targets do it when needed): TORCH_INDEX=cu126

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || { echo "error: $(PYTHON) is $$($(PYTHON) -V); Python 3.11, 3.12 or 3.13 is needed: give make PYTHON=python3.12" >&2; exit 5; }
	$(PYTHON) -m venv .venv
	$(if $(TORCH_INDEX),$(PY) -m pip install --disable-pip-version-check --index-url $(TORCH_URL) $(TORCH_PINS))
	$(PY) -m pip install --quiet --disable-pip-version-check --editable '.[dev,docs]'
	@touch $@

demo: $(STAMP)  ## the three stages on bundled digits and a report (continues where it stopped): SEEDS="0 1 2"
	@$(PY) -m launchers demo --seeds $(SEEDS) --nproc 2

data: $(STAMP)  ## the bundled digits as shards, and the split of the smoke and demo configs
	@$(PY) -m pipeline.data convert digits --out data/digits
	@$(PY) -m pipeline.data split data/digits/train --out data/digits/split-seed0.json \
		--imbalance 10 --labelled 0.1 --validation-per-class 15 --seed 0

stage-1: $(STAMP)  ## ARM pretraining: CONFIG=configs/arm/NAME.yaml ARGS="a.b=1 ..." NPROC=2
	@$(call stage,arm)

stage-2: $(STAMP)  ## supervised training or distillation: CONFIG=configs/distill/NAME.yaml ARGS= NPROC=
	@$(call stage,distill)

stage-3: $(STAMP)  ## semi-supervised fine-tuning: CONFIG=configs/semi/NAME.yaml ARGS= NPROC=
	@$(call stage,semi)

# One process runs in place; several are started and relayed by the launcher.
CONFIG ?= configs/$(1)/demo.yaml
define stage
$(if $(filter 1,$(NPROC)),$(PY) -m stages $(1) $(CONFIG) $(ARGS),$(PY) -m launchers local $(1) $(CONFIG) $(ARGS) --nproc $(NPROC))
endef

submit: $(STAMP)  ## the chain to SLURM: NAME=demo CLUSTER=cpu ARGS="a.b=1 arm:c.d=2 cluster:nodes=4"
	@$(PY) -m launchers slurm chain $(NAME) $(ARGS) --cluster configs/cluster/$(CLUSTER).yaml

submit-1: $(STAMP)  ## stage 1 to SLURM: CONFIG= CLUSTER= ARGS=
	@$(call submit,arm)

submit-2: $(STAMP)  ## stage 2 to SLURM: CONFIG= CLUSTER= ARGS=
	@$(call submit,distill)

submit-3: $(STAMP)  ## stage 3 to SLURM: CONFIG= CLUSTER= ARGS=
	@$(call submit,semi)

NAME ?= demo
CLUSTER ?= cpu
define submit
$(PY) -m launchers slurm $(1) $(CONFIG) $(ARGS) --cluster configs/cluster/$(CLUSTER).yaml
endef

plan: $(STAMP)  ## steps, memory, disk, hours and commands of the chain, without starting it: NAME=demo CLUSTER=cpu ARGS=
	@$(PY) -m launchers plan chain $(NAME) $(ARGS) --cluster configs/cluster/$(CLUSTER).yaml

doctor: $(STAMP)  ## check whether this machine and cluster can run the chain; each line is OK or a remedy: NAME=demo
	@$(PY) -m launchers doctor chain $(NAME) $(ARGS) --cluster configs/cluster/$(CLUSTER).yaml

status: $(STAMP)  ## the state of every stage (queued, running, failed and why, complete): RUNS=runs
	@$(PY) -m launchers status --root $(RUNS)

study: $(STAMP)  ## what helps in stage 3, on two bundled datasets: STUDY_SEEDS="0 1 2 3 4", JOBS=2 (continues where it stopped)
	@$(PY) -m studies.semi --seeds $(or $(STUDY_SEEDS),0 1 2 3 4) --jobs $(or $(JOBS),2)

tensorboard: $(STAMP)  ## show all runs at http://localhost:6006
	$(PY) -m tensorboard.main --logdir $(RUNS) --port 6006

.PHONY: chain recipe folds report evaluate efficiency inference pareto fields
chain: $(STAMP)  ## plan, the stages of configs/STAGE/NAME.yaml (written if there are none: BUDGET=30m), report: NAME=mine ARGS="a.b=1 arm:c.d=2" NPROC=
	@$(PY) -m launchers local chain $(NAME) $(ARGS) --nproc $(NPROC) $(if $(BUDGET),--budget $(BUDGET))

recipe: $(STAMP)  ## look at the images of data/NAME and write configs/STAGE/NAME.yaml: NAME=mine BUDGET=30m ARGS="--again"
	@$(PY) -m launchers recipe $(NAME) $(if $(BUDGET),--budget $(BUDGET)) $(ARGS)

folds: $(STAMP)  ## cross-validate stages 2 and 3 where labels are too few to hold any out: NAME=mine FOLDS=5 ARGS=
	@$(PY) -m studies.folds $(NAME) $(ARGS) --folds $(or $(FOLDS),5)

report: $(STAMP)  ## one page with the results of experiments: EXPERIMENT="runs/a runs/b" ARGS="--with runs/efficiency"
	@$(PY) -m launchers report $(EXPERIMENT) $(ARGS)

evaluate: $(STAMP)  ## evaluate an export: EXPORT=runs/E/semi/export DATA=data/D NPROC=2 ARGS="--train DATA --split FILE"
	@$(PY) -m launchers evaluate $(EXPORT) $(DATA) $(ARGS) --nproc $(NPROC)

efficiency: $(STAMP)  ## real stage-3 steps side by side: CONFIGS="configs/semi/a.yaml configs/semi/b.yaml" ARGS=
	@$(PY) -m launchers efficiency $(CONFIGS) $(ARGS)

inference: $(STAMP)  ## throughput against resolution: MODELS="efficientvim_m4 timm/resnet50" ARGS="--sizes 224 384"
	@$(PY) -m launchers inference $(MODELS) $(ARGS)

pareto: $(STAMP)  ## speed measured here against accuracy as papers report it: ARGS="--batch 16"
	@$(PY) -m launchers pareto $(ARGS)

fields: $(STAMP)  ## effective receptive fields: MODELS="vssd_tiny timm/resnet50" DATA=data/D ARGS="--size 480"
	@$(PY) -m launchers fields $(MODELS) --data $(DATA) $(ARGS)

# Long tests are in files with few tests. xdist would start those last. In the order of the folders they start early, and both
# processes end at about the same time.
test: $(STAMP)  ## all tests except SLURM's, the package's and those of `make soak`; warnings are errors
	$(PY) -m pytest tests --ignore=tests/slurm --ignore=tests/package -n 2 --dist loadfile --no-loadscope-reorder

test-slurm: $(STAMP)  ## on a real SLURM of two nodes on this machine (root, and apt-get install slurm-wlm)
	$(PY) -m pytest tests/slurm -rs

soak: $(STAMP)  ## long tests: runs and other commands killed many times in a row, fifty steps at every ZeRO stage
	$(PY) -m pytest tests -m soak -s

fuzz: $(STAMP)  ## feed 10,000 damaged and hostile inputs to the commands: CASES= SEED=
	$(PY) -m tests.fuzz --cases $(or $(CASES),10000) --seed $(or $(SEED),0)

.PHONY: sanitize
sanitize: $(STAMP)  ## test the compiled kernels under the address and undefined behaviour sanitizers of g++ (about five minutes)
	$(PY) -m tests.sanitize

.PHONY: bench
bench: $(STAMP)  ## take the figures of docs/performance.md that this commit lacks on this machine; use a quiet one: SIMD=avx2
	$(PY) -m benchmarks $(if $(SIMD),--simd $(SIMD))

.PHONY: gpu-check
gpu-check: $(STAMP)  ## check on this machine's GPU everything that needs one, into docs/gpu/: MINUTES=30; without one, what a CPU can check
	$(PY) -m benchmarks.gpu_check --minutes $(or $(MINUTES),30)

test-package: $(STAMP)  ## build the wheel, install it in a fresh environment in another folder, train and predict there; the quickstart notebook
	$(PY) -m pytest tests/package

check: $(STAMP)  ## format, lint, types, layers, lengths of files, words, and whether generated files are up to date
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy
	$(PY) .ci/requirements.py --check
	$(PY) -m docs.reference.generate --check
	$(PY) -m pytest tests/unit/test_layers.py tests/unit/test_words.py

requirements: $(STAMP)  ## write requirements*.txt from the pins in pyproject.toml
	$(PY) .ci/requirements.py

docs-reference: $(STAMP)  ## write docs/reference/config.md from the config schemas
	$(PY) -m docs.reference.generate

docs: $(STAMP)  ## build the documentation site in build/site; warnings are errors
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

docs-serve: $(STAMP)  ## show the documentation site at http://localhost:8000
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs serve

format: $(STAMP)  ## format the code and apply the linter's safe fixes
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

golden: $(STAMP)  ## regenerate the golden losses (the commit says why)
	$(PY) -m tests.golden.write

clean:  ## remove caches (never runs/ or data/)
	rm -rf .mypy_cache .ruff_cache .hypothesis build
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
