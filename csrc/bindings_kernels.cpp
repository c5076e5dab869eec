#include "bindings_kernels.hpp"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings_arrays.hpp"
#include "error.hpp"
#include "kernels/norm.hpp"
#include "kernels/plain.hpp"

namespace py = pybind11;

namespace mome {
namespace {

// Array (C, D, H, W), scale (C), shift (C), slope.
using PyInput = std::tuple<py::array, py::array, py::array, float>;

PlainOptions options_of(std::optional<int> threads, int repeat) {
  if (repeat < 0) {
    throw Error("argument.repeat", "The number of timed runs is " + std::to_string(repeat) + ".",
                "It must be 0 or more.");
  }
  return {.threads = threads_of(threads), .repeat = repeat};
}

// Views of arrays, which it holds.
class Arrays {
 public:
  template <std::size_t Rank>
  TensorView<const float, Rank> view(const py::array& array, const char* name) {
    auto [dense, view] = input<float, Rank>(array, name);
    held_.push_back(std::move(dense));
    return view;
  }

  std::span<const float> numbers(const py::array& array, const char* name) {
    const auto numbers = view<1>(array, name);
    return {numbers.data, static_cast<std::size_t>(numbers.size())};
  }

  // Weights of a 3-D convolution with this edge: its taps in one axis.
  TensorView<const float, 3> weights(const py::array& array, std::int64_t edge) {
    const auto five = view<5>(array, "array of weights");
    const auto [a, b, d, h, w] = five.shape;
    if (d != edge || h != edge || w != edge) {
      throw Error("argument.array", "The weights have " + text(Index3{d, h, w}) + " taps.",
                  text(Index3{edge, edge, edge}) + " are needed.");
    }
    return {five.data, {a, b, d * h * w}};
  }

  PlainInput plain(const PyInput& input) {
    const auto& [data, scale, shift, slope] = input;
    return {.data = view<4>(data, "input"),
            .scale = numbers(scale, "array of scales"),
            .shift = numbers(shift, "array of shifts"),
            .slope = slope};
  }

