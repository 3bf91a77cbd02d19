# `make demo` and `make test` on a fresh machine: they create .venv from the pinned constraints.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test adapters lint typecheck wheel docs
.DELETE_ON_ERROR:

demo: $(VENV)/demo.stamp
	$(BIN)/python -m benchmarks.demo --out demo-output

test: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -n auto --dist worksteal

adapters: $(VENV)/adapters.stamp
	$(BIN)/python -m pytest tests/test_integrations.py tests/test_loggers.py tests/test_readme.py

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check
	$(BIN)/ruff format --check

typecheck: $(VENV)/dev.stamp
	$(BIN)/mypy

docs: $(VENV)/dev.stamp
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build

wheel: $(VENV)/dev.stamp
	$(BIN)/python -m build

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/demo.stamp: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -e ".[plot]"
	touch $@

$(VENV)/dev.stamp: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -e ".[plot,pandas,sweep,onnx,qonnx,bench,docs,test,dev]"
	touch $(VENV)/demo.stamp $@

$(VENV)/adapters.stamp: $(VENV)/dev.stamp
	$(INSTALL) -e ".[lightning,transformers,tensorboard]"
	touch $@
