# Commands on a fresh machine: `make demo` and `make test`. They set up .venv first.
PYTHON ?= python3
BIN := .venv/bin
OLD := .venv-transformers-4
SOURCES := pyproject.toml setup.py CMakeLists.txt $(wildcard csrc/*.h csrc/*/*)

.PHONY: demo recipe-check test test-slow test-transformers-4 doctor clean
# The whole path on a tiny model, from raw files to a distilled student, in about eleven minutes of CPU time.
demo: .venv/demo
	$(BIN)/python -m training.recipes.demo --out runs/demo

# The same over three seeds, whose claims must hold.
recipe-check: .venv/demo
	$(BIN)/python -m training.recipes.demo --out runs/recipe-check --seeds 0 1 2 --check

test: .venv/test
	$(BIN)/python -m pytest -m "not gpu and not slow"

test-slow: .venv/test
	$(BIN)/python -m pytest -m "slow and not gpu"

# The integrations under transformers 4.57, the oldest they are for, in an environment of their own; `make test` has 5.
test-transformers-4: $(OLD)/test
	$(OLD)/bin/python -m pytest -m "not gpu" tests/integrations

doctor: .venv/demo
	$(BIN)/python -m qwen3_kernels doctor

.venv/python:
	$(PYTHON) -m venv .venv
	touch $@

.venv/demo: .venv/python $(SOURCES)
	$(BIN)/python -m pip install --quiet --editable '.[train,transformers,data,rl]'
	touch $@

.venv/test: .venv/demo
	$(BIN)/python -m pip install --quiet --editable '.[train,transformers,data,rl,test]'
	touch $@

$(OLD)/test: $(SOURCES)
	$(PYTHON) -m venv $(OLD)
	QWEN3_CUDA=0 $(OLD)/bin/python -m pip install --quiet --editable '.[test]' 'transformers>=4.57,<4.58'
	touch $@

clean:
	rm -rf .venv $(OLD) build dist *.egg-info qwen3_kernels/*.so
