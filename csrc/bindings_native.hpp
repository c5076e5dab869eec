#pragma once

#include <pybind11/pybind11.h>

#include <memory>

#include "engine.hpp"

namespace mome {

// Adds the class NativeEngine to the module.
void bind_native(pybind11::module_& module);

// The engine behind a Python object: native ones run without Python, all others through it.
std::shared_ptr<Engine> engine_of(const pybind11::object& object);

}  // namespace mome
