#include "safetensors.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cerrno>
#include <cstring>
#include <string_view>
#include <utility>

#include "error.hpp"
#include "json.hpp"

namespace mome {
namespace {

static_assert(std::endian::native == std::endian::little, "tensors are mapped as they are stored");

// The limit of the format's own implementation.
constexpr std::int64_t kMaxHeader = 100'000'000;
constexpr std::int64_t kLengthBytes = 8;

struct TypeName {
  std::string_view name;
  DType dtype;
  std::int64_t size;
};
constexpr std::array<TypeName, 12> kTypes{{{"BOOL", DType::boolean, 1},
                                           {"U8", DType::u8, 1},
                                           {"I8", DType::i8, 1},
                                           {"U16", DType::u16, 2},
                                           {"I16", DType::i16, 2},
                                           {"F16", DType::f16, 2},
                                           {"U32", DType::u32, 4},
                                           {"I32", DType::i32, 4},
                                           {"F32", DType::f32, 4},
                                           {"U64", DType::u64, 8},
                                           {"I64", DType::i64, 8},
                                           {"F64", DType::f64, 8}}};

[[noreturn]] void reject(const std::string& path, const std::string& found) {
  throw Error("bundle.safetensors", path + " is not a whole safetensors file: " + found + ".",
              "Copy or import the weights again.");
}

[[noreturn]] void reject_system(const std::string& path, const char* action, int error) {
  throw Error("bundle.unreadable",
              path + " cannot be " + action + ": " + std::strerror(error) + ".",
              "Check the path and its permissions.");
}

class Descriptor {
 public:
  // O_NONBLOCK: a named pipe must not hold the caller up until somebody writes to it.
  explicit Descriptor(const std::string& path)
      : number_(open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK)) {
    if (number_ < 0) {
      reject_system(path, "opened", errno);
    }
  }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  ~Descriptor() { close(number_); }

  int number() const { return number_; }

 private:
  int number_;
};

// The bytes [offset, offset + size) of a file; mappings begin at pages, so a little more is mapped.
struct Mapping {
  std::shared_ptr<const void> memory;
  std::span<const std::byte> bytes;
};

Mapping map_file(const std::string& path, std::int64_t offset, std::optional<std::int64_t> size) {
  const Descriptor file(path);
  struct stat status{};
  if (fstat(file.number(), &status) != 0) {
    reject_system(path, "read", errno);
  }
  if (!S_ISREG(status.st_mode)) {
    throw Error("bundle.unreadable", path + " is not a regular file.",
                "Give the path of a file of weights.");
  }
  const std::int64_t whole = status.st_size;
  if (offset < 0 || offset > whole || (size && (*size < 0 || *size > whole - offset))) {
    throw Error("bundle.unreadable",
                "Bytes from " + std::to_string(offset) + " on are wanted of " + path +
                    ", which has " + std::to_string(whole) + ".",
                "The file is shorter than its container says: copy it again.");
  }
  const std::int64_t used = size.value_or(whole - offset);
  if (used < kLengthBytes) {
    reject(path, "it has " + std::to_string(used) + " bytes, fewer than the header's length takes");
  }
  const std::int64_t skipped = offset % sysconf(_SC_PAGESIZE);
  const auto length = static_cast<std::size_t>(used + skipped);
  void* start = mmap(nullptr, length, PROT_READ, MAP_PRIVATE, file.number(), offset - skipped);
  if (start == MAP_FAILED) {
    reject_system(path, "mapped", errno);
  }
  Mapping mapping;
  mapping.memory = std::shared_ptr<const void>(
      start, [length](const void* memory) { munmap(const_cast<void*>(memory), length); });
  mapping.bytes = {static_cast<const std::byte*>(start) + skipped, static_cast<std::size_t>(used)};
  return mapping;
}

std::string_view header_of(const std::string& path, std::span<const std::byte> bytes) {
  std::uint64_t length = 0;
  std::memcpy(&length, bytes.data(), sizeof(length));
  const auto room = static_cast<std::uint64_t>(bytes.size()) - kLengthBytes;
  if (length > room || length > kMaxHeader) {
    reject(path, "its header should have " + std::to_string(length) + " bytes, " +
                     std::to_string(room) + " follow");
  }
  return {reinterpret_cast<const char*>(bytes.data()) + kLengthBytes,
          static_cast<std::size_t>(length)};
}

// One tensor as the header describes it, before it is compared with the data.
struct Entry {
  std::string name;
  TypeName type{};
  std::vector<std::int64_t> shape;
  std::int64_t begin = -1;
  std::int64_t end = -1;
};

class HeaderReader {
 public:
  HeaderReader(std::string path, std::string_view header) : path_(std::move(path)), json_(header) {}

