#include "plan.hpp"

#include <algorithm>
#include <utility>

namespace mome {
namespace {

constexpr float kLeakySlope = 0.01F;  // architecture.py
constexpr std::int64_t kAlignment = 64;
constexpr std::int64_t kFloat = sizeof(float);

std::int64_t voxels_of(const Index3& shape) { return shape[0] * shape[1] * shape[2]; }

// Writes down the steps of MoME in the order in which they run.
class Planner {
 public:
  Planner(const Architecture& architecture, const Index3& window, const Kernels& kernels,
          int workers)
      : architecture_(architecture), kernels_(kernels) {
    plan_.window = window;
    plan_.image_channels = architecture.in_channels;
    plan_.workers = workers;
  }

  Plan make() {
    plan_.expert_logits = add_storage(voxels_of(plan_.window) * maps_of_experts() * kFloat);
    if (architecture_.gated()) {
      // The gate's first convolution reads the image and the first features of all experts. It is
      // linear, so each part is added as soon as it is there, and none has to be kept.
      gate_first_ = add_stem("gate.", gate_inputs(), false);
    }
    for (std::int64_t expert = 0; expert < architecture_.experts; ++expert) {
      add_expert(expert);
    }
    add_gate_and_fusion();
    finish_lives();
    place();
    return std::move(plan_);
  }

 private:
  std::int64_t maps_of_experts() const { return architecture_.experts * architecture_.classes; }

  std::int64_t gate_inputs() const {
    return architecture_.in_channels + architecture_.experts * architecture_.features[0];
  }

  int add_storage(std::int64_t bytes) {
    const int now = static_cast<int>(plan_.steps.size());
    plan_.storages.push_back({.bytes = bytes, .first = now, .last = now});
    return static_cast<int>(plan_.storages.size()) - 1;
  }

  int add_map(std::int64_t channels, const Index3& shape, float slope) {
    const std::int64_t padded = kernels_.padded(channels);
    const int storage = add_storage(padded * voxels_of(shape) * kFloat);
    const int norm = add_storage(2 * padded * kFloat);
    plan_.maps.push_back(
        {.storage = storage, .norm = norm, .slope = slope, .channels = channels, .shape = shape});
    return static_cast<int>(plan_.maps.size()) - 1;
  }

  int add_stem(const std::string& network, std::int64_t stored_inputs, bool normalise) {
    Step step{.kind = StepKind::stem, .name = network + "encoder.stages.0.0.convs.0"};
    step.output = add_map(architecture_.features[0], plan_.window, kLeakySlope);
    step.stored_inputs = stored_inputs;
    step.normalise = normalise;
    const Stem call{.image_channels = architecture_.in_channels,
                    .shape = plan_.window,
                    .channels = architecture_.features[0]};
    add_work(step, kernels_.stem.packed_size(stored_weights_of(plan_, step)),
             kernels_.stem.scratch(call), kernels_.stem.tasks(call));
    return push(std::move(step));
  }

  int add_convolution(std::string name, std::array<int, 2> inputs, std::int64_t channels,
                      int stride) {
    const Map& input = map(inputs[0]);
    Index3 shape = input.shape;
    for (std::int64_t& edge : shape) {
      edge = (edge + stride - 1) / stride;
    }
    std::int64_t stored = input.channels;
    if (inputs[1] != kNone) {
      stored += map(inputs[1]).channels;
    }
    Step step{.kind = StepKind::convolution, .name = std::move(name), .inputs = inputs};
    step.kernel = &kernels_.convolution(stride, shape);
    step.stored_inputs = stored;
    step.normalise = true;
    step.output = add_map(channels, shape, kLeakySlope);
    return push_convolution(std::move(step));
  }

  void accumulate_for_gate(int features, std::int64_t expert) {
    Step step{.kind = StepKind::convolution, .name = "gate.encoder.stages.0.0.convs.0"};
    step.inputs[0] = features;
    step.output = gate_first_;
    step.kernel = &kernels_.convolution(1, plan_.window);
    step.stored_inputs = gate_inputs();
    step.first_input = architecture_.in_channels + expert * architecture_.features[0];
    step.accumulate = true;
    step.normalise = expert + 1 == architecture_.experts;
    push_convolution(std::move(step));
  }

