#pragma once

#include <cstdint>

#include "gemm.hpp"
#include "kernels.hpp"
#include "moments.hpp"
#include "schemes.hpp"
#include "simd.hpp"

// The 3x3x3 convolution of kernels.hpp, for every scheme and instruction set.
//
// A task computes `rows` x `columns` tiles of the result in one layer of tiles, all channels:
//   1. per voxel column (d, h at one w): load, norm, LeakyReLU, transform along d, then h
//      -> transformed (plane, block, row, w)     plane = one of the d-h points
//   2. per plane: transform along w, multiply by the weights of each point, transform back along w
//      -> product (plane, output block, row, w)
//   3. per voxel column: transform back along h, then d; statistics; store
// so that nothing transformed leaves the caches. Rounding, float32: rms 5e-6 and at most 5e-5 of
// the result's standard deviation against float64 (tests/kernels).
namespace mome {

template <typename S, typename Depth, typename Plane>
class ConvolutionTask {
 public:
  using V = typename S::Vector;
  static constexpr std::int64_t kWidth = S::kWidth;
  static constexpr int kStride = Plane::kStride;
  static constexpr int kPlanes = Depth::kPoints * Plane::kPoints;
  static constexpr std::int64_t kRowsOfKernel = Plane::kKernel.size();
  static constexpr std::int64_t kMatrices =
      static_cast<std::int64_t>(Depth::kKernel.size()) * kRowsOfKernel * kRowsOfKernel;
  // Tiles of a task: enough rows for the matrix product to reuse a weight, few enough for the
  // caches.
  static constexpr std::int64_t kTiles = 16;

  ConvolutionTask(const Convolution& call, std::int64_t task, float* scratch)
      : call_(call), tiling_(call), channels_(channels_of(call)) {
    layer_ = task / (tiling_.groups * tiling_.chunks);
    const std::int64_t rest = task % (tiling_.groups * tiling_.chunks);
    first_row_ = rest / tiling_.chunks * tiling_.rows;
    first_column_ = rest % tiling_.chunks * tiling_.columns;
    rows_ = smaller(tiling_.rows, tiling_.tiles[1] - first_row_);
    columns_ = smaller(tiling_.columns, tiling_.tiles[2] - first_column_);
    in_width_ = kStride * Plane::kOut * (columns_ - 1) + Plane::kIn;
    out_width_ = Plane::kOut * columns_;
    output_blocks_ = (call.channels + kWidth - 1) / kWidth;
    transformed_ = scratch;
    product_ = transformed_ + kPlanes * channels_.blocks * rows_ * in_width_ * kWidth;
    points_ = product_ + kPlanes * output_blocks_ * rows_ * out_width_ * kWidth;
    multiplied_ = points_ + Plane::kPoints * channels_.blocks * tiles() * kWidth;
    task_ = task;
  }

  void run() {
    for (std::int64_t row = 0; row < rows_; ++row) {
      for (std::int64_t block = 0; block < channels_.blocks; ++block) {
        transform_input(row, block);
      }
    }
    for (int plane = 0; plane < kPlanes; ++plane) {
      multiply_plane(plane);
    }
    for (std::int64_t block = 0; block < output_blocks_; ++block) {
      transform_output(block);
    }
  }

  static std::int64_t tasks(const Convolution& call) {
    const Tiling tiling(call);
    return tiling.tiles[0] * tiling.groups * tiling.chunks;
  }

