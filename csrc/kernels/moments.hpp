#pragma once

#include <cstdint>

#include "simd.hpp"

namespace mome {

// Sum and sum of squares of a row of vectors, lane by lane. They are taken about a value of the
// row, so that float32 keeps the variance where the mean is far from zero (background is nearly
// constant), and added up in float64.
template <typename S>
class Moments {
 public:
  using V = typename S::Vector;

  explicit Moments(V pivot) : pivot_(pivot) {}

  void add(V value) {
    const V difference = value - pivot_;
    sum_ += difference;
    squares_ += difference * difference;
  }

  // Adds those of a few values about the same pivot: many numbers lose less when added in groups.
  void add(const Moments& group) {
    sum_ += group.sum_;
    squares_ += group.squares_;
  }

  Moments empty() const { return Moments(pivot_); }

  // `count` is the number of values added.
  void add_to(std::int64_t count, double* sums, double* squares) const {
    for (std::int64_t lane = 0; lane < S::kWidth; ++lane) {
      const auto pivot = static_cast<double>(pivot_[lane]);
      const auto sum = static_cast<double>(sum_[lane]);
      const double shifted = static_cast<double>(count) * pivot;
      sums[lane] += shifted + sum;
      squares[lane] += static_cast<double>(squares_[lane]) + pivot * (2.0 * sum + shifted);
    }
  }

 private:
  V pivot_;
  V sum_ = {};
  V squares_ = {};
};

}  // namespace mome
