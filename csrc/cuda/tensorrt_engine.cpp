#include "tensorrt_engine.hpp"

#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <array>
#include <fstream>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

#include "../error.hpp"
#include "../tensor.hpp"
#include "device.hpp"
#include "runtime.hpp"

namespace mome {
namespace {

static_assert(NV_TENSORRT_MAJOR >= 10, "TensorRT 10.13 or later is needed");

using cuda::check;
using cuda::Current;

constexpr const char* kImage = "image";
constexpr const char* kLogits = "logits";
constexpr const char* kShares = "shares";

// Keeps what TensorRT says of errors, for the message of the next exception.
class Log final : public nvinfer1::ILogger {
 public:
  void log(Severity severity, const nvinfer1::AsciiChar* message) noexcept override {
    if (severity <= Severity::kERROR) {
      const std::lock_guard lock(mutex_);
      errors_ = errors_.empty() ? message : errors_ + " " + message;
    }
  }

  [[noreturn]] void fail(const std::string& action) {
    const std::lock_guard lock(mutex_);
    throw Error("engine.failed", "TensorRT could not " + action + ": " + std::exchange(errors_, {}),
                "A plan runs with the TensorRT version and the kind of GPU that it was built for: "
                "build it here (`mome export --target tensorrt`).");
  }

 private:
  std::mutex mutex_;
  std::string errors_;
};

// The library's two C functions; it stays loaded until the process ends.
class Library {
 public:
  explicit Library(const std::string& name) : handle_(dlopen(name.c_str(), RTLD_NOW)) {
    if (handle_ == nullptr) {
      throw Error("engine.missing", "TensorRT is not here: " + std::string(dlerror()) + ".",
                  "Install it, or add its folder to LD_LIBRARY_PATH.");
    }
    const int major = function<std::int32_t()>("getInferLibVersion")() / 10000;
    if (major != NV_TENSORRT_MAJOR) {
      throw Error("engine.version",
                  name + " is of TensorRT " + std::to_string(major) +
                      ", this program was compiled for " + std::to_string(NV_TENSORRT_MAJOR) + ".",
                  "Use the library of that version, or compile against its headers.");
    }
  }

  std::unique_ptr<nvinfer1::IRuntime> make_runtime(Log& log) const {
    nvinfer1::ILogger* const logger = &log;
    return std::unique_ptr<nvinfer1::IRuntime>(static_cast<nvinfer1::IRuntime*>(
        function<void*(void*, std::int32_t)>("createInferRuntime_INTERNAL")(
            logger, static_cast<std::int32_t>(NV_TENSORRT_VERSION))));
  }

 private:
  template <typename Signature>
  Signature* function(const char* name) const {
    void* const found = dlsym(handle_, name);
    if (found == nullptr) {
      throw Error("engine.missing", std::string("The library has no function ") + name + ".",
                  "Name libnvinfer.so.");
    }
    return reinterpret_cast<Signature*>(found);
  }

  void* handle_;
};

std::vector<char> bytes_of(const std::string& path) {
  std::ifstream file(path, std::ios::binary | std::ios::ate);
  const std::streamsize size = file ? static_cast<std::streamsize>(file.tellg()) : 0;
  std::vector<char> bytes(static_cast<std::size_t>(size));
  file.seekg(0);
  if (bytes.empty() || !file.read(bytes.data(), size)) {
    throw Error("bundle.unreadable", path + " cannot be read, or is empty.",
                "Name the model.plan of an export folder.");
  }
  return bytes;
}

// Float32 numbers on the current GPU.
class DeviceBuffer {
 public:
  float* data(std::int64_t size) {
    if (size > size_) {
      check(cudaFree(data_), "free memory");
      data_ = nullptr;
      size_ = 0;
      check(cudaMalloc(&data_, static_cast<std::size_t>(size) * sizeof(float)), "give memory");
      size_ = size;
    }
    return static_cast<float*>(data_);
  }

  DeviceBuffer() = default;
  DeviceBuffer(const DeviceBuffer&) = delete;
  DeviceBuffer& operator=(const DeviceBuffer&) = delete;
  ~DeviceBuffer() { cudaFree(data_); }

 private:
  void* data_ = nullptr;
  std::int64_t size_ = 0;
};

class TensorRtEngine final : public Engine {
 public:
  TensorRtEngine(const std::string& plan, int ordinal, const std::string& library)
      : ordinal_(ordinal) {
    const std::vector<char> bytes = bytes_of(plan);
    const Library nvinfer(library);
    const Current current(ordinal_);
    runtime_ = nvinfer.make_runtime(log_);
    if (runtime_ == nullptr) {
      log_.fail("begin");
    }
    engine_.reset(runtime_->deserializeCudaEngine(bytes.data(), bytes.size()));
    if (engine_ == nullptr) {
      log_.fail("load " + plan);
    }
    context_.reset(engine_->createExecutionContext());
    if (context_ == nullptr) {
      log_.fail("get memory for " + plan);
    }
    image_ = shape_of(kImage);
    classes_ = shape_of(kLogits)[1];
    experts_ = has(kShares) ? shape_of(kShares)[1] : 0;
  }

