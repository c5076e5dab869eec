#pragma once

#include <span>

namespace mome {

// out = (in - mean) / standard deviation, over all values: the population deviation, two passes,
// float64 sums in blocks of fixed size, so that threads do not change the result. `out` may be
// `in`. Throws Error volume.empty, volume.not-finite or volume.constant.
void zscore(std::span<const float> in, std::span<float> out);

}  // namespace mome
