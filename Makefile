# `make` lists the targets. To choose on the command line:
#   QSAM_VENV  the environment (default .venv); made if absent, and kept in step with pyproject.toml and constraints.txt
#   PYTHON     what makes it (default python3)
#   TASK       the task of `make glue` and `make zero-shot` (default stsb)
#   WORKERS    processes of pytest (default 2: each computes on one thread)
#   ARGS       appended to the arguments of the recipe, of pytest, or of the benchmarks
PYTHON ?= python3
QSAM_VENV ?= .venv
TASK ?= stsb
ARGS ?=
WORKERS ?= 2

# The oldest supported torch has a small CPU build; torchvision, which timm needs, goes with one torch.
TORCH_GLUE := torch==2.13.0
TORCH_TEST := torch==2.14.1 torchvision==0.29.1

RUN := "$(QSAM_VENV)/bin/python" -m
PIP := $(RUN) pip install --disable-pip-version-check -c constraints.txt
# pip says nothing while it downloads where output is no terminal: a line every 10 seconds until the recipe's end.
TICK := ( while sleep 9; do echo "  ... still installing"; done ) & tick=$$!; trap "kill $$tick" EXIT;
HAS_TORCH := "$(QSAM_VENV)/bin/python" -c 'from importlib.metadata import version; \
	raise SystemExit(tuple(map(int, version("torch").split(".")[:2])) < (2, 13))' 2>/dev/null

# torchvision has no build for the oldest torch, so what needs timm is skipped there.
OLDEST := $(QSAM_VENV)-oldest
ALL := -m "" -n $(WORKERS) --dist loadfile --hypothesis-profile=thorough

# A stamp in the environment says what was installed there; its name escapes the spaces of a path.
EMPTY :=
SPACE := $(EMPTY) $(EMPTY)
ENV := $(subst $(SPACE),\$(SPACE),$(QSAM_VENV))
STAMP_GLUE := $(ENV)/qsam-glue.stamp
STAMP_VISION := $(ENV)/qsam-vision.stamp
STAMP_TEST := $(ENV)/qsam-test.stamp
STAMP_BENCH := $(ENV)/qsam-bench.stamp
STAMP_OLDEST := $(ENV)-oldest/qsam-oldest.stamp

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help glue zero-shot vision check format test test-oldest test-all bench clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' Makefile

glue: $(STAMP_GLUE) ## train the small GLUE demo: make glue TASK=stsb ARGS="..."
	$(RUN) recipes.bert_glue --demo --task $(TASK) $(ARGS)

zero-shot: $(STAMP_GLUE) ## train the GLUE demo without training text: make zero-shot TASK=stsb ARGS="..."
	$(RUN) recipes.zero_shot --demo --task $(TASK) $(ARGS)

vision: $(STAMP_VISION) ## train a small ResNet on MNIST, 2 bits: make vision ARGS="..."
	$(RUN) recipes.vision --demo $(ARGS)

check: $(STAMP_TEST) ## formatting, lint and types; changes nothing
	$(RUN) ruff format --check .
	$(RUN) ruff check .
	$(RUN) mypy
	@$(RUN) tests.budgets || echo 'CONTRIBUTING.md names the budgets that are exceeded, and why.'

format: $(STAMP_TEST) ## format, and fix what lint can fix
	$(RUN) ruff check --fix-only .
	$(RUN) ruff format .

test: check ## check, then every test but the long ones: make test ARGS="-k lsq"
	$(RUN) pytest -m "not long" -n $(WORKERS) --dist loadfile $(ARGS)

test-oldest: $(STAMP_OLDEST) ## the tests, but for the long ones, with the oldest supported torch
	"$(OLDEST)/bin/python" -m pytest -m "not long" -n $(WORKERS) --dist loadfile $(ARGS)

