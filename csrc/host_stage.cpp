#include <algorithm>
#include <atomic>
#include <limits>
#include <memory>
#include <optional>
#include <utility>

#include "parallel.hpp"
#include "stage.hpp"

namespace mome {
namespace {

// The part of a window along one axis that lies in the image, in voxels of the image.
struct Overlap {
  std::int64_t begin;
  std::int64_t end;
};

Overlap overlap(std::int64_t start, std::int64_t patch, std::int64_t size) {
  return {std::max<std::int64_t>(0, start), std::min(size, start + patch)};
}

// Buffers that live through all calls of one run. Engines may hold on to their views of them.
struct BatchMemory {
  Buffer<float> windows;
  Buffer<float> logits;
  Buffer<float> shares;
};

class HostStage final : public Stage {
 public:
  HostStage(const StagePlan& plan, TensorView<const float, 4> image, Buffer<float> weights)
      : plan_(plan), image_(image), weights_(std::move(weights)) {
    const std::int64_t window = plan_.batch * plan_.patch.size();
    const std::int64_t voxels = plan_.shape.size();
    memory_->windows = Buffer<float>(window * plan_.channels);
    memory_->logits = Buffer<float>(window * plan_.classes);
    result_.maps = Buffer<float>(voxels * plan_.classes);
    fill(result_.maps, 0.0F);
    if (plan_.experts > 0) {
      memory_->shares = Buffer<float>(window * plan_.experts);
      result_.shares = Buffer<float>(voxels * plan_.experts);
      fill(*result_.shares, 0.0F);
    }
  }

  WindowBatch gather(std::span<const Window> windows, std::int64_t size) override {
    const auto [d, h, w] = plan_.patch;
    const auto out = memory_->windows.view<5>({size, plan_.channels, d, h, w});
    gather_planes(windows, out);
    fill(memory_->logits, std::numeric_limits<float>::quiet_NaN());
    WindowBatch batch{.windows = out,
                      .logits = memory_->logits.view<5>({size, plan_.classes, d, h, w}),
                      .owner = memory_};
    if (result_.shares) {
      fill(memory_->shares, std::numeric_limits<float>::quiet_NaN());
      batch.shares = memory_->shares.view<5>({size, plan_.experts, d, h, w});
    }
    return batch;
  }

  bool add(std::span<const Window> windows, const WindowBatch& batch) override {
    if (!finite(batch.logits, windows.size()) ||
        (batch.shares && !finite(*batch.shares, windows.size()))) {
      return false;
    }
    accumulate(windows, batch.logits, sums_of(result_.maps, plan_.classes));
    if (batch.shares) {
      accumulate(windows, *batch.shares, sums_of(*result_.shares, plan_.experts));
    }
    return true;
  }

  bool divide() override {
    return divide(sums_of(result_.maps, plan_.classes)) &&
           (!result_.shares || divide(sums_of(*result_.shares, plan_.experts)));
  }

  SlidingWindowResult take() override {
    const TensorView<float, 2> maps = result_.maps.view<2>({plan_.classes, plan_.shape.size()});
    if (plan_.output == Output::probabilities) {
      softmax(maps, maps);
    } else if (plan_.output == Output::labels) {
      result_.labels = Buffer<std::uint8_t>(plan_.shape.size());
      argmax(maps, result_.labels.view<1>({plan_.shape.size()}));
      result_.maps = {};
    }
    return std::move(result_);
  }

 private:
  TensorView<float, 4> sums_of(const Buffer<float>& sums, std::int64_t maps) const {
    return sums.view<4>({maps, plan_.shape.d, plan_.shape.h, plan_.shape.w});
  }

  TensorView<const float, 3> weights() const {
    return weights_.view<3>({plan_.patch.d, plan_.patch.h, plan_.patch.w});
  }

  void fill(const Buffer<float>& buffer, float value) const {
    parallel_for(buffer.size(), plan_.threads, [&](std::int64_t begin, std::int64_t end) {
      std::fill(buffer.data() + begin, buffer.data() + end, value);
    });
  }

  bool finite(TensorView<const float, 5> maps, std::size_t used) const {
    const auto size = used * static_cast<std::size_t>(maps(0).size());
    return all_finite({maps.data, size}, plan_.threads);
  }

  void gather_planes(std::span<const Window> windows, TensorView<float, 5> out) const {
    const std::int64_t depth = plan_.patch.d;
    const std::int64_t planes = out.shape[0] * plan_.channels * depth;
    parallel_for(planes, plan_.threads, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t plane = begin; plane < end; ++plane) {
        const auto entry = static_cast<std::size_t>(plane / (plan_.channels * depth));
        const std::int64_t channel = plane / depth % plan_.channels;
        const std::int64_t z = plane % depth;
        const TensorView<float, 2> to = out(entry, channel, z);
        if (entry < windows.size()) {
          gather_plane(windows[entry], channel, z, to);
        } else {
          std::fill_n(to.data, to.size(), 0.0F);
        }
      }
    });
  }

