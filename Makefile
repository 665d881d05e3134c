# Commands on a fresh machine: `make demo`, `make base` and `make test`. They set up .venv first.
PYTHON ?= python3
BIN := .venv/bin
SOURCES := pyproject.toml setup.py CMakeLists.txt $(wildcard csrc/*.h csrc/*/*)

.PHONY: demo base qwen3-path recipe-check test test-slow doctor clean
demo: .venv/demo
	$(BIN)/python -m training.recipes.demo --out runs/demo

# From raw files through the three pre-training stages, in small.
base: .venv/data
	$(BIN)/python -m training.recipes.base --out runs/base

# Post-training, all stages, on a tiny model, in five to ten minutes; then the same over three seeds, whose claims must hold.
qwen3-path: .venv/rl
	$(BIN)/python -m training.recipes.path --out runs/qwen3-path

recipe-check: .venv/rl
	$(BIN)/python -m training.recipes.path --out runs/recipe-check --seeds 0 1 2 --check

test: .venv/test
	$(BIN)/python -m pytest -m "not gpu and not slow"

test-slow: .venv/test
	$(BIN)/python -m pytest -m "slow and not gpu"

doctor: .venv/demo
	$(BIN)/python -m qwen3_kernels doctor

.venv/python:
	$(PYTHON) -m venv .venv
	touch $@

.venv/demo: .venv/python $(SOURCES)
	$(BIN)/python -m pip install --quiet --editable '.[train,transformers]'
	touch $@

.venv/data: .venv/demo
	$(BIN)/python -m pip install --quiet --editable '.[train,transformers,data]'
	touch $@

.venv/rl: .venv/demo
	$(BIN)/python -m pip install --quiet --editable '.[train,transformers,rl]'
	touch $@

.venv/test: .venv/demo
	$(BIN)/python -m pip install --quiet --editable '.[train,transformers,data,rl,test]'
	touch $@

clean:
	rm -rf .venv build dist *.egg-info qwen3_kernels/*.so
