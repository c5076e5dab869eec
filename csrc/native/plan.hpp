#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "../kernels/kernels.hpp"
#include "weights.hpp"

// What the native engine does for one window, decided before the first: every step, every buffer,
// and where each lies in one piece of memory.
namespace mome {

inline constexpr int kNone = -1;

// A piece of the arena, used from step `first` to step `last`.
struct Storage {
  std::int64_t bytes = 0;
  int first = 0;
  int last = 0;
  std::int64_t offset = 0;
};

// The result of a step: a blocked tensor, and what its numbers mean (kernels.hpp, Input).
struct Map {
  int storage = kNone;
  int norm = kNone;  // storage of scale, then shift
  float slope = 1.0F;
  std::int64_t channels = 0;
  Index3 shape{};
};

enum class StepKind { stem, convolution, upsampling, head, fusion };

// One kernel and, after it, the instance norm of its result.
struct Step {
  StepKind kind;
  std::string name;  // prefix of the names of its tensors
  std::array<int, 2> inputs{kNone, kNone};
  int output = kNone;  // a map
  const ConvolutionKernel* kernel = nullptr;
  std::int64_t stored_inputs = 0;  // of its weights; `first_input` is the first one used
  std::int64_t first_input = 0;
  bool accumulate = false;
  bool normalise = false;
  std::int64_t outputs = 0;  // of a head, of `expert`
  std::int64_t expert = 0;
  int packed = kNone;  // storages, used during this step only
  int statistics = kNone;
  int scratch = kNone;  // one piece per worker
  std::int64_t scratch_bytes = 0;
};

// `maps` and `steps` refer to each other and to `storages` by index.
struct Plan {
  Index3 window{};
  std::int64_t image_channels = 0;
  int workers = 1;
  std::vector<Step> steps;
  std::vector<Map> maps;
  std::vector<Storage> storages;
  int expert_logits = kNone;  // storage, (voxels, E * N)
  std::int64_t bytes = 0;     // of the arena: the engine's memory for one window, weights apart
};

// The plan for windows (in_channels, D, H, W) on at most `workers` workers. Edges are multiples of
// window_multiple().
Plan make_plan(const Architecture& architecture, const Index3& window, const Kernels& kernels,
               int workers);

// The calls of a step without pointers: sizes for the plan, to be completed by the network.
Convolution convolution_of(const Plan& plan, const Step& step);
StoredWeights stored_weights_of(const Plan& plan, const Step& step);

}  // namespace mome
