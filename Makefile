# Commands on a fresh machine: `make demo`, `make base` and `make test`. They set up .venv first.
PYTHON ?= python3
BIN := .venv/bin
SOURCES := pyproject.toml setup.py CMakeLists.txt $(wildcard csrc/*.h csrc/*/*)

.PHONY: demo base test test-slow doctor clean
demo: .venv/demo
	$(BIN)/python -m training.recipes.demo --out runs/demo

base: .venv/data
	$(BIN)/python -m training.recipes.base --out runs/base

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

.venv/test: .venv/demo
	$(BIN)/python -m pip install --quiet --editable '.[train,transformers,data,test]'
	touch $@

clean:
	rm -rf .venv build dist *.egg-info qwen3_kernels/*.so
