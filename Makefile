# One command a chore. Everything but `setup`, `clean` and `help` installs first, which costs nothing the second time.
#   PYTHON=python3.12 chooses the interpreter, ARGS="..." adds arguments to demo, up, test, chaos and bench.
VENV ?= .venv
TEST_PROCESSES ?= 3
BIN = $(VENV)/bin
BOOTSTRAP = VENV="$(VENV)" sh scripts/bootstrap.sh

.PHONY: help setup demo test check check-infra up chaos bench compose-smoke builtin-model clean
.DEFAULT_GOAL := help

help: ## say what there is
	@sed -n 's/^\([a-z-]*\):.*## /\1	/p' Makefile | while IFS='	' read -r name text; do printf '  make %-15s %s\n' "$$name" "$$text"; done

setup: ## make .venv and install everything into it
	@$(BOOTSTRAP)

demo: setup ## see it work: stack, jobs, completions, one trace
	@$(BIN)/throughline demo $(ARGS)

up: setup ## keep the stack running on 127.0.0.1:8000 until Ctrl-C
	@$(BIN)/throughline up $(ARGS)

test: setup ## run all tests, several files at a time (TEST_PROCESSES=0: one after the other)
	@$(BIN)/python -m pytest -q -n $(TEST_PROCESSES) --dist loadfile $(ARGS)

check: ## lint, format, types, import contracts, shell scripts, containers
	@$(BOOTSTRAP) check
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	@for script in scripts/*.sh .ci/run; do sh -n "$$script" || exit 1; done
	@$(MAKE) --no-print-directory check-infra

check-infra: # part of `check`: what the containers are made from and watched with
	$(BIN)/check-jsonschema --builtin-schema vendor.compose-spec compose.yaml
	$(BIN)/hadolint infra/docker/*.Dockerfile
	@if docker compose version >/dev/null 2>&1; then docker compose --profile gpu config --quiet; \
		else echo "skipped: docker compose config (docker compose is not installed)"; fi
	@if command -v promtool >/dev/null; then \
		promtool check config infra/prometheus/prometheus.yaml infra/prometheus/beside-make-up.yaml && \
		promtool test rules infra/prometheus/alerts_test.yaml; \
		else echo "skipped: alert rules (promtool is not installed; it comes with Prometheus)"; fi

compose-smoke: ## bring the containers up, try every link, take them down; needs docker compose
	@$${PYTHON:-python3} scripts/compose_smoke.py $(ARGS)

chaos: setup ## kill every part at random while 10,000 jobs run, then look for a broken promise (ARGS="--seed 2 --jobs 500")
	@$(BIN)/python -m tests.chaos $(ARGS)

bench: setup ## measure, see benchmarks/README.md
	@$(BIN)/python -m benchmarks $(ARGS)

builtin-model: setup ## train the built-in model again, from text the project makes itself
	@$(BIN)/python scripts/builtin_model/train.py $(ARGS)

clean: ## remove what was built and installed, and the state of `make up`
	rm -rf "$(VENV)" .throughline .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis *.egg-info build dist cuda_ops/cpu/build
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
