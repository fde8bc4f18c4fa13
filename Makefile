# On a new machine: `make demo`, then `make test`. Both install what they need into .venv.
PYTHON ?= python3
BIN := .venv/bin
.DEFAULT_GOAL := demo
.PHONY: demo test check clean

# A stamp for each set of dependencies: done again only when pyproject.toml changes.
.venv/base.stamp: pyproject.toml
	test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -e .
	touch $@

.venv/dev.stamp: .venv/base.stamp
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[recsys,dev]'
	touch $@

# Baseline against optimized on local Ray, a quick grid. Exit code 3 of the run (complete, but a point is INVALID)
# is normal on a busy machine, and the table says which.
demo: .venv/base.stamp
	$(BIN)/python -m orchestrator workload=unary profile=baseline,optimized sweep=quick -m || test $$? -eq 3

test: .venv/dev.stamp
	$(BIN)/python -m pytest

check: .venv/dev.stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
