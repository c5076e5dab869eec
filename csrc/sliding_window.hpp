#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <optional>
#include <span>

#include "engine.hpp"
#include "tensor.hpp"
#include "tiling.hpp"

namespace mome {

struct SlidingWindowOptions {
  Index3 patch{};                // D, H, W
  double step = 0.5;             // distance of windows, in patches
  std::array<bool, 3> mirror{};  // average over the flips along these axes
  Blend blend = Blend::exact;
  std::int64_t batch = 1;  // windows, flips counted, in one call of the engine
  int threads = 0;         // 0: all of the pool
};

// After each call of the engine: windows done and windows in all, flips counted. May throw to stop.
using Progress = std::function<void(std::int64_t done, std::int64_t total)>;

// What a run gives for each voxel of the image.
enum class Output { logits, probabilities, labels };

struct Wanted {
  Output output = Output::logits;
  bool shares = false;
};

struct SlidingWindowResult {
  Buffer<float> maps{};                   // logits or probabilities, (N, D, H, W)
  Buffer<std::uint8_t> labels{};          // (D, H, W), instead of the maps
  std::optional<Buffer<float>> shares{};  // (E, D, H, W)
};

// Throws Error argument.patch, argument.step or argument.batch if a run with these cannot begin.
void check_sliding_window(const SlidingWindowOptions& options);

// Bytes that run_sliding_window allocates itself, its result included; the image and what the
// engine allocates come on top. `experts` is 0 without shares. For an engine on a GPU these are
// bytes of the GPU, on which the image comes on top.
std::int64_t sliding_window_bytes(const Index3& shape, std::int64_t channels, std::int64_t classes,
                                  std::int64_t experts, const SlidingWindowOptions& options);

// Runs an engine over every window of an image (C, D, H, W) of any size and blends what it returns:
//   logits[n, v] = sum over windows i and flips f of w[v - s_i] * l[i, f, n, v - s_i]
//                  / (F * sum over windows i of w[v - s_i]),        all sums in float32,
// with w = window_weights(), s_i the window's start, F = 2^axes flips, l flipped back. Axes shorter
// than the patch are padded with zeros (padding_before()) and cropped again. Shares are blended in
// the same way; they are not normalised over the experts.
// The sums at a voxel run over windows, then flips, in one fixed order: the result is the same, bit
// by bit, for any number of threads, and for any batch as far as the engine's own result is.
// For an engine on a GPU the image is uploaded once, everything above happens there, with the same
// bits (softmax apart: exp is not), and the result is downloaded once. engine.run() then gets the
// addresses of the GPU and a stream; each call is waited for.
// Throws Error
//   argument.*          shapes, step or batch that cannot be used
//   volume.too-large    sliding_window_bytes() is more than the memory available
//   engine.device       the engine's GPU is not there, or the core was built without CUDA
//   engine.out-of-memory  the GPU has not enough memory left
//   engine.shape        the engine declares no channels or no classes
//   engine.shares       shares asked of an engine that has none
//   engine.not-finite   the engine left or wrote NaN or infinity
// and what the engine and `progress` throw. Nothing is kept of an unfinished run.
SlidingWindowResult run_sliding_window(Engine& engine, TensorView<const float, 4> image,
                                       const SlidingWindowOptions& options, const Wanted& wanted,
                                       const Progress& progress);

// Over the first axis of logits (N, V): probabilities = exp(l) / sum exp(l), and the class of the
// largest logit (the lowest of equals). Throw Error engine.not-finite on NaN or infinity.
void softmax(TensorView<const float, 2> logits, TensorView<float, 2> probabilities);
void argmax(TensorView<const float, 2> logits, TensorView<std::uint8_t, 1> labels);

// The most probable class of each voxel from probabilities (N, V), 0 where none beats the
// background (class 0): the rule by which Python's Segmenter makes masks.
void class_mask(TensorView<const float, 2> probabilities, std::span<std::uint8_t> mask);

}  // namespace mome
