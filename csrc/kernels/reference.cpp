// The definitions of kernels.hpp as plain loops: what every fast kernel is tested against, and the
// engine of MOME_CPU=reference. Sums are float64.
#include <array>
#include <cmath>
#include <cstdint>

#include "kernels.hpp"

namespace mome {
namespace {

constexpr std::int64_t kWidth = 8;

std::int64_t blocks_of(std::int64_t channels) { return (channels + kWidth - 1) / kWidth; }

// Position of channel c at voxel v of a blocked tensor of `voxels` voxels.
std::int64_t index_of(std::int64_t c, std::int64_t voxels, std::int64_t v) {
  return (c / kWidth * voxels + v) * kWidth + c % kWidth;
}

double value_of(const Input& input, std::int64_t c, std::int64_t voxels, std::int64_t v) {
  const double t = static_cast<double>(input.scale[c]) *
                       static_cast<double>(input.data[index_of(c, voxels, v)]) +
                   static_cast<double>(input.shift[c]);
  return std::fmax(t, static_cast<double>(input.slope) * t);
}

// (Co, inputs, 27), input channels of both tensors without a gap.
std::int64_t packed_size(const StoredWeights& weights) {
  return weights.outputs * (weights.inputs[0] + weights.inputs[1]) * 27;
}

void pack_output(const StoredWeights& weights, std::int64_t o, float* packed) {
  const std::int64_t taps = (weights.inputs[0] + weights.inputs[1]) * 27;
  for (std::int64_t tap = 0; tap < taps; ++tap) {
    packed[o * taps + tap] = weights.data[(o * weights.stored_inputs + weights.first) * 27 + tap];
  }
}

// One output channel at one voxel; `value` gives (channel, voxel) of the input.
template <typename Value>
double convolve(const Index3& in, const Index3& at, std::int64_t stride, std::int64_t channels,
                const float* weights, const Value& value) {
  double sum = 0.0;
  for (std::int64_t tap = 0; tap < 27; ++tap) {
    const Index3 from{stride * at[0] + tap / 9 - 1, stride * at[1] + tap / 3 % 3 - 1,
                      stride * at[2] + tap % 3 - 1};
    bool inside = true;
    for (std::size_t axis = 0; axis < 3; ++axis) {
      inside = inside && from[axis] >= 0 && from[axis] < in[axis];
    }
    for (std::int64_t c = 0; inside && c < channels; ++c) {
      sum += static_cast<double>(weights[c * 27 + tap]) *
             value(c, (from[0] * in[1] + from[1]) * in[2] + from[2]);
    }
  }
  return sum;
}

// All voxels of padded output channel o, with its statistics; `at` computes one.
template <typename At>
void write_channel(const Index3& out, std::int64_t o, bool accumulate, float* result,
                   double* statistics, std::int64_t padded, const At& at) {
  const std::int64_t voxels = out[0] * out[1] * out[2];
  double sum = 0.0;
  double squares = 0.0;
  for (std::int64_t v = 0; v < voxels; ++v) {
    float& to = result[index_of(o, voxels, v)];
    const double value = at(Index3{v / (out[1] * out[2]), v / out[2] % out[1], v % out[2]});
    to = static_cast<float>(accumulate ? static_cast<double>(to) + value : value);
    sum += static_cast<double>(to);
    squares += static_cast<double>(to) * static_cast<double>(to);
  }
  if (statistics != nullptr) {
    statistics[o] = sum;
    statistics[padded + o] = squares;
  }
}

// One task, so that the statistics need no second sum.
template <int Stride>
void run_convolution(const Convolution& call, std::int64_t /*task*/, float* /*scratch*/) {
  const auto [first, second] = call.inputs;
  const std::int64_t channels = first.channels + second.channels;
  const std::int64_t voxels = call.in[0] * call.in[1] * call.in[2];
  const std::int64_t padded = blocks_of(call.channels) * kWidth;
  const auto value = [&](std::int64_t c, std::int64_t v) {
    return c < first.channels ? value_of(first, c, voxels, v)
                              : value_of(second, c - first.channels, voxels, v);
  };
  for (std::int64_t o = 0; o < padded; ++o) {
    write_channel(call.out, o, call.accumulate, call.result, call.statistics, padded,
                  [&](const Index3& at) {
                    return o < call.channels ? convolve(call.in, at, Stride, channels,
                                                        call.weights + o * channels * 27, value)
                                             : 0.0;
                  });
  }
}

void run_stem(const Stem& call, std::int64_t /*task*/, float* /*scratch*/) {
  const std::int64_t voxels = call.shape[0] * call.shape[1] * call.shape[2];
  const std::int64_t padded = blocks_of(call.channels) * kWidth;
  const auto value = [&](std::int64_t c, std::int64_t v) {
    return static_cast<double>(call.image[c * voxels + v]);
  };
  for (std::int64_t o = 0; o < padded; ++o) {
    write_channel(
        call.shape, o, false, call.result, call.statistics, padded, [&](const Index3& at) {
          return o < call.channels ? convolve(call.shape, at, 1, call.image_channels,
                                              call.weights + o * call.image_channels * 27, value)
                                   : 0.0;
        });
  }
}

void run_upsampling(const Upsampling& call, std::int64_t /*task*/, float* /*scratch*/) {
  const Index3 out{2 * call.in[0], 2 * call.in[1], 2 * call.in[2]};
  const std::int64_t voxels = call.in[0] * call.in[1] * call.in[2];
  const std::int64_t padded = blocks_of(call.channels) * kWidth;
  for (std::int64_t o = 0; o < padded; ++o) {
    write_channel(out, o, false, call.result, nullptr, padded, [&](const Index3& at) {
      double sum = static_cast<double>(call.bias[o]);
      const std::int64_t tap = at[0] % 2 * 4 + at[1] % 2 * 2 + at[2] % 2;
      const std::int64_t v = (at[0] / 2 * call.in[1] + at[1] / 2) * call.in[2] + at[2] / 2;
      for (std::int64_t c = 0; o < call.channels && c < call.input.channels; ++c) {
        sum += static_cast<double>(call.weights[(c * call.channels + o) * 8 + tap]) *
               value_of(call.input, c, voxels, v);
      }
      return sum;
    });
  }
}

float head_at(const Head& call, std::int64_t o, std::int64_t v) {
  double sum = static_cast<double>(call.bias[o]);
  for (std::int64_t c = 0; c < call.input.channels; ++c) {
    sum += static_cast<double>(call.weights[o * call.input.channels + c]) *
           value_of(call.input, c, call.voxels, v);
  }
  return static_cast<float>(sum);
}

void run_head(const Head& call, std::int64_t /*task*/, float* /*scratch*/) {
  for (std::int64_t v = 0; v < call.voxels; ++v) {
    for (std::int64_t o = 0; o < call.outputs; ++o) {
      call.result[v * call.stride + o] = head_at(call, o, v);
    }
  }
}

void run_fusion(const Fusion& call, std::int64_t /*task*/, float* /*scratch*/) {
  const std::int64_t voxels = call.gate.voxels;
  for (std::int64_t v = 0; v < voxels; ++v) {
    const auto product = [&](std::int64_t m) {
      const float gate = call.gate.input.data == nullptr ? 1.0F : head_at(call.gate, m, v);
      return static_cast<double>(call.expert_logits[v * call.experts * call.classes + m]) *
             static_cast<double>(gate);
    };
    std::int64_t winner = 0;
    for (std::int64_t c = 0; c < call.classes; ++c) {
      double logit = 0.0;
      for (std::int64_t e = 0; e < call.experts; ++e) {
        logit += product(e * call.classes + c);
      }
      call.logits[c * voxels + v] = static_cast<float>(logit);
      winner = call.logits[c * voxels + v] > call.logits[winner * voxels + v] ? c : winner;
    }
    for (std::int64_t e = 0; call.shares != nullptr && e < call.experts; ++e) {
      call.shares[e * voxels + v] =
          static_cast<float>(std::fabs(product(e * call.classes + winner)));
    }
  }
}

void copy(const float* stored, std::int64_t size, float* packed) {
  for (std::int64_t i = 0; i < size; ++i) {
    packed[i] = stored[i];
  }
}

template <int Stride>
constexpr ConvolutionKernel convolution_kernel() {
  return {.name = Stride == 1 ? "reference" : "reference, stride 2",
          .stride = Stride,
          .packed_size = &packed_size,
          .pack_tasks = [](const StoredWeights& weights) { return weights.outputs; },
          .pack = &pack_output,
          .tasks = [](const Convolution&) { return std::int64_t{1}; },
          .scratch = [](const Convolution&) { return std::int64_t{0}; },
          .run = &run_convolution<Stride>,
          .multiplications =
              [](const Convolution& call) {
                return 27.0 * static_cast<double>(call.out[0] * call.out[1] * call.out[2]) *
                       static_cast<double>(call.channels) *
                       static_cast<double>(call.inputs[0].channels + call.inputs[1].channels);
              }};
}

// By the order of kernels.cpp: three for stride 1, two for stride 2.
constexpr std::array<ConvolutionKernel, 5> kConvolutions{
    convolution_kernel<1>(), convolution_kernel<1>(), convolution_kernel<1>(),
    convolution_kernel<2>(), convolution_kernel<2>()};

constexpr Kernels kTable{
    .name = "reference",
    .width = kWidth,
    .convolutions = kConvolutions,
    .stem = {.packed_size = &packed_size,
             .pack =
                 [](const StoredWeights& weights, float* packed) {
                   for (std::int64_t o = 0; o < weights.outputs; ++o) {
                     pack_output(weights, o, packed);
                   }
                 },
             .tasks = [](const Stem&) { return std::int64_t{1}; },
             .scratch = [](const Stem&) { return std::int64_t{0}; },
             .run = &run_stem},
    .upsampling = {.packed_size = [](std::int64_t inputs,
                                     std::int64_t outputs) { return 8 * inputs * outputs; },
                   .pack = [](const float* stored, std::int64_t inputs, std::int64_t outputs,
                              float* packed) { copy(stored, 8 * inputs * outputs, packed); },
                   .tasks = [](const Upsampling&) { return std::int64_t{1}; },
                   .scratch = [](const Upsampling&) { return std::int64_t{0}; },
                   .run = &run_upsampling},
    .head = {
        .packed_size = [](std::int64_t inputs, std::int64_t outputs) { return inputs * outputs; },
        .pack = [](const float* stored, std::int64_t inputs, std::int64_t outputs,
                   float* packed) { copy(stored, inputs * outputs, packed); },
        .tasks = [](std::int64_t) { return std::int64_t{1}; },
        .scratch = [](std::int64_t, std::int64_t) { return std::int64_t{0}; },
        .run = &run_head,
        .fuse = &run_fusion}};

}  // namespace

const Kernels& reference_kernels() { return kTable; }

}  // namespace mome
