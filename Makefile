PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test check bench
.DEFAULT_GOAL := demo

# A range, not an open end: it makes pip take a CPU build of torch where one lies on the machine.
$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "torch>=2.11,<2.14"
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $(STAMP)

demo: $(STAMP)  ## tune two embedded tasks on the embedded backbone, offline, about two minutes on two cores
	$(BIN)/mp2 bbt --task demo_sentiment --iters 600
	$(BIN)/mp2 bbt --task demo_topic --iters 400

test: $(STAMP)
	$(BIN)/python -m pytest

check: $(STAMP)
	$(BIN)/ruff check mp2 tests benchmarks
	$(BIN)/ruff format --check mp2 tests benchmarks
	$(BIN)/mypy

bench: $(STAMP)  ## speed against a plain PyTorch loop, same run, same machine
	$(BIN)/python -m benchmarks.speed.spine_speed
