#include "sliding_window.hpp"

#include <algorithm>
#include <atomic>
#include <bit>
#include <charconv>
#include <limits>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "cuda/device.hpp"
#include "memory.hpp"
#include "parallel.hpp"
#include "stage.hpp"
#include "voxel.hpp"

namespace mome {
namespace {

std::vector<Window> flips_of(const std::array<bool, 3>& mirror) {
  constexpr std::array kFlips{&Window::flip_d, &Window::flip_h, &Window::flip_w};
  std::vector<Window> flips{Window{}};
  for (std::size_t axis = 0; axis < 3; ++axis) {
    if (mirror[axis]) {
      const std::size_t count = flips.size();
      for (std::size_t i = 0; i < count; ++i) {
        Window flip = flips[i];
        flip.*kFlips[axis] = true;
        flips.push_back(flip);
      }
    }
  }
  return flips;
}

std::vector<Voxel> starts_of(const Index3& shape, const SlidingWindowOptions& options) {
  const auto starts = window_starts(shape, options.patch, options.step);
  const Index3 before = padding_before(shape, options.patch);
  std::vector<Voxel> voxels;
  for (const std::int64_t d : starts[0]) {
    for (const std::int64_t h : starts[1]) {
      for (const std::int64_t w : starts[2]) {
        voxels.push_back({d - before[0], h - before[1], w - before[2]});
      }
    }
  }
  return voxels;
}

Box box_of(const Index3& sizes) { return {sizes[0], sizes[1], sizes[2]}; }

// Which GPU "cuda:1" is; nullopt for "cpu". Throws Error engine.device for anything else.
std::optional<int> ordinal_of(const Engine& engine) {
  const std::string device = engine.device();
  if (device == "cpu") {
    return std::nullopt;
  }
  constexpr std::string_view kPrefix = "cuda:";
  int ordinal = -1;
  if (device.starts_with(kPrefix)) {
    const char* end = device.data() + device.size();
    const auto [rest, status] = std::from_chars(device.data() + kPrefix.size(), end, ordinal);
    if (status != std::errc{} || rest != end) {
      ordinal = -1;
    }
  }
  if (ordinal < 0) {
    throw Error(
        "engine.device",
        "Engine " + engine.name() + " works on " + device + ", where this runner has no buffers.",
        "Open it with device=\"cpu\", or \"cuda:0\" and so on.");
  }
  return ordinal;
}

// Takes the windows of an image through an engine, batch by batch.
class Runner {
 public:
  Runner(Engine& engine, const Index3& shape, const SlidingWindowOptions& options)
      : engine_(engine),
        batch_(options.batch),
        flips_(flips_of(options.mirror)),
        starts_(starts_of(shape, options)) {}

  std::span<const Voxel> starts() const { return starts_; }
  std::int64_t flips() const { return static_cast<std::int64_t>(flips_.size()); }

  SlidingWindowResult run(Stage& stage, const Progress& progress) const {
    const std::int64_t total = static_cast<std::int64_t>(starts_.size()) * flips();
    for (std::int64_t first = 0; first < total; first += batch_) {
      const std::int64_t used = std::min(batch_, total - first);
      run_batch(stage, first, used);
      if (progress) {
        progress(first + used, total);
      }
    }
    if (!stage.divide()) {
      throw Error("engine.not-finite",
                  "The logits of engine " + engine_.name() + " are too large to be summed.",
                  "Their weighted sum leaves the range of float32: check the model.");
    }
    return stage.take();
  }

 private:
  void run_batch(Stage& stage, std::int64_t first, std::int64_t used) const {
    std::vector<Window> windows;
    for (std::int64_t i = first; i < first + used; ++i) {
      windows.push_back(flips_[static_cast<std::size_t>(i % flips())]);
      windows.back().start = starts_[static_cast<std::size_t>(i / flips())];
    }
    // An engine with a fixed batch also gets a full one last; its surplus windows are zero.
    const WindowBatch batch = stage.gather(windows, engine_.batch() ? batch_ : used);
    engine_.run(batch);
    if (!stage.add(windows, batch)) {
      throw Error("engine.not-finite",
                  "Engine " + engine_.name() + " returned NaN or infinity, or left voxels unset.",
                  "Try precision fp32 or another engine; if it stays, the weights are damaged.");
    }
  }

