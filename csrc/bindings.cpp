#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cmath>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "bindings_arrays.hpp"
#include "bindings_kernels.hpp"
#include "bindings_native.hpp"
#include "components.hpp"
#include "cpu.hpp"
#include "error.hpp"
#include "memory.hpp"
#include "parallel.hpp"
#include "resample.hpp"
#include "safetensors.hpp"
#include "sliding_window.hpp"
#include "tensor.hpp"
#include "tiling.hpp"
#include "zscore.hpp"

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

py::tuple py_run_sliding_window(const py::object& engine, const py::array& image,
                                const Index3& patch, double step, const std::vector<int>& mirror,
                                const std::string& blend, std::int64_t batch,
                                std::optional<int> threads, bool shares,
                                const py::object& progress) {
  const auto [held, view] = input<float, 4>(image, "image");
  const SlidingWindowOptions options = options_of(patch, step, mirror, blend, batch, threads);
  const std::shared_ptr<Engine> core = engine_of(engine);
  SlidingWindowResult result;
  {
    const py::gil_scoped_release release;
    result = run_sliding_window(*core, view, options, shares, progress_of(progress));
  }
  const auto [channels, depth, height, width] = view.shape;
  const py::array logits =
      array_of<float, 4>(std::move(result.logits), {core->classes(), depth, height, width});
  if (!result.shares) {
    return py::make_tuple(logits, py::none());
  }
  return py::make_tuple(logits, array_of<float, 4>(std::move(*result.shares),
                                                   {core->experts(), depth, height, width}));
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

py::array_t<float> py_zscore(const py::array& array) {
  if (!py::isinstance<py::array_t<float>>(array)) {
    throw Error("argument.array",
                "The image is of " + py::str(array.dtype()).cast<std::string>() + ".",
                "Expected is float32.");
  }
  const py::array_t<float> in = py::array_t<float, py::array::c_style>::ensure(array);
  const std::vector<py::ssize_t> shape(in.shape(), in.shape() + in.ndim());
  py::array_t<float> out(shape);
  const std::span<const float> values{in.data(), static_cast<std::size_t>(in.size())};
  const std::span<float> normalised{out.mutable_data(), values.size()};
  {
    const py::gil_scoped_release release;
    zscore(values, normalised);
  }
  return out;
}

template <typename T>
py::array_t<T> resampled(const py::array& source, const Matrix4& matrix, const Index3& shape,
                         const std::string& mode, double fill) {
  const auto [held, view] = input<T, 3>(source, "volume");
  require_positive(view.shape, "shape");
  require_positive(shape, "shape");
  require_memory(checked_product(shape) * std::int64_t{sizeof(T)},
                 "A volume of " + text(shape) + " voxels");
  if (std::is_integral_v<T> && !(fill >= 0.0 && fill <= 255.0 && fill == std::floor(fill))) {
    throw Error("argument.fill", "The fill value is " + text(fill) + ".",
                "It must be a value of " + dtype_name<T>() + ".");
  }
  const T value = static_cast<T>(fill);
  Buffer<T> out(checked_product(shape));
  {
    const py::gil_scoped_release release;
    if (mode == "linear") {
      resample_linear(view, matrix, value, out.template view<3>(shape));
    } else if (mode == "nearest") {
      resample_nearest(view, matrix, value, out.template view<3>(shape));
    } else {
      throw Error("argument.mode", "The interpolation is '" + mode + "'.",
                  "It is 'linear' or 'nearest'.");
    }
  }
  return array_of<T, 3>(std::move(out), shape);
}

py::array py_resample(const py::array& source,
                      const py::array_t<double, py::array::c_style | py::array::forcecast>& matrix,
                      const Index3& shape, const std::string& mode, double fill) {
  if (matrix.ndim() != 2 || matrix.shape(0) != 4 || matrix.shape(1) != 4) {
    throw Error("argument.matrix", "The index matrix is not 4 x 4.", "Give a 4 x 4 affine.");
  }
  Matrix4 values{};
  std::copy_n(matrix.data(), values.size(), values.begin());
  if (py::isinstance<py::array_t<std::uint8_t>>(source)) {
    return resampled<std::uint8_t>(source, values, shape, mode, fill);
  }
  return resampled<float>(source, values, shape, mode, fill);
}

py::tuple py_connected_components(const py::array& mask) {
  const auto [held, view] = input<std::uint8_t, 3>(mask, "mask");
  Buffer<std::int32_t> labels(view.size());
  std::int32_t count = 0;
  {
    const py::gil_scoped_release release;
    count = connected_components(view, labels.view<3>(view.shape));
  }
  return py::make_tuple(array_of<std::int32_t, 3>(std::move(labels), view.shape), count);
}

const char* numpy_name(DType dtype) {
  switch (dtype) {
    case DType::boolean:
      return "?";
    case DType::u8:
      return "u1";
    case DType::i8:
      return "i1";
    case DType::u16:
      return "<u2";
    case DType::i16:
      return "<i2";
    case DType::f16:
      return "<f2";
    case DType::u32:
      return "<u4";
    case DType::i32:
      return "<i4";
    case DType::f32:
      return "<f4";
    case DType::u64:
      return "<u8";
    case DType::i64:
      return "<i8";
    case DType::f64:
      return "<f8";
  }
  throw Error("bundle.dtype", "A tensor has an unknown type.");
}

py::tuple py_read_safetensors(const py::object& path, std::int64_t offset,
                              std::optional<std::int64_t> size) {
  const auto name = py::module_::import("os").attr("fsencode")(path).cast<std::string>();
  auto file = std::make_unique<SafetensorsFile>(name, offset, size);
  const SafetensorsFile& view = *file;
  const py::capsule memory(file.get(), [](void* held) {
    const std::unique_ptr<SafetensorsFile> release(static_cast<SafetensorsFile*>(held));
  });
  file.release();  // the capsule owns it now
  py::dict tensors;
  for (const auto& [key, tensor] : view.tensors()) {
    py::array array(py::dtype(numpy_name(tensor.dtype)), tensor.shape, tensor.bytes.data(), memory);
    array.attr("setflags")(py::arg("write") = false);
    tensors[py::str(key)] = array;
  }
  return py::make_tuple(tensors, py::cast(view.metadata()));
}

}  // namespace

