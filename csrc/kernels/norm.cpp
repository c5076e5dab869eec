#include "norm.hpp"

#include <cassert>
#include <cmath>
#include <cstddef>
#include <limits>

namespace mome {

void instance_norm(std::span<const double> statistics, std::int64_t voxels,
                   std::span<const float> gamma, std::span<const float> beta, double eps,
                   std::span<float> scale, std::span<float> shift) {
  const std::size_t channels = scale.size();
  assert(statistics.size() % (2 * channels) == 0);
  for (std::size_t c = 0; c < channels; ++c) {
    if (c >= gamma.size()) {
      scale[c] = 0.0F;
      shift[c] = 0.0F;
      continue;
    }
    double sum = 0.0;
    double squares = 0.0;
    for (std::size_t at = c; at < statistics.size(); at += 2 * channels) {
      sum += statistics[at];
      squares += statistics[at + channels];
    }
    const double mean = sum / static_cast<double>(voxels);
    // Rounding may leave less than nothing; what is not finite must not become a number.
    const double variance = squares / static_cast<double>(voxels) - mean * mean;
    const double factor = std::isfinite(variance) ? static_cast<double>(gamma[c]) /
                                                        std::sqrt(std::fmax(0.0, variance) + eps)
                                                  : std::numeric_limits<double>::quiet_NaN();
    scale[c] = static_cast<float>(factor);
    shift[c] = static_cast<float>(static_cast<double>(beta[c]) - mean * factor);
  }
}

}  // namespace mome
