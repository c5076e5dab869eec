#include <list>
#include <memory>
#include <mutex>
#include <string>
#include <utility>

#include "device.hpp"
#include "device_stage.hpp"
#include "runtime.hpp"

namespace mome::cuda {
namespace {

constexpr std::int64_t kMebibyte = 1 << 20;

// A thread's loop over its part of count bodies: any count fits any grid.
template <typename Body>
__global__ void run_each(std::int64_t count, Body body) {
  const std::int64_t step = std::int64_t{blockDim.x} * gridDim.x;
  for (std::int64_t i = std::int64_t{blockDim.x} * blockIdx.x + threadIdx.x; i < count; i += step) {
    body(i);
  }
}

// See DeviceStage. Whatever is added waits for what was added before.
class Memory {
 public:
  // Takes a stream; memory comes with reserve().
  explicit Memory(int ordinal) : ordinal_(ordinal) {
    const Current current(ordinal_);
    // Of its own: an engine may record a graph on it while others use the default stream.
    check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "make a stream");
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory() {
    cudaFree(device_);
    cudaFreeHost(staging_);
    cudaStreamDestroy(stream_);
  }

  // At least these sizes; false if there is too little of one kind.
  bool reserve(std::int64_t device_bytes, std::int64_t staging_bytes) {
    const Current current(ordinal_);
    if (device_bytes > device_bytes_) {
      cudaFree(std::exchange(device_, nullptr));
      device_bytes_ = 0;
      if (!has_memory(cudaMalloc(&device_, static_cast<std::size_t>(device_bytes)))) {
        return false;
      }
      device_bytes_ = device_bytes;
    }
    if (staging_bytes > staging_bytes_) {
      cudaFreeHost(std::exchange(staging_, nullptr));
      staging_bytes_ = 0;
      if (!has_memory(cudaMallocHost(&staging_, static_cast<std::size_t>(staging_bytes)))) {
        return false;
      }
      staging_bytes_ = staging_bytes;
    }
    return true;
  }

  int ordinal() const { return ordinal_; }
  std::byte* device() const { return static_cast<std::byte*>(device_); }
  std::byte* staging() const { return static_cast<std::byte*>(staging_); }
  std::uintptr_t stream() const { return reinterpret_cast<std::uintptr_t>(stream_); }

  void upload(std::int64_t bytes) const {
    check(cudaMemcpyAsync(device_, staging_, static_cast<std::size_t>(bytes),
                          cudaMemcpyHostToDevice, stream_),
          "take the image");
  }

  void download(std::int64_t offset, std::int64_t bytes) const {
    check(cudaMemcpyAsync(staging_, device() + offset, static_cast<std::size_t>(bytes),
                          cudaMemcpyDeviceToHost, stream_),
          "give its result");
    check(cudaStreamSynchronize(stream_), "finish its work");
  }

  void fill(std::int64_t offset, int value, std::int64_t bytes) const {
    check(cudaMemsetAsync(device() + offset, value, static_cast<std::size_t>(bytes), stream_),
          "set its memory");
  }

  template <typename Body>
  void each(std::int64_t count, const Body& body) const {
    if (count == 0) {
      return;
    }
    constexpr std::int64_t kThreads = 256;
    constexpr std::int64_t kMostBlocks = 1 << 20;
    const Current current(ordinal_);
    const auto blocks =
        static_cast<unsigned>(std::min((count + kThreads - 1) / kThreads, kMostBlocks));
    run_each<<<blocks, kThreads, 0, stream_>>>(count, body);
    check(cudaGetLastError(), "begin its work");
  }

 private:
  static bool has_memory(cudaError_t status) {
    if (status == cudaErrorMemoryAllocation) {
      cudaGetLastError();  // else the next call would report it
      return false;
    }
    check(status, "give memory");
    return true;
  }

