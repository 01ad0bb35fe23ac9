# Without a GPU, PyPI's Linux torch still brings several GB of CUDA packages. The CPU build is smaller:
#   make demo PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu"
PYTHON ?= python3.11
PIP_FLAGS ?=

VENV := .venv
BIN := $(VENV)/bin
BASE := $(VENV)/.installed-base
DEV := $(VENV)/.installed-dev
TRITON := $(VENV)/.installed-triton

.PHONY: demo test triton lint fmt clean

demo: $(BASE)
	$(BIN)/python -m moray.deploy.cli demo

test: $(DEV)
	# Else each of the test processes would compile the kernels for itself.
	$(BIN)/python -m moray.runtime.kernels.compile deploy/demo/store int8
	$(BIN)/python -m pytest --numprocesses 2 --dist loadgroup --no-loadscope-reorder

# 1 GB. With it `make test` also runs the GPU's kernels, in Triton's interpreter.
triton: $(TRITON)

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

fmt: $(DEV)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Leaves the environment, which is slow to rebuild: `rm -rf .venv` for that.
clean:
	rm -rf build dist src/*.egg-info .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find actors cluster deploy runtime src tests -name __pycache__ -prune -exec rm -rf {} +

$(BIN)/pip:
	$(PYTHON) -m venv $(VENV)

$(BASE): pyproject.toml | $(BIN)/pip
	$(BIN)/python -m pip install $(PIP_FLAGS) -e .
	touch $@

$(DEV): pyproject.toml | $(BIN)/pip
	$(BIN)/python -m pip install $(PIP_FLAGS) -e '.[dev]'
	touch $(BASE) $@

$(TRITON): pyproject.toml | $(DEV)
	$(BIN)/python -m pip install $(PIP_FLAGS) -e '.[triton]'
	touch $@
