# make demo | test | lint | clean. Another interpreter: make PYTHON=python3.12 demo
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip --disable-pip-version-check -qq

# A change here means a new install. Python sources are not listed: installs are editable.
BUILD := pyproject.toml setup.py CMakeLists.txt constraints.txt $(shell find csrc -type f)

.PHONY: help demo test lint clean
.NOTPARALLEL: # one environment, one install at a time

help:
	@echo "make demo    draw digits with and without ToCa, compare time and pictures"
	@echo "make test    all tests"
	@echo "make lint    ruff, mypy, clang-format"
	@echo "make clean   remove everything that make made, .venv included"

demo: .venv/demo.stamp
	$(BIN)/python examples/digits/demo.py

test: .venv/dev.stamp
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal \
		--require-backends reference,native,triton

lint: .venv/dev.stamp
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu*')

clean:
	rm -rf .venv build dist *.egg-info demo_output .pytest_cache .mypy_cache .ruff_cache
	rm -f toca_kernels/_C.*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch comes first and pinned, so that nothing else chooses its version. The build tools come with
# it because the package is built without isolation: CMake then recompiles only what changed.
.venv/torch.stamp: constraints.txt
	@echo "==> creating .venv and installing PyTorch and the build tools (once, some hundred MB)"
	$(PYTHON) -m venv .venv
	$(PIP) install -c constraints.txt torch setuptools cmake ninja pybind11
	@touch $@

.venv/demo.stamp: EXTRAS = examples
.venv/dev.stamp: EXTRAS = examples,test,lint
.venv/demo.stamp .venv/dev.stamp: .venv/torch.stamp $(BUILD)
	@echo "==> building toca_kernels and installing it with [$(EXTRAS)]"
	$(PIP) install -c constraints.txt --no-build-isolation -e '.[$(EXTRAS)]'
	@touch $@
