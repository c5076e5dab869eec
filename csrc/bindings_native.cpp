#include "bindings_native.hpp"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <utility>

#include "bindings_arrays.hpp"
#include "error.hpp"
#include "kernels/kernels.hpp"
#include "native/network.hpp"
#include "python_engine.hpp"

namespace py = pybind11;

namespace mome {
namespace {

using Floats = py::array_t<float, py::array::c_style>;

void check_signals() {
  const py::gil_scoped_acquire gil;
  if (PyErr_CheckSignals() != 0) {
    throw py::error_already_set();
  }
}

std::shared_ptr<NativeEngine> open_native(const py::object& path, std::int64_t offset,
                                          std::optional<std::int64_t> size,
                                          std::optional<int> threads) {
  const auto name = py::module_::import("os").attr("fsencode")(path).cast<std::string>();
  return std::make_shared<NativeEngine>(std::make_shared<const Weights>(name, offset, size),
                                        threads_of(threads), &check_signals);
}

template <typename View, typename Data>
View view_of(const Floats& array, Data* data) {
  if (array.ndim() != 5) {
    throw Error("engine.buffers", "A buffer has " + std::to_string(array.ndim()) + " axes.",
                "Five are expected.");
  }
  View view{data, {}};
  for (std::size_t axis = 0; axis < 5; ++axis) {
    view.shape[axis] = array.shape(static_cast<py::ssize_t>(axis));
  }
  return view;
}

// Arrays are dense float32 (noconvert): what is written must reach the caller.
WindowBatch batch_of(const NativeEngine& engine, const Floats& windows, Floats& logits,
                     std::optional<Floats>& shares) {
  WindowBatch batch{.windows = view_of<TensorView<const float, 5>>(windows, windows.data()),
                    .logits = view_of<TensorView<float, 5>>(logits, logits.mutable_data()),
                    .owner = nullptr};
  std::array<std::int64_t, 5> expected = batch.windows.shape;
  bool fits = expected[1] == engine.channels();
  expected[1] = engine.classes();
  fits = fits && batch.logits.shape == expected;
  if (shares) {
    batch.shares = view_of<TensorView<float, 5>>(*shares, shares->mutable_data());
    expected[1] = engine.experts();
    fits = fits && batch.shares->shape == expected;
  }
  if (!fits) {
    throw Error("engine.buffers", "The buffers do not fit each other or the network.",
                "(B, C, D, H, W), (B, N, D, H, W) and (B, E, D, H, W) are expected.");
  }
  return batch;
}

void run(NativeEngine& engine, const Floats& windows, Floats logits, std::optional<Floats> shares) {
  const WindowBatch batch = batch_of(engine, windows, logits, shares);
  const py::gil_scoped_release release;
  engine.run(batch);
}

std::vector<py::dict> profile(NativeEngine& engine, const Floats& windows, Floats logits) {
  std::optional<Floats> none;
  const WindowBatch batch = batch_of(engine, windows, logits, none);
  std::vector<StepTime> times;
  {
    const py::gil_scoped_release release;
    times = engine.profile(batch);
  }
  std::vector<py::dict> rows;
  for (const StepTime& time : times) {
    using py::arg;
    rows.push_back(py::dict(arg("name") = time.name, arg("kernel") = time.kernel,
                            arg("seconds") = time.seconds, arg("packing") = time.packing,
                            arg("gflop") = time.gflop, arg("executed") = time.executed));
  }
  return rows;
}

}  // namespace

void bind_native(py::module_& module) {
  using py::arg;
  module.def(
      "native_kernels", [](std::int64_t channels) { return chosen_kernels(channels).name; },
      arg("channels"));
  py::class_<NativeEngine, std::shared_ptr<NativeEngine>>(module, "NativeEngine")
      .def(py::init(&open_native), arg("path"), py::kw_only(), arg("offset") = 0,
           arg("size") = py::none(), arg("threads") = py::none())
      .def_property_readonly("cpu",
                             [](const NativeEngine& engine) { return engine.kernels().name; })
      .def("bytes", &NativeEngine::bytes, arg("window"))
      .def("run", &run, arg("windows").noconvert(), arg("logits").noconvert(),
           arg("shares").noconvert() = py::none())
      .def("profile", &profile, arg("windows").noconvert(), arg("logits").noconvert());
}

std::shared_ptr<Engine> engine_of(const py::object& object) {
  // mome_sdk.engines.native wraps the engine; its wrapper says so by this attribute.
  if (py::hasattr(object, "core")) {
    const py::object core = object.attr("core");
    if (py::isinstance<NativeEngine>(core)) {
      return core.cast<std::shared_ptr<NativeEngine>>();
    }
  }
  return std::make_shared<PythonEngine>(object);
}

}  // namespace mome
