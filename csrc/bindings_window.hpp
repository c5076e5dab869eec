#pragma once

#include <pybind11/pybind11.h>

namespace mome {

// Errors of the core as those of mome_sdk.errors.
void bind_errors();

// Adds the sliding window and what belongs to it.
void bind_window(pybind11::module_& module);

}  // namespace mome
