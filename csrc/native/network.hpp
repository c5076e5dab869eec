#pragma once

#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "../engine.hpp"
#include "weights.hpp"

namespace mome {

class Arena;
struct Kernels;
struct Plan;

// What one step took: `seconds` in all, of which `packing` for its weights; `gflop` as a direct
// convolution counts them (27 taps, 2 per product), `executed` as the kernel does.
struct StepTime {
  std::string name;
  std::string kernel;
  double seconds = 0.0;
  double packing = 0.0;
  double gflop = 0.0;
  double executed = 0.0;
};

// The native CPU engine: MoME as a plan of our own kernels, float32. Several threads may run at
// once; each run takes an arena of its own, which is kept for the next one. Results are the same
// bits for every number of threads.
class NativeEngine final : public Engine {
 public:
  // `threads` caps one call (0: none). `interrupt` is called now and then, between tasks, on the
  // thread that called run(), and ends the run by throwing.
  // Throws as Weights, Error bundle.tensors for a tensor that is missing or has another shape, and
  // as chosen_kernels().
  NativeEngine(std::shared_ptr<const Weights> weights, int threads,
               std::function<void()> interrupt);
  ~NativeEngine() override;

  std::string name() const override { return "native"; }
  std::string device() const override { return "cpu"; }
  std::int64_t channels() const override { return weights_->architecture().in_channels; }
  std::int64_t classes() const override { return weights_->architecture().classes; }
  std::int64_t experts() const override { return weights_->architecture().experts; }
  std::optional<std::int64_t> batch() const override { return std::nullopt; }
  const Kernels& kernels() const { return kernels_; }

  // Throws Error engine.buffers unless the edges are multiples of the architecture's, and Error
  // engine.out-of-memory.
  void run(const WindowBatch& batch) override;

  // Runs one window and says what each step took.
  std::vector<StepTime> profile(const WindowBatch& batch);

  // Memory of one run for a window (D, H, W), apart from the weights' own file.
  std::int64_t bytes(const Index3& window);

 private:
  std::shared_ptr<const Plan> plan_for(const Index3& window);
  std::unique_ptr<Arena> take_arena(std::int64_t bytes);
  void run_windows(const WindowBatch& batch, std::vector<StepTime>* times);

  std::shared_ptr<const Weights> weights_;
  const Kernels& kernels_;
  int threads_;
  std::function<void()> interrupt_;
  std::mutex mutex_;  // guards what follows
  std::map<Index3, std::shared_ptr<const Plan>> plans_;
  std::vector<std::unique_ptr<Arena>> arenas_;  // not in use
};

}  // namespace mome
