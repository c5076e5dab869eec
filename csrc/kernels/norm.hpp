#pragma once

#include <cstdint>
#include <span>

namespace mome {

// Instance norm from the statistics of a convolution (kernels.hpp): scale and shift such that
// scale * raw + shift = gamma * (raw - mean) / sqrt(variance + eps) + beta, biased variance, over
// `voxels` voxels. Tasks are added in their order, in float64: the result depends on nothing else.
//   statistics  (tasks, 2, padded channels)
//   scale, shift  padded channels; zero past gamma.size()
void instance_norm(std::span<const double> statistics, std::int64_t voxels,
                   std::span<const float> gamma, std::span<const float> beta, double eps,
                   std::span<float> scale, std::span<float> shift);

}  // namespace mome
