#pragma once

#include <pybind11/numpy.h>

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "error.hpp"
#include "tensor.hpp"

// NumPy arrays as views of the core, and its buffers as NumPy arrays.
namespace mome {

template <typename T>
std::string dtype_name() {
  return pybind11::str(pybind11::dtype::of<T>()).template cast<std::string>();
}

// A dense array in C order of exactly this type; copies if the layout differs, never converts.
template <typename T, std::size_t Rank>
std::pair<pybind11::array, TensorView<const T, Rank>> input(const pybind11::array& array,
                                                            const char* name) {
  if (!pybind11::isinstance<pybind11::array_t<T>>(array) ||
      array.ndim() != static_cast<pybind11::ssize_t>(Rank)) {
    throw Error("argument.array",
                std::string("The ") + name + " is an array of " +
                    pybind11::str(array.dtype()).cast<std::string>() + " with " +
                    std::to_string(array.ndim()) + " axes.",
                "Expected are " + std::to_string(Rank) + " axes of " + dtype_name<T>() + ".");
  }
  pybind11::array dense = pybind11::array_t<T, pybind11::array::c_style>::ensure(array);
  TensorView<const T, Rank> view{static_cast<const T*>(dense.data()), {}};
  for (std::size_t axis = 0; axis < Rank; ++axis) {
    view.shape[axis] = dense.shape(static_cast<pybind11::ssize_t>(axis));
  }
  return {std::move(dense), view};
}

template <typename T, std::size_t Rank>
pybind11::array_t<T> array_of(Buffer<T> buffer, const std::array<std::int64_t, Rank>& shape) {
  auto owner = std::make_unique<Buffer<T>>(std::move(buffer));
  T* data = owner->data();
  const pybind11::capsule base(owner.get(), [](void* memory) {
    const std::unique_ptr<Buffer<T>> release(static_cast<Buffer<T>*>(memory));
  });
  owner.release();  // the capsule owns it now
  return pybind11::array_t<T>(shape, data, base);
}

inline int threads_of(std::optional<int> threads) {
  if (threads && *threads < 1) {
    throw Error("argument.threads", "The number of threads is " + std::to_string(*threads) + ".",
                "It must be at least 1, or None for all.");
  }
  return threads.value_or(0);
}

}  // namespace mome
