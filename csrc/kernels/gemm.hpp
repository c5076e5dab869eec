#pragma once

#include <cstdint>

#include "simd.hpp"

// The matrix product under every kernel but the first convolution.
namespace mome {

// Input channels of up to two tensors in blocks of `width`; the last block of each may be partial.
struct Channels {
  std::int64_t first_blocks;
  std::int64_t blocks;
  std::int64_t first_last;  // channels in the last block of the first tensor
  std::int64_t last;        // channels in the last block

  Channels(std::int64_t first, std::int64_t second, std::int64_t width)
      : first_blocks((first + width - 1) / width),
        blocks(first_blocks + (second + width - 1) / width),
        first_last(first - (first_blocks - 1) * width),
        last(second == 0 ? first_last : second - (blocks - first_blocks - 1) * width) {}

  std::int64_t count(std::int64_t block, std::int64_t width) const {
    return block == first_blocks - 1 ? first_last : block == blocks - 1 ? last : width;
  }
};

// c[v][t] = sum over channels k of a[k][t] * u[k][v], for `Rows` rows t and `Columns` blocks v of
// output channels.
//   a  (blocks, row_stride, width)          row t at a + t * width
//   u  (blocks * width, Columns * width)
//   c  (Columns, row_stride, width)         overwritten
template <typename S, int Rows, int Columns>
void multiply_tile(const float* a, const float* u, const Channels& channels,
                   std::int64_t row_stride, float* c) {
  using V = typename S::Vector;
  constexpr std::int64_t kWidth = S::kWidth;
  V sum[Rows][Columns];
#pragma GCC unroll 16
  for (int t = 0; t < Rows; ++t) {
#pragma GCC unroll 16
    for (int v = 0; v < Columns; ++v) {
      sum[t][v] = V{};  // one by one: an initialiser would clear memory too
    }
  }
  const auto accumulate = [&](const float* row, const float* column) {
    // The weights of a layer are one stream, which the processor's own prefetch loses at every
    // page.
    __builtin_prefetch(column + 1024, 0, 2);
    V weight[Columns];
#pragma GCC unroll 16
    for (int v = 0; v < Columns; ++v) {
      weight[v] = load<S>(column + v * kWidth);
    }
#pragma GCC unroll 16
    for (int t = 0; t < Rows; ++t) {
      const V value = broadcast<S>(row[t * kWidth]);
#pragma GCC unroll 16
      for (int v = 0; v < Columns; ++v) {
        sum[t][v] += value * weight[v];
      }
    }
  };
  for (std::int64_t block = 0; block < channels.blocks; ++block) {
    const float* row = a + block * row_stride * kWidth;
    const float* column = u + block * kWidth * Columns * kWidth;
    const std::int64_t count = channels.count(block, kWidth);
    if (count == kWidth) {
      for (std::int64_t k = 0; k < kWidth; ++k) {
        accumulate(row + k, column + k * Columns * kWidth);
      }
    } else {
      for (std::int64_t k = 0; k < count; ++k) {
        accumulate(row + k, column + k * Columns * kWidth);
      }
    }
  }
#pragma GCC unroll 16
  for (int t = 0; t < Rows; ++t) {
#pragma GCC unroll 16
    for (int v = 0; v < Columns; ++v) {
      store<S>(c + (v * row_stride + t) * kWidth, sum[t][v]);
    }
  }
}

template <typename S, int Columns, int Rows>
void multiply_rows(std::int64_t rows, const float* a, const float* u, const Channels& channels,
                   std::int64_t row_stride, float* c) {
  if (rows == Rows) {
    multiply_tile<S, Rows, Columns>(a, u, channels, row_stride, c);
  } else if constexpr (Rows > 1) {
    multiply_rows<S, Columns, Rows - 1>(rows, a, u, channels, row_stride, c);
  }
}

template <typename S, int Columns>
void multiply_columns(const float* a, const float* u, const Channels& channels, std::int64_t rows,
                      std::int64_t row_stride, float* c) {
  // A single column of accumulators takes twice the rows, to fill the pipeline.
  constexpr int kMost = S::kRows * S::kColumns / Columns;
  std::int64_t pieces = (rows + kMost - 1) / kMost;
  for (std::int64_t t = 0; t < rows; --pieces) {
    const std::int64_t count = (rows - t + pieces - 1) / pieces;
    multiply_rows<S, Columns, kMost>(count, a + t * S::kWidth, u, channels, row_stride,
                                     c + t * S::kWidth);
    t += count;
  }
}

// c (blocks of outputs, rows, width) = a (blocks of channels, rows, width) x u, all output
// channels. u is a sequence of groups of S::kColumns blocks of outputs (the last may be smaller),
// each (blocks * width, columns * width).
template <typename S>
void multiply(const float* a, const float* u, const Channels& channels, std::int64_t output_blocks,
              std::int64_t rows, float* c) {
  constexpr std::int64_t kWidth = S::kWidth;
  static_assert(S::kColumns == 2);
  std::int64_t block = 0;
  for (; block + 2 <= output_blocks; block += 2) {
    multiply_columns<S, 2>(a, u + block * channels.blocks * kWidth * kWidth, channels, rows, rows,
                           c + block * rows * kWidth);
  }
  if (block < output_blocks) {
    multiply_columns<S, 1>(a, u + block * channels.blocks * kWidth * kWidth, channels, rows, rows,
                           c + block * rows * kWidth);
  }
}

// Where weight (input channel k of the padded channels, output o) lies in such a sequence.
template <typename S>
std::int64_t packed_index(std::int64_t k, std::int64_t output, std::int64_t padded_inputs,
                          std::int64_t output_blocks) {
  constexpr std::int64_t kWidth = S::kWidth;
  const std::int64_t block = output / kWidth;
  const std::int64_t group = block / S::kColumns * S::kColumns;
  const std::int64_t columns =
      output_blocks - group < S::kColumns ? output_blocks - group : std::int64_t{S::kColumns};
  return (group * padded_inputs + k * columns + (block - group)) * kWidth + output % kWidth;
}

}  // namespace mome
