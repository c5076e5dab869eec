#!/bin/sh
# Builds the C++ core with AddressSanitizer and UndefinedBehaviorSanitizer beside the usual build and
# runs its tests on that. Usage: tests/sanitize.sh [PYTHON] (one with the test extra installed).
# MOME_SANITIZE chooses other sanitizers, for example thread.
set -eu

cd "$(dirname "$0")/.."
python=$("${1:-.venv/bin/python}" -c 'import sys; print(sys.executable)')
sanitizers=${MOME_SANITIZE:-address,undefined}
root=$PWD
build=$root/build/sanitize-$(echo "$sanitizers" | tr , -)
compiler=${CXX:-g++}

# A package of links to the sources, but with a core of its own.
rm -rf "$build/package"
mkdir -p "$build/package/mome_sdk"
for file in mome_sdk/*; do
    case $file in
    mome_sdk/_core.*.so) ;;
    *) ln -s "$root/$file" "$build/package/mome_sdk/" ;;
    esac
done
cmake -S csrc -B "$build/core" -DCMAKE_BUILD_TYPE=Debug -DCMAKE_CXX_COMPILER="$compiler" \
    -DCMAKE_CXX_FLAGS=-O1 -DMOME_WERROR=ON -DMOME_SANITIZE="$sanitizers" \
    -DMOME_EMULATE_AVX512=ON \
    -DCMAKE_LIBRARY_OUTPUT_DIRECTORY="$build/package/mome_sdk" \
    -DPython_EXECUTABLE="$python" \
    -Dpybind11_DIR="$("$python" -c 'import pybind11; print(pybind11.get_cmake_dir())')"
cmake --build "$build/core" --parallel

case $sanitizers in
*address*) runtime=libasan.so ;;
*thread*) runtime=libtsan.so ;;
*) runtime=libubsan.so ;;
esac
# The runtime must come first, and with it libstdc++, whose exceptions it intercepts. Python frees
# little at its end, so leaks are not looked for. Announced memory cannot be compared under the
# sanitizers, which keep what was freed.
runtime=$("$compiler" -print-file-name=$runtime)
export LD_PRELOAD="$runtime $("$compiler" -print-file-name=libstdc++.so)"
export ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=1:strict_string_checks=1
export UBSAN_OPTIONS=print_stacktrace=1
export TSAN_OPTIONS=die_after_fork=0
# Python looks in the working directory first, also in the processes that tests start.
cd "$build/package"
"$python" -c 'import os, mome_sdk._core as c; assert c.__file__.startswith(os.getcwd()), c.__file__'
"$python" -m pytest -c "$root/pyproject.toml" --rootdir "$root" -p no:cacheprovider -q \
    "$root/tests/csrc" "$root/tests/kernels" "$root/tests/test_sliding_window.py" \
    -m "not slow" --ignore "$root/tests/kernels/test_twins.py" \
    --deselect tests/test_sliding_window.py::test_memory_is_what_was_announced
