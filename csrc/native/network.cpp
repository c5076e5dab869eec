#include "network.hpp"

#include <algorithm>
#include <chrono>
#include <utility>

#include "../error.hpp"
#include "../kernels/norm.hpp"
#include "../parallel.hpp"
#include "arena.hpp"
#include "plan.hpp"

namespace mome {
namespace {

using Clock = std::chrono::steady_clock;

constexpr double kNormEps = 1e-5;  // architecture.py
constexpr std::chrono::milliseconds kInterruptEvery{50};

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// The stored numbers that a step needs; empty where it needs none.
struct StepTensors {
  std::span<const float> weight, bias, gamma, beta;
};

StepTensors tensors_of(const Weights& weights, const Plan& plan, const Step& step) {
  const auto map = [&](int index) { return plan.maps[static_cast<std::size_t>(index)]; };
  StepTensors found;
  if (step.kind == StepKind::stem || step.kind == StepKind::convolution) {
    const std::int64_t outputs = map(step.output).channels;
    found.weight =
        weights.tensor(step.name + ".conv.weight", {outputs, step.stored_inputs, 3, 3, 3});
    found.gamma = weights.tensor(step.name + ".norm.weight", {outputs});
    found.beta = weights.tensor(step.name + ".norm.bias", {outputs});
  } else if (step.kind == StepKind::upsampling) {
    const std::int64_t outputs = map(step.output).channels;
    found.weight = weights.tensor(step.name + ".weight", {step.stored_inputs, outputs, 2, 2, 2});
    found.bias = weights.tensor(step.name + ".bias", {outputs});
  } else if (step.inputs[0] != kNone) {
    found.weight =
        weights.tensor(step.name + ".weight", {step.outputs, step.stored_inputs, 1, 1, 1});
    found.bias = weights.tensor(step.name + ".bias", {step.outputs});
  }
  return found;
}

// One window through a plan, on an arena.
class Run {
 public:
  Run(const Weights& weights, const Kernels& kernels, const Plan& plan, const Arena& arena,
      const std::function<void()>& interrupt)
      : weights_(weights), kernels_(kernels), plan_(plan), arena_(arena), interrupt_(interrupt) {}

  // image (C, D, H, W), logits (N, D, H, W), shares (E, D, H, W) or null.
  void window(const float* image, float* logits, float* shares, std::vector<StepTime>* times) {
    image_ = image;
    logits_ = logits;
    shares_ = shares;
    for (const Step& step : plan_.steps) {
      StepTime time;
      time.name = step.name;
      const auto start = Clock::now();
      run(step, time);
      if (times != nullptr) {
        time.seconds = seconds_since(start);
        times->push_back(std::move(time));
      }
    }
  }

 private:
  void run(const Step& step, StepTime& time) {
    switch (step.kind) {
      case StepKind::stem:
        return run_stem(step, time);
      case StepKind::convolution:
        return run_convolution(step, time);
      case StepKind::upsampling:
        return run_upsampling(step, time);
      case StepKind::head:
      case StepKind::fusion:
        return run_head(step, time);
    }
  }

  void run_stem(const Step& step, StepTime& time) {
    const StoredWeights stored = weights_of(step);
    const auto start = Clock::now();
    kernels_.stem.pack(stored, at<float>(step.packed));
    time.packing = seconds_since(start);
    const Map& output = map(step.output);
    const Stem call{.image = image_,
                    .image_channels = plan_.image_channels,
                    .shape = output.shape,
                    .channels = output.channels,
                    .weights = at<float>(step.packed),
                    .result = at<float>(output.storage),
                    .statistics = statistics_of(step)};
    run_tasks(step, kernels_.stem.tasks(call),
              [&](std::int64_t task, float* scratch) { kernels_.stem.run(call, task, scratch); });
    time.kernel = "first convolution";
    time.gflop =
        54e-9 * static_cast<double>(plan_.image_channels * output.channels * voxels(output));
    time.executed = time.gflop;
    normalise(step);
  }

  void run_convolution(const Step& step, StepTime& time) {
    const StoredWeights stored = weights_of(step);
    const auto start = Clock::now();
    float* packed = at<float>(step.packed);
    parallel_tasks(step.kernel->pack_tasks(stored), plan_.workers,
                   [&](std::int64_t task, int) { step.kernel->pack(stored, task, packed); });
    time.packing = seconds_since(start);
    Convolution call = convolution_of(plan_, step);
    for (std::size_t i = 0; i < 2 && step.inputs[i] != kNone; ++i) {
      call.inputs[i] = input_of(step.inputs[i]);
    }
    call.weights = packed;
    call.result = at<float>(map(step.output).storage);
    call.workers = plan_.workers;
    call.statistics = statistics_of(step);
    run_tasks(step, step.kernel->tasks(call),
              [&](std::int64_t task, float* scratch) { step.kernel->run(call, task, scratch); });
    time.kernel = step.kernel->name;
    time.gflop = 54e-9 * static_cast<double>((stored.inputs[0] + stored.inputs[1]) * call.channels *
                                             voxels(map(step.output)));
    time.executed = 2e-9 * step.kernel->multiplications(call);
    normalise(step);
  }

