#include "device_tensor.hpp"

#include <pybind11/stl.h>

#include <optional>
#include <utility>

#include "cuda/device.hpp"
#include "error.hpp"

namespace py = pybind11;

namespace mome {
namespace {

// The structures of DLPack 1.0, of its binary interface.
struct DLDevice {
  std::int32_t type;
  std::int32_t id;
};
struct DLDataType {
  std::uint8_t code;
  std::uint8_t bits;
  std::uint16_t lanes;
};
struct DLTensor {
  void* data;
  DLDevice device;
  std::int32_t ndim;
  DLDataType dtype;
  std::int64_t* shape;
  std::int64_t* strides;  // in elements
  std::uint64_t byte_offset;
};
struct DLManagedTensor {
  DLTensor tensor;
  void* context;
  void (*deleter)(DLManagedTensor*);
};
struct DLManagedTensorVersioned {
  std::uint32_t major;
  std::uint32_t minor;
  void* context;
  void (*deleter)(DLManagedTensorVersioned*);
  std::uint64_t flags;  // 0: may be written
  DLTensor tensor;
};

template <typename Managed>
constexpr const char* kName = "dltensor";
template <>
constexpr const char* kName<DLManagedTensorVersioned> = "dltensor_versioned";

// What a consumer holds: a DLPack structure, and what it points to.
template <typename Managed>
struct Export {
  DeviceTensor source;
  std::array<std::int64_t, 5> strides{};
  Managed managed{};

  explicit Export(const DeviceTensor& tensor) : source(tensor) {
    std::int64_t step = 1;
    for (std::size_t axis = 5; axis-- > 0;) {
      strides[axis] = step;
      step *= source.shape[axis];
    }
    managed.tensor = {.data = source.data,
                      .device = {cuda::dlpack_device_type(), source.ordinal},
                      .ndim = 5,
                      .dtype = {.code = 2, .bits = 32, .lanes = 1},  // float32
                      .shape = source.shape.data(),
                      .strides = strides.data(),
                      .byte_offset = 0};
    managed.context = this;
    managed.deleter = [](Managed* used) {
      const std::unique_ptr<Export> release(static_cast<Export*>(used->context));
    };
    if constexpr (requires { managed.major; }) {
      managed.major = 1;
    }
  }
};

// A capsule that a consumer takes over by renaming it; until then it is its own owner.
template <typename Managed>
py::object capsule_of(const DeviceTensor& tensor) {
  auto held = std::make_unique<Export<Managed>>(tensor);
  PyObject* capsule = PyCapsule_New(&held->managed, kName<Managed>, [](PyObject* dying) {
    if (PyCapsule_IsValid(dying, kName<Managed>) != 0) {
      auto* managed = static_cast<Managed*>(PyCapsule_GetPointer(dying, kName<Managed>));
      managed->deleter(managed);
    }
  });
  if (capsule == nullptr) {
    throw py::error_already_set();
  }
  held.release();  // the capsule owns it now
  return py::reinterpret_steal<py::object>(capsule);
}

py::tuple device_of(const DeviceTensor& tensor) {
  return py::make_tuple(cuda::dlpack_device_type(), tensor.ordinal);
}

// `stream` is the consumer's: None is CUDA's default stream, -1 asks for no ordering.
void order_for(const DeviceTensor& tensor, std::optional<std::int64_t> stream) {
  constexpr std::int64_t kDefaultStream = 1;
  const std::int64_t consumer = stream.value_or(kDefaultStream);
  if (consumer != -1 && static_cast<std::uintptr_t>(consumer) != tensor.stream) {
    cuda::order_streams(tensor.ordinal, tensor.stream, static_cast<std::uintptr_t>(consumer));
  }
}

py::object dlpack_of(const DeviceTensor& tensor, std::optional<std::int64_t> stream,
                     const std::optional<std::pair<int, int>>& max_version,
                     const py::object& dl_device, std::optional<bool> copy) {
  if (copy.value_or(false) || !(dl_device.is_none() || dl_device.equal(device_of(tensor)))) {
    throw py::buffer_error("The runner's buffers are shared where they are, never copied.");
  }
  order_for(tensor, stream);
  return max_version && max_version->first >= 1 ? capsule_of<DLManagedTensorVersioned>(tensor)
                                                : capsule_of<DLManagedTensor>(tensor);
}

}  // namespace

void bind_device_tensor(py::module_& module) {
  using py::arg;
  py::class_<DeviceTensor>(module, "DeviceTensor")
      .def_property_readonly("shape",
                             [](const DeviceTensor& tensor) {
                               const auto [b, c, d, h, w] = tensor.shape;
                               return py::make_tuple(b, c, d, h, w);
                             })
      .def_property_readonly(
          "pointer",
          [](const DeviceTensor& tensor) { return reinterpret_cast<std::uintptr_t>(tensor.data); })
      .def_readonly("device", &DeviceTensor::device)
      .def("__dlpack_device__", &device_of)
      .def("__dlpack__", &dlpack_of, py::kw_only(), arg("stream") = py::none(),
           arg("max_version") = py::none(), arg("dl_device") = py::none(),
           arg("copy") = py::none());
}

}  // namespace mome