  int push_convolution(Step step) {
    const Convolution call = convolution_of(plan_, step);
    add_work(step, step.kernel->packed_size(stored_weights_of(plan_, step)),
             step.kernel->scratch(call), step.kernel->tasks(call));
    return push(std::move(step));
  }

  int add_upsampling(std::string name, int input, std::int64_t channels) {
    const Map& low = map(input);
    const Upsampling call{
        .input = {.channels = low.channels}, .in = low.shape, .channels = channels};
    const std::int64_t packed = kernels_.upsampling.packed_size(low.channels, channels);
    const Index3 shape{2 * low.shape[0], 2 * low.shape[1], 2 * low.shape[2]};
    Step step{.kind = StepKind::upsampling, .name = std::move(name), .inputs = {input, kNone}};
    step.stored_inputs = low.channels;
    step.output = add_map(channels, shape, 1.0F);
    // The bias, padded, is packed behind the weights.
    add_work(step, packed + kernels_.padded(channels), kernels_.upsampling.scratch(call), 0);
    return push(std::move(step));
  }

  void add_head(const std::string& network, int input, std::int64_t outputs, StepKind kind,
                std::int64_t expert) {
    const std::string last = std::to_string(architecture_.stages() - 2);
    Step step{.kind = kind, .name = network + "decoder.seg_layers." + last};
    step.inputs[0] = input;
    step.outputs = outputs;
    step.expert = expert;
    const std::int64_t channels = architecture_.features[0];
    step.stored_inputs = channels;
    add_work(step, kernels_.head.packed_size(channels, outputs),
             kernels_.head.scratch(channels, outputs), 0);
    push(std::move(step));
  }

  // Storage for what a step needs besides its maps.
  void add_work(Step& step, std::int64_t packed, std::int64_t scratch, std::int64_t tasks) {
    step.packed = add_storage(packed * kFloat);
    step.scratch_bytes = (scratch * kFloat + kAlignment - 1) / kAlignment * kAlignment;
    step.scratch = add_storage(step.scratch_bytes * plan_.workers);
    if (step.normalise) {
      const std::int64_t padded = kernels_.padded(map(step.output).channels);
      step.statistics = add_storage(2 * padded * tasks * static_cast<std::int64_t>(sizeof(double)));
    }
  }

  int push(Step step) {
    const int now = static_cast<int>(plan_.steps.size());
    for (const int used : {step.inputs[0], step.inputs[1], step.output}) {
      if (used != kNone) {
        storage(map(used).storage).last = now;
        storage(map(used).norm).last = now;
      }
    }
    plan_.steps.push_back(std::move(step));
    return plan_.steps.back().output;
  }

  // Further convolutions of an encoder or decoder stage.
  int add_stack(const std::string& stage, int input, std::int64_t count) {
    for (std::int64_t c = 1; c < count; ++c) {
      input = add_convolution(stage + ".convs." + std::to_string(c), {input, kNone},
                              map(input).channels, 1);
    }
    return input;
  }

  static std::string encoder_stage(const std::string& network, std::int64_t stage) {
    return network + "encoder.stages." + std::to_string(stage) + ".0";
  }

