# What a person types. `make help` lists it.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# DVC runs `python stages/….py`: the environment's python has to be the first on PATH.
export PATH := $(CURDIR)/$(BIN):$(PATH)

.DEFAULT_GOAL := help

.PHONY: help
help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

.PHONY: env
env: ## the virtual environment, with the pinned dependencies
	@$(PYTHON) tools/make_env.py $(VENV)

.PHONY: params
params: env ## compose conf/ into params.yaml; ARGS="fleet=rtx40 export.opset=20"
	@diffusion-engines compose $(ARGS)

.PHONY: repro
repro: env ## build, validate, benchmark and report the fleet; ARGS="model=sd14 fleet=rtx40"
	@diffusion-engines repro $(ARGS)

.PHONY: fleet
fleet: env ## build each target of the fleet that is missing, in parallel or on Slurm; ARGS="jobs=2"
	@diffusion-engines fleet $(ARGS)

# Its status 2 says that something is to do, which is no error of make's.
.PHONY: plan
plan: env ## what `make repro` would run and restore, and why; ARGS="fleet=rtx40 export.opset=20"
	@diffusion-engines plan $(ARGS) || test $$? -eq 2

.PHONY: measure
measure: env ## time a target on this machine, with params.yaml as it is; TARGET=cpu
	@diffusion-engines measure $(TARGET)

.PHONY: full
full: env ## SD 1.4 at full size with synthetic weights, to TensorRT-RTX engines for Ada GPUs
	@diffusion-engines repro model=sd14-synthetic fleet=rtx40 reference=short

# By file, as files share what takes long to make, and in order: the longest ones come first.
PYTEST := python -m pytest -n auto --dist loadfile --no-loadscope-reorder

.PHONY: test
test: env lint ## every test but for the long ones: about eight minutes on two cores
	@$(PYTEST) -m "not long and not browser and not fleet and not gpu and not full" $(TESTS)

.PHONY: test-long
test-long: env ## the long matrices, and the report in a real browser; TESTS=tests/browser
	@$(PYTEST) -m "(long or browser) and not fleet and not gpu and not full" $(TESTS)

.PHONY: test-all
test-all: env lint ## both of these in one run, which is shorter: they share what takes long to make
	@$(PYTEST) -m "not fleet and not gpu and not full" $(TESTS)

# Each file has a cluster or a server of its own.
.PHONY: test-fleet
test-fleet: env ## a fleet here and on Slurm's virtual nodes: installs Debian's packages, as root
	@python -m tests.fleet.install
	@$(PYTEST) -m fleet $(TESTS)

.PHONY: test-full
test-full: env ## full-size models: up to 24 GB of memory, three quarters of an hour
	@python -m pytest -m full

.PHONY: test-gpu
test-gpu: env ## what needs an NVIDIA GPU
	@python -m pytest -m gpu

.PHONY: bench-gpu
bench-gpu: env ## how close a built target comes to the GPU's limits, beside PyTorch; TARGET=h100
	@python tools/bench_gpu.py $(TARGET)

.PHONY: doctor
doctor: env ## find out what of TensorRT works on this machine, and write a page to send back
	@diffusion-engines doctor

.PHONY: lint
lint: env ## ruff and mypy
	@ruff check src stages hydra_plugins tests tools models
	@ruff format --check src stages hydra_plugins tests tools models
	@mypy

.PHONY: verify
verify: env ## hash DVC's cache again, and mend what is damaged; ARGS="--all --remote"
	@diffusion-engines verify $(ARGS)

.PHONY: gc
gc: env ## drop what nobody needs of DVC's cache, after saying what and asking; ARGS="--budget 200GB"
	@diffusion-engines gc $(ARGS)
.PHONY: pull
pull: env ## restore from the default remote what dvc.lock names, each object hashed
	@diffusion-engines pull

.PHONY: push
push: env ## bring to the default remote what it lacks, each object asked for
	@diffusion-engines push

.PHONY: audit
audit: env ## known vulnerabilities of the pinned dependencies, where pip-audit's service answers
	@python tools/audit.py

.PHONY: sweep
sweep: env ## a sweep of conf/sweep/, to its end; SWEEP=precision JOBS=2 ARGS="model=sd14-synthetic"
	@diffusion-engines sweep $(SWEEP) $(ARGS) --jobs $(or $(JOBS),1)

.PHONY: pick
pick: env ## write the point of the last sweep that a rule picks into conf/; ARGS=pick=knee
	@diffusion-engines pick $(ARGS)

.PHONY: experiments
experiments: env ## the table of experiments: their metrics, and the parameters that differ
	@diffusion-engines experiments

.PHONY: diff
diff: env ## two revisions side by side, marked where it is more than noise; ARGS="v1 v2"
	@diffusion-engines diff $(ARGS)

.PHONY: quantize-auto
quantize-auto: env ## find the layers that can have 8 bits, by measuring; ARGS="unet-int8 --minutes 30"
	@diffusion-engines quantize-auto $(ARGS)

.PHONY: publish
publish: env ## put the proven engines of the fleet into a release, from which each machine takes its own
	@diffusion-engines publish $(ARGS)

.PHONY: reproduce
reproduce: env ## build an engine again, of its own commit, and compare; BUNDLE=artifacts/bundles/cpu/unet
	@diffusion-engines reproduce $(BUNDLE) $(ARGS)

.PHONY: clean
clean: ## remove what was built; the DVC cache stays
	git clean -fdXq artifacts .pytest_cache .mypy_cache .ruff_cache