  int ordinal_;
  cudaStream_t stream_ = nullptr;
  void* device_ = nullptr;
  void* staging_ = nullptr;
  std::int64_t device_bytes_ = 0;
  std::int64_t staging_bytes_ = 0;
};

// Memory that no run has at present. It stays for the next one: so do the stream, for which PyTorch
// keeps memory of its own, and the pinned pages, which take long to get. It is never destroyed: at
// the end of the process CUDA may be gone first.
struct Idle {
  std::mutex mutex;
  std::list<std::unique_ptr<Memory>> memories;

  static Idle& of_process() {
    static Idle* const idle = std::make_unique<Idle>().release();
    return *idle;
  }

  std::unique_ptr<Memory> take(int ordinal) {
    const std::lock_guard lock(mutex);
    for (auto memory = memories.begin(); memory != memories.end(); ++memory) {
      if ((*memory)->ordinal() == ordinal) {
        std::unique_ptr<Memory> taken = std::move(*memory);
        memories.erase(memory);
        return taken;
      }
    }
    return std::make_unique<Memory>(ordinal);
  }

  void give_back(std::unique_ptr<Memory> memory) {
    const std::lock_guard lock(mutex);
    memories.push_back(std::move(memory));
  }

  void clear() {
    const std::lock_guard lock(mutex);
    memories.clear();
  }
};

[[noreturn]] void out_of_memory(int ordinal, std::int64_t device_bytes,
                                std::int64_t staging_bytes) {
  const Current current(ordinal);
  std::size_t left = 0;
  std::size_t all = 0;
  check(cudaMemGetInfo(&left, &all), "count its memory");
  throw Error("engine.out-of-memory",
              "The runner needs " + std::to_string(device_bytes / kMebibyte) +
                  " MiB on cuda:" + std::to_string(ordinal) + ", which has " +
                  std::to_string(static_cast<std::int64_t>(left) / kMebibyte) + " MiB left, and " +
                  std::to_string(staging_bytes / kMebibyte) + " MiB of pinned host memory.",
              "Take a smaller batch.");
}

std::shared_ptr<Memory> take_memory(int ordinal, std::int64_t device_bytes,
                                    std::int64_t staging_bytes) {
  std::unique_ptr<Memory> memory = Idle::of_process().take(ordinal);
  if (!memory->reserve(device_bytes, staging_bytes)) {
    Idle::of_process().clear();
    if (!memory->reserve(device_bytes, staging_bytes)) {
      out_of_memory(ordinal, device_bytes, staging_bytes);
    }
  }
  // Given back when the run is over and nobody holds a view of it.
  return {memory.release(),
          [](Memory* used) { Idle::of_process().give_back(std::unique_ptr<Memory>(used)); }};
}

}  // namespace

std::optional<std::string> build() {
  return std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10) +
         " for " + MOME_CUDA_TARGETS;
}

int device_count() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
}

void require_device(const std::string& engine, int ordinal) {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess || ordinal >= count) {
    const std::string found = status == cudaSuccess
                                  ? std::to_string(count) + " are"
                                  : std::string("none is (") + cudaGetErrorString(status) + ")";
    throw Error("engine.device",
                "Engine " + engine + " works on cuda:" + std::to_string(ordinal) +
                    ", but of NVIDIA GPUs " + found + " here.",
                "Take another device, or cpu; `nvidia-smi` lists what the driver sees.");
  }
}

std::unique_ptr<Stage> stage(int ordinal, const StagePlan& plan, TensorView<const float, 4> image,
                             Buffer<float> weights) {
  return make_device_stage(plan, image, weights, [ordinal](std::int64_t device, std::int64_t host) {
    return take_memory(ordinal, device, host);
  });
}

int dlpack_device_type() { return 2; }

void order_streams(int ordinal, std::uintptr_t producer, std::uintptr_t consumer) {
  const Current current(ordinal);
  cudaEvent_t event = nullptr;
  check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "make an event");
  cudaError_t status = cudaEventRecord(event, reinterpret_cast<cudaStream_t>(producer));
  if (status == cudaSuccess) {
    status = cudaStreamWaitEvent(reinterpret_cast<cudaStream_t>(consumer), event, 0);
  }
  cudaEventDestroy(event);
  check(status, "order two streams");
}

}  // namespace mome::cuda