  void read() {
    try {
      json_.object([this](const std::string& name) {
        if (name == "__metadata__") {
          json_.object([this](const std::string& key) { metadata[key] = json_.string(); });
        } else {
          entries.push_back(entry(name));
        }
      });
      json_.finish();
    } catch (const JsonError& error) {
      reject(path_, "its header is not as expected at byte " + std::to_string(error.position()) +
                        ", " + error.what());
    }
  }

  std::vector<Entry> entries;
  std::map<std::string, std::string> metadata;

 private:
  Entry entry(const std::string& name) {
    Entry result;
    result.name = name;
    bool typed = false;
    bool shaped = false;
    json_.object([&](const std::string& key) {
      if (key == "dtype") {
        result.type = type(name, json_.string());
        typed = true;
      } else if (key == "shape") {
        json_.array([&] { result.shape.push_back(json_.natural()); });
        shaped = true;
      } else if (key == "data_offsets") {
        std::vector<std::int64_t> offsets;
        json_.array([&] { offsets.push_back(json_.natural()); });
        if (offsets.size() != 2) {
          reject(path_, "tensor '" + name + "' has " + std::to_string(offsets.size()) +
                            " data offsets, not 2");
        }
        result.begin = offsets[0];
        result.end = offsets[1];
      } else {
        reject(path_, "tensor '" + name + "' has an unknown field '" + key + "'");
      }
    });
    if (!typed || !shaped || result.end < 0) {
      reject(path_, "tensor '" + name + "' lacks dtype, shape or data_offsets");
    }
    return result;
  }

  TypeName type(const std::string& name, const std::string& text) const {
    const auto found = std::find_if(kTypes.begin(), kTypes.end(),
                                    [&text](const TypeName& type) { return type.name == text; });
    if (found == kTypes.end()) {
      throw Error("bundle.dtype",
                  "Tensor '" + name + "' of " + path_ + " has the type '" + text + "'.",
                  "Store it as F32.");
    }
    return *found;
  }

  std::string path_;
  JsonReader json_;
};

std::int64_t bytes_of(const std::string& path, const Entry& entry) {
  std::int64_t bytes = entry.type.size;
  for (const std::int64_t extent : entry.shape) {
    if (__builtin_mul_overflow(bytes, extent, &bytes)) {
      reject(path, "the shape of tensor '" + entry.name + "' overflows");
    }
  }
  return bytes;
}

// In the order of their data, each tensor must begin where the one before ended.
void check_cover(const std::string& path, std::vector<Entry>& entries, std::int64_t room) {
  std::sort(entries.begin(), entries.end(), [](const Entry& a, const Entry& b) {
    return std::pair(a.begin, a.end) < std::pair(b.begin, b.end);
  });
  std::int64_t covered = 0;
  for (const Entry& entry : entries) {
    const std::string where = "tensor '" + entry.name + "' has the bytes " +
                              std::to_string(entry.begin) + " to " + std::to_string(entry.end);
    if (entry.begin != covered || entry.end < entry.begin || entry.end > room) {
      reject(path, where + ", where " + std::to_string(covered) + " were used of " +
                       std::to_string(room));
    }
    const std::int64_t needed = bytes_of(path, entry);
    if (entry.end - entry.begin != needed) {
      reject(path, where + "; its shape takes " + std::to_string(needed));
    }
    covered = entry.end;
  }
  if (covered != room) {
    reject(path,
           "the tensors end at byte " + std::to_string(covered) + " of " + std::to_string(room));
  }
}

}  // namespace

std::int64_t size_of(DType dtype) {
  return std::find_if(kTypes.begin(), kTypes.end(),
                      [dtype](const TypeName& type) { return type.dtype == dtype; })
      ->size;
}

SafetensorsFile::SafetensorsFile(const std::string& path, std::int64_t offset,
                                 std::optional<std::int64_t> size) {
  const Mapping mapping = map_file(path, offset, size);
  const std::string_view header = header_of(path, mapping.bytes);
  HeaderReader reader(path, header);
  reader.read();
  const auto data = mapping.bytes.subspan(static_cast<std::size_t>(kLengthBytes) + header.size());
  check_cover(path, reader.entries, static_cast<std::int64_t>(data.size()));
  for (Entry& entry : reader.entries) {
    const auto bytes = data.subspan(static_cast<std::size_t>(entry.begin),
                                    static_cast<std::size_t>(entry.end - entry.begin));
    tensors_.emplace(entry.name, StoredTensor{entry.type.dtype, std::move(entry.shape), bytes});
  }
  metadata_ = std::move(reader.metadata);
  memory_ = mapping.memory;
}

}  // namespace mome
