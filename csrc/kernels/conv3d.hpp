#pragma once

#include <array>
#include <cstdint>
#include <type_traits>

#include "gemm.hpp"
#include "kernels.hpp"
#include "moments.hpp"
#include "schemes.hpp"
#include "simd.hpp"

// The 3x3x3 convolution of kernels.hpp, for every scheme and instruction set.
//
// A task computes a few rows of tiles of the result (Tiling), all channels:
//   1. per voxel column (d, h at one w): load, norm, LeakyReLU, transform along d, then h
//      -> transformed (plane, block, row, w)     plane = one of the d-h points
//   2. per plane: transform along w, multiply by the weights of each point, transform back along w
//      -> product (plane, output block, row, w)
//   3. per voxel column: transform back along h, then d; statistics; store
// so that nothing transformed leaves the caches. Rounding, float32: rms 5e-6 and at most 5e-5 of
// the result's standard deviation against float64; up to 1e-4 where a few voxels of 50 deviations
// hardly raise it (tests/kernels).
namespace mome {

template <typename S, typename Depth, typename Plane>
class ConvolutionTask {
 public:
  using V = typename S::Vector;
  static constexpr std::int64_t kWidth = S::kWidth;
  static constexpr int kStride = Plane::kStride;
  // Voxels of a cache line. Columns are transformed a line at a time: rows of a tensor are often a
  // multiple of 4 KiB apart, so that a line would be evicted between its first and second voxel.
  static constexpr int kColumnsOfLine = 16 / S::kWidth;
  static constexpr int kPlanes = Depth::kPoints * Plane::kPoints;
  static constexpr std::int64_t kRowsOfKernel = Plane::kKernel.size();
  static constexpr std::int64_t kMatrices =
      static_cast<std::int64_t>(Depth::kKernel.size()) * kRowsOfKernel * kRowsOfKernel;

  ConvolutionTask(const Convolution& call, std::int64_t task, float* scratch)
      : call_(call),
        tiling_(call),
        channels_(channels_of(call)),
        output_blocks_(blocks_of(call.channels)),
        task_(task),
        place_(tiling_, task) {
    transformed_ = scratch;
    product_ = transformed_ + kPlanes * transformed_plane();
    points_ = product_ + kPlanes * product_plane();
    multiplied_ = points_ + Plane::kPoints * channels_.blocks * tiles() * kWidth;
  }

  void run() {
    for (std::int64_t row = 0; row < place_.rows; ++row) {
      for (std::int64_t block = 0; block < channels_.blocks; ++block) {
        transform_input(row, block);
      }
    }
    Ahead ahead(*this);
    for (int plane = 0; plane < kPlanes; ++plane) {
      multiply_plane(plane, ahead);
    }
    for (std::int64_t block = 0; block < output_blocks_; ++block) {
      transform_output(block);
    }
    if (streaming()) {
      _mm_sfence();
    }
  }

  static std::int64_t tasks(const Convolution& call) {
    const Tiling tiling(call);
    return tiling.layers * tiling.groups * tiling.chunks;
  }

  static std::int64_t scratch(const Convolution& call) {
    const Tiling tiling(call);
    const std::int64_t inputs = channels_of(call).blocks;
    const std::int64_t outputs = blocks_of(call.channels);
    const std::int64_t rows = tiling.depth * tiling.rows;
    const std::int64_t tiles = rows * tiling.columns;
    const std::int64_t in_width = kStride * Plane::kOut * (tiling.columns - 1) + Plane::kIn;
    return kPlanes * (plane_size(inputs, rows, in_width) +
                      plane_size(outputs, rows, Plane::kOut * tiling.columns)) +
           Plane::kPoints * (inputs + outputs) * tiles * kWidth;
  }

  static double multiplications(const Convolution& call) {
    const Tiling tiling(call);
    const auto inputs = static_cast<double>(call.inputs[0].channels + call.inputs[1].channels);
    return static_cast<double>(tiling.tiles[0] * tiling.tiles[1] * tiling.tiles[2]) * kPlanes *
           Plane::kPoints * inputs * static_cast<double>(call.channels);
  }

  static Channels channels_of(const Convolution& call) {
    return {call.inputs[0].channels, call.inputs[1].channels, kWidth};
  }

