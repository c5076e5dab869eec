#pragma once

#include <cstdint>

#include "tensor.hpp"

namespace mome {

// Connected components of a mask (I, J, K): two voxels belong together if they touch by a face, an
// edge or a corner (26 neighbours) and have the same class above zero. Writes 0 for background and
// 1..count for the components, the largest first, and of equals the one that comes first in the
// array. Returns the count.
std::int32_t connected_components(TensorView<const std::uint8_t, 3> mask,
                                  TensorView<std::int32_t, 3> labels);

}  // namespace mome