  static std::int64_t scratch(const Convolution& call) {
    const Tiling tiling(call);
    const std::int64_t inputs = channels_of(call).blocks;
    const std::int64_t outputs = (call.channels + kWidth - 1) / kWidth;
    const std::int64_t tiles = tiling.rows * tiling.columns;
    const std::int64_t in_width = kStride * Plane::kOut * (tiling.columns - 1) + Plane::kIn;
    return kWidth *
           (kPlanes * tiling.rows * inputs * in_width +
            (kPlanes * outputs * Plane::kOut + Plane::kPoints * (inputs + outputs)) * tiles);
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

  // How the tiles of a result are shared out: `columns` along w, `rows` along h, one layer in d.
  struct Tiling {
    explicit Tiling(const Convolution& call) {
      tiles = {pieces(call.out[0], Depth::kOut), pieces(call.out[1], Plane::kOut),
               pieces(call.out[2], Plane::kOut)};
      chunks = pieces(tiles[2], kTiles);
      columns = pieces(tiles[2], chunks);
      rows = smaller(tiles[1], larger(1, kTiles / columns));
      groups = pieces(tiles[1], rows);
    }

    Index3 tiles;
    std::int64_t columns, chunks, rows, groups;
  };

  std::int64_t tiles() const { return rows_ * columns_; }

  void transform_input(std::int64_t row, std::int64_t block) {
    const bool second = block >= channels_.first_blocks;
    const Input& input = call_.inputs[second ? 1 : 0];
    const std::int64_t own = second ? block - channels_.first_blocks : block;
    const auto [depth, height, width] = call_.in;
    const float* data = input.data + own * depth * height * width * kWidth;
    const std::int64_t d0 = kStride * Depth::kOut * layer_ - 1;
    const std::int64_t h0 = kStride * Plane::kOut * (first_row_ + row) - 1;
    const std::int64_t w0 = kStride * Plane::kOut * first_column_ - 1;
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
    const std::int64_t end = larger(begin, smaller(in_width_, width - w0));
    float* to = transformed_ + (block * rows_ + row) * in_width_ * kWidth;
    const V scale = load<S>(input.scale + own * kWidth);
    const V shift = load<S>(input.shift + own * kWidth);
    clear_columns(to, 0, begin);
    if (inside) {
      transform_columns<true>(lines, w0, begin, end, scale, shift, input.slope, to);
    } else {
      transform_columns<false>(lines, w0, begin, end, scale, shift, input.slope, to);
    }
    clear_columns(to, end, in_width_);
  }

  std::int64_t transformed_plane() const { return channels_.blocks * rows_ * in_width_ * kWidth; }

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
    const std::int64_t plane_stride = transformed_plane();
    for (std::int64_t w = begin; w < end; ++w) {
      V half[Depth::kPoints][Plane::kIn];
      for (int h = 0; h < Plane::kIn; ++h) {
        V x[Depth::kIn];
        for (int d = 0; d < Depth::kIn; ++d) {
          if (Inside || lines[d][h] != nullptr) {
            const V t = load<S>(lines[d][h] + (w0 + w) * kWidth) * scale + shift;
            x[d] = maximum<S>(t, slope * t);
          } else {
            x[d] = V{};
          }
        }
        Depth::input(x, 1, &half[0][h], Plane::kIn);
      }
      for (int d = 0; d < Depth::kPoints; ++d) {
        V y[Plane::kPoints];
        Plane::input(half[d], 1, y, 1);
        for (int h = 0; h < Plane::kPoints; ++h) {
          store<S>(to + (d * Plane::kPoints + h) * plane_stride + w * kWidth, y[h]);
        }
      }
    }
  }

