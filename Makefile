# `make demo` and `make test` on a fresh machine: they create .venv from the pinned constraints.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test lint typecheck wheel docs
.DELETE_ON_ERROR:

demo: $(VENV)/demo.stamp
	$(BIN)/python -m benchmarks.demo --out demo-output

test: $(VENV)/dev.stamp
	$(BIN)/python -m pytest

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check
	$(BIN)/ruff format --check

typecheck: $(VENV)/dev.stamp
	$(BIN)/mypy

docs: $(VENV)/docs.stamp
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build

wheel: $(VENV)/dev.stamp
	$(BIN)/python -m build --wheel

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/demo.stamp: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -e ".[plot]"
	touch $@

$(VENV)/dev.stamp: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -e ".[plot,onnx,qonnx,bench,test,dev]"
	touch $(VENV)/demo.stamp $@

$(VENV)/docs.stamp: $(VENV)/dev.stamp
	$(INSTALL) -e ".[docs]"
	touch $@
