#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "../stage.hpp"

// The runner on a GPU. sliding_window.cu implements this where nvcc is found, absent.cpp elsewhere.
namespace mome::cuda {

// CUDA's version and the architectures of this build; nullopt: it was built without CUDA.
std::optional<std::string> build();

// GPUs that the driver shows; 0 without driver or without CUDA in the build. Creates nothing.
int device_count();

// Throws Error engine.device unless GPU `ordinal` is there; `engine` is for the message.
void require_device(const std::string& engine, int ordinal);

// Image, sums and batches on a GPU: one upload, one download, and a few bytes for every batch. The
// memory, and the stream of its batches, are kept for the next run in this process.
// Throws Error engine.out-of-memory, volume.too-large (host memory), and from its calls
// engine.failed, also for what the engine did wrong on the stream before.
std::unique_ptr<Stage> stage(int ordinal, const StagePlan& plan, TensorView<const float, 4> image,
                             Buffer<float> weights);

// What DLPack calls the kind of memory that the stage's buffers lie in.
int dlpack_device_type();

// Lets the work that `consumer` gets from now on wait for what is on `producer`.
void order_streams(int ordinal, std::uintptr_t producer, std::uintptr_t consumer);

}  // namespace mome::cuda
