#pragma once

#include <cstdint>

#include "gemm.hpp"
#include "kernels.hpp"
#include "moments.hpp"
#include "simd.hpp"

// The convolutions of kernels.hpp that have no overlap to save: first convolution, transposed
// convolution, heads, and the fusion after them. Direct, float32.
namespace mome {

// Norm and LeakyReLU of `count` voxels of every block: (blocks, all, width) -> (blocks, count,
// width).
template <typename S>
void activate(const Input& input, std::int64_t all, std::int64_t first, std::int64_t count,
              float* to) {
  using V = typename S::Vector;
  constexpr std::int64_t kWidth = S::kWidth;
  const std::int64_t blocks = (input.channels + kWidth - 1) / kWidth;
  for (std::int64_t block = 0; block < blocks; ++block) {
    const V scale = load<S>(input.scale + block * kWidth);
    const V shift = load<S>(input.shift + block * kWidth);
    const float* from = input.data + (block * all + first) * kWidth;
    for (std::int64_t v = 0; v < count; ++v) {
      const V t = load<S>(from + v * kWidth) * scale + shift;
      store<S>(to + (block * count + v) * kWidth, maximum<S>(t, input.slope * t));
    }
  }
}

// Stored weight (input, output) for a matrix product; `at` says where it is stored.
template <typename S, typename At>
void pack_matrix(std::int64_t inputs, std::int64_t outputs, const At& at, float* packed) {
  constexpr std::int64_t kWidth = S::kWidth;
  const std::int64_t padded_inputs = (inputs + kWidth - 1) / kWidth * kWidth;
  const std::int64_t output_blocks = (outputs + kWidth - 1) / kWidth;
  for (std::int64_t k = 0; k < padded_inputs; ++k) {
    for (std::int64_t o = 0; o < output_blocks * kWidth; ++o) {
      packed[packed_index<S>(k, o, padded_inputs, output_blocks)] =
          k < inputs && o < outputs ? at(k, o) : 0.0F;
    }
  }
}

template <typename S>
std::int64_t matrix_size(std::int64_t inputs, std::int64_t outputs) {
  constexpr std::int64_t kWidth = S::kWidth;
  return (inputs + kWidth - 1) / kWidth * kWidth * ((outputs + kWidth - 1) / kWidth) * kWidth;
}

// A task is a few rows (along w) of one plane d. The nine rows around each are copied with their
// border into scratch, then every tap is a broadcast of the image times a vector of weights.
template <typename S>
struct StemTask {
  using V = typename S::Vector;
  static constexpr std::int64_t kWidth = S::kWidth;
  static constexpr std::int64_t kRows = 8;  // rows of a task

  static std::int64_t packed_size(const StoredWeights& weights) {
    return 27 * weights.inputs[0] * ((weights.outputs + kWidth - 1) / kWidth) * kWidth;
  }

  // (output block, channel, tap, width)
  static void pack(const StoredWeights& weights, float* packed) {
    const std::int64_t blocks = (weights.outputs + kWidth - 1) / kWidth;
    for (std::int64_t o = 0; o < blocks * kWidth; ++o) {
      for (std::int64_t tap = 0; tap < 27 * weights.inputs[0]; ++tap) {
        const std::int64_t from = (o * weights.stored_inputs + weights.first) * 27 + tap;
        packed[(o / kWidth * 27 * weights.inputs[0] + tap) * kWidth + o % kWidth] =
            o < weights.outputs ? weights.data[from] : 0.0F;
      }
    }
  }

  static std::int64_t groups(const Stem& call) { return (call.shape[1] + kRows - 1) / kRows; }
  static std::int64_t tasks(const Stem& call) { return call.shape[0] * groups(call); }
  static std::int64_t scratch(const Stem& call) {
    const std::int64_t floats = 9 * call.image_channels * (call.shape[2] + 2);
    return (floats + kWidth - 1) / kWidth * kWidth;
  }