PYBIND11_MODULE(_core, module) {
  module.doc() = "The C++ core of mome_sdk; _core.pyi describes it.";
  py::register_exception_translator([](std::exception_ptr thrown) {
    try {
      if (thrown) {
        std::rethrow_exception(thrown);
      }
    } catch (const Error& error) {
      raise_in_python(error);
    }
  });

  using py::arg;
  module.def("window_starts", &py_window_starts, arg("shape"), arg("patch"), arg("step"));
  module.def("window_weights", &py_window_weights, arg("patch"), arg("blend"));
  module.def("check_sliding_window", &py_check_sliding_window, py::kw_only(), arg("patch"),
             arg("step"), arg("mirror"), arg("blend"), arg("batch"), arg("threads"));
  module.def("run_sliding_window", &py_run_sliding_window, arg("engine"), arg("image"),
             py::kw_only(), arg("patch"), arg("step"), arg("mirror"), arg("blend"), arg("batch"),
             arg("threads"), arg("shares") = false, arg("progress") = py::none());
  module.def("sliding_window_bytes", &py_sliding_window_bytes, arg("shape"), arg("channels"),
             arg("classes"), arg("experts"), arg("patch"), arg("step"), arg("batch"));
  module.def("softmax", &py_softmax, arg("logits"));
  module.def("argmax", &py_argmax, arg("logits"));
  module.def("zscore", &py_zscore, arg("array"));
  module.def("resample", &py_resample, arg("source"), arg("matrix"), arg("shape"), arg("mode"),
             arg("fill") = 0.0);
  module.def("connected_components", &py_connected_components, arg("mask"));
  module.def("read_safetensors", &py_read_safetensors, arg("path"), py::kw_only(),
             arg("offset") = 0, arg("size") = py::none());
  module.def("cpu_features", &cpu_features);
  module.def("default_threads", &default_threads);
  bind_kernels(module);
  bind_native(module);
}

}  // namespace mome
