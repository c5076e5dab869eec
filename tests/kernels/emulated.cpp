// The module that tests/kernels/test_emulated.py builds: the kernels without the rest of the core.
#include <pybind11/pybind11.h>

#include "bindings_kernels.hpp"

PYBIND11_MODULE(_core, module) {
  mome::bind_kernels(module);
}
