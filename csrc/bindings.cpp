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
#include "bindings_window.hpp"
#include "components.hpp"
#include "cpu.hpp"
#include "cuda/device.hpp"
#include "error.hpp"
#include "memory.hpp"
#include "parallel.hpp"
#include "resample.hpp"
#include "safetensors.hpp"
#include "tensor.hpp"
#include "zscore.hpp"

namespace py = pybind11;

namespace mome {
namespace {

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
  bind_errors();
  bind_window(module);
  using py::arg;
  module.def("zscore", &py_zscore, arg("array"));
  module.def("resample", &py_resample, arg("source"), arg("matrix"), arg("shape"), arg("mode"),
             arg("fill") = 0.0);
  module.def("connected_components", &py_connected_components, arg("mask"));
  module.def("read_safetensors", &py_read_safetensors, arg("path"), py::kw_only(),
             arg("offset") = 0, arg("size") = py::none());
  module.def("cpu_features", &cpu_features);
  module.def("default_threads", &default_threads);
  module.def("cuda_build", &cuda::build);
  module.def("cuda_devices", &cuda::device_count);
  bind_kernels(module);
  bind_native(module);
}

}  // namespace mome
