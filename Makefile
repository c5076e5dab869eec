# Two commands: `make demo`, `make test`. They need Python 3.10+ (venv, headers), a C++20 compiler,
# git and make; everything else goes into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CORE := setup.py pyproject.toml $(wildcard csrc/* csrc/*/*)
PYTEST := $(BIN)/pytest
CORE_TESTS := tests/test_sliding_window.py tests/csrc

# A folder with the package as setup.py's folder map will install it, made of links.
define lay_out
rm -rf $(1) && mkdir -p $(1)/mome_sdk
ln -s $(CURDIR)/mome_sdk/* $(CURDIR)/export $(CURDIR)/training $(CURDIR)/benchmarks $(1)/mome_sdk
endef

.PHONY: demo test slow bench lint sanitize size fresh clean

demo: $(VENV)/default
	$(BIN)/mome demo -o demo-out

test: $(VENV)/test
	$(PYTEST) -m "not slow and not gpu"

slow: $(VENV)/test
	$(PYTEST) -m "slow and not gpu"

# Timings, each beside its parity figure; the table is printed last.
bench: $(VENV)/bench
	mkdir -p build
	$(PYTEST) benchmarks --benchmark-json=build/benchmarks.json
	$(BIN)/python -m mome_sdk.benchmarks.report build/benchmarks.json

lint: $(VENV)/test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(call lay_out,build/typed)
	cd build/typed && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml -p mome_sdk
	$(BIN)/clang-format --dry-run -Werror $(wildcard csrc/*.[ch]pp csrc/*/*.[ch]pp)

# The tests of the core against a build that checks every access (ASan) and operation (UBSan). Python
# itself leaks by design, and ASan's own memory would count where a test measures what the runner takes.
sanitize: $(VENV)/test
	$(BIN)/pip install --quiet cmake pybind11
	$(BIN)/cmake -S csrc -B build/sanitize -DCMAKE_BUILD_TYPE=RelWithDebInfo -DMOME_WERROR=ON \
	  -DMOME_SANITIZE=address,undefined -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python \
	  -Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir)
	$(BIN)/cmake --build build/sanitize --parallel
	$(call lay_out,build/sanitized)
	rm -f build/sanitized/mome_sdk/_core*.so
	ln -s $(CURDIR)/build/sanitize/_core*.so build/sanitized/mome_sdk
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH=build/sanitized \
	  $(PYTEST) -m "not gpu" -k "not memory_is_what_was_announced" $(CORE_TESTS)

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
