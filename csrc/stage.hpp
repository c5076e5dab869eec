#pragma once

#include <cstdint>
#include <memory>
#include <span>

#include "engine.hpp"
#include "sliding_window.hpp"
#include "tensor.hpp"
#include "voxel.hpp"

namespace mome {

// True if no value is NaN or infinity.
bool all_finite(std::span<const float> values, int threads);

// What a run is about, for whoever holds its memory.
struct StagePlan {
  Box shape;  // of the image
  Box patch;
  std::int64_t channels;
  std::int64_t classes;
  std::int64_t experts;  // 0 without shares
  std::int64_t batch;
  Output output;
  std::span<const Voxel> starts;  // of all windows, in order
  std::int64_t flips;             // of each window
  int threads;
};

// The memory of one run, and the work on it: the image, the sums of the result, and the buffers of
// a batch, all where the engine wants them. One implementation is the host's, one a GPU's; results
// are the same bits. Calls come in order: gather and add for each batch, then divide and take.
class Stage {
 public:
  virtual ~Stage() = default;

  // Buffers for a call of the engine with `size` windows: those given, then zeros. Logits and
  // shares are NaN: what an engine leaves unwritten must not pass for the result of a batch before.
  virtual WindowBatch gather(std::span<const Window> windows, std::int64_t size) = 0;

  // Adds what the engine wrote for these windows; false if not all of it is finite.
  virtual bool add(std::span<const Window> windows, const WindowBatch& batch) = 0;

  // Divides the sums by their weights; false if not all of them are finite.
  virtual bool divide() = 0;

  // The result, in host memory.
  virtual SlidingWindowResult take() = 0;
};

// In host memory. `image` and `starts` must outlive it.
std::unique_ptr<Stage> host_stage(const StagePlan& plan, TensorView<const float, 4> image,
                                  Buffer<float> weights);

}  // namespace mome
