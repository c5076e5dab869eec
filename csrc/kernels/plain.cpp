#include "plain.hpp"

#include <algorithm>
#include <chrono>
#include <initializer_list>
#include <limits>
#include <utility>

#include "../error.hpp"
#include "../parallel.hpp"

namespace mome {
namespace {

constexpr float kUnset = std::numeric_limits<float>::quiet_NaN();

void require(bool holds, const std::string& found, const std::string& expected) {
  if (!holds) {
    throw Error("argument.array", found, expected);
  }
}

// "(2, 3)"
std::string list_of(std::initializer_list<std::int64_t> sizes) {
  std::string list;
  for (const std::int64_t size : sizes) {
    list.append(list.empty() ? "(" : ", ").append(std::to_string(size));
  }
  return list + ")";
}

Index3 edges_of(const TensorView<const float, 4>& view) {
  return {view.shape[1], view.shape[2], view.shape[3]};
}

std::int64_t voxels_of(const Index3& edges) { return checked_product(edges); }

template <typename T>
Buffer<T> filled(std::int64_t size, T value) {
  Buffer<T> buffer(size);
  std::fill_n(buffer.data(), size, value);
  return buffer;
}

// (C, voxels) -> (blocks, voxels, width), channels past C zero.
Buffer<float> to_blocked(const float* plain, std::int64_t channels, std::int64_t voxels,
                         const Kernels& kernels) {
  Buffer<float> blocked = filled(kernels.padded(channels) * voxels, 0.0F);
  for (std::int64_t c = 0; c < channels; ++c) {
    float* to = blocked.data() + c / kernels.width * voxels * kernels.width + c % kernels.width;
    for (std::int64_t v = 0; v < voxels; ++v) {
      to[v * kernels.width] = plain[c * voxels + v];
    }
  }
  return blocked;
}

// (blocks, voxels, width) -> (padded channels, voxels).
Buffer<float> to_plain(const Buffer<float>& blocked, std::int64_t voxels, std::int64_t width) {
  Buffer<float> plain(blocked.size());
  for (std::int64_t c = 0; c < blocked.size() / voxels; ++c) {
    const float* from = blocked.data() + c / width * voxels * width + c % width;
    for (std::int64_t v = 0; v < voxels; ++v) {
      plain.data()[c * voxels + v] = from[v * width];
    }
  }
  return plain;
}

Buffer<float> padded(std::span<const float> numbers, const Kernels& kernels) {
  const auto size = static_cast<std::int64_t>(numbers.size());
  Buffer<float> to = filled(kernels.padded(size), 0.0F);
  std::copy(numbers.begin(), numbers.end(), to.data());
  return to;
}

void check(const PlainInput& input) {
  require_positive(edges_of(input.data), "shape");
  const auto channels = static_cast<std::size_t>(input.data.shape[0]);
  require(channels >= 1 && input.scale.size() == channels && input.shift.size() == channels,
          "An input of " + std::to_string(channels) + " channels has " +
              std::to_string(input.scale.size()) + " scales and " +
              std::to_string(input.shift.size()) + " shifts.",
          "One of each is needed for every channel, and at least one channel.");
}

// A kernel's input and the memory it points to.
class BlockedInput {
 public:
  BlockedInput(const PlainInput& input, const Kernels& kernels)
      : data_(to_blocked(input.data.data, input.data.shape[0], voxels_of(edges_of(input.data)),
                         kernels)),
        scale_(padded(input.scale, kernels)),
        shift_(padded(input.shift, kernels)),
        input_{.data = data_.data(),
               .scale = scale_.data(),
               .shift = shift_.data(),
               .slope = input.slope,
               .channels = input.data.shape[0]} {}

  const Input& input() const { return input_; }

