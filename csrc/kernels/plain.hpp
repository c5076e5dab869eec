#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "../tensor.hpp"
#include "kernels.hpp"

// One kernel on plain arrays (C, D, H, W): packs the weights, goes to the blocked layout and back,
// runs all tasks. For tests and benchmarks; the engine keeps its tensors blocked.
//
// Results and scratch are full of NaN before a kernel runs, so that what it leaves out, or reads
// before it writes, shows up. Every function checks its arguments and throws Error argument.*.
namespace mome {

// Input of kernels.hpp, (C, D, H, W), with one scale and shift per channel.
struct PlainInput {
  TensorView<const float, 4> data{};
  std::span<const float> scale{};
  std::span<const float> shift{};
  float slope = 1.0F;
};

struct PlainOptions {
  int threads = 0;  // 0: all of the pool
  int repeat = 0;   // timed runs after the one that makes the result
};

struct PlainRun {
  // Channels include those of the padding, which a kernel must have written as zero.
  Buffer<float> result{};
  std::array<std::int64_t, 4> shape{};
  Buffer<double> statistics{};  // (tasks, 2, padded channels)
  std::int64_t tasks = 0;
  std::vector<double> seconds{};  // of each timed run: the arithmetic alone
};

// Of `available_kernels()`.
const Kernels& kernels_named(const std::string& name);

// The first of this name; several sizes of the reference share one.
const ConvolutionKernel& convolution_named(const Kernels& kernels, const std::string& name);

// One or two inputs and weights (Co, Ci, 27), of which input channels from `first` on are used;
// `initial` (Co, D, H, W) is added to.
struct PlainConvolution {
  std::span<const PlainInput> inputs{};
  TensorView<const float, 3> weights{};
  std::int64_t first = 0;
  std::optional<TensorView<const float, 4>> initial{};
};

PlainRun plain_convolution(const Kernels& kernels, const ConvolutionKernel& kernel,
                           const PlainConvolution& call, const PlainOptions& options);

// Products that the scheme needs for such a call.
double plain_multiplications(const ConvolutionKernel& kernel, const PlainConvolution& call);

// Image (C, D, H, W), weights (Co, C, 27).
PlainRun plain_stem(const Kernels& kernels, const TensorView<const float, 4>& image,
                    const TensorView<const float, 3>& weights, const PlainOptions& options);

// Weights (Ci, Co, 8), bias (Co). No statistics.
PlainRun plain_upsampling(const Kernels& kernels, const PlainInput& input,
                          const TensorView<const float, 3>& weights, std::span<const float> bias,
                          const PlainOptions& options);

// Weights (Co, Ci), bias (Co). The result is (voxels, stride) with NaN past the Co maps.
PlainRun plain_head(const Kernels& kernels, const PlainInput& input,
                    const TensorView<const float, 2>& weights, std::span<const float> bias,
                    std::int64_t stride, const PlainOptions& options);

// The gate as in plain_head, or none; expert logits (voxels, E, N).
struct PlainFusion {
  std::optional<PlainInput> gate{};
  TensorView<const float, 2> weights{};
  std::span<const float> bias{};
  TensorView<const float, 3> expert_logits{};
};

struct PlainFusionRun {
  Buffer<float> logits{};                 // (N, voxels)
  std::optional<Buffer<float>> shares{};  // (E, voxels), if asked for
  std::vector<double> seconds{};
};

PlainFusionRun plain_fusion(const Kernels& kernels, const PlainFusion& call, bool shares,
                            const PlainOptions& options);

}  // namespace mome
