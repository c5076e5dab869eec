#pragma once

#include <string>
#include <vector>

#include "tensor.hpp"
#include "tiling.hpp"

namespace mome {

// What a program must know of a bundle to run it: images are z-scored (zscore.hpp), 1 mm, axes SAR:
// D to the head, H to the face, W to the right.
struct Bundle {
  std::string name;
  std::string notice;  // to be said with every result
  Index3 patch{};
  Blend blend = Blend::exact;
  std::vector<std::string> classes;     // one per logit, the background first
  std::vector<std::string> modalities;  // one per expert
  std::string weights;                  // path of weights.safetensors
};

// Reads bundle.json in a bundle's folder. Throws Error bundle.unreadable or bundle.manifest. The
// files' sha256 are not compared, as Python's loader does: `mome inspect` checks them.
Bundle read_bundle(const std::string& folder);

}  // namespace mome
