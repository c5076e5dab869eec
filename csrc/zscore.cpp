#include "zscore.hpp"

#include <algorithm>
#include <cassert>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "error.hpp"
#include "parallel.hpp"
#include "tensor.hpp"

namespace mome {
namespace {

constexpr std::int64_t kBlock = 1 << 14;

// What one pass learns about a block, and then about the whole.
struct Summary {
  double sum = 0.0;
  float smallest = std::numeric_limits<float>::infinity();
  float largest = -std::numeric_limits<float>::infinity();
};

// Sum of term(x), with the smallest and the largest x. NaN and infinity show in the sum.
template <typename Term>
Summary summarise(std::span<const float> values, const Term& term) {
  const auto size = static_cast<std::int64_t>(values.size());
  const std::int64_t count = (size + kBlock - 1) / kBlock;
  std::vector<Summary> blocks(static_cast<std::size_t>(count));
  parallel_for(count, 0, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t block = begin; block < end; ++block) {
      Summary summary;
      const std::int64_t last = std::min(size, (block + 1) * kBlock);
      for (std::int64_t i = block * kBlock; i < last; ++i) {
        const float value = values[static_cast<std::size_t>(i)];
        summary.sum += term(value);
        summary.smallest = std::min(summary.smallest, value);
        summary.largest = std::max(summary.largest, value);
      }
      blocks[static_cast<std::size_t>(block)] = summary;
    }
  });
  Summary whole;
  for (const Summary& summary : blocks) {
    whole.sum += summary.sum;
    whole.smallest = std::min(whole.smallest, summary.smallest);
    whole.largest = std::max(whole.largest, summary.largest);
  }
  return whole;
}

}  // namespace

void zscore(std::span<const float> in, std::span<float> out) {
  assert(in.size() == out.size());
  if (in.empty()) {
    throw Error("volume.empty", "The volume has no voxels.");
  }
  const auto count = static_cast<double>(in.size());
  const Summary values = summarise(in, [](float value) { return static_cast<double>(value); });
  if (!std::isfinite(values.sum)) {
    throw Error("volume.not-finite", "The volume holds NaN or infinity.",
                "Every voxel needs a finite intensity.");
  }
  if (values.smallest == values.largest) {
    throw Error("volume.constant",
                "Every voxel of the volume has the value " + text(values.smallest) + ".",
                "An image with contrast is expected.");
  }
  const double mean = values.sum / count;
  const Summary squares = summarise(in, [mean](float value) {
    const double difference = static_cast<double>(value) - mean;
    return difference * difference;
  });
  const double deviation = std::sqrt(squares.sum / count);
  const auto size = static_cast<std::int64_t>(in.size());
  parallel_for(size, 0, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      const auto at = static_cast<std::size_t>(i);
      out[at] = static_cast<float>((static_cast<double>(in[at]) - mean) / deviation);
    }
  });
}

}  // namespace mome
