# Every target makes .venv and installs what it needs first; nothing is fetched after that.

# The first Python from 3.11 on that can make a virtual environment.
PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3; do \
	$$python -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& { echo $$python; break; }; done)

# With an NVIDIA GPU exactly the pinned release, which is the CUDA build on Linux. Without one a
# local build of it (2.13.0+cpu) is preferred wherever pip's own settings (PIP_FIND_LINKS,
# PIP_EXTRA_INDEX_URL) offer one.
TORCH = torch$(shell command -v nvidia-smi >/dev/null && echo === || echo ==)$(shell \
	sed -n 's/^torch==//p' constraints.txt)
PIP = .venv/bin/python -m pip -qq --disable-pip-version-check install

BENCH = scripts/bench/$(subst -,_,$(NAME)).py
NAMES = $(subst $(eval ) ,|,$(subst _,-,$(basename $(notdir $(shell grep -l __main__ scripts/bench/*.py)))))

export HF_HUB_OFFLINE = 1

.PHONY: help demo test test-all check bench clean
.DEFAULT_GOAL := help

help: ## show the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

demo: .venv/.installed ## the whole pipeline on the packaged model: offline, CPU, minutes
	.venv/bin/emotion-atlas demo

test: .venv/.installed-dev ## the fast tests
	.venv/bin/python -m pytest

test-all: .venv/.installed-dev ## every test, whole runs too
	.venv/bin/python -m pytest -m ""

check: .venv/.installed-dev ## style, types and import rules
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/basedpyright
	.venv/bin/lint-imports

bench: .venv/.installed-bench ## a benchmark beside its peers: make bench NAME=topk-step
	@test -f "$(BENCH)" || { echo "name one: make bench NAME=$(NAMES)" >&2; exit 1; }
	.venv/bin/python $(BENCH) $(ARGS)

clean: ## remove .venv and caches; run folders stay
	rm -rf .venv .hypothesis .pytest_cache .ruff_cache .import_linter_cache dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/bin/python:
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or newer with venv found; name one: make PYTHON=/path/to/python" >&2; exit 1; }
	$(PYTHON) -m venv .venv

# torch on its own and first: with it in place nothing else asks for another build of it.
.venv/.installed: pyproject.toml constraints.txt | .venv/bin/python
	@echo "installing into .venv: once, some minutes"
	$(PIP) "$(TORCH)"
	$(PIP) --constraint constraints.txt --editable .
	@touch $@

.venv/.installed-dev: .venv/.installed
	$(PIP) --constraint constraints.txt --editable '.[dev]'
	@touch $@

.venv/.installed-bench: .venv/.installed-dev
	$(PIP) --constraint constraints.txt --editable '.[bench]'
	@touch $@
