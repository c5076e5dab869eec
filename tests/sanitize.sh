#!/bin/sh
# Builds the C++ core with AddressSanitizer and UndefinedBehaviorSanitizer beside the usual build and
# runs its tests on that; then tests/csrc/threads.cpp with ThreadSanitizer. Where the processor has
# no AVX-512, both builds emulate it. Usage: tests/sanitize.sh [PYTHON] (one with the test extra installed).
set -eu

cd "$(dirname "$0")/.."
python=$("${1:-.venv/bin/python}" -c 'import sys; print(sys.executable)')
root=$PWD
build=$root/build/sanitize
compiler=${CXX:-g++}
emulate=ON
if grep -qw avx512f /proc/cpuinfo; then emulate=OFF; fi

# configure FOLDER SANITIZERS
configure() {
    cmake -S csrc -B "$1" -DCMAKE_BUILD_TYPE=Debug -DCMAKE_CXX_COMPILER="$compiler" \
        -DCMAKE_CXX_FLAGS=-O1 -DMOME_WERROR=ON -DMOME_SANITIZE="$2" -DMOME_EMULATE_AVX512=$emulate -DMOME_CUDA=OFF \
        -DCMAKE_LIBRARY_OUTPUT_DIRECTORY="$build/package/mome_sdk" \
        -DPython_EXECUTABLE="$python" \
        -Dpybind11_DIR="$("$python" -c 'import pybind11; print(pybind11.get_cmake_dir())')"
}

# A package of links to the sources, but with a core of its own.
rm -rf "$build/package"
mkdir -p "$build/package/mome_sdk"
for file in mome_sdk/*; do
    case $file in
    mome_sdk/_core.*.so) ;;
    *) ln -s "$root/$file" "$build/package/mome_sdk/" ;;
    esac
done

# ThreadSanitizer goes with no other, and Python is not built with it: a program without Python.
configure "$build/thread" thread
cmake --build "$build/thread" --target threads --parallel "$(nproc)"
"$build/thread/threads"

configure "$build/address" address,undefined
cmake --build "$build/address" --parallel "$(nproc)"
"$build/address/threads"

# The runtime must come first, and with it libstdc++, whose exceptions it intercepts. Python frees
# little at its end, so leaks are not looked for. Announced memory cannot be compared under the
# sanitizers, which keep what was freed.
runtime=$("$compiler" -print-file-name=libasan.so)
export LD_PRELOAD="$runtime $("$compiler" -print-file-name=libstdc++.so)"
export ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=1:strict_string_checks=1
export UBSAN_OPTIONS=print_stacktrace=1
# Python looks in the working directory first, also in the processes that tests start.
cd "$build/package"
"$python" -c 'import os, mome_sdk._core as c; assert c.__file__.startswith(os.getcwd()), c.__file__'
"$python" -m pytest -c "$root/pyproject.toml" --rootdir "$root" -p no:cacheprovider -q \
    "$root/tests/csrc" "$root/tests/kernels" "$root/tests/test_sliding_window.py" \
    -m "not slow" --ignore "$root/tests/kernels/test_twins.py" \
    --deselect tests/test_sliding_window.py::test_memory_is_what_was_announced

# The GPU runner on the emulated GPU, whose core takes the place of the other.
LD_PRELOAD='' cmake -S "$root/csrc" -B "$build/address" -DMOME_EMULATE_GPU=ON \
    -DCMAKE_LIBRARY_OUTPUT_DIRECTORY="$build/gpu/mome_sdk"
rm -rf "$build/gpu"
cp -r --no-dereference "$build/package" "$build/gpu"
LD_PRELOAD='' cmake --build "$build/address" --target emulated_gpu --parallel "$(nproc)"
cd "$build/gpu"
"$python" -m pytest -c "$root/pyproject.toml" --rootdir "$root" -p no:cacheprovider -q \
    "$root/tests/test_gpu_runner.py" -m gpu
