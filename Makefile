PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
NEWEST := .venv-newest

# Lower instruction sets than the machine's own: oneDNN, ATen and MKL have a variable each, and without
# -mno-avx512f the C kernels would be compiled for the processor that is there. onnxruntime has no such variable.
AVX2 := ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 CC="cc -mno-avx512f"
AVX512 := ONEDNN_MAX_CPU_ISA=AVX512_CORE ATEN_CPU_CAPABILITY=avx512 MKL_ENABLE_INSTRUCTIONS=AVX512
VNNI := ONEDNN_MAX_CPU_ISA=AVX512_CORE_VNNI ATEN_CPU_CAPABILITY=avx512 MKL_ENABLE_INSTRUCTIONS=AVX512
ON_CPUS := tests/engine tests/optimizers tests/runs
# In CI: what the CPU engine computes, what optimizers make of it, and the bits of runs together against runs alone.
# Not the other backends: Triton's interpreter is numpy, TensorRT has a double, onnxruntime has no level to set.
ON_AVX2 := tests/engine/test_*.py tests/engine/cpu tests/optimizers tests/runs/test_series.py tests/runs/test_together.py

# A file's tests stay in one process: they share what its fixtures made. Each process has one thread of its own.
# The order of files is that of tests/conftest.py.
JOBS ?= 2
PYTEST := python -m pytest --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder

# Processes that tests start would each compile the package anew where the environment says so.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: fuzz kill demo test test-cpus test-avx2 test-newest check constraints bench
.DEFAULT_GOAL := demo

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $(STAMP)

demo: $(STAMP)  ## two embedded tasks, untuned, baselines and tuned side by side; offline, under two minutes on two cores
	$(BIN)/mp2 bbt --task demo_sentiment,demo_topic --iters 300
	@echo "your own task: $(BIN)/mp2 tasks new FILE (CSV, JSON lines ...; docs/tasks.md), then what that prints"

test: $(STAMP)
	$(BIN)/$(PYTEST)

test-cpus: $(STAMP)  ## what depends on the processor, as on processors without AMX, without VNNI, without AVX-512
	$(BIN)/$(PYTEST) $(ON_CPUS)
	$(VNNI) $(BIN)/$(PYTEST) $(ON_CPUS)
	$(AVX512) $(BIN)/$(PYTEST) $(ON_CPUS)
	$(AVX2) $(BIN)/$(PYTEST) $(ON_CPUS)

test-avx2: $(STAMP)  ## the part of test-cpus that differs most between processors, on the lowest level
	$(AVX2) $(BIN)/$(PYTEST) $(ON_AVX2)

test-newest:  ## on the newest permitted versions, their warnings shown: to be looked at, it blocks nothing
	$(PYTHON) -m venv --clear $(NEWEST)
	$(NEWEST)/bin/python -m pip install --quiet --editable ".[dev]"
	$(NEWEST)/bin/python -m pip freeze --exclude-editable | diff constraints.txt - || true
	$(NEWEST)/bin/$(PYTEST) -W default

constraints:  ## write constraints.txt anew from the newest permitted versions; run the tests before committing it
	$(PYTHON) -m venv --clear $(NEWEST)
	$(NEWEST)/bin/python -m pip install --quiet --editable ".[dev]"
	head -1 constraints.txt > constraints.new
	# without the local part: "torch==2.13.0" takes a CPU build where one lies on the machine
	$(NEWEST)/bin/python -m pip freeze --exclude-editable | sed 's/+.*//' >> constraints.new
	mv constraints.new constraints.txt

N ?= 2000
fuzz: $(STAMP)  ## N damaged copies of a file of every format: no traceback, no hang, nothing wrong accepted
	MP2_FUZZ_CASES=$(N) $(BIN)/python -m pytest tests/fuzz

kill: N = 50
kill: $(STAMP)  ## N commands killed at random and started again: the bytes of one never killed
	$(BIN)/python tests/kill/campaign.py --n $(N)

check: $(STAMP)
	$(BIN)/ruff check mp2 tests benchmarks
	$(BIN)/ruff format --check mp2 tests benchmarks
	$(BIN)/mypy

bench: $(STAMP)  ## speed against a plain PyTorch loop, same run, same machine
	$(BIN)/python -m benchmarks.speed.throughput --shape mini
