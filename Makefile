# Every target works in a fresh clone with only python3 and make. The first one creates .venv, which takes some minutes.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

TORCH_VERSION ?= 2.13.0
# Where to look for torch besides the default index: a URL, `none`, or `auto`. `auto` means PyTorch's index of CPU builds if
# there is no NVIDIA GPU and that index answers, and otherwise `none`.
TORCH_INDEX ?= auto
CPU_INDEX := https://download.pytorch.org/whl/cpu
GPU := $(shell if nvidia-smi -L >/dev/null 2>&1 || [ -e /proc/driver/nvidia/version ]; then echo yes; fi)
EXTRAS ?= dev,metrics$(if $(GPU),$(comma)gpu)
comma := ,

HOST ?= 127.0.0.1
PORT ?= 8000
# `make distill`: a TOML or JSON file, or a recipe's name (distillers/recipes).
JOB ?= demo
OUT ?= runs/evaluation
# Number of processes for `make test`; each uses one core and about 1.5 GB of memory.
WORKERS ?= 2
# `make leaderboard`: training budget of each method, in minutes on this many threads; docs/leaderboard.md is for 6 on 1.
MINUTES ?= 6
THREADS ?= 1
# More arguments for a target's command: `make test ARGS="-k schedules"`.
ARGS ?=

.PHONY: help
help: ## list all targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(STAMP): pyproject.toml
	@python=$$(for p in $(PYTHON) python3 python3.13 python3.12 python3.11; do \
	    if "$$p" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then echo "$$p"; break; fi; \
	  done); \
	[ -n "$$python" ] || { echo "fewstep needs Python 3.11, 3.12 or 3.13: name one with 'make PYTHON=/path/to/python3.12 ...'" >&2; exit 1; }; \
	[ -x $(BIN)/python ] || "$$python" -m venv $(VENV) || \
	  { echo "$$python cannot make a virtual environment; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@index='$(TORCH_INDEX)'; \
	if [ "$$index" = auto ]; then \
	  index=none; \
	  if [ -z "$(GPU)" ] && [ "$$(uname -s)" = Linux ]; then \
	    if $(BIN)/python -c 'import sys, urllib.request as r; r.urlopen(sys.argv[1], timeout=10)' $(CPU_INDEX)/torch/ 2>/dev/null; \
	    then index=$(CPU_INDEX); fi; \
	  fi; \
	fi; \
	echo "installing torch $(TORCH_VERSION) ($(if $(GPU),NVIDIA GPU found,no NVIDIA GPU); extra index: $$index), then fewstep[$(EXTRAS)]"; \
	extra=(); [ "$$index" = none ] || extra=(--extra-index-url "$$index"); \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$${extra[@]}" torch==$(TORCH_VERSION); \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$${extra[@]}" --editable '.[$(EXTRAS)]'
	@touch $@

.PHONY: install
install: $(STAMP) ## create the virtual environment, with the build of torch for this machine

.PHONY: demo
demo: $(STAMP) ## distil the bundled teacher for some minutes, serve the student, draw a labelled contact sheet
	$(BIN)/fewstep demo $(ARGS)

.PHONY: serve
serve: $(STAMP) ## serve the API on http://127.0.0.1:8000 (HOST=, PORT=) with the bundled models
	$(BIN)/fewstep serve --host $(HOST) --port $(PORT) $(ARGS)

.PHONY: distill
distill: $(STAMP) ## run the job in JOB= (a TOML or JSON file, or a recipe's name); resumes where it stopped
	$(BIN)/fewstep distill $(JOB) --resume $(ARGS)

.PHONY: evaluate
evaluate: $(STAMP) ## measure the bundled teacher and students: JSON, sheets, curves and an HTML report in OUT=
	$(BIN)/fewstep evaluate --out $(OUT) $(ARGS)

.PHONY: test
test: $(STAMP) ## run the tests, and require 90% coverage of weights/ and distillers/losses
	$(BIN)/python -m pytest --numprocesses=$(WORKERS) --cov --cov-report=term --cov-fail-under=90 $(ARGS)

.PHONY: test-slow
test-slow: $(STAMP) ## run the tests that take minutes
	$(BIN)/python -m pytest -m slow $(ARGS)

.PHONY: lint
lint: $(STAMP) ## run ruff and mypy, and hadolint and shellcheck if they are installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	@if [ -x $(BIN)/hadolint ]; then echo "hadolint docker/Dockerfile"; $(BIN)/hadolint --config docker/hadolint.yaml docker/Dockerfile; fi
	@if [ -x $(BIN)/shellcheck ]; then echo "shellcheck .ci/run docker/*.sh"; $(BIN)/shellcheck .ci/run docker/*.sh; fi

.PHONY: format
format: $(STAMP) ## format the code with ruff, and fix what it can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

.PHONY: bench
bench: $(STAMP) ## time the network, the decoder and whole images by backend; JSON in runs/bench.json
	$(BIN)/python -m tests.benchmarks.bench_network --out runs/bench.json $(ARGS)

.PHONY: bench-train
bench-train: $(STAMP) ## time training by method, and its network evaluations alone; JSON in runs/bench-train.json
	$(BIN)/python -m tests.benchmarks.bench_train --out runs/bench-train.json $(ARGS)

.PHONY: bench-serve
bench-serve: $(STAMP) ## compare the server with other ways to serve, and with bare calls; JSON in runs/bench-serve.json
	$(BIN)/python -m tests.benchmarks.bench_serve --out runs/bench-serve.json $(ARGS)

.PHONY: leaderboard
leaderboard: $(STAMP) ## train and measure every method (hours): docs/leaderboard.md; resumes where it stopped
	$(BIN)/python -m distillers.evaluation.leaderboard --minutes $(MINUTES) --threads $(THREADS) $(ARGS)

.PHONY: bench-memory
bench-memory: $(STAMP) ## measure a job's memory: full fine-tuning, LoRA, and LoRA on a shared base
	$(BIN)/python -m tests.benchmarks.bench_memory $(ARGS)

.PHONY: docs
docs: $(STAMP) ## regenerate the table in docs/settings.md from the settings' descriptions
	{ sed '/^|/,$$d' docs/settings.md; $(BIN)/python -m service.settings; } > docs/settings.md.new
	mv docs/settings.md.new docs/settings.md

.PHONY: docker-test
docker-test: ## build and start the containers, generate an image through the published port, run a short job
	docker/smoke.sh

.PHONY: clean
clean: ## remove caches (but not .venv or runs/)
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage .coverage.* build dist *.egg-info htmlcov
