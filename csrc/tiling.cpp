#include "tiling.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>

#include "memory.hpp"

namespace mome {
namespace {

std::vector<std::int64_t> axis_starts(std::int64_t size, std::int64_t patch, double step) {
  const std::int64_t last = std::max<std::int64_t>(0, size - patch);
  const double distance = static_cast<double>(patch) * step;
  const auto intervals = static_cast<std::int64_t>(std::ceil(static_cast<double>(last) / distance));
  std::vector<std::int64_t> starts{0};
  for (std::int64_t i = 1; i <= intervals; ++i) {
    const double exact =
        static_cast<double>(last) / static_cast<double>(intervals) * static_cast<double>(i);
    starts.push_back(static_cast<std::int64_t>(std::nearbyint(exact)));
  }
  return starts;
}

// An impulse at size / 2 after scipy.ndimage.gaussian_filter1d: the kernel itself, which is wide
// enough (4 sigma is half the size) to reach both ends.
std::vector<double> filtered_impulse(std::int64_t size) {
  const double sigma = static_cast<double>(size) / 8.0;
  const auto radius = static_cast<std::int64_t>(4.0 * sigma + 0.5);
  const auto phi = [sigma](std::int64_t x) {
    return std::exp(-0.5 / (sigma * sigma) * static_cast<double>(x * x));
  };
  double sum = 0.0;
  for (std::int64_t x = -radius; x <= radius; ++x) {
    sum += phi(x);
  }
  std::vector<double> line(static_cast<std::size_t>(size));
  for (std::int64_t i = 0; i < size; ++i) {
    line[static_cast<std::size_t>(i)] = phi(i - size / 2) / sum;
  }
  return line;
}

// The nearest IEEE half precision number, ties to even; for values below its largest (65504).
float rounded_to_half(float value) {
  if (value == 0.0F) {
    return value;
  }
  const int exponent = std::max(std::ilogb(value), -14);
  const float quantum = std::ldexp(1.0F, exponent - 10);
  return std::nearbyint(value / quantum) * quantum;
}

float rounded_to_float(float value) { return value; }

}  // namespace

std::array<std::vector<std::int64_t>, 3> window_starts(const Index3& shape, const Index3& patch,
                                                       double step) {
  require_positive(patch, "patch");
  require_positive(shape, "shape");
  if (!(step > 0.0 && step <= 1.0)) {
    throw Error("argument.step", "The step is " + text(step) + ".",
                "It is a fraction of the patch: above 0 and at most 1.");
  }
  return {axis_starts(shape[0], patch[0], step), axis_starts(shape[1], patch[1], step),
          axis_starts(shape[2], patch[2], step)};
}

Index3 padding_before(const Index3& shape, const Index3& patch) {
  Index3 before{};
  for (std::size_t axis = 0; axis < 3; ++axis) {
    before[axis] = std::max<std::int64_t>(0, patch[axis] - shape[axis]) / 2;
  }
  return before;
}

Buffer<float> window_weights(const Index3& patch, Blend blend) {
  require_positive(patch, "patch");
  const std::int64_t size = checked_product(patch);
  require_memory(size * std::int64_t{sizeof(float)}, "A window of " + text(patch) + " voxels");
  const std::vector<double> along_d = filtered_impulse(patch[0]);
  const std::vector<double> along_h = filtered_impulse(patch[1]);
  const std::vector<double> along_w = filtered_impulse(patch[2]);
  const auto rounded = blend == Blend::authors ? rounded_to_half : rounded_to_float;

  Buffer<float> weights(size);
  float* next = weights.data();
  for (const double d : along_d) {
    for (const double h : along_h) {
      for (const double w : along_w) {
        *next++ = rounded(static_cast<float>(d * h * w));
      }
    }
  }
  const std::span<float> table = weights.span();
  const float largest = *std::max_element(table.begin(), table.end());
  float smallest = std::numeric_limits<float>::max();
  for (float& weight : table) {
    weight = rounded(rounded(weight / largest) * 1000.0F);
    if (weight > 0.0F) {
      smallest = std::min(smallest, weight);
    }
  }
  std::replace(table.begin(), table.end(), 0.0F, smallest);
  return weights;
}

}  // namespace mome