 private:
  static std::int64_t smaller(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
  static std::int64_t larger(std::int64_t a, std::int64_t b) { return a > b ? a : b; }
  static std::int64_t pieces(std::int64_t whole, std::int64_t piece) {
    return (whole + piece - 1) / piece;
  }

  static std::int64_t blocks_of(std::int64_t channels) { return pieces(channels, kWidth); }

  // How the tiles of a result are shared out: `columns` along w, `rows` along h, and, where a layer
  // is small, `depth` layers. Many tiles reuse a weight more often, few fit the caches: with 16 and
  // 32 tiles 64 -> 64 channels at 64^3 voxels took 119 and 152 ms, 256 -> 256 at 16^3 34 and 28.
  struct Tiling {
    explicit Tiling(const Convolution& call) {
      const std::int64_t wanted = channels_of(call).blocks * kWidth + call.channels < 256 ? 16 : 32;
      tiles = {pieces(call.out[0], Depth::kOut), pieces(call.out[1], Plane::kOut),
               pieces(call.out[2], Plane::kOut)};
      chunks = pieces(tiles[2], wanted);
      columns = pieces(tiles[2], chunks);
      rows = smaller(tiles[1], larger(1, wanted / columns));
      groups = pieces(tiles[1], rows);
      depth = smaller(tiles[0], larger(1, wanted / (columns * tiles[1])));
      layers = pieces(tiles[0], depth);
    }

    Index3 tiles;
    std::int64_t columns, chunks, rows, groups, depth, layers;
  };

  // What a task computes. Tasks run through bands of `kBand` groups of rows, in a band through the
  // layers, so that the layer before is still in the cache where two overlap.
  struct Place {
    static constexpr std::int64_t kBand = 8;

    Place(const Tiling& tiling, std::int64_t task) {
      const std::int64_t group_tasks = tiling.chunks;
      const std::int64_t band = task / (kBand * tiling.layers * group_tasks);
      const std::int64_t band_groups = smaller(kBand, tiling.groups - band * kBand);
      const std::int64_t rest = task - band * kBand * tiling.layers * group_tasks;
      layer = rest / (band_groups * group_tasks) * tiling.depth;
      layers = smaller(tiling.depth, tiling.tiles[0] - layer);
      first_row = (band * kBand + rest / group_tasks % band_groups) * tiling.rows;
      first_column = rest % group_tasks * tiling.columns;
      group_rows = smaller(tiling.rows, tiling.tiles[1] - first_row);
      rows = layers * group_rows;
      columns = smaller(tiling.columns, tiling.tiles[2] - first_column);
    }

    // Row r of the task is row_of(r) along h, in layer_of(r).
    std::int64_t layer_of(std::int64_t r) const { return layer + r / group_rows; }
    std::int64_t row_of(std::int64_t r) const { return first_row + r % group_rows; }
    std::int64_t in_width() const { return kStride * Plane::kOut * (columns - 1) + Plane::kIn; }
    std::int64_t out_width() const { return Plane::kOut * columns; }

    std::int64_t layer, layers, first_row, group_rows, first_column, columns;
    std::int64_t rows;  // of all layers
  };

  // Fetches the rows that a later task reads into the cache, and those that this one adds to, a few
  // lines at a time between the products of this one. Without it the transforms wait for memory:
  // 36 rows at once defeat the processor's own prefetch.
  class Ahead {
   public:
    explicit Ahead(const ConvolutionTask& now)
        : now_(now),
          call_(now.call_),
          channels_(now.channels_),
          there_(now.task_ + call_.workers < tasks(call_)),
          next_(now.tiling_, there_ ? now.task_ + call_.workers : now.task_),
          inputs_(there_ ? channels_.blocks * next_.rows * Depth::kIn * kNew : 0),
          results_(call_.accumulate ? now.output_blocks_ * now.place_.rows * kOut : 0) {
      constexpr std::int64_t kProducts = kPlanes * Plane::kPoints;
      const std::int64_t lines = inputs_ * (next_.in_width() * kWidth / kLine + 1) +
                                 results_ * (now.place_.out_width() * kWidth / kLine + 1);
      burst_ = (lines + kProducts - 1) / kProducts;
    }

    void fetch() {
      for (std::int64_t line = 0; line < burst_ && (at_ < end_ || next_segment()); ++line) {
        __builtin_prefetch(at_, 0, 2);
        at_ += kLine;
      }
    }

   private:
    static constexpr std::int64_t kLine = 16;
    // Rows that the task just before, in the same column, has not read.
    static constexpr std::int64_t kNew = kStride * Plane::kOut;
    static constexpr std::int64_t kOut = std::int64_t{Depth::kOut} * Plane::kOut;

    bool next_segment() {
      while (segment_ < inputs_ + results_) {
        const std::int64_t segment = segment_++;
        if (segment < inputs_ ? input_row(segment) : result_row(segment - inputs_)) {
          return true;
        }
      }
      return false;
    }

    bool input_row(std::int64_t segment) {
      const std::int64_t row = segment / kNew % next_.rows;
      const std::int64_t rest = segment / (kNew * next_.rows);
      const std::int64_t h =
          kStride * Plane::kOut * next_.row_of(row) - 1 + Plane::kIn - kNew + segment % kNew;
      const std::int64_t d = kStride * Depth::kOut * next_.layer_of(row) - 1 + rest % Depth::kIn;
      const std::int64_t block = rest / Depth::kIn;
      const bool second = block >= channels_.first_blocks;
      const std::int64_t own = second ? block - channels_.first_blocks : block;
      const std::int64_t w = kStride * Plane::kOut * next_.first_column - 1;
      return set(call_.inputs[second ? 1 : 0].data, call_.in, {own, d, h}, w, next_.in_width());
    }

    bool result_row(std::int64_t segment) {
      const Place& place = now_.place_;
      const std::int64_t row = segment / kOut % place.rows;
      const std::int64_t d = Depth::kOut * place.layer_of(row) + segment % kOut / Plane::kOut;
      const std::int64_t h = Plane::kOut * place.row_of(row) + segment % Plane::kOut;
      const std::int64_t w = Plane::kOut * place.first_column;
      return set(call_.result, call_.out, {segment / (kOut * place.rows), d, h}, w,
                 place.out_width());
    }

    // Voxels [w, w + count) of the row (block, d, h); false if the tensor has no such row.
    bool set(const float* data, const Index3& shape, const Index3& row, std::int64_t w,
             std::int64_t count) {
      const auto [block, d, h] = row;
      if (d < 0 || d >= shape[0] || h < 0 || h >= shape[1]) {
        return false;
      }
      const float* line = data + ((block * shape[0] + d) * shape[1] + h) * shape[2] * kWidth;
      at_ = line + larger(0, w) * kWidth;
      end_ = line + smaller(shape[2], w + count) * kWidth;
      return true;
    }

    const ConvolutionTask& now_;
    const Convolution& call_;
    const Channels& channels_;
    bool there_;
    Place next_;
    std::int64_t inputs_;   // rows to fetch
    std::int64_t results_;  // rows to fetch
    std::int64_t segment_ = 0;
    std::int64_t burst_ = 0;
    const float* at_ = nullptr;
    const float* end_ = nullptr;
  };

  bool streaming() const {
    return call_.out[0] * call_.out[1] * call_.out[2] * call_.channels > kStreamed;
  }

  std::int64_t tiles() const { return place_.rows * place_.columns; }

  void transform_input(std::int64_t row, std::int64_t block) {
    const bool second = block >= channels_.first_blocks;
    const Input& input = call_.inputs[second ? 1 : 0];
    const std::int64_t own = second ? block - channels_.first_blocks : block;
    const auto [depth, height, width] = call_.in;
    const float* data = input.data + own * depth * height * width * kWidth;
    const std::int64_t d0 = kStride * Depth::kOut * place_.layer_of(row) - 1;
    const std::int64_t h0 = kStride * Plane::kOut * place_.row_of(row) - 1;
    const std::int64_t w0 = kStride * Plane::kOut * place_.first_column - 1;
    const float* lines[Depth::kIn][Plane::kIn];  // null outside of the tensor
    bool inside = true;
    for (int d = 0; d < Depth::kIn; ++d) {
      for (int h = 0; h < Plane::kIn; ++h) {
        const bool there = d0 + d >= 0 && d0 + d < depth && h0 + h >= 0 && h0 + h < height;
        lines[d][h] = there ? data + ((d0 + d) * height + h0 + h) * width * kWidth : nullptr;
        inside = inside && there;
      }
    }
    const std::int64_t begin = larger(0, -w0);
    const std::int64_t end = larger(begin, smaller(place_.in_width(), width - w0));
    float* to = transformed_ + (block * place_.rows + row) * place_.in_width() * kWidth;
    const V scale = load<S>(input.scale + own * kWidth);
    const V shift = load<S>(input.shift + own * kWidth);
    clear_columns(to, 0, begin);
    if (inside) {
      transform_columns<true>(lines, w0, begin, end, scale, shift, input.slope, to);
    } else {
      transform_columns<false>(lines, w0, begin, end, scale, shift, input.slope, to);
    }
    clear_columns(to, end, place_.in_width());
  }

  // Planes lie a cache line further apart than they are long: at powers of two, the same voxel of
  // all planes would compete for one set of the cache.
  static std::int64_t plane_size(std::int64_t blocks, std::int64_t rows, std::int64_t width) {
    return (blocks * rows * width + kColumnsOfLine) * kWidth;
  }
  std::int64_t transformed_plane() const {
    return plane_size(channels_.blocks, place_.rows, place_.in_width());
  }
  std::int64_t product_plane() const {
    return plane_size(output_blocks_, place_.rows, place_.out_width());
  }

  void clear_columns(float* to, std::int64_t begin, std::int64_t end) {
    for (int plane = 0; plane < kPlanes; ++plane) {
      for (std::int64_t w = begin; w < end; ++w) {
        store<S>(to + plane * transformed_plane() + w * kWidth, V{});
      }
    }
  }

  template <bool Inside>
  void transform_columns(const float* (&lines)[Depth::kIn][Plane::kIn], std::int64_t w0,
                         std::int64_t begin, std::int64_t end, V scale, V shift, float slope,
                         float* to) {
    const auto transform = [&]<int Columns>(std::integral_constant<int, Columns>, std::int64_t w) {
      transform_line<Inside, Columns>(lines, w0 + w, scale, shift, slope, to + w * kWidth);
    };
    std::int64_t w = begin;
    for (; w < end && (w0 + w) % kColumnsOfLine != 0; ++w) {
      transform(std::integral_constant<int, 1>{}, w);
    }
    for (; w + kColumnsOfLine <= end; w += kColumnsOfLine) {
      transform(std::integral_constant<int, kColumnsOfLine>{}, w);
    }
    for (; w < end; ++w) {
      transform(std::integral_constant<int, 1>{}, w);
    }
  }

  template <bool Inside, int Columns>
  void transform_line(const float* (&lines)[Depth::kIn][Plane::kIn], std::int64_t w, V scale,
                      V shift, float slope, float* to) {
    V half[Columns][Depth::kPoints][Plane::kIn];
#pragma GCC unroll 16
    for (int h = 0; h < Plane::kIn; ++h) {
      V x[Columns][Depth::kIn];
#pragma GCC unroll 16
      for (int d = 0; d < Depth::kIn; ++d) {
#pragma GCC unroll 16
        for (int c = 0; c < Columns; ++c) {
          if (Inside || lines[d][h] != nullptr) {
            const V t = load<S>(lines[d][h] + (w + c) * kWidth) * scale + shift;
            x[c][d] = maximum<S>(t, slope * t);
          } else {
            x[c][d] = V{};
          }
        }
      }
#pragma GCC unroll 16
      for (int c = 0; c < Columns; ++c) {
        Depth::input(x[c], 1, &half[c][0][h], Plane::kIn);
      }
    }
#pragma GCC unroll 16
    for (int d = 0; d < Depth::kPoints; ++d) {
      V y[Columns][Plane::kPoints];
#pragma GCC unroll 16
      for (int c = 0; c < Columns; ++c) {
        Plane::input(half[c][d], 1, y[c], 1);
      }
#pragma GCC unroll 16
      for (int h = 0; h < Plane::kPoints; ++h) {
#pragma GCC unroll 16
        for (int c = 0; c < Columns; ++c) {
          store<S>(to + (d * Plane::kPoints + h) * transformed_plane() + c * kWidth, y[c][h]);
        }
      }
    }
  }

  void multiply_plane(int plane, Ahead& ahead) {
    const std::int64_t point_size = channels_.blocks * tiles() * kWidth;
    const float* from = transformed_ + plane * transformed_plane();
    for (std::int64_t line = 0; line < channels_.blocks * place_.rows; ++line) {
      const std::int64_t block = line / place_.rows;
      const std::int64_t row = line % place_.rows;
      float* to = points_ + (block * tiles() + row * place_.columns) * kWidth;
      for (std::int64_t tile = 0; tile < place_.columns; ++tile) {
        V x[Plane::kIn];
        V y[Plane::kPoints];
#pragma GCC unroll 16
        for (int w = 0; w < Plane::kIn; ++w) {
          x[w] = load<S>(from +
                         (line * place_.in_width() + tile * kStride * Plane::kOut + w) * kWidth);
        }
        Plane::input(x, 1, y, 1);
#pragma GCC unroll 16
        for (int p = 0; p < Plane::kPoints; ++p) {
          store<S>(to + p * point_size + tile * kWidth, y[p]);
        }
      }
    }
    const std::int64_t matrix = channels_.blocks * kWidth * output_blocks_ * kWidth;
    const std::int64_t matrices =
        (Depth::kRow[static_cast<std::size_t>(plane / Plane::kPoints)] * kRowsOfKernel +
         Plane::kRow[static_cast<std::size_t>(plane % Plane::kPoints)]) *
        kRowsOfKernel;
    const std::int64_t product_size = output_blocks_ * tiles() * kWidth;
    for (std::size_t p = 0; p < Plane::kPoints; ++p) {
      ahead.fetch();
      multiply<S>(points_ + static_cast<std::int64_t>(p) * point_size,
                  call_.weights + (matrices + Plane::kRow[p]) * matrix, channels_, output_blocks_,
                  tiles(), multiplied_ + static_cast<std::int64_t>(p) * product_size);
    }
    float* to = product_ + plane * product_plane();
    for (std::int64_t tile = 0; tile < output_blocks_ * tiles(); ++tile) {
      V m[Plane::kPoints];
      V y[Plane::kOut];
#pragma GCC unroll 16
      for (int p = 0; p < Plane::kPoints; ++p) {
        m[p] = load<S>(multiplied_ + p * product_size + tile * kWidth);
      }
      Plane::output(m, 1, y, 1);
#pragma GCC unroll 16
      for (int w = 0; w < Plane::kOut; ++w) {
        store<S>(to + (tile * Plane::kOut + w) * kWidth, y[w]);
      }
    }
  }

  void transform_output(std::int64_t block) {
    double sums[2][kWidth] = {};
    for (std::int64_t row = 0; row < place_.rows; ++row) {
      const std::int64_t d0 = Depth::kOut * place_.layer_of(row);
      const std::int64_t h0 = Plane::kOut * place_.row_of(row);
      const std::int64_t w0 = Plane::kOut * place_.first_column;
      const std::int64_t depth = smaller(Depth::kOut, call_.out[0] - d0);
      const std::int64_t height = smaller(Plane::kOut, call_.out[1] - h0);
      const std::int64_t width = smaller(place_.out_width(), call_.out[2] - w0);
      const float* from = product_ + (block * place_.rows + row) * place_.out_width() * kWidth;
      float* to = call_.result +
                  (((block * call_.out[0] + d0) * call_.out[1] + h0) * call_.out[2] + w0) * kWidth;
      // From the middle, whose values, unlike those of a border, are good pivots.
      V middle[Depth::kOut][Plane::kOut];
      transform_back(from + width / 2 * kWidth, middle);
      V pivot = middle[depth / 2][height / 2];
      if (call_.accumulate) {
        pivot += load<S>(to + ((depth / 2 * call_.out[1] + height / 2) * call_.out[2] + width / 2) *
                                  kWidth);
      }
      Moments<S> moments{pivot};
      std::int64_t w = 0;
      for (; w + kColumnsOfLine <= width; w += kColumnsOfLine) {
        if (streaming()) {
          write_line<kColumnsOfLine, true>(from + w * kWidth, depth, height, to + w * kWidth,
                                           moments);
        } else {
          write_line<kColumnsOfLine, false>(from + w * kWidth, depth, height, to + w * kWidth,
                                            moments);
        }
      }
      for (; w < width; ++w) {
        write_line<1, false>(from + w * kWidth, depth, height, to + w * kWidth, moments);
      }
      moments.add_to(depth * height * width, sums[0], sums[1]);
    }
    if (call_.statistics != nullptr) {
      double* to = call_.statistics + 2 * task_ * output_blocks_ * kWidth + block * kWidth;
      for (std::int64_t lane = 0; lane < kWidth; ++lane) {
        to[lane] = sums[0][lane];
        to[output_blocks_ * kWidth + lane] = sums[1][lane];
      }
    }
  }

  template <int Columns, bool Streaming>
  void write_line(const float* from, std::int64_t depth, std::int64_t height, float* to,
                  Moments<S>& moments) {
    V y[Columns][Depth::kOut][Plane::kOut];
#pragma GCC unroll 16
    for (int c = 0; c < Columns; ++c) {
      transform_back(from + c * kWidth, y[c]);
    }
    Moments<S> line = moments.empty();
    for (int d = 0; d < depth; ++d) {
      for (int h = 0; h < height; ++h) {
        float* voxel = to + (d * call_.out[1] + h) * call_.out[2] * kWidth;
#pragma GCC unroll 16
        for (int c = 0; c < Columns; ++c) {
          const V value = call_.accumulate ? y[c][d][h] + load<S>(voxel + c * kWidth) : y[c][d][h];
          if (Streaming) {
            store_streaming<S>(voxel + c * kWidth, value);
          } else {
            store<S>(voxel + c * kWidth, value);
          }
          line.add(value);
        }
      }
    }
    moments.add(line);
  }

  void transform_back(const float* from, V (&y)[Depth::kOut][Plane::kOut]) {
    V half[Depth::kPoints][Plane::kOut];
#pragma GCC unroll 16
    for (int d = 0; d < Depth::kPoints; ++d) {
      V m[Plane::kPoints];
#pragma GCC unroll 16
      for (int h = 0; h < Plane::kPoints; ++h) {
        m[h] = load<S>(from + (d * Plane::kPoints + h) * product_plane());
      }
      Plane::output(m, 1, half[d], 1);
    }
#pragma GCC unroll 16
    for (int h = 0; h < Plane::kOut; ++h) {
      Depth::output(&half[0][h], Plane::kOut, &y[0][h], Plane::kOut);
    }
  }

  const Convolution& call_;
  Tiling tiling_;
  Channels channels_;
  std::int64_t output_blocks_;
  std::int64_t task_;
  Place place_;
  float* transformed_;
  float* product_;
  float* points_;
  float* multiplied_;
};

// Weights (G x G x G) w, float64 until the last rounding. A task packs one block of input channels
// for one group of output blocks, whole cache lines at a time.
template <typename S, typename Depth, typename Plane>
class WeightPacking {
 public:
  static constexpr std::int64_t kWidth = S::kWidth;
  static constexpr std::int64_t kMatrices = ConvolutionTask<S, Depth, Plane>::kMatrices;
  static constexpr std::int64_t kRowsOfKernel = Plane::kKernel.size();

