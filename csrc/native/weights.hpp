#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "../safetensors.hpp"

namespace mome {

// The numbers of a network, as in architecture.py; strides are 1, 2, 2, ...
struct Architecture {
  std::vector<std::int64_t> features;
  std::vector<std::int64_t> encoder_convs;
  std::vector<std::int64_t> decoder_convs;
  std::int64_t in_channels = 0;
  std::int64_t classes = 0;
  std::int64_t experts = 0;

  bool gated() const { return experts > 1; }
  std::int64_t stages() const { return static_cast<std::int64_t>(features.size()); }
  // Every edge of a window is a multiple of this.
  std::int64_t window_multiple() const { return std::int64_t{1} << (stages() - 1); }
};

// A bundle's weights.safetensors, mapped: tensors by name, and the architecture that its metadata
// holds.
class Weights {
 public:
  // Throws as SafetensorsFile, and Error bundle.architecture if the metadata lacks a usable one.
  explicit Weights(const std::string& path, std::int64_t offset = 0,
                   std::optional<std::int64_t> size = std::nullopt);

  const Architecture& architecture() const { return architecture_; }

  // The numbers of a float32 tensor; throws Error bundle.tensors unless it is there with this
  // shape, at a multiple of 4 bytes.
  std::span<const float> tensor(const std::string& name,
                                const std::vector<std::int64_t>& shape) const;

 private:
  SafetensorsFile file_;
  Architecture architecture_;
};

}  // namespace mome
