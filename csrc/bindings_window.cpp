#include "bindings_window.hpp"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "bindings_arrays.hpp"
#include "bindings_native.hpp"
#include "device_tensor.hpp"
#include "error.hpp"
#include "sliding_window.hpp"
#include "tensor.hpp"
#include "tiling.hpp"

namespace py = pybind11;

namespace mome {
namespace {

const char* class_of(const std::string& code) {
  if (code.starts_with("bundle.")) {
    return "BundleError";
  }
  if (code.starts_with("engine.")) {
    return "EngineError";
  }
  if (code.starts_with("geometry.")) {
    return "GeometryError";
  }
  return "InputError";
}

// Messages may hold a path, which need not be UTF-8.
py::str text_of(const std::string& text) {
  PyObject* decoded =
      PyUnicode_DecodeFSDefaultAndSize(text.data(), static_cast<Py_ssize_t>(text.size()));
  if (decoded == nullptr) {
    throw py::error_already_set();
  }
  return py::reinterpret_steal<py::str>(decoded);
}

void raise_in_python(const Error& error) {
  const py::object type = py::module_::import("mome_sdk.errors").attr(class_of(error.code()));
  const py::object value =
      type(error.code(), text_of(error.what()), py::arg("hint") = text_of(error.hint()));
  PyErr_SetObject(type.ptr(), value.ptr());
}

Blend blend_of(const std::string& name) {
  if (name == "exact") {
    return Blend::exact;
  }
  if (name == "authors") {
    return Blend::authors;
  }
  throw Error("argument.blend", "The blend is '" + name + "'.", "It is 'exact' or 'authors'.");
}

std::array<bool, 3> mirror_of(const std::vector<int>& axes) {
  std::array<bool, 3> mirror{};
  for (const int axis : axes) {
    if (axis < 0 || axis > 2 || mirror[static_cast<std::size_t>(axis)]) {
      throw Error("argument.mirror", "Mirroring names axis " + std::to_string(axis) + ".",
                  "The axes are 0 (D), 1 (H) and 2 (W), each at most once.");
    }
    mirror[static_cast<std::size_t>(axis)] = true;
  }
  return mirror;
}

SlidingWindowOptions options_of(const Index3& patch, double step, const std::vector<int>& mirror,
                                const std::string& blend, std::int64_t batch,
                                std::optional<int> threads) {
  return {.patch = patch,
          .step = step,
          .mirror = mirror_of(mirror),
          .blend = blend_of(blend),
          .batch = batch,
          .threads = threads_of(threads)};
}

// Between two calls of the engine: lets Ctrl-C through and tells Python how far the run is.
// The callback is borrowed: copies of the function object must not count references without the
// GIL.
Progress progress_of(py::handle callback) {
  return [callback](std::int64_t done, std::int64_t total) {
    const py::gil_scoped_acquire gil;
    if (PyErr_CheckSignals() != 0) {
      throw py::error_already_set();
    }
    if (!callback.is_none()) {
      callback(done, total);
    }
  };
}

Output output_of(const std::string& name) {
  if (name == "logits") {
    return Output::logits;
  }
  if (name == "probabilities") {
    return Output::probabilities;
  }
  if (name == "labels") {
    return Output::labels;
  }
  throw Error("argument.output", "The output is '" + name + "'.",
              "It is 'logits', 'probabilities' or 'labels'.");
}

py::tuple py_run_sliding_window(const py::object& engine, const py::array& image,
                                const Index3& patch, double step, const std::vector<int>& mirror,
                                const std::string& blend, std::int64_t batch,
                                std::optional<int> threads, const std::string& output, bool shares,
                                const py::object& progress) {
  const auto [held, view] = input<float, 4>(image, "image");
  const SlidingWindowOptions options = options_of(patch, step, mirror, blend, batch, threads);
  const Wanted wanted{.output = output_of(output), .shares = shares};
  const std::shared_ptr<Engine> core = engine_of(engine);
  SlidingWindowResult result;
  {
    const py::gil_scoped_release release;
    result = run_sliding_window(*core, view, options, wanted, progress_of(progress));
  }
  const auto [channels, depth, height, width] = view.shape;
  const auto maps_of = [&](Buffer<float> maps, std::int64_t count) -> py::object {
    return array_of<float, 4>(std::move(maps), {count, depth, height, width});
  };
  const py::object maps =
      wanted.output == Output::labels
          ? array_of<std::uint8_t, 3>(std::move(result.labels), {depth, height, width})
          : maps_of(std::move(result.maps), core->classes());
  return py::make_tuple(
      maps, result.shares ? maps_of(std::move(*result.shares), core->experts()) : py::none());
}

void py_check_sliding_window(const Index3& patch, double step, const std::vector<int>& mirror,
                             const std::string& blend, std::int64_t batch,
                             std::optional<int> threads) {
  check_sliding_window(options_of(patch, step, mirror, blend, batch, threads));
}

py::tuple py_window_starts(const Index3& shape, const Index3& patch, double step) {
  const auto starts = window_starts(shape, patch, step);
  return py::make_tuple(starts[0], starts[1], starts[2]);
}

std::int64_t py_sliding_window_bytes(const Index3& shape, std::int64_t channels,
                                     std::int64_t classes, std::int64_t experts,
                                     const Index3& patch, double step, std::int64_t batch) {
  return sliding_window_bytes(shape, channels, classes, experts,
                              {.patch = patch, .step = step, .batch = batch});
}

py::array_t<float> py_window_weights(const Index3& patch, const std::string& blend) {
  return array_of<float, 3>(window_weights(patch, blend_of(blend)), patch);
}

TensorView<const float, 2> flat(const TensorView<const float, 4>& view) {
  return {view.data, {view.shape[0], view.shape[1] * view.shape[2] * view.shape[3]}};
}

void require_classes(const TensorView<const float, 4>& logits, std::int64_t most) {
  if (logits.shape[0] < 1 || logits.shape[0] > most) {
    throw Error("argument.array",
                "The logits are of " + std::to_string(logits.shape[0]) + " classes.",
                "Expected are 1 to " + std::to_string(most) + ".");
  }
}

py::array_t<float> py_softmax(const py::array& logits) {
  const auto [held, view] = input<float, 4>(logits, "array of logits");
  require_classes(view, 256);
  Buffer<float> out(view.size());
  {
    const py::gil_scoped_release release;
    softmax(flat(view), out.view<2>(flat(view).shape));
  }
  return array_of<float, 4>(std::move(out), view.shape);
}

py::array_t<std::uint8_t> py_argmax(const py::array& logits) {
  const auto [held, view] = input<float, 4>(logits, "array of logits");
  require_classes(view, 256);
  const auto [classes, depth, height, width] = view.shape;
  Buffer<std::uint8_t> out(depth * height * width);
  {
    const py::gil_scoped_release release;
    argmax(flat(view), out.view<1>({out.size()}));
  }
  return array_of<std::uint8_t, 3>(std::move(out), {depth, height, width});
}

}  // namespace

void bind_errors() {
  py::register_exception_translator([](std::exception_ptr thrown) {
    try {
      if (thrown) {
        std::rethrow_exception(thrown);
      }
    } catch (const Error& error) {
      raise_in_python(error);
    }
  });
}

void bind_window(py::module_& module) {
  using py::arg;
  module.def("window_starts", &py_window_starts, arg("shape"), arg("patch"), arg("step"));
  module.def("window_weights", &py_window_weights, arg("patch"), arg("blend"));
  module.def("check_sliding_window", &py_check_sliding_window, py::kw_only(), arg("patch"),
             arg("step"), arg("mirror"), arg("blend"), arg("batch"), arg("threads"));
  module.def("run_sliding_window", &py_run_sliding_window, arg("engine"), arg("image"),
             py::kw_only(), arg("patch"), arg("step"), arg("mirror"), arg("blend"), arg("batch"),
             arg("threads"), arg("output") = "logits", arg("shares") = false,
             arg("progress") = py::none());
  module.def("sliding_window_bytes", &py_sliding_window_bytes, arg("shape"), arg("channels"),
             arg("classes"), arg("experts"), arg("patch"), arg("step"), arg("batch"));
  module.def("softmax", &py_softmax, arg("logits"));
  module.def("argmax", &py_argmax, arg("logits"));
  bind_device_tensor(module);
}

}  // namespace mome
