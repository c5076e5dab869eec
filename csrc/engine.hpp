#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "tensor.hpp"

namespace mome {

// One call of an engine. The views are dense and in C order, in the memory of the engine's device.
struct WindowBatch {
  TensorView<const float, 5> windows;            // (B, C, D, H, W)
  TensorView<float, 5> logits;                   // (B, N, D, H, W), to be filled
  std::optional<TensorView<float, 5>> shares{};  // (B, E, D, H, W), to be filled when given
  std::optional<std::uintptr_t> stream{};  // CUDA stream (its address) to work on; none on a CPU
  std::shared_ptr<const void> owner;       // keeps the memory of the views alive
};

// What computes logits for windows. The runner sees this and nothing else, so an engine in C++, one
// in Python, and one whose buffers live on a GPU look the same to it.
class Engine {
 public:
  virtual ~Engine() = default;

  virtual std::string name() const = 0;
  virtual std::string device() const = 0;  // "cpu", "cuda:0": where the buffers must live
  virtual std::int64_t channels() const = 0;
  virtual std::int64_t classes() const = 0;
  virtual std::int64_t experts() const = 0;               // 0: cannot fill shares
  virtual std::optional<std::int64_t> batch() const = 0;  // the only B it takes, if fixed

  // Fills logits and, when given, shares = abs(expert logit x gate) of the class with the larger
  // fused logit, per expert. Called from the thread that called the runner, with no lock held.
  virtual void run(const WindowBatch& batch) = 0;
};

}  // namespace mome
