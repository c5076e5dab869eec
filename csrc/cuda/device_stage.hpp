#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <utility>

#include "../memory.hpp"
#include "../parallel.hpp"
#include "../stage.hpp"

namespace mome::cuda {

// Where the parts of one run lie in its piece of device memory, in bytes from the start. The first
// parts are uploaded together; the sums of logits and shares are downloaded together.
struct Layout {
  std::int64_t image, weights, starts, uploaded;
  std::int64_t not_finite, sums, windows, logits, shares, labels, bytes;
  std::int64_t result_bytes;

  explicit Layout(const StagePlan& plan) {
    const std::int64_t voxels = plan.shape.size();
    const std::int64_t window = plan.batch * plan.patch.size();
    const std::int64_t maps = plan.classes + plan.experts;
    image = take<float>(voxels * plan.channels);
    weights = take<float>(plan.patch.size());
    starts = take<Voxel>(static_cast<std::int64_t>(plan.starts.size()));
    uploaded = end_;
    not_finite = take<int>(1);
    sums = take<float>(voxels * maps);
    windows = take<float>(window * plan.channels);
    logits = take<float>(window * plan.classes);
    shares = take<float>(window * plan.experts);
    const bool labelled = plan.output == Output::labels;
    labels = take<std::uint8_t>(labelled ? voxels : 0);
    bytes = end_;
    result_bytes = labelled ? voxels : voxels * maps * std::int64_t{sizeof(float)};
  }

 private:
  template <typename T>
  std::int64_t take(std::int64_t count) {
    constexpr std::int64_t kAlignment = 256;
    const std::int64_t begin = end_;
    end_ += (count * std::int64_t{sizeof(T)} + kAlignment - 1) / kAlignment * kAlignment;
    return begin;
  }

  std::int64_t end_ = 0;
};

// The stage of a GPU. Memory is its own piece of device memory, a pinned piece of host memory, and
// a stream, on which all of this happens in order:
//   device(), staging()            the two pieces
//   stream()                       the stream's address
//   upload(bytes)                  from the start of staging() to the start of device()
//   download(offset, bytes)        from device() + offset to the start of staging(), and waits
//   fill(offset, value, bytes)     sets bytes of device()
//   each(count, body)              body(0) ... body(count - 1), in any order, at once
template <typename Memory>
class DeviceStage final : public Stage {
 public:
  DeviceStage(const StagePlan& plan, const Layout& layout, std::shared_ptr<Memory> memory,
              TensorView<const float, 4> image, const Buffer<float>& weights)
      : plan_(plan), layout_(layout), memory_(std::move(memory)) {
    put(layout_.image, image.data, image.size());
    put(layout_.weights, weights.data(), weights.size());
    put(layout_.starts, plan_.starts.data(), static_cast<std::int64_t>(plan_.starts.size()));
    memory_->upload(layout_.uploaded);
    memory_->fill(layout_.not_finite, 0, layout_.windows - layout_.not_finite);
  }

  WindowBatch gather(std::span<const Window> windows, std::int64_t size) override {
    const auto used = static_cast<std::int64_t>(windows.size());
    const auto [d, h, w] = plan_.patch;
    const TensorView<float, 5> out{at<float>(layout_.windows), {size, plan_.channels, d, h, w}};
    for (std::int64_t entry = 0; entry < used; ++entry) {
      const TensorView<float, 4> to = out(entry);
      memory_->each(to.size(), Gather{.image = at<float>(layout_.image),
                                      .shape = plan_.shape,
                                      .patch = plan_.patch,
                                      .window = windows[static_cast<std::size_t>(entry)],
                                      .out = to.data});
    }
    const std::int64_t entry_bytes = out(0).size() * std::int64_t{sizeof(float)};
    memory_->fill(layout_.windows + used * entry_bytes, 0, (size - used) * entry_bytes);
    memory_->fill(layout_.logits, 0xFF, layout_.labels - layout_.logits);  // NaN
    WindowBatch batch{.windows = out,
                      .logits = {at<float>(layout_.logits), {size, plan_.classes, d, h, w}},
                      .stream = memory_->stream(),
                      .owner = memory_};
    if (plan_.experts > 0) {
      batch.shares = {at<float>(layout_.shares), {size, plan_.experts, d, h, w}};
    }
    return batch;
  }

