#include "device.hpp"

namespace mome::cuda {
namespace {

[[noreturn]] void reject(const std::string& engine, int ordinal) {
  throw Error("engine.device",
              "Engine " + engine + " works on cuda:" + std::to_string(ordinal) +
                  ", but the core of this installation was built without CUDA.",
              "Install the package again where nvcc (CUDA 12.0 or later) is found: on the PATH, in "
              "/usr/local/cuda, or where CUDACXX says. Or take device cpu.");
}

}  // namespace

std::optional<std::string> build() { return std::nullopt; }

int device_count() { return 0; }

void require_device(const std::string& engine, int ordinal) { reject(engine, ordinal); }

// Nobody comes here: require_device() was asked before.
std::unique_ptr<Stage> stage(int ordinal, const StagePlan&, TensorView<const float, 4>,
                             Buffer<float>) {
  reject("of the caller", ordinal);
}

int dlpack_device_type() { return 2; }

void order_streams(int, std::uintptr_t, std::uintptr_t) {}

}  // namespace mome::cuda
