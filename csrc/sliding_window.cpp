#include "sliding_window.hpp"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <limits>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "memory.hpp"
#include "parallel.hpp"

namespace mome {
namespace {

using Flip = std::array<bool, 3>;

// One window of the image seen in one of its flips: what an engine gets as one entry of a batch.
struct Item {
  Index3 start;  // in voxels of the image; negative where zeros are padded before it
  Flip flip;
};

// The part of a window along one axis that lies in the image, in voxels of the image.
struct Overlap {
  std::int64_t begin;
  std::int64_t end;
};

Overlap overlap(std::int64_t start, std::int64_t patch, std::int64_t size) {
  return {std::max<std::int64_t>(0, start), std::min(size, start + patch)};
}

std::vector<Flip> flips_of(const std::array<bool, 3>& mirror) {
  std::vector<Flip> flips{Flip{}};
  for (std::size_t axis = 0; axis < 3; ++axis) {
    if (mirror[axis]) {
      const std::size_t count = flips.size();
      for (std::size_t i = 0; i < count; ++i) {
        Flip flip = flips[i];
        flip[axis] = true;
        flips.push_back(flip);
      }
    }
  }
  return flips;
}

std::vector<Index3> windows_of(const Index3& shape, const SlidingWindowOptions& options) {
  const auto starts = window_starts(shape, options.patch, options.step);
  const Index3 before = padding_before(shape, options.patch);
  std::vector<Index3> windows;
  for (const std::int64_t d : starts[0]) {
    for (const std::int64_t h : starts[1]) {
      for (const std::int64_t w : starts[2]) {
        windows.push_back({d - before[0], h - before[1], w - before[2]});
      }
    }
  }
  return windows;
}

bool finite(float value) {
  constexpr std::uint32_t kExponent = 0x7F800000U;
  return (std::bit_cast<std::uint32_t>(value) & kExponent) != kExponent;
}

// Reads everything and decides at the end, which lets the compiler vectorise the loop.
bool all_finite(std::span<const float> values, int threads) {
  std::atomic<bool> whole{true};
  const auto size = static_cast<std::int64_t>(values.size());
  parallel_for(size, threads, [&](std::int64_t begin, std::int64_t end) {
    std::uint32_t piece = 1;
    for (std::int64_t i = begin; i < end; ++i) {
      piece &= static_cast<std::uint32_t>(finite(values[static_cast<std::size_t>(i)]));
    }
    if (piece == 0) {
      whole.store(false, std::memory_order_relaxed);
    }
  });
  return whole;
}

// Buffers that live through all calls of one run. Engines may hold on to their views of them.
struct BatchMemory {
  Buffer<float> windows;
  Buffer<float> logits;
  Buffer<float> shares;
};

class Runner {
 public:
  Runner(Engine& engine, TensorView<const float, 4> image, const SlidingWindowOptions& options,
         bool shares)
      : engine_(engine),
        image_(image),
        shape_{image.shape[1], image.shape[2], image.shape[3]},
        options_(options),
        shares_(shares),
        flips_(flips_of(options.mirror)),
        windows_(windows_of(shape_, options)) {}

  SlidingWindowResult run(const Progress& progress) {
    allocate();
    const std::int64_t total = static_cast<std::int64_t>(windows_.size() * flips_.size());
    for (std::int64_t first = 0; first < total; first += options_.batch) {
      const std::int64_t used = std::min(options_.batch, total - first);
      run_batch(first, used);
      if (progress) {
        progress(first + used, total);
      }
    }
    divide(view_of(result_.logits, engine_.classes()));
    if (shares_) {
      divide(view_of(*result_.shares, engine_.experts()));
    }
    return std::move(result_);
  }

 private:
  Item item(std::int64_t index) const {
    const auto flips = static_cast<std::int64_t>(flips_.size());
    return {windows_[static_cast<std::size_t>(index / flips)],
            flips_[static_cast<std::size_t>(index % flips)]};
  }

  TensorView<float, 4> view_of(const Buffer<float>& sums, std::int64_t maps) const {
    return sums.view<4>({maps, shape_[0], shape_[1], shape_[2]});
  }

  void allocate() {
    const std::int64_t voxels = checked_product(shape_);
    const std::int64_t window = options_.batch * checked_product(options_.patch);
    weights_ = window_weights(options_.patch, options_.blend);
    memory_ = std::make_shared<BatchMemory>();
    memory_->windows = Buffer<float>(window * engine_.channels());
    memory_->logits = Buffer<float>(window * engine_.classes());
    result_.logits = Buffer<float>(voxels * engine_.classes());
    clear(result_.logits);
    if (shares_) {
      memory_->shares = Buffer<float>(window * engine_.experts());
      result_.shares = Buffer<float>(voxels * engine_.experts());
      clear(*result_.shares);
    }
  }