  Engine& engine_;
  std::int64_t batch_;
  std::vector<Window> flips_;
  std::vector<Voxel> starts_;
};

void check(const Engine& engine, TensorView<const float, 4> image,
           const SlidingWindowOptions& options, const Wanted& wanted) {
  if (engine.channels() < 1 || engine.classes() < 1 || engine.experts() < 0) {
    throw Error("engine.shape",
                "Engine " + engine.name() + " declares " + std::to_string(engine.channels()) +
                    " channels, " + std::to_string(engine.classes()) + " classes and " +
                    std::to_string(engine.experts()) + " experts.",
                "It needs at least one channel and one class.");
  }
  if (wanted.output == Output::labels && engine.classes() > 256) {
    throw Error(
        "engine.shape",
        "Engine " + engine.name() + " has " + std::to_string(engine.classes()) + " classes.",
        "Labels are of 1 to 256 classes: ask for the logits.");
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
  if (wanted.shares && engine.experts() < 1) {
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

// Reads everything and decides at the end, which lets the compiler vectorise the loop.
bool all_finite(std::span<const float> values, int threads) {
  constexpr std::uint32_t kExponent = 0x7F800000U;
  std::atomic<bool> whole{true};
  const auto size = static_cast<std::int64_t>(values.size());
  parallel_for(size, threads, [&](std::int64_t begin, std::int64_t end) {
    std::uint32_t piece = 1;
    for (std::int64_t i = begin; i < end; ++i) {
      const auto bits = std::bit_cast<std::uint32_t>(values[static_cast<std::size_t>(i)]);
      piece &= static_cast<std::uint32_t>((bits & kExponent) != kExponent);
    }
    if (piece == 0) {
      whole.store(false, std::memory_order_relaxed);
    }
  });
  return whole;
}

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
      checked_product({{static_cast<std::int64_t>(sizeof(Voxel)), windows}}),
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
                                       const SlidingWindowOptions& options, const Wanted& wanted,
                                       const Progress& progress) {
  const std::optional<int> gpu = ordinal_of(engine);
  if (gpu) {
    cuda::require_device(engine.name(), *gpu);
  }
  check(engine, image, options, wanted);
  const Index3 shape{image.shape[1], image.shape[2], image.shape[3]};
  const std::int64_t experts = wanted.shares ? engine.experts() : 0;
  const std::int64_t needed =
      sliding_window_bytes(shape, engine.channels(), engine.classes(), experts, options);
  // A GPU says itself what it has left, but it must be able to count that far.
  if (!gpu || needed > std::numeric_limits<std::int64_t>::max() / 4) {
    require_memory(needed, "A volume of " + text(shape) + " voxels");
  }
  const Runner runner(engine, shape, options);
  const StagePlan plan{.shape = box_of(shape),
                       .patch = box_of(options.patch),
                       .channels = engine.channels(),
                       .classes = engine.classes(),
                       .experts = experts,
                       .batch = options.batch,
                       .output = wanted.output,
                       .starts = runner.starts(),
                       .flips = runner.flips(),
                       .threads = options.threads};
  Buffer<float> weights = window_weights(options.patch, options.blend);
  const std::unique_ptr<Stage> stage = gpu ? cuda::stage(*gpu, plan, image, std::move(weights))
                                           : host_stage(plan, image, std::move(weights));
  return runner.run(*stage, progress);
}

void softmax(TensorView<const float, 2> logits, TensorView<float, 2> probabilities) {
  require_finite_logits(logits);
  const auto [classes, voxels] = logits.shape;
  const Softmax body{logits.data, classes, voxels, probabilities.data};
  parallel_for(voxels, 0, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t v = begin; v < end; ++v) {
      body(v);
    }
  });
}

void argmax(TensorView<const float, 2> logits, TensorView<std::uint8_t, 1> labels) {
  require_finite_logits(logits);
  const auto [classes, voxels] = logits.shape;
  const Argmax body{logits.data, classes, voxels, labels.data};
  parallel_for(voxels, 0, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t v = begin; v < end; ++v) {
      body(v);
    }
  });
}

void class_mask(TensorView<const float, 2> probabilities, std::span<std::uint8_t> mask) {
  const auto [classes, voxels] = probabilities.shape;
  for (std::int64_t v = 0; v < voxels; ++v) {
    float best = 0.0F;
    float foreground = 0.0F;
    std::int64_t found = 0;
    for (std::int64_t n = 1; n < classes; ++n) {
      const float probability = *probabilities(n, v);
      foreground += probability;
      if (n == 1 || probability > best) {
        best = probability;
        found = n;
      }
    }
    mask[static_cast<std::size_t>(v)] =
        best > 1.0F - foreground ? static_cast<std::uint8_t>(found) : std::uint8_t{0};
  }
}

}  // namespace mome