  // From the first convolution's result to the last features of the decoder.
  int add_unet(const std::string& network, int first, std::int64_t expert) {
    std::vector<int> skips{
        add_stack(encoder_stage(network, 0), first, architecture_.encoder_convs[0])};
    if (architecture_.gated() && expert != kNone) {
      accumulate_for_gate(skips[0], expert);
    }
    const auto stages = static_cast<std::size_t>(architecture_.stages());
    for (std::size_t s = 1; s < stages; ++s) {
      const std::string stage = encoder_stage(network, static_cast<std::int64_t>(s));
      const int down =
          add_convolution(stage + ".convs.0", {skips.back(), kNone}, architecture_.features[s], 2);
      skips.push_back(add_stack(stage, down, architecture_.encoder_convs[s]));
    }
    int x = skips.back();
    for (std::size_t d = 0; d + 1 < stages; ++d) {
      const int skip = skips[stages - 2 - d];
      const std::int64_t channels = map(skip).channels;
      const std::string number = std::to_string(d);
      const int up = add_upsampling(network + "decoder.transpconvs." + number, x, channels);
      const std::string stage = network + "decoder.stages." + number;
      x = add_convolution(stage + ".convs.0", {up, skip}, channels, 1);
      x = add_stack(stage, x, architecture_.decoder_convs[d]);
    }
    return x;
  }

  void add_expert(std::int64_t expert) {
    const std::string network = "experts." + std::to_string(expert) + ".";
    const int first = add_stem(network, architecture_.in_channels, true);
    const int features = add_unet(network, first, expert);
    add_head(network, features, architecture_.classes, StepKind::head, expert);
  }

  void add_gate_and_fusion() {
    int features = kNone;
    if (architecture_.gated()) {
      features = add_unet("gate.", gate_first_, kNone);
    }
    add_head("gate.", features, maps_of_experts(), StepKind::fusion, 0);
  }

  void finish_lives() {
    storage(plan_.expert_logits).last = static_cast<int>(plan_.steps.size()) - 1;
  }

  // First fit, large pieces first, among those that live at the same time.
  void place() {
    std::vector<Storage*> order;
    for (Storage& each : plan_.storages) {
      each.bytes = (each.bytes + kAlignment - 1) / kAlignment * kAlignment;
      order.push_back(&each);
    }
    std::stable_sort(order.begin(), order.end(),
                     [](const Storage* a, const Storage* b) { return a->bytes > b->bytes; });
    std::vector<const Storage*> placed;  // by offset
    for (Storage* each : order) {
      std::int64_t offset = 0;
      for (const Storage* other : placed) {
        const bool together = other->first <= each->last && each->first <= other->last;
        if (together && offset + each->bytes > other->offset) {
          offset = std::max(offset, other->offset + other->bytes);
        }
      }
      each->offset = offset;
      const auto by_offset = [](const Storage* a, const Storage* b) {
        return a->offset < b->offset;
      };
      placed.insert(std::upper_bound(placed.begin(), placed.end(), each, by_offset), each);
      plan_.bytes = std::max(plan_.bytes, offset + each->bytes);
    }
  }

  const Map& map(int index) const { return plan_.maps[static_cast<std::size_t>(index)]; }
  Storage& storage(int index) { return plan_.storages[static_cast<std::size_t>(index)]; }

  const Architecture& architecture_;
  const Kernels& kernels_;
  Plan plan_;
  int gate_first_ = kNone;
};

}  // namespace

Plan make_plan(const Architecture& architecture, const Index3& window, const Kernels& kernels,
               int workers) {
  return Planner(architecture, window, kernels, workers).make();
}

Convolution convolution_of(const Plan& plan, const Step& step) {
  const Map& output = plan.maps[static_cast<std::size_t>(step.output)];
  Convolution call{.out = output.shape, .channels = output.channels, .accumulate = step.accumulate};
  for (std::size_t i = 0; i < 2 && step.inputs[i] != kNone; ++i) {
    const Map& input = plan.maps[static_cast<std::size_t>(step.inputs[i])];
    call.inputs[i].channels = input.channels;
    call.inputs[i].slope = input.slope;
    call.in = input.shape;
  }
  return call;
}

StoredWeights stored_weights_of(const Plan& plan, const Step& step) {
  const Convolution call = convolution_of(plan, step);
  const bool stem = step.kind == StepKind::stem;
  return {.stored_inputs = step.stored_inputs,
          .first = step.first_input,
          .inputs = {stem ? plan.image_channels : call.inputs[0].channels, call.inputs[1].channels},
          .outputs = call.channels};
}

}  // namespace mome
