#include "python_engine.hpp"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <memory>

#include "device_tensor.hpp"

namespace py = pybind11;

namespace mome {
namespace {

py::array_t<float> array_of(const TensorView<const float, 5>& view,
                            const std::shared_ptr<const void>& owner) {
  auto held = std::make_unique<std::shared_ptr<const void>>(owner);
  const py::capsule base(held.get(), [](void* memory) {
    const std::unique_ptr<std::shared_ptr<const void>> release(
        static_cast<std::shared_ptr<const void>*>(memory));
  });
  held.release();  // the capsule owns it now
  return py::array_t<float>(view.shape, view.data, base);
}

// The number in "cuda:1"; the runner has checked the name.
int ordinal_in(const std::string& device) { return std::stoi(device.substr(device.find(':') + 1)); }

}  // namespace

PythonEngine::PythonEngine(const py::object& engine)
    : run_(engine.attr("run")),
      name_(engine.attr("name").cast<std::string>()),
      device_(engine.attr("device").cast<std::string>()),
      channels_(engine.attr("channels").cast<std::int64_t>()),
      classes_(engine.attr("classes").cast<std::int64_t>()),
      experts_(engine.attr("experts").cast<std::int64_t>()),
      batch_(engine.attr("batch").cast<std::optional<std::int64_t>>()) {}

void PythonEngine::run(const WindowBatch& batch) {
  const py::gil_scoped_acquire gil;
  if (batch.stream) {
    run_on_device(batch);
    return;
  }
  const py::array_t<float> windows = array_of(batch.windows, batch.owner);
  const py::array_t<float> logits = array_of(batch.logits, batch.owner);
  if (batch.shares) {
    run_(windows, logits, array_of(*batch.shares, batch.owner));
  } else {
    run_(windows, logits);
  }
}

void PythonEngine::run_on_device(const WindowBatch& batch) {
  const auto tensor = [&](const TensorView<const float, 5>& view) {
    return DeviceTensor{.data = const_cast<float*>(view.data),
                        .shape = view.shape,
                        .device = device_,
                        .ordinal = ordinal_in(device_),
                        .stream = *batch.stream,
                        .owner = batch.owner};
  };
  const py::object shares = batch.shares ? py::cast(tensor(*batch.shares)) : py::none();
  run_(tensor(batch.windows), tensor(batch.logits), shares, *batch.stream);
}

}  // namespace mome
