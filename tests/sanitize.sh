#!/bin/sh
# Builds the C++ core with AddressSanitizer and UndefinedBehaviorSanitizer beside the usual build and
# runs its tests on that. Usage: tests/sanitize.sh [PYTHON] (one with the test extra installed).
# MOME_SANITIZE chooses other sanitizers, for example thread.
set -eu

cd "$(dirname "$0")/.."
python=$(realpath --no-symlinks "${1:-.venv/bin/python}")
sanitizers=${MOME_SANITIZE:-address,undefined}
build=build/sanitize-$(echo "$sanitizers" | tr , -)
compiler=${CXX:-g++}

# A package of links to the sources, but with a core of its own.
rm -rf "$build/package"
mkdir -p "$build/package/mome_sdk"
for file in mome_sdk/*; do
    case $file in
    mome_sdk/_core.*.so) ;;
    *) ln -s "$PWD/$file" "$build/package/mome_sdk/" ;;
    esac
done
cmake -S csrc -B "$build/core" -DCMAKE_BUILD_TYPE=Debug -DCMAKE_CXX_COMPILER="$compiler" \
    -DCMAKE_CXX_FLAGS=-O1 -DMOME_WERROR=ON -DMOME_SANITIZE="$sanitizers" \
    -DCMAKE_LIBRARY_OUTPUT_DIRECTORY="$PWD/$build/package/mome_sdk" \
    -DPython_EXECUTABLE="$("$python" -c 'import sys; print(sys.executable)')" \
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
# The tests run in the folder of that package: with -m and -c, Python looks there first.
root=$PWD
cd "$build/package"
LD_PRELOAD="$("$compiler" -print-file-name=$runtime) $("$compiler" -print-file-name=libstdc++.so)"
ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=1:strict_string_checks=1
UBSAN_OPTIONS=print_stacktrace=1
export LD_PRELOAD ASAN_OPTIONS UBSAN_OPTIONS
"$python" -c 'import os; from mome_sdk import _core; assert _core.__file__.startswith(os.getcwd())'
"$python" -m pytest -p no:cacheprovider -q -c "$root/pyproject.toml" \
    "$root/tests/csrc" "$root/tests/test_sliding_window.py" \
    --deselect tests/test_sliding_window.py::test_memory_is_what_was_announced