  static void run(const Stem& call, std::int64_t task, float* scratch) {
    const std::int64_t d = task / groups(call);
    const std::int64_t first = task % groups(call) * kRows;
    const std::int64_t last = first + kRows < call.shape[1] ? first + kRows : call.shape[1];
    const std::int64_t blocks = (call.channels + kWidth - 1) / kWidth;
    const bool streaming =
        call.shape[0] * call.shape[1] * call.shape[2] * call.channels > kStreamed;
    double* statistics =
        call.statistics == nullptr ? nullptr : call.statistics + 2 * task * blocks * kWidth;
    for (std::int64_t i = 0; statistics != nullptr && i < 2 * blocks * kWidth; ++i) {
      statistics[i] = 0.0;
    }
    for (std::int64_t h = first; h < last; ++h) {
      copy_rows(call, d, h, scratch);
      for (std::int64_t block = 0; block < blocks; ++block) {
        double* sums = statistics == nullptr ? nullptr : statistics + block * kWidth;
        if (streaming) {
          run_row<true>(call, d, h, block, scratch, sums, blocks * kWidth);
        } else {
          run_row<false>(call, d, h, block, scratch, sums, blocks * kWidth);
        }
      }
    }
    if (streaming) {
      _mm_sfence();
    }
  }

 private:
  // (channel, d, h, width + 2), zeros outside of the image.
  static void copy_rows(const Stem& call, std::int64_t d, std::int64_t h, float* to) {
    const auto [depth, height, width] = call.shape;
    for (std::int64_t line = 0; line < 9 * call.image_channels; ++line) {
      const std::int64_t z = d + line / 3 % 3 - 1;
      const std::int64_t y = h + line % 3 - 1;
      const bool inside = z >= 0 && z < depth && y >= 0 && y < height;
      const float* from = call.image + ((line / 9 * depth + z) * height + y) * width;
      float* row = to + line * (width + 2);
      row[0] = 0.0F;
      row[width + 1] = 0.0F;
      for (std::int64_t w = 0; w < width; ++w) {
        row[w + 1] = inside ? from[w] : 0.0F;
      }
    }
  }

  template <bool Streaming>
  static void run_row(const Stem& call, std::int64_t d, std::int64_t h, std::int64_t block,
                      const float* rows, double* statistics, std::int64_t squares_after) {
    const auto [depth, height, width] = call.shape;
    const std::int64_t taps = 27 * call.image_channels;
    float* to = call.result + ((block * depth + d) * height + h) * width * kWidth;
    const float* weights = call.weights + block * taps * kWidth;
    V middle[1];
    convolve<1>(rows + width / 2, width + 2, taps, weights, middle);
    Moments<S> moments{middle[0]};
    std::int64_t w = 0;
    for (; w + kTogether <= width; w += kTogether) {
      run_voxels<kTogether, Streaming>(rows + w, width + 2, taps, weights, to + w * kWidth,
                                       moments);
    }
    for (; w < width; ++w) {
      run_voxels<1, false>(rows + w, width + 2, taps, weights, to + w * kWidth, moments);
    }
    if (statistics != nullptr) {
      moments.add_to(width, statistics, statistics + squares_after);
    }
  }

  static constexpr std::int64_t kTogether = 8;

  template <std::int64_t Voxels>
  static void convolve(const float* rows, std::int64_t row_stride, std::int64_t taps,
                       const float* weights, V (&value)[Voxels]) {
#pragma GCC unroll 8
    for (V& each : value) {
      each = V{};
    }
    for (std::int64_t tap = 0; tap < taps; tap += 3) {
      const float* row = rows + tap / 3 * row_stride;
#pragma GCC unroll 3
      for (std::int64_t k = 0; k < 3; ++k) {
        const V weight = load<S>(weights + (tap + k) * kWidth);
#pragma GCC unroll 8
        for (std::int64_t v = 0; v < Voxels; ++v) {
          value[v] += broadcast<S>(row[v + k]) * weight;
        }
      }
    }
  }

