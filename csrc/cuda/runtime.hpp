#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include "../error.hpp"

namespace mome::cuda {

// Throws Error engine.failed, "The GPU could not <action>", unless the call succeeded.
inline void check(cudaError_t status, const char* action) {
  if (status != cudaSuccess) {
    throw Error(
        "engine.failed",
        std::string("The GPU could not ") + action + ": " + cudaGetErrorString(status) + ".",
        "The engine or the runner did something that the GPU refused: start again.");
  }
}

// Makes a GPU the current one of this thread, and puts back what was.
class Current {
 public:
  explicit Current(int ordinal) {
    check(cudaGetDevice(&before_), "be asked for");
    check(cudaSetDevice(ordinal), "be chosen");
  }
  Current(const Current&) = delete;
  Current& operator=(const Current&) = delete;
  ~Current() { cudaSetDevice(before_); }

 private:
  int before_ = 0;
};

}  // namespace mome::cuda