  static std::int64_t size(const StoredWeights& weights) {
    return kMatrices * channels_of(weights).blocks * kWidth * output_blocks(weights) * kWidth;
  }

  static std::int64_t tasks(const StoredWeights& weights) {
    return channels_of(weights).blocks * groups(weights);
  }

  static void run(const StoredWeights& weights, std::int64_t task, float* packed) {
    const Channels channels = channels_of(weights);
    const std::int64_t outputs = output_blocks(weights);
    const std::int64_t block = task / groups(weights);
    const std::int64_t first_output = task % groups(weights) * S::kColumns;
    const bool second = block >= channels.first_blocks;
    const std::int64_t first =
        weights.first +
        (second ? weights.inputs[0] + (block - channels.first_blocks) * kWidth : block * kWidth);
    const std::int64_t padded = channels.blocks * kWidth;
    Vector taps[kWidth][S::kColumns][3][3][3] = {};
    for (std::int64_t k = 0; k < channels.count(block, kWidth); ++k) {
      for (std::int64_t c = 0; c < S::kColumns; ++c) {
        gather(weights, first + k, (first_output + c) * kWidth, taps[k][c]);
      }
    }
    float* to = packed + packed_index<S>(block * kWidth, first_output * kWidth, padded, outputs);
    const std::int64_t matrix = padded * outputs * kWidth;
    if (first_output + S::kColumns <= outputs) {
      transform<S::kColumns>(taps, to, matrix);
    } else {
      transform<1>(taps, to, matrix);
    }
  }