  template <std::int64_t Voxels, bool Streaming>
  static void run_voxels(const float* rows, std::int64_t row_stride, std::int64_t taps,
                         const float* weights, float* to, Moments<S>& moments) {
    V value[Voxels];
    convolve<Voxels>(rows, row_stride, taps, weights, value);
    Moments<S> group = moments.empty();
#pragma GCC unroll 8
    for (std::int64_t v = 0; v < Voxels; ++v) {
      if (Streaming) {
        store_streaming<S>(to + v * kWidth, value[v]);
      } else {
        store<S>(to + v * kWidth, value[v]);
      }
      group.add(value[v]);
    }
    moments.add(group);
  }
};

// A task is one row (along w) of the input: a matrix product for each of the eight taps. The
// results of two that are neighbours along w interleave.
template <typename S>
struct UpsamplingTask {
  using V = typename S::Vector;
  static constexpr std::int64_t kWidth = S::kWidth;

  static std::int64_t packed_size(std::int64_t inputs, std::int64_t outputs) {
    return 8 * matrix_size<S>(inputs, outputs);
  }

  static void pack(const float* stored, std::int64_t inputs, std::int64_t outputs, float* packed) {
    for (std::int64_t tap = 0; tap < 8; ++tap) {
      const auto at = [=](std::int64_t k, std::int64_t o) {
        return stored[(k * outputs + o) * 8 + tap];
      };
      pack_matrix<S>(inputs, outputs, at, packed + tap * matrix_size<S>(inputs, outputs));
    }
  }

  static std::int64_t tasks(const Upsampling& call) { return call.in[0] * call.in[1]; }

  static std::int64_t scratch(const Upsampling& call) {
    const Channels channels{call.input.channels, 0, kWidth};
    return (channels.blocks + 2 * ((call.channels + kWidth - 1) / kWidth)) * call.in[2] * kWidth;
  }

  static void run(const Upsampling& call, std::int64_t task, float* scratch) {
    const auto [depth, height, width] = call.in;
    const Channels channels{call.input.channels, 0, kWidth};
    const std::int64_t blocks = (call.channels + kWidth - 1) / kWidth;
    const std::int64_t matrix = matrix_size<S>(call.input.channels, call.channels);
    const std::int64_t product_size = blocks * width * kWidth;
    float* product = scratch + channels.blocks * width * kWidth;
    activate<S>(call.input, depth * height * width, task * width, width, scratch);
    for (std::int64_t pair = 0; pair < 4; ++pair) {
      for (std::int64_t w = 0; w < 2; ++w) {
        multiply<S>(scratch, call.weights + (2 * pair + w) * matrix, channels, blocks, width,
                    product + w * product_size);
      }
      const std::int64_t d = 2 * (task / height) + pair / 2;
      const std::int64_t h = 2 * (task % height) + pair % 2;
      for (std::int64_t block = 0; block < blocks; ++block) {
        const V bias = load<S>(call.bias + block * kWidth);
        const float* from = product + block * width * kWidth;
        float* to = call.result + ((block * 2 * depth + d) * 2 * height + h) * 2 * width * kWidth;
        if (8 * depth * height * width * call.channels > kStreamed) {
          interleave<true>(from, from + product_size, bias, width, to);
        } else {
          interleave<false>(from, from + product_size, bias, width, to);
        }
      }
    }
    _mm_sfence();
  }

 private:
  template <bool Streaming>
  static void interleave(const float* even, const float* odd, V bias, std::int64_t width,
                         float* to) {
    const auto write = [](float* voxel, V value) {
      if (Streaming) {
        store_streaming<S>(voxel, value);
      } else {
        store<S>(voxel, value);
      }
    };
    for (std::int64_t w = 0; w < width; ++w) {
      write(to + 2 * w * kWidth, load<S>(even + w * kWidth) + bias);
      write(to + (2 * w + 1) * kWidth, load<S>(odd + w * kWidth) + bias);
    }
  }
};

// A task is a run of voxels. A head and the fusion walk through it in chunks that stay in the
// cache.
template <typename S>
struct HeadTask {
  static constexpr std::int64_t kWidth = S::kWidth;
  static constexpr std::int64_t kVoxels = 4096;  // of a task
  static constexpr std::int64_t kChunk = 48;

