#include "arena.hpp"

#include <sys/mman.h>

#include <string>

#include "../error.hpp"
#include "../memory.hpp"

namespace mome {

Arena::Arena(std::int64_t bytes) : bytes_(bytes) {
  const std::string needed = std::to_string(bytes / (1 << 20)) + " MiB";
  if (bytes > available_memory()) {
    throw Error("engine.out-of-memory",
                "The engine native needs " + needed + " for a window, and " +
                    std::to_string(available_memory() / (1 << 20)) + " MiB are free.",
                "Close other programs, or run fewer threads that share an engine.");
  }
  void* memory = mmap(nullptr, static_cast<std::size_t>(bytes), PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) {
    throw Error("engine.out-of-memory",
                "The engine native needs " + needed + " for a window, which the system refuses.",
                "Close other programs, or run fewer threads that share an engine.");
  }
  // Only advice: the engine works without huge pages, too.
  madvise(memory, static_cast<std::size_t>(bytes), MADV_HUGEPAGE);
  data_ = static_cast<std::byte*>(memory);
}

Arena::~Arena() { munmap(data_, static_cast<std::size_t>(bytes_)); }

}  // namespace mome