  void clear(const Buffer<float>& buffer) const { fill(buffer, 0.0F); }

  void fill(const Buffer<float>& buffer, float value) const {
    parallel_for(buffer.size(), options_.threads, [&](std::int64_t begin, std::int64_t end) {
      std::fill(buffer.data() + begin, buffer.data() + end, value);
    });
  }

  void run_batch(std::int64_t first, std::int64_t used) {
    // An engine with a fixed batch also gets a full one last; its surplus windows are zero.
    const std::int64_t size = engine_.batch() ? options_.batch : used;
    const auto [d, h, w] = options_.patch;
    const auto windows = memory_->windows.view<5>({size, engine_.channels(), d, h, w});
    gather(first, used, windows);
    // Whatever an engine leaves unwritten must not pass for the result of the previous batch.
    fill(memory_->logits, std::numeric_limits<float>::quiet_NaN());
    WindowBatch batch{.windows = windows,
                      .logits = memory_->logits.view<5>({size, engine_.classes(), d, h, w}),
                      .owner = memory_};
    if (shares_) {
      fill(memory_->shares, std::numeric_limits<float>::quiet_NaN());
      batch.shares = memory_->shares.view<5>({size, engine_.experts(), d, h, w});
    }
    engine_.run(batch);
    require_finite(batch.logits, used);
    accumulate(first, used, batch.logits, view_of(result_.logits, engine_.classes()));
    if (shares_) {
      require_finite(*batch.shares, used);
      accumulate(first, used, *batch.shares, view_of(*result_.shares, engine_.experts()));
    }
  }

  void gather(std::int64_t first, std::int64_t used, TensorView<float, 5> windows) const {
    const std::int64_t channels = engine_.channels();
    const std::int64_t depth = options_.patch[0];
    const std::int64_t planes = windows.shape[0] * channels * depth;
    parallel_for(planes, options_.threads, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t plane = begin; plane < end; ++plane) {
        const std::int64_t entry = plane / (channels * depth);
        const std::int64_t channel = plane / depth % channels;
        const std::int64_t z = plane % depth;
        const TensorView<float, 2> out = windows(entry, channel, z);
        if (entry < used) {
          gather_plane(item(first + entry), channel, z, out);
        } else {
          std::fill_n(out.data, out.size(), 0.0F);
        }
      }
    });
  }

  void gather_plane(const Item& item, std::int64_t channel, std::int64_t z,
                    TensorView<float, 2> out) const {
    const auto [depth, height, width] = options_.patch;
    const std::int64_t source_z = item.start[0] + (item.flip[0] ? depth - 1 - z : z);
    const Overlap columns = overlap(item.start[2], width, shape_[2]);
    const std::int64_t count = columns.end - columns.begin;
    // Zeros left of the row as it lies in `out`.
    const std::int64_t left =
        item.flip[2] ? item.start[2] + width - columns.end : columns.begin - item.start[2];
    for (std::int64_t y = 0; y < height; ++y) {
      float* row = out(y).data;
      const std::int64_t source_y = item.start[1] + (item.flip[1] ? height - 1 - y : y);
      if (source_z < 0 || source_z >= shape_[0] || source_y < 0 || source_y >= shape_[1]) {
        std::fill_n(row, width, 0.0F);
        continue;
      }
      const float* source = image_(channel, source_z, source_y, columns.begin);
      std::fill_n(row, left, 0.0F);
      if (item.flip[2]) {
        std::reverse_copy(source, source + count, row + left);
      } else {
        std::copy_n(source, count, row + left);
      }
      std::fill_n(row + left + count, width - left - count, 0.0F);
    }
  }

  void require_finite(TensorView<const float, 5> maps, std::int64_t used) const {
    const auto size = static_cast<std::size_t>(used * maps(0).size());
    if (!all_finite({maps.data, size}, options_.threads)) {
      throw Error("engine.not-finite",
                  "Engine " + engine_.name() + " returned NaN or infinity, or left voxels unset.",
                  "Try precision fp32 or another engine; if it stays, the weights are damaged.");
    }
  }

  // Adds the first `used` entries of `maps` (B, M, patch) to `sums` (M, D, H, W). Threads share the
  // planes of the image, never the windows: each voxel sees the windows in their own order.
  void accumulate(std::int64_t first, std::int64_t used, TensorView<const float, 5> maps,
                  TensorView<float, 4> sums) const {
    std::vector<Item> items;
    for (std::int64_t entry = 0; entry < used; ++entry) {
      items.push_back(item(first + entry));
    }
    parallel_for(sums.shape[0] * shape_[0], options_.threads,
                 [&](std::int64_t begin, std::int64_t end) {
                   for (std::int64_t plane = begin; plane < end; ++plane) {
                     const std::int64_t map = plane / shape_[0];
                     const std::int64_t z = plane % shape_[0];
                     for (std::size_t entry = 0; entry < items.size(); ++entry) {
                       const std::int64_t window_z = z - items[entry].start[0];
                       if (window_z >= 0 && window_z < options_.patch[0]) {
                         add_plane(items[entry], window_z, maps(entry, map), sums(map, z));
                       }
                     }
                   }
                 });
  }

