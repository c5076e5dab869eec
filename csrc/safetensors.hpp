#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

namespace mome {

// The numbers a file may hold, by their names in the format. bfloat16 and the 8-bit floats are not
// among them: nothing here computes with them.
enum class DType { boolean, u8, i8, u16, i16, f16, u32, i32, f32, u64, i64, f64 };

std::int64_t size_of(DType dtype);

struct StoredTensor {
  DType dtype;
  std::vector<std::int64_t> shape;
  std::span<const std::byte> bytes;  // little-endian, C order; aligned only if the file is
};

// A .safetensors file, or a part of a file that is one (a stored member of a zip), in read-only
// mapped memory. Everything the header says is checked against the size of the file before it is
// used: length, JSON (UTF-8, no name twice), types, shapes, and that the tensors cover the data
// once, without gap or overlap. Another process that shortens the file meanwhile ends this one
// (SIGBUS).
class SafetensorsFile {
 public:
  // Throws Error bundle.unreadable (no such part of a file) or bundle.safetensors (not as above).
  explicit SafetensorsFile(const std::string& path, std::int64_t offset = 0,
                           std::optional<std::int64_t> size = std::nullopt);

  const std::map<std::string, StoredTensor>& tensors() const { return tensors_; }
  const std::map<std::string, std::string>& metadata() const { return metadata_; }

  // Holds the memory that the tensors point into.
  std::shared_ptr<const void> memory() const { return memory_; }

 private:
  std::shared_ptr<const void> memory_;
  std::map<std::string, StoredTensor> tensors_;
  std::map<std::string, std::string> metadata_;
};

}  // namespace mome