  static std::int64_t tasks(std::int64_t voxels) { return (voxels + kVoxels - 1) / kVoxels; }

  static std::int64_t scratch(std::int64_t inputs, std::int64_t outputs) {
    return ((inputs + kWidth - 1) / kWidth + (outputs + kWidth - 1) / kWidth) * kChunk * kWidth;
  }

  static void pack(const float* stored, std::int64_t inputs, std::int64_t outputs, float* packed) {
    const auto at = [=](std::int64_t k, std::int64_t o) { return stored[o * inputs + k]; };
    pack_matrix<S>(inputs, outputs, at, packed);
  }

  static void run(const Head& call, std::int64_t task, float* scratch) {
    for_chunks(task, call.voxels, [&](std::int64_t first, std::int64_t count) {
      const float* maps = evaluate(call, first, count, scratch);
      for (std::int64_t v = 0; v < count; ++v) {
        float* to = call.result + (first + v) * call.stride;
        for (std::int64_t o = 0; o < call.outputs; ++o) {
          to[o] = maps[(o / kWidth * count + v) * kWidth + o % kWidth] + call.bias[o];
        }
      }
    });
  }

  static void fuse(const Fusion& call, std::int64_t task, float* scratch) {
    for_chunks(task, call.gate.voxels, [&](std::int64_t first, std::int64_t count) {
      const float* gates = nullptr;
      if (call.gate.input.data != nullptr) {
        gates = evaluate(call.gate, first, count, scratch);
      }
      for (std::int64_t v = 0; v < count; ++v) {
        fuse_voxel(call, gates, first, count, v);
      }
    });
  }

 private:
  template <typename Body>
  static void for_chunks(std::int64_t task, std::int64_t voxels, const Body& body) {
    const std::int64_t end = (task + 1) * kVoxels < voxels ? (task + 1) * kVoxels : voxels;
    for (std::int64_t first = task * kVoxels; first < end; first += kChunk) {
      body(first, kChunk < end - first ? kChunk : end - first);
    }
  }

  // (output blocks, count, width), without bias.
  static const float* evaluate(const Head& call, std::int64_t first, std::int64_t count,
                               float* scratch) {
    const Channels channels{call.input.channels, 0, kWidth};
    float* maps = scratch + channels.blocks * kChunk * kWidth;
    activate<S>(call.input, call.voxels, first, count, scratch);
    multiply<S>(scratch, call.weights, channels, (call.outputs + kWidth - 1) / kWidth, count, maps);
    return maps;
  }

  static void fuse_voxel(const Fusion& call, const float* gates, std::int64_t first,
                         std::int64_t count, std::int64_t v) {
    const std::int64_t voxels = call.gate.voxels;
    const float* expert = call.expert_logits + (first + v) * call.experts * call.classes;
    const auto product = [&](std::int64_t m) {
      if (gates == nullptr) {
        return expert[m];
      }
      return expert[m] *
             (gates[(m / kWidth * count + v) * kWidth + m % kWidth] + call.gate.bias[m]);
    };
    std::int64_t winner = 0;
    float best = 0.0F;
    for (std::int64_t c = 0; c < call.classes; ++c) {
      float logit = 0.0F;
      for (std::int64_t e = 0; e < call.experts; ++e) {
        logit += product(e * call.classes + c);
      }
      call.logits[c * voxels + first + v] = logit;
      if (c == 0 || logit > best) {
        winner = c;
        best = logit;
      }
    }
    for (std::int64_t e = 0; call.shares != nullptr && e < call.experts; ++e) {
      const float share = product(e * call.classes + winner);
      call.shares[e * voxels + first + v] = share < 0.0F ? -share : share;
    }
  }
};

}  // namespace mome