  void multiply_plane(int plane) {
    const std::int64_t point_size = channels_.blocks * tiles() * kWidth;
    const float* from = transformed_ + plane * transformed_plane();
    for (std::int64_t line = 0; line < channels_.blocks * rows_; ++line) {
      const std::int64_t block = line / rows_;
      const std::int64_t row = line % rows_;
      float* to = points_ + (block * tiles() + row * columns_) * kWidth;
      for (std::int64_t tile = 0; tile < columns_; ++tile) {
        V x[Plane::kIn];
        V y[Plane::kPoints];
        for (int w = 0; w < Plane::kIn; ++w) {
          x[w] = load<S>(from + (line * in_width_ + tile * kStride * Plane::kOut + w) * kWidth);
        }
        Plane::input(x, 1, y, 1);
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
      multiply<S>(points_ + static_cast<std::int64_t>(p) * point_size,
                  call_.weights + (matrices + Plane::kRow[p]) * matrix, channels_, output_blocks_,
                  tiles(), multiplied_ + static_cast<std::int64_t>(p) * product_size);
    }
    float* to = product_ + plane * product_plane();
    for (std::int64_t tile = 0; tile < output_blocks_ * tiles(); ++tile) {
      V m[Plane::kPoints];
      V y[Plane::kOut];
      for (int p = 0; p < Plane::kPoints; ++p) {
        m[p] = load<S>(multiplied_ + p * product_size + tile * kWidth);
      }
      Plane::output(m, 1, y, 1);
      for (int w = 0; w < Plane::kOut; ++w) {
        store<S>(to + (tile * Plane::kOut + w) * kWidth, y[w]);
      }
    }
  }

  std::int64_t product_plane() const { return output_blocks_ * tiles() * Plane::kOut * kWidth; }

  void transform_output(std::int64_t block) {
    double sums[2][kWidth] = {};
    for (std::int64_t row = 0; row < rows_; ++row) {
      const std::int64_t h0 = Plane::kOut * (first_row_ + row);
      const std::int64_t w0 = Plane::kOut * first_column_;
      const std::int64_t depth = smaller(Depth::kOut, call_.out[0] - Depth::kOut * layer_);
      const std::int64_t height = smaller(Plane::kOut, call_.out[1] - h0);
      const std::int64_t width = smaller(out_width_, call_.out[2] - w0);
      const float* from = product_ + (block * rows_ + row) * out_width_ * kWidth;
      float* to =
          call_.result +
          (((block * call_.out[0] + Depth::kOut * layer_) * call_.out[1] + h0) * call_.out[2] +
           w0) *
              kWidth;
      const auto voxel = [&](std::int64_t d, std::int64_t h, std::int64_t w) {
        return to + ((d * call_.out[1] + h) * call_.out[2] + w) * kWidth;
      };
      Moments<S> moments{V{}};
      // From the middle on, whose values, unlike those of a border, are good pivots.
      for (std::int64_t i = 0; i < width; ++i) {
        const std::int64_t w = i + width / 2 < width ? i + width / 2 : i + width / 2 - width;
        V y[Depth::kOut][Plane::kOut];
        transform_back(from + w * kWidth, y);
        for (std::int64_t d = 0; call_.accumulate && d < depth; ++d) {
          for (std::int64_t h = 0; h < height; ++h) {
            y[d][h] += load<S>(voxel(d, h, w));
          }
        }
        if (i == 0) {
          moments = Moments<S>{y[depth / 2][height / 2]};
        }
        Moments<S> column = moments.empty();
        for (std::int64_t d = 0; d < depth; ++d) {
          for (std::int64_t h = 0; h < height; ++h) {
            store<S>(voxel(d, h, w), y[d][h]);
            column.add(y[d][h]);
          }
        }
        moments.add(column);
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

  void transform_back(const float* from, V (&y)[Depth::kOut][Plane::kOut]) {
    V half[Depth::kPoints][Plane::kOut];
    for (int d = 0; d < Depth::kPoints; ++d) {
      V m[Plane::kPoints];
      for (int h = 0; h < Plane::kPoints; ++h) {
        m[h] = load<S>(from + (d * Plane::kPoints + h) * product_plane());
      }
      Plane::output(m, 1, half[d], 1);
    }
    for (int h = 0; h < Plane::kOut; ++h) {
      Depth::output(&half[0][h], Plane::kOut, &y[0][h], Plane::kOut);
    }
  }

  const Convolution& call_;
  Tiling tiling_;
  Channels channels_;
  std::int64_t task_, layer_, first_row_, first_column_, rows_, columns_;
  std::int64_t in_width_, out_width_, output_blocks_;
  float* transformed_;
  float* product_;
  float* points_;
  float* multiplied_;
};

// Weights (G x G x G) w, float64 until the last rounding. A task packs one block of input channels
// for one group of output blocks.
template <typename S, typename Depth, typename Plane>
class WeightPacking {
 public:
  static constexpr std::int64_t kWidth = S::kWidth;
  static constexpr std::int64_t kMatrices = ConvolutionTask<S, Depth, Plane>::kMatrices;

  static std::int64_t size(const StoredWeights& weights) {
    return kMatrices * channels_of(weights).blocks * kWidth * output_blocks(weights) * kWidth;
  }

  static std::int64_t tasks(const StoredWeights& weights) {
    return channels_of(weights).blocks * output_blocks(weights);
  }

  static void run(const StoredWeights& weights, std::int64_t task, float* packed) {
    const Channels channels = channels_of(weights);
    const std::int64_t outputs = output_blocks(weights);
    const std::int64_t block = task / outputs;
    const std::int64_t output_block = task % outputs;
    const bool second = block >= channels.first_blocks;
    const std::int64_t first =
        weights.first +
        (second ? weights.inputs[0] + (block - channels.first_blocks) * kWidth : block * kWidth);
    const std::int64_t padded = channels.blocks * kWidth;
    const std::int64_t matrix = padded * outputs * kWidth;
    for (std::int64_t k = 0; k < kWidth; ++k) {
      Vector taps[3][3][3] = {};
      if (k < channels.count(block, kWidth)) {
        gather(weights, first + k, output_block * kWidth, taps);
      }
      float* to =
          packed + packed_index<S>(block * kWidth + k, output_block * kWidth, padded, outputs);
      transform(taps, to, matrix);
    }
  }

 private:
  // Twice the lanes' bytes: float64 costs little here, and keeps the rounding to one.
  using Vector = typename VectorOf<double, S::kWidth>::Type;
  using Single = typename S::Vector;

  static Channels channels_of(const StoredWeights& weights) {
    return {weights.inputs[0], weights.inputs[1], kWidth};
  }

  static std::int64_t output_blocks(const StoredWeights& weights) {
    return (weights.outputs + kWidth - 1) / kWidth;
  }

  static void gather(const StoredWeights& weights, std::int64_t channel, std::int64_t first_output,
                     Vector (&taps)[3][3][3]) {
    for (std::int64_t lane = 0; lane < kWidth && first_output + lane < weights.outputs; ++lane) {
      const float* from =
          weights.data + ((first_output + lane) * weights.stored_inputs + channel) * 27;
      for (int tap = 0; tap < 27; ++tap) {
        taps[tap / 9][tap / 3 % 3][tap % 3][lane] = static_cast<double>(from[tap]);
      }
    }
  }

  static void transform(const Vector (&taps)[3][3][3], float* to, std::int64_t matrix) {
    for (const auto& along_d : Depth::kKernel) {
      Vector plane[3][3];
      for (int j = 0; j < 3; ++j) {
        for (int k = 0; k < 3; ++k) {
          plane[j][k] =
              along_d[0] * taps[0][j][k] + along_d[1] * taps[1][j][k] + along_d[2] * taps[2][j][k];
        }
      }
      for (const auto& along_h : Plane::kKernel) {
        Vector line[3];
        for (int k = 0; k < 3; ++k) {
          line[k] = along_h[0] * plane[0][k] + along_h[1] * plane[1][k] + along_h[2] * plane[2][k];
        }
        for (const auto& along_w : Plane::kKernel) {
          const Vector value = along_w[0] * line[0] + along_w[1] * line[1] + along_w[2] * line[2];
          *reinterpret_cast<Single*>(to) = __builtin_convertvector(value, Single);
          to += matrix;
        }
      }
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