  void add_plane(const Item& item, std::int64_t z, TensorView<const float, 3> map,
                 TensorView<float, 2> sums) const {
    const auto [depth, height, width] = options_.patch;
    const TensorView<const float, 3> weights = weights_.view<3>(options_.patch);
    const std::int64_t map_z = item.flip[0] ? depth - 1 - z : z;
    const Overlap rows = overlap(item.start[1], height, shape_[1]);
    const Overlap columns = overlap(item.start[2], width, shape_[2]);
    const std::int64_t count = columns.end - columns.begin;
    const std::int64_t first = columns.begin - item.start[2];
    for (std::int64_t row = rows.begin; row < rows.end; ++row) {
      const std::int64_t y = row - item.start[1];
      const std::int64_t map_y = item.flip[1] ? height - 1 - y : y;
      const float* weight = weights(z, y, first);
      float* sum = sums(row, columns.begin);
      if (item.flip[2]) {
        const float* value = map(map_z, map_y, width - 1 - first);
        for (std::int64_t x = 0; x < count; ++x) {
          sum[x] += weight[x] * value[-x];
        }
      } else {
        const float* value = map(map_z, map_y, first);
        for (std::int64_t x = 0; x < count; ++x) {
          sum[x] += weight[x] * value[x];
        }
      }
    }
  }

  // Divides the sums by the weights that went into them. The weights of a plane are summed anew,
  // over the windows in the same order: cheaper than keeping one more volume.
  void divide(TensorView<float, 4> sums) const {
    const auto flips = static_cast<float>(flips_.size());
    parallel_for(shape_[0], options_.threads, [&](std::int64_t begin, std::int64_t end) {
      const Buffer<float> total(shape_[1] * shape_[2]);
      for (std::int64_t z = begin; z < end; ++z) {
        sum_weights(z, total.view<2>({shape_[1], shape_[2]}));
        for (std::int64_t map = 0; map < sums.shape[0]; ++map) {
          float* values = sums(map, z).data;
          for (std::int64_t i = 0; i < total.size(); ++i) {
            values[i] /= total.data()[i] * flips;
          }
        }
      }
    });
    if (!all_finite({sums.data, static_cast<std::size_t>(sums.size())}, options_.threads)) {
      throw Error("engine.not-finite",
                  "The logits of engine " + engine_.name() + " are too large to be summed.",
                  "Their weighted sum leaves the range of float32: check the model.");
    }
  }

  void sum_weights(std::int64_t z, TensorView<float, 2> total) const {
    const TensorView<const float, 3> weights = weights_.view<3>(options_.patch);
    std::fill_n(total.data, total.size(), 0.0F);
    for (const Index3& start : windows_) {
      const std::int64_t window_z = z - start[0];
      if (window_z < 0 || window_z >= options_.patch[0]) {
        continue;
      }
      const Overlap rows = overlap(start[1], options_.patch[1], shape_[1]);
      const Overlap columns = overlap(start[2], options_.patch[2], shape_[2]);
      for (std::int64_t row = rows.begin; row < rows.end; ++row) {
        const float* weight = weights(window_z, row - start[1], columns.begin - start[2]);
        float* sum = total(row, columns.begin);
        for (std::int64_t x = 0; x < columns.end - columns.begin; ++x) {
          sum[x] += weight[x];
        }
      }
    }
  }

  Engine& engine_;
  TensorView<const float, 4> image_;
  Index3 shape_;
  SlidingWindowOptions options_;
  bool shares_;
  std::vector<Flip> flips_;
  std::vector<Index3> windows_;
  Buffer<float> weights_;
  std::shared_ptr<BatchMemory> memory_;
  SlidingWindowResult result_;
};

void check(const Engine& engine, TensorView<const float, 4> image,
           const SlidingWindowOptions& options, bool shares) {
  if (engine.device() != "cpu") {
    throw Error("engine.device",
                "Engine " + engine.name() + " works on " + engine.device() +
                    ", but this runner keeps its buffers in host memory.",
                "Open the engine with device=\"cpu\".");
  }
  if (engine.channels() < 1 || engine.classes() < 1 || engine.experts() < 0) {
    throw Error("engine.shape",
                "Engine " + engine.name() + " declares " + std::to_string(engine.channels()) +
                    " channels, " + std::to_string(engine.classes()) + " classes and " +
                    std::to_string(engine.experts()) + " experts.",
                "It needs at least one channel and one class.");
  }
  if (image.shape[0] != engine.channels()) {
    throw Error("argument.channels", "The image has " + std::to_string(image.shape[0]) +
                                         " channels; the engine expects " +
                                         std::to_string(engine.channels()) + ".");
  }
  if (engine.batch() && *engine.batch() != options.batch) {
    throw Error("argument.batch",
                "The batch is " + std::to_string(options.batch) + ", but engine " + engine.name() +
                    " was built for " + std::to_string(*engine.batch()) + ".",
                "Leave the batch at auto.");
  }
  if (shares && engine.experts() < 1) {
    throw Error("engine.shares", "Engine " + engine.name() + " has no experts to share the result.",
                "Ask for the segmentation without shares.");
  }
}

