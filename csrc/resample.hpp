#pragma once

#include <array>
#include <cstdint>

#include "tensor.hpp"

namespace mome {

// 4 x 4, row by row; maps an index of `out` to a (fractional) index of `in`. The last row is 0 0
// 0 1.
using Matrix4 = std::array<double, 16>;

// Samples `in` at the place of every voxel of `out`, both (I, J, K). Beyond the outermost voxel
// centres of `in` lie voxels of the value `fill`: linear goes over to it within one voxel (as
// scipy.ndimage with mode grid-constant, order 1), nearest takes it from half a voxel on. Halves of
// nearest go up. Linear on integers is rounded to the nearest, halves up. Coordinates are float64.
// Throws Error argument.matrix if the matrix is not finite or its last row is another.
void resample_linear(TensorView<const float, 3> in, const Matrix4& matrix, float fill,
                     TensorView<float, 3> out);
void resample_linear(TensorView<const std::uint8_t, 3> in, const Matrix4& matrix, std::uint8_t fill,
                     TensorView<std::uint8_t, 3> out);
void resample_nearest(TensorView<const float, 3> in, const Matrix4& matrix, float fill,
                      TensorView<float, 3> out);
void resample_nearest(TensorView<const std::uint8_t, 3> in, const Matrix4& matrix,
                      std::uint8_t fill, TensorView<std::uint8_t, 3> out);

}  // namespace mome
