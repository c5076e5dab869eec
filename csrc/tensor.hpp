#pragma once

#include <array>
#include <cassert>
#include <charconv>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <span>
#include <string>
#include <system_error>
#include <type_traits>

#include "error.hpp"

namespace mome {

// Three sizes or positions, in the axis order of the array they belong to.
using Index3 = std::array<std::int64_t, 3>;

inline std::string text(const Index3& value) {
  return std::to_string(value[0]) + " x " + std::to_string(value[1]) + " x " +
         std::to_string(value[2]);
}

// The shortest decimal that reads back as the same number.
template <std::floating_point T>
std::string text(T value) {
  std::array<char, 32> digits{};
  const auto [end, status] = std::to_chars(digits.data(), digits.data() + digits.size(), value);
  assert(status == std::errc{});
  return {digits.data(), end};
}

// Product of sizes that may come from a file or a caller; throws Error volume.too-large instead of
// wrapping around.
inline std::int64_t checked_product(std::span<const std::int64_t> sizes) {
  std::int64_t product = 1;
  for (const std::int64_t size : sizes) {
    assert(size >= 0);
    if (__builtin_mul_overflow(product, size, &product)) {
      throw Error("volume.too-large", "The number of elements does not fit 63 bits.",
                  "Use a smaller volume.");
    }
  }
  return product;
}

// Throws Error argument.<name> unless every axis has at least one voxel and their product fits.
inline void require_positive(const Index3& sizes, const std::string& name) {
  if (sizes[0] < 1 || sizes[1] < 1 || sizes[2] < 1) {
    throw Error("argument." + name, "The " + name + " is " + text(sizes) + ".",
                "Every axis needs at least one voxel.");
  }
  checked_product(sizes);
}

// A dense array in C order that somebody else owns. On a GPU the pointer is a device address.
template <typename T, std::size_t Rank>
struct TensorView {
  T* data = nullptr;
  std::array<std::int64_t, Rank> shape{};

  std::int64_t size() const {
    std::int64_t product = 1;
    for (const std::int64_t extent : shape) {
      product *= extent;
    }
    return product;
  }

  // The sub-array at an index of the first axes: view(b, c) of (B, C, D, H, W) is (D, H, W).
  template <typename... Indices>
  auto operator()(Indices... indices) const {
    constexpr std::size_t kLeading = sizeof...(Indices);
    static_assert(kLeading >= 1 && kLeading <= Rank);
    const std::array<std::int64_t, kLeading> leading{static_cast<std::int64_t>(indices)...};
    std::int64_t offset = 0;
    for (std::size_t axis = 0; axis < Rank; ++axis) {
      offset *= shape[axis];
      if (axis < kLeading) {
        assert(leading[axis] >= 0 && leading[axis] < shape[axis]);
        offset += leading[axis];
      }
    }
    if constexpr (kLeading == Rank) {
      return data + offset;
    } else {
      TensorView<T, Rank - kLeading> view;
      view.data = data + offset;
      for (std::size_t axis = kLeading; axis < Rank; ++axis) {
        view.shape[axis - kLeading] = shape[axis];
      }
      return view;
    }
  }

  // A template only so that nvcc does not warn of the one that views of constants have no use for.
  template <std::same_as<const T> U>
  operator TensorView<U, Rank>() const
    requires(!std::is_const_v<T>)
  {
    return {data, shape};
  }
};

// Owns 64-byte aligned memory for numbers; its content is unset until somebody writes it.
template <typename T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(std::int64_t size) : size_(size) {
    assert(size >= 0);
    const std::size_t bytes = static_cast<std::size_t>(size) * sizeof(T);
    data_.reset(static_cast<T*>(::operator new(bytes == 0 ? 1 : bytes, kAlignment)));
  }

  T* data() const { return data_.get(); }
  std::int64_t size() const { return size_; }
  std::span<T> span() const { return {data(), static_cast<std::size_t>(size_)}; }

  template <std::size_t Rank>
  TensorView<T, Rank> view(const std::array<std::int64_t, Rank>& shape) const {
    assert((TensorView<T, Rank>{data(), shape}.size() <= size_));
    return {data(), shape};
  }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Free {
    void operator()(T* memory) const { ::operator delete(memory, kAlignment); }
  };

  std::unique_ptr<T, Free> data_;
  std::int64_t size_ = 0;
};

}  // namespace mome