 private:
  static_assert(S::kColumns == 2);
  // Twice the lanes' bytes: float64 costs little here, and keeps the rounding to one.
  using Vector = typename VectorOf<double, S::kWidth>::Type;
  using Single = typename S::Vector;

  static Channels channels_of(const StoredWeights& weights) {
    return {weights.inputs[0], weights.inputs[1], kWidth};
  }

  static std::int64_t output_blocks(const StoredWeights& weights) {
    return (weights.outputs + kWidth - 1) / kWidth;
  }

  static std::int64_t groups(const StoredWeights& weights) {
    return (output_blocks(weights) + S::kColumns - 1) / S::kColumns;
  }

  static void gather(const StoredWeights& weights, std::int64_t channel, std::int64_t first_output,
                     Vector (&taps)[3][3][3]) {
    auto* to = reinterpret_cast<double*>(&taps);
    for (std::int64_t lane = 0; lane < kWidth && first_output + lane < weights.outputs; ++lane) {
      const float* from =
          weights.data + ((first_output + lane) * weights.stored_inputs + channel) * 27;
#pragma GCC unroll 27
      for (int tap = 0; tap < 27; ++tap) {
        to[tap * kWidth + lane] = static_cast<double>(from[tap]);
      }
    }
  }

  // Matrix by matrix, all channels of the block in each: few streams of memory at a time.
  template <int Columns>
  static void transform(const Vector (&taps)[kWidth][S::kColumns][3][3][3], float* to,
                        std::int64_t matrix) {
    for (const auto& along_d : Depth::kKernel) {
      Vector plane[kWidth][Columns][3][3];
      for (int line = 0; line < kWidth * Columns * 9; ++line) {
        const int k = line / (Columns * 9);
        const int c = line / 9 % Columns;
        const auto& tap = taps[k][c];
        const int h = line / 3 % 3;
        const int w = line % 3;
        plane[k][c][h][w] =
            along_d[0] * tap[0][h][w] + along_d[1] * tap[1][h][w] + along_d[2] * tap[2][h][w];
      }
      for (const auto& along_h : Plane::kKernel) {
        for (int k = 0; k < kWidth; ++k) {
          transform_lines<Columns>(plane[k], along_h, to + k * Columns * kWidth, matrix);
        }
        to += kRowsOfKernel * matrix;
      }
    }
  }