  bool add(std::span<const Window> windows, const WindowBatch& batch) override {
    float* const sums = at<float>(layout_.sums);
    accumulate(windows, batch.logits, sums);
    if (batch.shares) {
      accumulate(windows, *batch.shares, sums + plan_.classes * plan_.shape.size());
    }
    return all_were_finite();
  }

  bool divide() override {
    memory_->each(plan_.shape.size(),
                  Divide{.starts = at<Voxel>(layout_.starts),
                         .windows = static_cast<std::int64_t>(plan_.starts.size()),
                         .weights = at<float>(layout_.weights),
                         .shape = plan_.shape,
                         .patch = plan_.patch,
                         .flips = static_cast<float>(plan_.flips),
                         .maps = plan_.classes + plan_.experts,
                         .sums = at<float>(layout_.sums),
                         .not_finite = at<int>(layout_.not_finite)});
    return all_were_finite();
  }

  SlidingWindowResult take() override {
    const std::int64_t voxels = plan_.shape.size();
    float* const logits = at<float>(layout_.sums);
    SlidingWindowResult result;
    if (plan_.output == Output::labels) {
      memory_->each(voxels, Argmax{.logits = logits,
                                   .classes = plan_.classes,
                                   .voxels = voxels,
                                   .labels = at<std::uint8_t>(layout_.labels)});
      memory_->download(layout_.labels, layout_.result_bytes);
      result.labels = from_staging<std::uint8_t>(0, voxels);
      return result;
    }
    if (plan_.output == Output::probabilities) {
      memory_->each(
          voxels,
          Softmax{.logits = logits, .classes = plan_.classes, .voxels = voxels, .out = logits});
    }
    memory_->download(layout_.sums, layout_.result_bytes);
    result.maps = from_staging<float>(0, plan_.classes * voxels);
    if (plan_.experts > 0) {
      result.shares = from_staging<float>(plan_.classes * voxels, plan_.experts * voxels);
    }
    return result;
  }

 private:
  template <typename T>
  T* at(std::int64_t offset) const {
    return reinterpret_cast<T*>(memory_->device() + offset);
  }

  template <typename T>
  void put(std::int64_t offset, const T* from, std::int64_t count) const {
    copy(reinterpret_cast<T*>(memory_->staging() + offset), from, count);
  }

  template <typename T>
  Buffer<T> from_staging(std::int64_t first, std::int64_t count) const {
    Buffer<T> to(count);
    copy(to.data(), reinterpret_cast<const T*>(memory_->staging()) + first, count);
    return to;
  }

  template <typename T>
  void copy(T* to, const T* from, std::int64_t count) const {
    parallel_for(count, plan_.threads, [&](std::int64_t begin, std::int64_t end) {
      std::copy(from + begin, from + end, to + begin);
    });
  }

  void accumulate(std::span<const Window> windows, TensorView<const float, 5> maps,
                  float* sums) const {
    for (std::size_t entry = 0; entry < windows.size(); ++entry) {
      const TensorView<const float, 4> from = maps(entry);
      memory_->each(from.size(), Accumulate{.maps = from.data,
                                            .weights = at<float>(layout_.weights),
                                            .shape = plan_.shape,
                                            .patch = plan_.patch,
                                            .window = windows[entry],
                                            .sums = sums,
                                            .not_finite = at<int>(layout_.not_finite)});
    }
  }

  bool all_were_finite() const {
    memory_->download(layout_.not_finite, sizeof(int));
    int not_finite = 0;
    std::memcpy(&not_finite, memory_->staging(), sizeof(int));
    return not_finite == 0;
  }

  StagePlan plan_;
  Layout layout_;
  std::shared_ptr<Memory> memory_;
};

// A stage on what take_memory(device bytes, staging bytes) gives. Throws Error volume.too-large if
// the host has no room for staging and result.
template <typename TakeMemory>
auto make_device_stage(const StagePlan& plan, TensorView<const float, 4> image,
                       const Buffer<float>& weights, const TakeMemory& take_memory)
    -> std::unique_ptr<Stage> {
  using Memory = typename decltype(take_memory(0, 0))::element_type;
  const Layout layout(plan);
  const std::int64_t staging = std::max(layout.uploaded, layout.result_bytes);
  require_memory(
      staging + layout.result_bytes,
      "A volume of " + text(Index3{plan.shape.d, plan.shape.h, plan.shape.w}) + " voxels");
  return std::make_unique<DeviceStage<Memory>>(plan, layout, take_memory(layout.bytes, staging),
                                               image, weights);
}

}  // namespace mome::cuda
