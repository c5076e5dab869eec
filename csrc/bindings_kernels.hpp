#pragma once

#include <pybind11/pybind11.h>

namespace mome {

// Adds the kernels on plain arrays to the module.
void bind_kernels(pybind11::module_& module);

}  // namespace mome