void require_finite_logits(TensorView<const float, 2> logits) {
  if (!all_finite({logits.data, static_cast<std::size_t>(logits.size())}, 0)) {
    throw Error("engine.not-finite", "The logits hold NaN or infinity.",
                "No class can be told from them.");
  }
}

}  // namespace

void check_sliding_window(const SlidingWindowOptions& options) {
  window_starts(options.patch, options.patch, options.step);
  if (options.batch < 1) {
    throw Error("argument.batch", "The batch is " + std::to_string(options.batch) + ".",
                "It must be at least 1.");
  }
}

std::int64_t sliding_window_bytes(const Index3& shape, std::int64_t channels, std::int64_t classes,
                                  std::int64_t experts, const SlidingWindowOptions& options) {
  check_sliding_window(options);
  const auto starts = window_starts(shape, options.patch, options.step);
  const std::int64_t windows = static_cast<std::int64_t>(starts[0].size()) *
                               static_cast<std::int64_t>(starts[1].size()) *
                               static_cast<std::int64_t>(starts[2].size());
  const int pool = default_threads();
  const int threads = options.threads <= 0 ? pool : std::min(options.threads, pool);
  constexpr auto kFloat = static_cast<std::int64_t>(sizeof(float));
  const std::int64_t parts[] = {
      checked_product({{kFloat, classes + experts, shape[0], shape[1], shape[2]}}),
      checked_product({{kFloat, threads, shape[1], shape[2]}}),
      checked_product({{kFloat, options.batch, channels + classes + experts, options.patch[0],
                        options.patch[1], options.patch[2]}}),
      checked_product({{kFloat, options.patch[0], options.patch[1], options.patch[2]}}),
      checked_product({{static_cast<std::int64_t>(sizeof(Index3)), windows}}),
  };
  std::int64_t bytes = 0;
  for (const std::int64_t part : parts) {
    if (__builtin_add_overflow(bytes, part, &bytes)) {
      bytes = std::numeric_limits<std::int64_t>::max();
    }
  }
  return bytes;
}

SlidingWindowResult run_sliding_window(Engine& engine, TensorView<const float, 4> image,
                                       const SlidingWindowOptions& options, bool shares,
                                       const Progress& progress) {
  check(engine, image, options, shares);
  const Index3 shape{image.shape[1], image.shape[2], image.shape[3]};
  const std::int64_t needed = sliding_window_bytes(shape, engine.channels(), engine.classes(),
                                                   shares ? engine.experts() : 0, options);
  require_memory(needed, "A volume of " + text(shape) + " voxels");
  return Runner(engine, image, options, shares).run(progress);
}

void softmax(TensorView<const float, 2> logits, TensorView<float, 2> probabilities) {
  require_finite_logits(logits);
  const auto [classes, voxels] = logits.shape;
  parallel_for(voxels, 0, [&, classes = classes](std::int64_t begin, std::int64_t end) {
    for (std::int64_t v = begin; v < end; ++v) {
      float largest = *logits(0, v);
      for (std::int64_t n = 1; n < classes; ++n) {
        largest = std::max(largest, *logits(n, v));
      }
      float sum = 0.0F;
      for (std::int64_t n = 0; n < classes; ++n) {
        const float term = std::exp(*logits(n, v) - largest);
        *probabilities(n, v) = term;
        sum += term;
      }
      for (std::int64_t n = 0; n < classes; ++n) {
        *probabilities(n, v) /= sum;
      }
    }
  });
}

void argmax(TensorView<const float, 2> logits, TensorView<std::uint8_t, 1> labels) {
  require_finite_logits(logits);
  const auto [classes, voxels] = logits.shape;
  parallel_for(voxels, 0, [&, classes = classes](std::int64_t begin, std::int64_t end) {
    for (std::int64_t v = begin; v < end; ++v) {
      std::uint8_t best = 0;
      for (std::int64_t n = 1; n < classes; ++n) {
        if (*logits(n, v) > *logits(best, v)) {
          best = static_cast<std::uint8_t>(n);
        }
      }
      *labels(v) = best;
    }
  });
}

}  // namespace mome
