#pragma once

#include <cstddef>
#include <cstdint>

namespace mome {

// A large piece of memory from the system, in huge pages where it has them; zeros at first.
class Arena {
 public:
  // Throws Error engine.out-of-memory.
  explicit Arena(std::int64_t bytes);
  ~Arena();
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  std::byte* data() const { return data_; }
  std::int64_t bytes() const { return bytes_; }

 private:
  std::byte* data_ = nullptr;
  std::int64_t bytes_ = 0;
};

}  // namespace mome