  void run_upsampling(const Step& step, StepTime& time) {
    const Map& low = map(step.inputs[0]);
    const Map& output = map(step.output);
    const std::int64_t channels = output.channels;
    const auto start = Clock::now();
    float* packed = at<float>(step.packed);
    const StepTensors stored = tensors_of(weights_, plan_, step);
    kernels_.upsampling.pack(stored.weight.data(), low.channels, channels, packed);
    float* bias = packed + kernels_.upsampling.packed_size(low.channels, channels);
    std::fill_n(bias, kernels_.padded(channels), 0.0F);
    std::copy(stored.bias.begin(), stored.bias.end(), bias);
    time.packing = seconds_since(start);
    const Upsampling call{.input = input_of(step.inputs[0]),
                          .in = low.shape,
                          .channels = channels,
                          .weights = packed,
                          .bias = bias,
                          .result = at<float>(output.storage)};
    run_tasks(step, kernels_.upsampling.tasks(call), [&](std::int64_t task, float* scratch) {
      kernels_.upsampling.run(call, task, scratch);
    });
    // What it writes is read as it is.
    const auto [scale, shift] = norm_of(output);
    std::fill(scale.begin(), scale.end(), 0.0F);
    std::fill_n(scale.begin(), channels, 1.0F);
    std::fill(shift.begin(), shift.end(), 0.0F);
    time.kernel = "transposed convolution";
    time.gflop = 2e-9 * static_cast<double>(low.channels * channels * voxels(output));
    time.executed = time.gflop;
  }

  void run_head(const Step& step, StepTime& time) {
    const Architecture& numbers = weights_.architecture();
    const Index3& shape = plan_.window;
    Head head{.voxels = shape[0] * shape[1] * shape[2],
              .outputs = step.outputs,
              .stride = numbers.experts * numbers.classes};
    if (step.inputs[0] != kNone) {
      const std::int64_t channels = map(step.inputs[0]).channels;
      const auto start = Clock::now();
      const StepTensors stored = tensors_of(weights_, plan_, step);
      kernels_.head.pack(stored.weight.data(), channels, step.outputs, at<float>(step.packed));
      time.packing = seconds_since(start);
      head.input = input_of(step.inputs[0]);
      head.weights = at<float>(step.packed);
      head.bias = stored.bias.data();
      time.gflop = 2e-9 * static_cast<double>(channels * step.outputs * head.voxels);
      time.executed = time.gflop;
    }
    float* expert_logits = at<float>(plan_.expert_logits);
    head.result = expert_logits + step.expert * numbers.classes;
    const Fusion fusion{.gate = head,
                        .experts = numbers.experts,
                        .classes = numbers.classes,
                        .expert_logits = expert_logits,
                        .logits = logits_,
                        .shares = shares_};
    run_tasks(step, kernels_.head.tasks(head.voxels), [&](std::int64_t task, float* scratch) {
      if (step.kind == StepKind::fusion) {
        kernels_.head.fuse(fusion, task, scratch);
      } else {
        kernels_.head.run(head, task, scratch);
      }
    });
    time.kernel = step.kind == StepKind::fusion ? "gate head and fusion" : "head";
  }

  // Every task with the scratch of its worker; worker 0 is the caller, who may be interrupted.
  void run_tasks(const Step& step, std::int64_t tasks,
                 const std::function<void(std::int64_t, float*)>& body) {
    std::byte* scratch = at<std::byte>(step.scratch);
    parallel_tasks(tasks, plan_.workers, [&](std::int64_t task, int worker) {
      if (worker == 0 && interrupt_ && Clock::now() - last_interrupt_ > kInterruptEvery) {
        last_interrupt_ = Clock::now();
        interrupt_();
      }
      body(task, reinterpret_cast<float*>(scratch + worker * step.scratch_bytes));
    });
  }

  void normalise(const Step& step) {
    if (!step.normalise) {
      return;
    }
    const Map& output = map(step.output);
    const auto [scale, shift] = norm_of(output);
    const Storage& stored = storage(step.statistics);
    const std::span<const double> statistics{
        at<double>(step.statistics), static_cast<std::size_t>(statistics_size(step, stored))};
    const StepTensors tensors = tensors_of(weights_, plan_, step);
    instance_norm(statistics, voxels(output), tensors.gamma, tensors.beta, kNormEps, scale, shift);
  }

  // The numbers that the kernel wrote; a storage is rounded up.
  std::int64_t statistics_size(const Step& step, const Storage& stored) const {
    const std::int64_t task = 2 * kernels_.padded(map(step.output).channels);
    return stored.bytes / static_cast<std::int64_t>(sizeof(double)) / task * task;
  }

