#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "tensor.hpp"

namespace mome {

// Window weights. `authors`: the table of the published predictor, built in half precision, where
// small weights become a constant floor. `exact`: the same Gaussian in float32.
enum class Blend { exact, authors };

// Where windows begin along each axis, by the rule of nnU-Net 2 (compute_steps_for_sliding_window):
// the fewest windows whose distance is at most `step` patches, spread evenly and rounded half to
// even. The shape may be smaller than the patch, which gives the one start 0.
// Throws Error argument.shape, argument.patch or argument.step.
std::array<std::vector<std::int64_t>, 3> window_starts(const Index3& shape, const Index3& patch,
                                                       double step);

// Zeros that come before the image along each axis when it is smaller than the patch: floor(d / 2)
// of the d that are missing; the rest comes after.
Index3 padding_before(const Index3& shape, const Index3& patch);

// The weight of each voxel of a window, D x H x W, positive, 1000 in the centre voxel (size / 2):
// a unit impulse filtered as scipy.ndimage.gaussian_filter does (sigma = size / 8, truncate 4, mode
// constant, float64), divided by its maximum, times 1000, zeros replaced by the smallest weight
// above zero. With Blend::authors every step after the filter is rounded to half precision.
// Throws Error argument.patch or volume.too-large.
Buffer<float> window_weights(const Index3& patch, Blend blend);

}  // namespace mome