  template <int Columns>
  static void transform_lines(const Vector (&plane)[Columns][3][3],
                              const std::array<double, 3>& along_h, float* to,
                              std::int64_t matrix) {
    Vector line[Columns][3];
    for (int c = 0; c < Columns; ++c) {
      for (int w = 0; w < 3; ++w) {
        line[c][w] =
            along_h[0] * plane[c][0][w] + along_h[1] * plane[c][1][w] + along_h[2] * plane[c][2][w];
      }
    }
    for (const auto& along_w : Plane::kKernel) {
      for (int c = 0; c < Columns; ++c) {
        const Vector value =
            along_w[0] * line[c][0] + along_w[1] * line[c][1] + along_w[2] * line[c][2];
        store<S>(to + c * kWidth, __builtin_convertvector(value, Single));
      }
      to += matrix;
    }
  }
};

template <typename S, typename Depth, typename Plane>
constexpr ConvolutionKernel convolution_kernel(const char* name) {
  static_assert(Depth::kStride == Plane::kStride);
  using Task = ConvolutionTask<S, Depth, Plane>;
  using Packing = WeightPacking<S, Depth, Plane>;
  return {.name = name,
          .stride = Plane::kStride,
          .packed_size = &Packing::size,
          .pack_tasks = &Packing::tasks,
          .pack = &Packing::run,
          .tasks = &Task::tasks,
          .scratch = &Task::scratch,
          .run = [](const Convolution& call, std::int64_t task,
                    float* scratch) { Task(call, task, scratch).run(); },
          .multiplications = &Task::multiplications};
}

}  // namespace mome
