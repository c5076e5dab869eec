#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <cstdint>
#include <memory>
#include <string>

namespace mome {

// A buffer of a batch on a GPU, as an engine in Python gets it: float32, dense, C order. It keeps
// the memory alive, and hands it out without a copy, by its address or by DLPack.
struct __attribute__((visibility("hidden"))) DeviceTensor {
  void* data;
  std::array<std::int64_t, 5> shape;
  std::string device;  // "cuda:0"
  int ordinal;
  std::uintptr_t stream;  // on which the runner works
  std::shared_ptr<const void> owner;
};

// Adds the class DeviceTensor to the module.
void bind_device_tensor(pybind11::module_& module);

}  // namespace mome
