#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <string>

#include "../tensor.hpp"

// The arithmetic of the native engine: no allocation, no exceptions, no files. A kernel is a few
// functions over a call (what to compute), which splits into tasks; tasks may run on any thread and
// in any order, each with its own scratch, and write disjoint results.
//
// Tensors are blocked: (ceil(C / width), D, H, W, width), 64-byte aligned. Channels past C are zero
// in what a kernel reads and are written as zero.
namespace mome {

// A tensor as a kernel reads it. Its numbers are raw results of the kernel before; what they mean
// is
//   value = max(t, slope * t),  t = scale[c] * raw + shift[c]
// that is, instance norm and LeakyReLU (or scale 1, shift 0, slope 1 for nothing). Outside of the
// tensor the value is 0. scale and shift are padded with zeros to whole blocks.
struct Input {
  const float* data = nullptr;
  const float* scale = nullptr;
  const float* shift = nullptr;
  float slope = 1.0F;
  std::int64_t channels = 0;
};

// 3x3x3 convolution, zero padding 1, without bias, of up to two tensors taken one after the other:
//   result[o, z] (+)= sum over c, k of w[o, c, k] * value[c, stride * z + k - 1]
// Every edge of `out` is ceil(edge of `in` / stride).
struct Convolution {
  std::array<Input, 2> inputs{};  // the second may have no channels
  Index3 in{};
  Index3 out{};
  std::int64_t channels = 0;       // of the result
  const float* weights = nullptr;  // as packed
  float* result = nullptr;         // may not overlap the inputs
  bool accumulate = false;         // add to `result` instead of overwriting it
  // Tasks that run at the same time: what the task this far ahead will read is fetched in advance.
  std::int64_t workers = 1;
  // Per task: sum, then sum of squares, of every (padded) channel of the result; or none.
  double* statistics = nullptr;
};

// The weights of a convolution where they are stored: (Co, Ci, 3, 3, 3), of which the input
// channels [first, first + sum(inputs)) are taken.
struct StoredWeights {
  const float* data = nullptr;
  std::int64_t stored_inputs = 0;  // Ci
  std::int64_t first = 0;
  std::array<std::int64_t, 2> inputs{};  // channels of each input tensor
  std::int64_t outputs = 0;              // Co
};

struct ConvolutionKernel {
  const char* name;
  int stride;
  std::int64_t (*packed_size)(const StoredWeights&);  // floats
  std::int64_t (*pack_tasks)(const StoredWeights&);
  void (*pack)(const StoredWeights&, std::int64_t task, float* packed);
  std::int64_t (*tasks)(const Convolution&);
  std::int64_t (*scratch)(const Convolution&);  // floats
  void (*run)(const Convolution&, std::int64_t task, float* scratch);
  double (*multiplications)(const Convolution&);  // that the algorithm needs; for the profile
};

// The first convolution: the same as above, of a plain image (C, D, H, W), stride 1.
struct Stem {
  const float* image = nullptr;
  std::int64_t image_channels = 0;
  Index3 shape{};
  std::int64_t channels = 0;
  const float* weights = nullptr;
  float* result = nullptr;
  double* statistics = nullptr;
};

struct StemKernel {
  std::int64_t (*packed_size)(const StoredWeights&);
  void (*pack)(const StoredWeights&, float* packed);
  std::int64_t (*tasks)(const Stem&);
  std::int64_t (*scratch)(const Stem&);
  void (*run)(const Stem&, std::int64_t task, float* scratch);
};

// 2x2x2 transposed convolution, stride 2: result[o, 2z + k] = bias[o] + sum over c of
// w[c, o, k] * value[c, z]. Stored weights are (Ci, Co, 2, 2, 2).
struct Upsampling {
  Input input{};
  Index3 in{};
  std::int64_t channels = 0;
  const float* weights = nullptr;
  const float* bias = nullptr;  // padded with zeros
  float* result = nullptr;
};

struct UpsamplingKernel {
  std::int64_t (*packed_size)(std::int64_t inputs, std::int64_t outputs);
  void (*pack)(const float* stored, std::int64_t inputs, std::int64_t outputs, float* packed);
  std::int64_t (*tasks)(const Upsampling&);
  std::int64_t (*scratch)(const Upsampling&);
  void (*run)(const Upsampling&, std::int64_t task, float* scratch);
};

// 1x1x1 convolution to a few maps, interleaved: result[v * stride + o] = bias[o] + sum over c of
// w[o, c] * value[c, v], for all voxels v. Stored weights are (Co, Ci).
struct Head {
  Input input{};
  std::int64_t voxels = 0;
  std::int64_t outputs = 0;
  const float* weights = nullptr;
  const float* bias = nullptr;  // `outputs` numbers
  float* result = nullptr;
  std::int64_t stride = 0;
};

// The end of MoME. With m = N * e + c for expert e and class c, and gates = the head of the gating
// network (1 where there is none):
//   logits[c, v] = sum over e of expert_logits[v, m] * gates[m, v]
//   shares[e, v] = abs(expert_logits[v, m] * gates[m, v]), c the class of the largest logit
struct Fusion {
  Head gate{};  // `result` is not used; without a gating network input.data is null
  std::int64_t experts = 0;
  std::int64_t classes = 0;
  const float* expert_logits = nullptr;  // (voxels, E * N)
  float* logits = nullptr;               // (N, voxels)
  float* shares = nullptr;               // (E, voxels), or null
};

struct HeadKernel {
  std::int64_t (*packed_size)(std::int64_t inputs, std::int64_t outputs);
  void (*pack)(const float* stored, std::int64_t inputs, std::int64_t outputs, float* packed);
  std::int64_t (*tasks)(std::int64_t voxels);
  std::int64_t (*scratch)(std::int64_t inputs, std::int64_t outputs);
  void (*run)(const Head&, std::int64_t task, float* scratch);
  void (*fuse)(const Fusion&, std::int64_t task, float* scratch);
};

// One row of the table of kernels.
struct Kernels {
  const char* name;  // "reference", "avx2", "avx512": what MOME_CPU takes
  std::int64_t width;
  std::span<const ConvolutionKernel> convolutions;
  StemKernel stem;
  UpsamplingKernel upsampling;
  HeadKernel head;

  // The convolution kernel for a stride and the size of the result.
  const ConvolutionKernel& convolution(int stride, const Index3& out) const;

  std::int64_t blocks(std::int64_t channels) const { return (channels + width - 1) / width; }
  std::int64_t padded(std::int64_t channels) const { return blocks(channels) * width; }
};

// What was compiled for and runs on this processor, slowest first.
std::span<const Kernels* const> available_kernels();

// The kernels that MOME_CPU names, else the fastest for a network whose largest maps have this many
// channels. Throws Error engine.cpu if MOME_CPU names what this processor lacks, and engine.missing
// if nothing but the reference is left unasked.
const Kernels& chosen_kernels(std::int64_t channels);

const Kernels& reference_kernels();
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();

}  // namespace mome
