#pragma once

#include <cstdint>
#include <string>

namespace mome {

// Bytes this process can still use without swapping: free memory and page cache of the machine
// (MemAvailable), or less where a container (cgroup v2 or v1) sets a limit.
std::int64_t available_memory();

// Throws Error volume.too-large if `bytes` are more than available_memory().
void require_memory(std::int64_t bytes, const std::string& what);

}  // namespace mome
