#pragma once

#include <pybind11/pybind11.h>

#include <optional>
#include <string>

#include "engine.hpp"

namespace mome {

// An engine written in Python (the Engine protocol of mome_sdk.engines). It is made with the GIL
// held, when its numbers are read, and destroyed with it; run() takes the GIL for the call only.
// It passes views of the batch, without copies: NumPy arrays, or DeviceTensors and the stream on a
// GPU. They stay valid as long as Python keeps them, although later calls write to the same memory.
class __attribute__((visibility("hidden"))) PythonEngine final : public Engine {
 public:
  explicit PythonEngine(const pybind11::object& engine);

  std::string name() const override { return name_; }
  std::string device() const override { return device_; }
  std::int64_t channels() const override { return channels_; }
  std::int64_t classes() const override { return classes_; }
  std::int64_t experts() const override { return experts_; }
  std::optional<std::int64_t> batch() const override { return batch_; }
  void run(const WindowBatch& batch) override;

 private:
  void run_on_device(const WindowBatch& batch);

  pybind11::object run_;
  std::string name_;
  std::string device_;
  std::int64_t channels_;
  std::int64_t classes_;
  std::int64_t experts_;
  std::optional<std::int64_t> batch_;
};

}  // namespace mome
