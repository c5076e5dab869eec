# Two commands: `make demo`, `make test`. They need Python 3.10+ (venv, headers), a C++20 compiler,
# git and make; everything else goes into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CORE := setup.py pyproject.toml $(wildcard csrc/* csrc/*/*)
PYTEST := $(BIN)/pytest

# Where nvcc is: CUDACXX, the PATH, or the usual place.
NVCC := $(or $(CUDACXX),$(shell command -v nvcc || ls /usr/local/cuda/bin/nvcc 2>/dev/null))

.PHONY: demo test slow bench viewer lint sanitize cuda size fresh clean

demo: $(VENV)/default
	$(BIN)/mome demo -o demo-out

test: $(VENV)/test
	$(PYTEST) -m "not slow and not gpu"

slow: $(VENV)/test
	$(PYTEST) -m "slow and not gpu"

# What can be measured without a GPU, with the demonstration model; tables, JSON and charts in build/bench.
bench: $(VENV)/bench
	mkdir -p build
	for suite in engines kernels window end-to-end cold-start preprocess; do \
	  $(BIN)/mome bench $$suite -o build/bench || exit; \
	done

# The viewer of the node's status page, from npm; it is packaged if it is there.
viewer:
	packaging/npm.sh @niivue/niivue build/npm/niivue
	cp build/npm/niivue/dist/index.js mome_sdk/pacs/static/niivue.js
	cp build/npm/niivue/package.json mome_sdk/pacs/static/niivue.json

# mypy knows nothing of the folder map in setup.py: it reads links laid out as the package will be.
lint: $(VENV)/test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	rm -rf build/typed && mkdir -p build/typed/mome_sdk
	ln -s $(CURDIR)/mome_sdk/* $(CURDIR)/export $(CURDIR)/training $(CURDIR)/benchmarks build/typed/mome_sdk
	cd build/typed && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml -p mome_sdk
	$(BIN)/clang-format --dry-run -Werror $(wildcard csrc/*.[ch]pp csrc/*/*.[ch]pp csrc/cuda/*.cu)

# The tests of the core against a build that checks every access (ASan) and operation (UBSan).
sanitize: $(VENV)/test
	PATH=$(CURDIR)/$(BIN):$$PATH tests/sanitize.sh $(BIN)/python

# Compiles the GPU runner for every architecture, warnings as errors, and runs its functions on the CPU
# against the CPU runner, bit for bit. Needs CUDA's compiler and no GPU.
cuda: $(VENV)/test
	@test -n "$(NVCC)" || { echo "make cuda: nvcc (CUDA 12.0 or later) was not found; CUDACXX names it." >&2; exit 1; }
	CUDACXX=$(NVCC) $(BIN)/cmake -S csrc -B build/cuda -DMOME_PYTHON=OFF -DMOME_CUDA=ON -DMOME_WERROR=ON
	$(BIN)/cmake --build build/cuda --target mome --parallel 2
	$(PYTEST) tests/csrc/test_emulated_gpu.py

# Installs an sdist with the default dependencies in a new environment and prints its size.
size: $(VENV)/test
	$(PYTEST) -q -rP -k size tests/test_install.py

# `make demo` and `make test` in a bare Debian 12; as root, with debootstrap.
fresh:
	tests/fresh.sh

clean:
	rm -rf $(VENV) build dist demo-out *.egg-info mome_sdk/_core*.so

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/default: $(BIN)/python $(CORE)
	$(BIN)/pip install --quiet --editable .
	touch $@

# The package is in place: its name brings what the extra asks for, without another build. The published
# U-Net, which network.py is checked against, asks for libraries that it does not use here.
$(VENV)/test: $(VENV)/default
	$(BIN)/pip install --quiet "mome-sdk[test]"
	$(BIN)/pip install --quiet --no-deps dynamic-network-architectures==0.4.4
	touch $@

$(VENV)/bench: $(VENV)/default
	$(BIN)/pip install --quiet "mome-sdk[bench]"
	touch $@