  void gather_plane(const Window& window, std::int64_t channel, std::int64_t z,
                    TensorView<float, 2> out) const {
    const auto [depth, height, width] = plan_.patch;
    const Box& shape = plan_.shape;
    const std::int64_t source_z = window.start.d + (window.flip_d ? depth - 1 - z : z);
    const Overlap columns = overlap(window.start.w, width, shape.w);
    const std::int64_t count = columns.end - columns.begin;
    // Zeros left of the row as it lies in `out`.
    const std::int64_t left =
        window.flip_w ? window.start.w + width - columns.end : columns.begin - window.start.w;
    for (std::int64_t y = 0; y < height; ++y) {
      float* row = out(y).data;
      const std::int64_t source_y = window.start.h + (window.flip_h ? height - 1 - y : y);
      if (source_z < 0 || source_z >= shape.d || source_y < 0 || source_y >= shape.h) {
        std::fill_n(row, width, 0.0F);
        continue;
      }
      const float* source = image_(channel, source_z, source_y, columns.begin);
      std::fill_n(row, left, 0.0F);
      if (window.flip_w) {
        std::reverse_copy(source, source + count, row + left);
      } else {
        std::copy_n(source, count, row + left);
      }
      std::fill_n(row + left + count, width - left - count, 0.0F);
    }
  }

  // Adds the first entries of `maps` (B, M, patch) to `sums` (M, D, H, W). Threads share the planes
  // of the image, never the windows: each voxel sees the windows in their own order.
  void accumulate(std::span<const Window> windows, TensorView<const float, 5> maps,
                  TensorView<float, 4> sums) const {
    const std::int64_t depth = plan_.shape.d;
    parallel_for(sums.shape[0] * depth, plan_.threads, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t plane = begin; plane < end; ++plane) {
        const std::int64_t map = plane / depth;
        const std::int64_t z = plane % depth;
        for (std::size_t entry = 0; entry < windows.size(); ++entry) {
          const std::int64_t window_z = z - windows[entry].start.d;
          if (window_z >= 0 && window_z < plan_.patch.d) {
            add_plane(windows[entry], window_z, maps(entry, map), sums(map, z));
          }
        }
      }
    });
  }

  void add_plane(const Window& window, std::int64_t z, TensorView<const float, 3> map,
                 TensorView<float, 2> sums) const {
    const auto [depth, height, width] = plan_.patch;
    const std::int64_t map_z = window.flip_d ? depth - 1 - z : z;
    const Overlap rows = overlap(window.start.h, height, plan_.shape.h);
    const Overlap columns = overlap(window.start.w, width, plan_.shape.w);
    const std::int64_t count = columns.end - columns.begin;
    const std::int64_t first = columns.begin - window.start.w;
    for (std::int64_t row = rows.begin; row < rows.end; ++row) {
      const std::int64_t y = row - window.start.h;
      const std::int64_t map_y = window.flip_h ? height - 1 - y : y;
      const float* weight = weights()(z, y, first);
      float* sum = sums(row, columns.begin);
      if (window.flip_w) {
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

  // The weights of a plane are summed anew, over the windows in the same order: cheaper than
  // keeping one more volume.
  bool divide(TensorView<float, 4> sums) const {
    const auto [depth, height, width] = plan_.shape;
    const auto flips = static_cast<float>(plan_.flips);
    parallel_for(depth, plan_.threads, [&](std::int64_t begin, std::int64_t end) {
      const Buffer<float> total(height * width);
      for (std::int64_t z = begin; z < end; ++z) {
        sum_weights(z, total.view<2>({height, width}));
        for (std::int64_t map = 0; map < sums.shape[0]; ++map) {
          float* values = sums(map, z).data;
          for (std::int64_t i = 0; i < total.size(); ++i) {
            values[i] /= total.data()[i] * flips;
          }
        }
      }
    });
    return all_finite({sums.data, static_cast<std::size_t>(sums.size())}, plan_.threads);
  }

  void sum_weights(std::int64_t z, TensorView<float, 2> total) const {
    std::fill_n(total.data, total.size(), 0.0F);
    for (const Voxel& start : plan_.starts) {
      const std::int64_t window_z = z - start.d;
      if (window_z < 0 || window_z >= plan_.patch.d) {
        continue;
      }
      const Overlap rows = overlap(start.h, plan_.patch.h, plan_.shape.h);
      const Overlap columns = overlap(start.w, plan_.patch.w, plan_.shape.w);
      for (std::int64_t row = rows.begin; row < rows.end; ++row) {
        const float* weight = weights()(window_z, row - start.h, columns.begin - start.w);
        float* sum = total(row, columns.begin);
        for (std::int64_t x = 0; x < columns.end - columns.begin; ++x) {
          sum[x] += weight[x];
        }
      }
    }
  }

  StagePlan plan_;
  TensorView<const float, 4> image_;
  Buffer<float> weights_;
  std::shared_ptr<BatchMemory> memory_ = std::make_shared<BatchMemory>();
  SlidingWindowResult result_;
};

}  // namespace

std::unique_ptr<Stage> host_stage(const StagePlan& plan, TensorView<const float, 4> image,
                                  Buffer<float> weights) {
  return std::make_unique<HostStage>(plan, image, std::move(weights));
}

}  // namespace mome