test-all: check $(STAMP_OLDEST) ## check, then every test, on imitated machines and the oldest torch too; writes docs/test-all.txt
	@mkdir -p docs
	@log="$(QSAM_VENV)/test-all.log"; code="$(QSAM_VENV)/test-all.code"; varied="$(QSAM_VENV)/variations.log"; \
	{ $(RUN) tests.variations -n $(WORKERS) --dist loadfile; echo $$? >"$$code"; } | tee "$$varied"; \
	{ "$(OLDEST)/bin/python" -m pytest -q -m "not long" -n $(WORKERS) --dist loadfile --color=no || echo 1 >"$$code"; } | tee "$$log"; \
	{ printf 'the oldest supported torch: '; tail -n 1 "$$log" | tr -d =; } >>"$$varied"; \
	{ $(RUN) pytest $(ALL) $(ARGS) --color=no --durations=25 || echo 1 >"$$code"; } | tee "$$log"; \
	{ \
		echo 'Written by `make test-all`.'; \
		echo "date: $$(date -u +%Y-%m-%d)"; \
		echo "commit: $$(git describe --always --dirty 2>/dev/null || echo unknown)"; \
		echo "command:" 'pytest $(ALL) $(ARGS)'; \
		"$(QSAM_VENV)/bin/python" -c 'import os, platform as p; \
			print("python", p.python_version(), "on", p.system(), p.machine(), "with", os.cpu_count(), "cores")'; \
		$(RUN) pip list --format=freeze | grep -E '^(qsam|torch|torchvision|numpy|transformers|timm|hypothesis|pytest)=='; \
		echo "result:$$(tail -n 1 "$$log" | tr -d =)"; \
		echo 'the core tests and the oldest torch:'; \
		cat "$$varied"; \
		sed -n '/ slowest .*durations /,$$p' "$$log"; \
	} >docs/test-all.txt; \
	exit "$$(cat "$$code")"

bench: $(STAMP_BENCH) ## measure speed and memory, on a quiet machine; writes docs/speed.md: make bench ARGS="step memory"
	$(RUN) benchmarks $(ARGS)

clean: ## remove caches and build output; the environment and runs/ stay
	rm -rf build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -not -path '*/site-packages/*' -not -path '*/lib/python*' -prune -exec rm -rf {} +

$(ENV)/bin/pip:
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "qsam needs Python 3.11 or newer, but $(PYTHON) is: $$("$(PYTHON)" --version 2>&1)." >&2; \
		echo "Name another one: make PYTHON=python3.12" >&2; exit 1; }
	"$(PYTHON)" -m venv "$(QSAM_VENV)"

# A torch that will do stays: after `make test`, torchvision needs the one that is there.
$(STAMP_GLUE): pyproject.toml constraints.txt | $(ENV)/bin/pip
	@echo "Installing what the recipe needs into $(QSAM_VENV), once."
	@$(TICK) { $(HAS_TORCH) || $(PIP) $(TORCH_GLUE); } && $(PIP) -e '.[glue]'
	@touch "$@"

$(STAMP_VISION): pyproject.toml constraints.txt | $(ENV)/bin/pip
	@echo "Installing what the recipe needs into $(QSAM_VENV), once."
	@$(TICK) $(PIP) $(TORCH_TEST) -e '.[vision]'
	@touch "$@"

$(STAMP_TEST): pyproject.toml constraints.txt | $(ENV)/bin/pip
	$(PIP) $(TORCH_TEST) -e '.[test]'
	@touch "$(QSAM_VENV)/qsam-glue.stamp" "$(QSAM_VENV)/qsam-vision.stamp" "$@"

$(STAMP_OLDEST): pyproject.toml constraints.txt
	"$(PYTHON)" -m venv "$(OLDEST)"
	"$(OLDEST)/bin/python" -m pip install --disable-pip-version-check -c constraints.txt $(TORCH_GLUE)
	"$(OLDEST)/bin/python" -m pip install --disable-pip-version-check -c constraints.txt -e '.[glue,integrations,deploy]' \
		hatchling hypothesis pytest pytest-xdist pytorch-optimizer torch-optimizer
	@touch "$@"

# The torch of the tests, so that numbers and tests speak of the same one; peers that want another are refused here.
$(STAMP_BENCH): pyproject.toml constraints.txt | $(ENV)/bin/pip
	$(PIP) $(TORCH_TEST) -e '.[test,bench]'
	@touch "$(QSAM_VENV)/qsam-glue.stamp" "$(QSAM_VENV)/qsam-vision.stamp" "$(QSAM_VENV)/qsam-test.stamp" "$@"