  std::string name() const override { return "tensorrt"; }
  std::string device() const override { return "cuda:" + std::to_string(ordinal_); }
  std::int64_t channels() const override { return image_[1]; }
  std::int64_t classes() const override { return classes_; }
  std::int64_t experts() const override { return experts_; }
  std::optional<std::int64_t> batch() const override {
    return image_[0] > 0 ? std::optional(image_[0]) : std::nullopt;
  }

  void run(const WindowBatch& batch) override {
    const std::lock_guard lock(mutex_);  // an execution context is for one caller at a time
    const Current current(ordinal_);
    set_shape(batch.windows.shape);
    bind(kImage, const_cast<float*>(batch.windows.data));
    bind(kLogits, batch.logits.data);
    if (experts_ > 0) {
      // The plan computes the shares whether or not they are wanted.
      const std::int64_t size = batch.logits.size() / classes_ * experts_;
      bind(kShares, batch.shares ? batch.shares->data : unwanted_.data(size));
    }
    const auto stream = reinterpret_cast<cudaStream_t>(batch.stream.value_or(0));
    if (!context_->enqueueV3(stream)) {
      log_.fail("run");
    }
    check(cudaStreamSynchronize(stream), "finish its work");
  }

 private:
  bool has(const std::string& tensor) const {
    for (std::int32_t i = 0; i < engine_->getNbIOTensors(); ++i) {
      if (tensor == engine_->getIOTensorName(i)) {
        return true;
      }
    }
    return false;
  }

  // Sizes of a tensor (B, C, D, H, W); -1 where a size is the caller's to choose.
  std::array<std::int64_t, 5> shape_of(const char* tensor) const {
    const bool known = has(tensor);
    const nvinfer1::Dims shape = known ? engine_->getTensorShape(tensor) : nvinfer1::Dims{};
    if (shape.nbDims != 5 || shape.d[1] < 1 ||
        engine_->getTensorDataType(tensor) != nvinfer1::DataType::kFLOAT) {
      throw Error("engine.failed",
                  std::string("The plan has no float32 tensor ") + tensor + " of five axes.",
                  "Name the model.plan of an export folder.");
    }
    return {shape.d[0], shape.d[1], shape.d[2], shape.d[3], shape.d[4]};
  }

  void set_shape(const std::array<std::int64_t, 5>& shape) {
    nvinfer1::Dims dims{};
    dims.nbDims = 5;
    for (std::size_t axis = 0; axis < 5; ++axis) {
      if (image_[axis] >= 0 && image_[axis] != shape[axis]) {
        throw Error("engine.buffers",
                    "The plan was built for windows of " +
                        text(Index3{image_[2], image_[3], image_[4]}) + " voxels, in batches of " +
                        std::to_string(image_[0]) + "; those given are of another size.",
                    "Take the patch and the batch of its export.json.");
      }
      dims.d[axis] = shape[axis];
    }
    if (!context_->setInputShape(kImage, dims)) {
      log_.fail("take windows of this size");
    }
  }

  void bind(const char* tensor, float* data) {
    if (!context_->setTensorAddress(tensor, data)) {
      log_.fail(std::string("take the buffer of ") + tensor);
    }
  }

  int ordinal_;
  Log log_;
  std::unique_ptr<nvinfer1::IRuntime> runtime_;
  std::unique_ptr<nvinfer1::ICudaEngine> engine_;
  std::unique_ptr<nvinfer1::IExecutionContext> context_;
  std::array<std::int64_t, 5> image_{};
  std::int64_t classes_ = 0;
  std::int64_t experts_ = 0;
  DeviceBuffer unwanted_;
  std::mutex mutex_;
};

}  // namespace

std::unique_ptr<Engine> open_tensorrt(const std::string& plan, int ordinal,
                                      const std::string& library) {
  // TensorRT without a GPU gives a runtime that is not null and crashes: count first.
  cuda::require_device("tensorrt", ordinal);
  const std::string name =
      library.empty() ? "libnvinfer.so." + std::to_string(NV_TENSORRT_MAJOR) : library;
  return std::make_unique<TensorRtEngine>(plan, ordinal, name);
}

}  // namespace mome
