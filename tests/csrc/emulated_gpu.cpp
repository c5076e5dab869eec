// A GPU of host memory: the stage of the GPU runner (csrc/cuda/device_stage.hpp) and its bodies,
// run by the processor. The module that tests/csrc/test_gpu.py builds; it counts what is moved.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "bindings_native.hpp"
#include "bindings_window.hpp"
#include "cuda/device.hpp"
#include "cuda/device_stage.hpp"
#include "parallel.hpp"
#include "python_engine.hpp"

namespace mome {
namespace cuda {
namespace {

constexpr std::uintptr_t kStream = 0x57EA;

struct Log {
  std::vector<std::pair<std::string, std::int64_t>> transfers;
  std::vector<std::pair<std::uintptr_t, std::uintptr_t>> ordered;
  std::int64_t limit = std::int64_t{1} << 40;  // bytes of the device
  int alive = 0;                               // pieces of memory
};

Log& log() {
  static Log one;
  return one;
}

class Memory {
 public:
  Memory(std::int64_t device_bytes, std::int64_t staging_bytes)
      : device_(device_bytes), staging_(staging_bytes) {
    ++log().alive;
    // Nothing may rely on what was there.
    std::memset(device_.data(), 0xA5, static_cast<std::size_t>(device_bytes));
    std::memset(staging_.data(), 0xA5, static_cast<std::size_t>(staging_bytes));
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory() { --log().alive; }

  std::byte* device() const { return device_.data(); }
  std::byte* staging() const { return staging_.data(); }
  std::uintptr_t stream() const { return kStream; }

  void upload(std::int64_t bytes) const {
    log().transfers.emplace_back("upload", bytes);
    std::memcpy(device(), staging(), static_cast<std::size_t>(bytes));
  }
  void download(std::int64_t offset, std::int64_t bytes) const {
    log().transfers.emplace_back("download", bytes);
    std::memcpy(staging(), device() + offset, static_cast<std::size_t>(bytes));
  }
  void fill(std::int64_t offset, int value, std::int64_t bytes) const {
    std::memset(device() + offset, value, static_cast<std::size_t>(bytes));
  }

  // Backwards: the order of the bodies must not matter.
  template <typename Body>
  void each(std::int64_t count, const Body& body) const {
    for (std::int64_t i = count; i-- > 0;) {
      body(i);
    }
  }

 private:
  Buffer<std::byte> device_;
  Buffer<std::byte> staging_;
};

}  // namespace

std::optional<std::string> build() { return "emulated"; }

int device_count() { return 1; }

void require_device(const std::string& engine, int ordinal) {
  if (ordinal != 0) {
    throw Error("engine.device",
                "Engine " + engine + " works on cuda:" + std::to_string(ordinal) + ".");
  }
}

std::unique_ptr<Stage> stage(int, const StagePlan& plan, TensorView<const float, 4> image,
                             Buffer<float> weights) {
  return make_device_stage(plan, image, weights, [](std::int64_t device, std::int64_t staging) {
    if (device > log().limit) {
      throw Error("engine.out-of-memory", "The device is full.", "Take a smaller batch.");
    }
    return std::make_shared<Memory>(device, staging);
  });
}

int dlpack_device_type() { return 1; }  // host memory, which NumPy and PyTorch take

void order_streams(int, std::uintptr_t producer, std::uintptr_t consumer) {
  log().ordered.emplace_back(producer, consumer);
}

}  // namespace cuda

std::shared_ptr<Engine> engine_of(const pybind11::object& object) {
  return std::make_shared<PythonEngine>(object);
}

}  // namespace mome

PYBIND11_MODULE(_core, module) {
  mome::bind_errors();
  mome::bind_window(module);
  module.def("default_threads", &mome::default_threads);
  module.def("cuda_build", &mome::cuda::build);
  module.def("cuda_devices", &mome::cuda::device_count);
  module.def("emulated_transfers", [] { return std::exchange(mome::cuda::log().transfers, {}); });
  module.def("emulated_ordered", [] { return std::exchange(mome::cuda::log().ordered, {}); });
  module.def("emulated_alive", [] { return mome::cuda::log().alive; });
  module.def("emulated_limit",
             [](std::int64_t bytes) { return std::exchange(mome::cuda::log().limit, bytes); });
}