 private:
  std::vector<py::array> held_;
};

py::array statistics_of(PlainRun& run) {
  return array_of<double, 3>(std::move(run.statistics), {run.tasks, 2, run.shape[0]});
}

py::dict py_kernel_sets() {
  py::dict sets;
  for (const Kernels* kernels : available_kernels()) {
    py::dict convolutions;
    for (const ConvolutionKernel& each : kernels->convolutions) {
      convolutions[each.name] = each.stride;
    }
    sets[kernels->name] = convolutions;
  }
  return sets;
}

std::string py_convolution_for(const std::string& kernels, int stride, const Index3& out) {
  require_positive(out, "shape");
  if (stride != 1 && stride != 2) {
    throw Error("argument.stride", "The stride is " + std::to_string(stride) + ".",
                "It must be 1 or 2.");
  }
  return kernels_named(kernels).convolution(stride, out).name;
}

py::dict py_run_convolution(const std::string& kernels, const std::string& scheme,
                            const std::vector<PyInput>& inputs, const py::array& weights,
                            std::int64_t first, const std::optional<py::array>& initial,
                            std::optional<int> threads, int repeat) {
  const Kernels& set = kernels_named(kernels);
  const ConvolutionKernel& kernel = convolution_named(set, scheme);
  const PlainOptions options = options_of(threads, repeat);
  Arrays arrays;
  std::vector<PlainInput> plain;
  for (const PyInput& input : inputs) {
    plain.push_back(arrays.plain(input));
  }
  PlainConvolution call{.inputs = plain, .weights = arrays.weights(weights, 3), .first = first};
  if (initial) {
    call.initial = arrays.view<4>(*initial, "array to add to");
  }
  PlainRun run;
  {
    const py::gil_scoped_release release;
    run = plain_convolution(set, kernel, call, options);
  }
  using py::arg;
  return py::dict(arg("result") = array_of<float, 4>(std::move(run.result), run.shape),
                  arg("statistics") = statistics_of(run), arg("seconds") = run.seconds,
                  arg("multiplications") = plain_multiplications(kernel, call));
}

py::dict py_run_stem(const std::string& kernels, const py::array& image, const py::array& weights,
                     std::optional<int> threads, int repeat) {
  const Kernels& set = kernels_named(kernels);
  const PlainOptions options = options_of(threads, repeat);
  Arrays arrays;
  const auto image_view = arrays.view<4>(image, "image");
  const auto weight_view = arrays.weights(weights, 3);
  PlainRun run;
  {
    const py::gil_scoped_release release;
    run = plain_stem(set, image_view, weight_view, options);
  }
  using py::arg;
  return py::dict(arg("result") = array_of<float, 4>(std::move(run.result), run.shape),
                  arg("statistics") = statistics_of(run), arg("seconds") = run.seconds);
}

py::dict py_run_upsampling(const std::string& kernels, const PyInput& input,
                           const py::array& weights, const py::array& bias,
                           std::optional<int> threads, int repeat) {
  const Kernels& set = kernels_named(kernels);
  const PlainOptions options = options_of(threads, repeat);
  Arrays arrays;
  const PlainInput plain = arrays.plain(input);
  const auto weight_view = arrays.weights(weights, 2);
  const auto biases = arrays.numbers(bias, "bias");
  PlainRun run;
  {
    const py::gil_scoped_release release;
    run = plain_upsampling(set, plain, weight_view, biases, options);
  }
  using py::arg;
  return py::dict(arg("result") = array_of<float, 4>(std::move(run.result), run.shape),
                  arg("seconds") = run.seconds);
}

py::dict py_run_head(const std::string& kernels, const PyInput& input, const py::array& weights,
                     const py::array& bias, std::optional<std::int64_t> stride,
                     std::optional<int> threads, int repeat) {
  const Kernels& set = kernels_named(kernels);
  const PlainOptions options = options_of(threads, repeat);
  Arrays arrays;
  const PlainInput plain = arrays.plain(input);
  const auto weight_view = arrays.view<2>(weights, "array of weights");
  const auto biases = arrays.numbers(bias, "bias");
  PlainRun run;
  {
    const py::gil_scoped_release release;
    run =
        plain_head(set, plain, weight_view, biases, stride.value_or(weight_view.shape[0]), options);
  }
  using py::arg;
  return py::dict(
      arg("result") = array_of<float, 2>(std::move(run.result), {run.shape[0], run.shape[1]}),
      arg("seconds") = run.seconds);
}

py::dict py_run_fusion(const std::string& kernels, const py::array& expert_logits,
                       const std::optional<std::tuple<PyInput, py::array, py::array>>& gate,
                       bool shares, std::optional<int> threads, int repeat) {
  const Kernels& set = kernels_named(kernels);
  const PlainOptions options = options_of(threads, repeat);
  Arrays arrays;
  PlainFusion call{.expert_logits = arrays.view<3>(expert_logits, "array of experts' logits")};
  if (gate) {
    const auto& [input, weights, bias] = *gate;
    call.gate = arrays.plain(input);
    call.weights = arrays.view<2>(weights, "array of weights");
    call.bias = arrays.numbers(bias, "bias");
  }
  PlainFusionRun run;
  {
    const py::gil_scoped_release release;
    run = plain_fusion(set, call, shares, options);
  }
  const auto [voxels, experts, classes] = call.expert_logits.shape;
  py::object share_maps = py::none();
  if (run.shares) {
    share_maps = array_of<float, 2>(std::move(*run.shares), {experts, voxels});
  }
  using py::arg;
  return py::dict(arg("result") = array_of<float, 2>(std::move(run.logits), {classes, voxels}),
                  arg("shares") = share_maps, arg("seconds") = run.seconds);
}

py::tuple py_instance_norm(const py::array& statistics, std::int64_t voxels, const py::array& gamma,
                           const py::array& beta, double eps) {
  const auto [held, sums] = input<double, 3>(statistics, "array of statistics");
  Arrays arrays;
  const auto gammas = arrays.numbers(gamma, "gamma");
  const auto betas = arrays.numbers(beta, "beta");
  if (sums.shape[1] != 2 || sums.shape[2] < static_cast<std::int64_t>(gammas.size()) ||
      gammas.size() != betas.size() || voxels < 1) {
    throw Error("argument.array",
                "The statistics are (" + std::to_string(sums.shape[0]) + ", " +
                    std::to_string(sums.shape[1]) + ", " + std::to_string(sums.shape[2]) +
                    ") over " + std::to_string(voxels) + " voxels, with " +
                    std::to_string(gammas.size()) + " gammas and " + std::to_string(betas.size()) +
                    " betas.",
                "(tasks, 2, padded channels), a voxel, and as many gammas as betas are needed.");
  }
  Buffer<float> scale(sums.shape[2]);
  Buffer<float> shift(sums.shape[2]);
  instance_norm({sums.data, static_cast<std::size_t>(sums.size())}, voxels, gammas, betas, eps,
                scale.span(), shift.span());
  return py::make_tuple(array_of<float, 1>(std::move(scale), {sums.shape[2]}),
                        array_of<float, 1>(std::move(shift), {sums.shape[2]}));
}

}  // namespace

void bind_kernels(py::module_& module) {
  using py::arg;
  module.def("kernel_sets", &py_kernel_sets);
  module.def("convolution_for", &py_convolution_for, arg("kernels"), arg("stride"), arg("out"));
  module.def("run_convolution", &py_run_convolution, arg("kernels"), arg("scheme"), arg("inputs"),
             arg("weights"), py::kw_only(), arg("first") = 0, arg("initial") = py::none(),
             arg("threads") = py::none(), arg("repeat") = 0);
  module.def("run_stem", &py_run_stem, arg("kernels"), arg("image"), arg("weights"), py::kw_only(),
             arg("threads") = py::none(), arg("repeat") = 0);
  module.def("run_upsampling", &py_run_upsampling, arg("kernels"), arg("input"), arg("weights"),
             arg("bias"), py::kw_only(), arg("threads") = py::none(), arg("repeat") = 0);
  module.def("run_head", &py_run_head, arg("kernels"), arg("input"), arg("weights"), arg("bias"),
             py::kw_only(), arg("stride") = py::none(), arg("threads") = py::none(),
             arg("repeat") = 0);
  module.def("run_fusion", &py_run_fusion, arg("kernels"), arg("expert_logits"), py::kw_only(),
             arg("gate") = py::none(), arg("shares") = false, arg("threads") = py::none(),
             arg("repeat") = 0);
  module.def("instance_norm", &py_instance_norm, arg("statistics"), arg("voxels"), arg("gamma"),
             arg("beta"), arg("eps"));
}

}  // namespace mome