 private:
  Buffer<float> data_, scale_, shift_;
  Input input_;
};

// Runs all tasks, calls keep(), and then runs them `repeat` times more; returns the seconds of
// each.
template <typename Run, typename Keep>
std::vector<double> run_tasks(std::int64_t tasks, std::int64_t scratch_size,
                              const PlainOptions& options, const Run& run, const Keep& keep) {
  std::vector<Buffer<float>> scratch;  // apart from each other, for AddressSanitizer
  for (int worker = 0; worker < workers(options.threads); ++worker) {
    scratch.push_back(filled(scratch_size, kUnset));
  }
  const auto run_once = [&] {
    parallel_tasks(tasks, options.threads, [&](std::int64_t task, int worker) {
      run(task, scratch[static_cast<std::size_t>(worker)].data());
    });
  };
  run_once();
  keep();
  std::vector<double> seconds;
  for (int i = 0; i < options.repeat; ++i) {
    const auto start = std::chrono::steady_clock::now();
    run_once();
    seconds.push_back(
        std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  return seconds;
}

Buffer<double> copy_of(const Buffer<double>& from) {
  Buffer<double> to(from.size());
  std::copy_n(from.data(), from.size(), to.data());
  return to;
}

void check_weights(const TensorView<const float, 3>& weights, std::int64_t first,
                   std::int64_t channels) {
  require(weights.shape[0] >= 1 && weights.shape[2] == 27 && first >= 0 &&
              first + channels <= weights.shape[1],
          "The weights are " + list_of({weights.shape[0], weights.shape[1], 3, 3, 3}) +
              "; channels from " + std::to_string(first) + " on are used.",
          "At least one output and " + std::to_string(first + channels) + " inputs are needed.");
}

// The call without pointers: sizes only.
Convolution sizes_of(const ConvolutionKernel& kernel, const PlainConvolution& call) {
  Convolution sizes{.in = edges_of(call.inputs[0].data), .channels = call.weights.shape[0]};
  for (std::size_t axis = 0; axis < 3; ++axis) {
    sizes.out[axis] = (sizes.in[axis] + kernel.stride - 1) / kernel.stride;
  }
  for (std::size_t i = 0; i < call.inputs.size(); ++i) {
    sizes.inputs[i].channels = call.inputs[i].data.shape[0];
  }
  return sizes;
}

void check(const ConvolutionKernel& kernel, const PlainConvolution& call) {
  require(call.inputs.size() == 1 || call.inputs.size() == 2,
          "There are " + std::to_string(call.inputs.size()) + " inputs.",
          "One or two can be read.");
  std::int64_t channels = 0;
  for (const PlainInput& input : call.inputs) {
    check(input);
    require(edges_of(input.data) == edges_of(call.inputs[0].data),
            "The inputs have " + text(edges_of(call.inputs[0].data)) + " and " +
                text(edges_of(input.data)) + " voxels.",
            "They must have the same edges.");
    channels += input.data.shape[0];
  }
  check_weights(call.weights, call.first, channels);
  if (call.initial) {
    const Index3 out = sizes_of(kernel, call).out;
    require(edges_of(*call.initial) == out && call.initial->shape[0] == call.weights.shape[0],
            "What is added to has " + std::to_string(call.initial->shape[0]) + " channels of " +
                text(edges_of(*call.initial)) + " voxels.",
            "The result has " + std::to_string(call.weights.shape[0]) + " of " + text(out) + ".");
  }
}

void check_head(std::int64_t inputs, const TensorView<const float, 2>& weights,
                std::span<const float> bias) {
  require(weights.shape[0] >= 1 && weights.shape[1] == inputs &&
              static_cast<std::int64_t>(bias.size()) == weights.shape[0],
          "The weights are " + list_of({weights.shape[0], weights.shape[1]}) + ", with " +
              std::to_string(bias.size()) + " biases.",
          "For " + std::to_string(inputs) + " inputs (Co, inputs) and Co are needed.");
}

}  // namespace

const Kernels& kernels_named(const std::string& name) {
  std::string names;
  for (const Kernels* each : available_kernels()) {
    if (name == each->name) {
      return *each;
    }
    names += (names.empty() ? "" : ", ") + std::string(each->name);
  }
  throw Error("argument.kernels", "There are no kernels '" + name + "'.",
              "This processor has: " + names + ".");
}

const ConvolutionKernel& convolution_named(const Kernels& kernels, const std::string& name) {
  std::string names;
  for (const ConvolutionKernel& each : kernels.convolutions) {
    if (name == each.name) {
      return each;
    }
    names += (names.empty() ? "" : "; ") + std::string(each.name);
  }
  throw Error("argument.scheme", "There is no convolution '" + name + "'.",
              std::string("The kernels ") + kernels.name + " have: " + names + ".");
}

PlainRun plain_convolution(const Kernels& kernels, const ConvolutionKernel& kernel,
                           const PlainConvolution& call, const PlainOptions& options) {
  check(kernel, call);
  Convolution blocked = sizes_of(kernel, call);
  std::vector<BlockedInput> inputs;
  inputs.reserve(call.inputs.size());
  for (const PlainInput& input : call.inputs) {
    inputs.emplace_back(input, kernels);
    blocked.inputs[inputs.size() - 1] = inputs.back().input();
  }
  const StoredWeights stored{.data = call.weights.data,
                             .stored_inputs = call.weights.shape[1],
                             .first = call.first,
                             .inputs = {blocked.inputs[0].channels, blocked.inputs[1].channels},
                             .outputs = blocked.channels};
  const Buffer<float> packed = filled(kernel.packed_size(stored), kUnset);
  parallel_tasks(kernel.pack_tasks(stored), options.threads,
                 [&](std::int64_t task, int) { kernel.pack(stored, task, packed.data()); });
  const std::int64_t voxels = voxels_of(blocked.out);
  const std::int64_t channels = kernels.padded(blocked.channels);
  const Buffer<float> result =
      call.initial ? to_blocked(call.initial->data, blocked.channels, voxels, kernels)
                   : filled(channels * voxels, kUnset);
  PlainRun run{.shape = {channels, blocked.out[0], blocked.out[1], blocked.out[2]},
               .tasks = kernel.tasks(blocked)};
  const Buffer<double> statistics = filled(run.tasks * 2 * channels, double{kUnset});
  blocked.weights = packed.data();
  blocked.result = result.data();
  blocked.workers = workers(options.threads);
  blocked.accumulate = call.initial.has_value();
  blocked.statistics = statistics.data();
  run.seconds = run_tasks(
      run.tasks, kernel.scratch(blocked), options,
      [&](std::int64_t task, float* scratch) { kernel.run(blocked, task, scratch); },
      [&] {
        run.result = to_plain(result, voxels, kernels.width);
        run.statistics = copy_of(statistics);
      });
  return run;
}

double plain_multiplications(const ConvolutionKernel& kernel, const PlainConvolution& call) {
  check(kernel, call);
  return kernel.multiplications(sizes_of(kernel, call));
}

PlainRun plain_stem(const Kernels& kernels, const TensorView<const float, 4>& image,
                    const TensorView<const float, 3>& weights, const PlainOptions& options) {
  const Index3 edges = edges_of(image);
  require_positive(edges, "shape");
  check_weights(weights, 0, image.shape[0]);
  const StoredWeights stored{.data = weights.data,
                             .stored_inputs = weights.shape[1],
                             .inputs = {image.shape[0], 0},
                             .outputs = weights.shape[0]};
  const Buffer<float> packed = filled(kernels.stem.packed_size(stored), kUnset);
  kernels.stem.pack(stored, packed.data());
  const std::int64_t channels = kernels.padded(stored.outputs);
  const Buffer<float> result = filled(channels * voxels_of(edges), kUnset);
  Stem call{.image = image.data,
            .image_channels = image.shape[0],
            .shape = edges,
            .channels = stored.outputs,
            .weights = packed.data(),
            .result = result.data()};
  PlainRun run{.shape = {channels, edges[0], edges[1], edges[2]},
               .tasks = kernels.stem.tasks(call)};
  run.statistics = filled(run.tasks * 2 * channels, double{kUnset});
  call.statistics = run.statistics.data();
  run.seconds = run_tasks(
      run.tasks, kernels.stem.scratch(call), options,
      [&](std::int64_t task, float* scratch) { kernels.stem.run(call, task, scratch); },
      [&] { run.result = to_plain(result, voxels_of(edges), kernels.width); });
  return run;
}

PlainRun plain_upsampling(const Kernels& kernels, const PlainInput& input,
                          const TensorView<const float, 3>& weights, std::span<const float> bias,
                          const PlainOptions& options) {
  check(input);
  const std::int64_t inputs = input.data.shape[0];
  const std::int64_t outputs = weights.shape[1];
  require(weights.shape[0] == inputs && outputs >= 1 && weights.shape[2] == 8 &&
              static_cast<std::int64_t>(bias.size()) == outputs,
          "The weights are " + list_of({weights.shape[0], outputs, 2, 2, 2}) + ", with " +
              std::to_string(bias.size()) + " biases.",
          "For " + std::to_string(inputs) + " inputs (inputs, Co, 2, 2, 2) and Co are needed.");
  const Buffer<float> packed = filled(kernels.upsampling.packed_size(inputs, outputs), kUnset);
  kernels.upsampling.pack(weights.data, inputs, outputs, packed.data());
  const BlockedInput blocked(input, kernels);
  const Buffer<float> padded_bias = padded(bias, kernels);
  const Index3 in = edges_of(input.data);
  const Index3 out{2 * in[0], 2 * in[1], 2 * in[2]};
  const std::int64_t channels = kernels.padded(outputs);
  const Buffer<float> result = filled(channels * voxels_of(out), kUnset);
  const Upsampling call{.input = blocked.input(),
                        .in = in,
                        .channels = outputs,
                        .weights = packed.data(),
                        .bias = padded_bias.data(),
                        .result = result.data()};
  PlainRun run{.shape = {channels, out[0], out[1], out[2]},
               .tasks = kernels.upsampling.tasks(call)};
  run.seconds = run_tasks(
      run.tasks, kernels.upsampling.scratch(call), options,
      [&](std::int64_t task, float* scratch) { kernels.upsampling.run(call, task, scratch); },
      [&] { run.result = to_plain(result, voxels_of(out), kernels.width); });
  return run;
}

PlainRun plain_head(const Kernels& kernels, const PlainInput& input,
                    const TensorView<const float, 2>& weights, std::span<const float> bias,
                    std::int64_t stride, const PlainOptions& options) {
  check(input);
  check_head(input.data.shape[0], weights, bias);
  require(stride >= weights.shape[0],
          "The stride is " + std::to_string(stride) + " for " + std::to_string(weights.shape[0]) +
              " maps.",
          "It must be at least their number.");
  const std::int64_t inputs = input.data.shape[0];
  const std::int64_t outputs = weights.shape[0];
  const Buffer<float> packed = filled(kernels.head.packed_size(inputs, outputs), kUnset);
  kernels.head.pack(weights.data, inputs, outputs, packed.data());
  const BlockedInput blocked(input, kernels);
  const std::int64_t voxels = voxels_of(edges_of(input.data));
  PlainRun run{.result = filled(voxels * stride, kUnset),
               .shape = {voxels, stride, 1, 1},
               .tasks = kernels.head.tasks(voxels)};
  const Head call{.input = blocked.input(),
                  .voxels = voxels,
                  .outputs = outputs,
                  .weights = packed.data(),
                  .bias = bias.data(),
                  .result = run.result.data(),
                  .stride = stride};
  run.seconds = run_tasks(
      run.tasks, kernels.head.scratch(inputs, outputs), options,
      [&](std::int64_t task, float* scratch) { kernels.head.run(call, task, scratch); }, [] {});
  return run;
}

PlainFusionRun plain_fusion(const Kernels& kernels, const PlainFusion& call, bool shares,
                            const PlainOptions& options) {
  const auto [voxels, experts, classes] = call.expert_logits.shape;
  require(voxels >= 1 && experts >= 1 && classes >= 1,
          "The experts' logits are " + list_of({voxels, experts, classes}) + ".",
          "(voxels, E, N) are needed, each at least 1.");
  std::optional<BlockedInput> blocked;
  Buffer<float> packed;
  Fusion fusion{.gate = {.voxels = voxels, .outputs = experts * classes},
                .experts = experts,
                .classes = classes,
                .expert_logits = call.expert_logits.data};
  std::int64_t inputs = 0;
  if (call.gate) {
    check(*call.gate);
    inputs = call.gate->data.shape[0];
    check_head(inputs, call.weights, call.bias);
    require(call.weights.shape[0] == experts * classes &&
                voxels_of(edges_of(call.gate->data)) == voxels,
            "The gate makes " + std::to_string(call.weights.shape[0]) + " maps of " +
                text(edges_of(call.gate->data)) + " voxels.",
            std::to_string(experts * classes) + " maps of " + std::to_string(voxels) +
                " voxels are needed.");
    packed = filled(kernels.head.packed_size(inputs, experts * classes), kUnset);
    kernels.head.pack(call.weights.data, inputs, experts * classes, packed.data());
    blocked.emplace(*call.gate, kernels);
    fusion.gate.input = blocked->input();
    fusion.gate.weights = packed.data();
    fusion.gate.bias = call.bias.data();
  }
  PlainFusionRun run{.logits = filled(classes * voxels, kUnset)};
  fusion.logits = run.logits.data();
  if (shares) {
    run.shares = filled(experts * voxels, kUnset);
    fusion.shares = run.shares->data();
  }
  run.seconds = run_tasks(
      kernels.head.tasks(voxels), kernels.head.scratch(inputs, experts * classes), options,
      [&](std::int64_t task, float* scratch) { kernels.head.fuse(fusion, task, scratch); }, [] {});
  return run;
}

}  // namespace mome