  double* statistics_of(const Step& step) const {
    return step.normalise ? at<double>(step.statistics) : nullptr;
  }

  StoredWeights weights_of(const Step& step) const {
    StoredWeights stored = stored_weights_of(plan_, step);
    stored.data = tensors_of(weights_, plan_, step).weight.data();
    return stored;
  }

  Input input_of(int index) const {
    const Map& from = map(index);
    const auto [scale, shift] = norm_of(from);
    return {.data = at<float>(from.storage),
            .scale = scale.data(),
            .shift = shift.data(),
            .slope = from.slope,
            .channels = from.channels};
  }

  std::pair<std::span<float>, std::span<float>> norm_of(const Map& of) const {
    const auto padded = static_cast<std::size_t>(kernels_.padded(of.channels));
    float* scale = at<float>(of.norm);
    return {{scale, padded}, {scale + padded, padded}};
  }

  template <typename T>
  T* at(int index) const {
    return reinterpret_cast<T*>(arena_.data() + storage(index).offset);
  }

  const Storage& storage(int index) const {
    return plan_.storages[static_cast<std::size_t>(index)];
  }
  const Map& map(int index) const { return plan_.maps[static_cast<std::size_t>(index)]; }
  static std::int64_t voxels(const Map& of) { return of.shape[0] * of.shape[1] * of.shape[2]; }

  const Weights& weights_;
  const Kernels& kernels_;
  const Plan& plan_;
  const Arena& arena_;
  const std::function<void()>& interrupt_;
  Clock::time_point last_interrupt_ = Clock::now();
  const float* image_ = nullptr;
  float* logits_ = nullptr;
  float* shares_ = nullptr;
};

}  // namespace

NativeEngine::NativeEngine(std::shared_ptr<const Weights> weights, int threads,
                           std::function<void()> interrupt)
    : weights_(std::move(weights)),
      kernels_(chosen_kernels(weights_->architecture().features[0])),
      threads_(threads),
      interrupt_(std::move(interrupt)) {
  const std::int64_t edge = weights_->architecture().window_multiple();
  const Plan smallest = make_plan(weights_->architecture(), {edge, edge, edge}, kernels_, 1);
  for (const Step& step : smallest.steps) {
    tensors_of(*weights_, smallest, step);
  }
}

NativeEngine::~NativeEngine() = default;

void NativeEngine::run(const WindowBatch& batch) { run_windows(batch, nullptr); }

std::vector<StepTime> NativeEngine::profile(const WindowBatch& batch) {
  std::vector<StepTime> times;
  run_windows(batch, &times);
  return times;
}

std::int64_t NativeEngine::bytes(const Index3& window) { return plan_for(window)->bytes; }

void NativeEngine::run_windows(const WindowBatch& batch, std::vector<StepTime>* times) {
  const auto [windows, channels, depth, height, width] = batch.windows.shape;
  const std::shared_ptr<const Plan> plan = plan_for({depth, height, width});
  std::unique_ptr<Arena> arena = take_arena(plan->bytes);
  for (std::int64_t b = 0; b < windows; ++b) {
    Run(*weights_, kernels_, *plan, *arena, interrupt_)
        .window(batch.windows(b).data, batch.logits(b).data,
                batch.shares ? (*batch.shares)(b).data : nullptr, times);
  }
  const std::lock_guard lock(mutex_);
  arenas_.push_back(std::move(arena));
}

std::shared_ptr<const Plan> NativeEngine::plan_for(const Index3& window) {
  const std::int64_t multiple = weights_->architecture().window_multiple();
  for (const std::int64_t edge : window) {
    if (edge < 1 || edge % multiple != 0) {
      throw Error("engine.buffers", "The window is " + text(window) + ".",
                  "Its edges must be multiples of " + std::to_string(multiple) + ".");
    }
  }
  const std::lock_guard lock(mutex_);
  std::shared_ptr<const Plan>& plan = plans_[window];
  if (plan == nullptr) {
    plan = std::make_shared<const Plan>(
        make_plan(weights_->architecture(), window, kernels_, workers(threads_)));
  }
  return plan;
}

std::unique_ptr<Arena> NativeEngine::take_arena(std::int64_t bytes) {
  {
    const std::lock_guard lock(mutex_);
    const auto fits = [bytes](const auto& arena) { return arena->bytes() >= bytes; };
    if (const auto found = std::find_if(arenas_.begin(), arenas_.end(), fits);
        found != arenas_.end()) {
      std::unique_ptr<Arena> arena = std::move(*found);
      arenas_.erase(found);
      return arena;
    }
    arenas_.clear();  // too small for this window: do not keep both
  }
  return std::make_unique<Arena>(bytes);
}

}  // namespace mome
