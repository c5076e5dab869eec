#include "memory.hpp"

#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <limits>
#include <optional>

#include "error.hpp"

namespace mome {
namespace {

constexpr std::int64_t kNoLimit = std::numeric_limits<std::int64_t>::max();

std::optional<std::int64_t> number_in(const std::string& path) {
  std::ifstream file(path);
  std::int64_t value = 0;
  return file >> value ? std::optional(value) : std::nullopt;
}

// The number behind a key in a file of lines "key number": MemAvailable: 1234 kB.
std::optional<std::int64_t> number_after(const std::string& path, const std::string& key) {
  std::ifstream file(path);
  std::string line;
  while (std::getline(file, line)) {
    if (line.starts_with(key + " ")) {
      return std::stoll(line.substr(key.size()));
    }
  }
  return std::nullopt;
}

std::int64_t left_in_machine() {
  if (const auto kibibytes = number_after("/proc/meminfo", "MemAvailable:")) {
    return *kibibytes * 1024;
  }
  return static_cast<std::int64_t>(sysconf(_SC_PHYS_PAGES)) * sysconf(_SC_PAGESIZE);
}

// A limit of "max" is no number, that of an unlimited v1 group larger than any memory. Cached file
// pages count as used but are given back under pressure.
std::int64_t left_in_group(const std::string& limit_file, const std::string& usage_file,
                           const std::string& stat_file, const std::string& cache_key) {
  const auto limit = number_in(limit_file);
  const auto usage = number_in(usage_file);
  if (!limit || !usage) {
    return kNoLimit;
  }
  return std::max<std::int64_t>(0,
                                *limit - *usage + number_after(stat_file, cache_key).value_or(0));
}

}  // namespace

std::int64_t available_memory() {
  const std::string v2 = "/sys/fs/cgroup/";
  const std::string v1 = "/sys/fs/cgroup/memory/";
  return std::min(
      {left_in_machine(),
       left_in_group(v2 + "memory.max", v2 + "memory.current", v2 + "memory.stat", "inactive_file"),
       left_in_group(v1 + "memory.limit_in_bytes", v1 + "memory.usage_in_bytes", v1 + "memory.stat",
                     "total_inactive_file")});
}

void require_memory(std::int64_t bytes, const std::string& what) {
  const std::int64_t available = available_memory();
  if (bytes > available) {
    constexpr std::int64_t kMebibyte = 1 << 20;
    throw Error("volume.too-large",
                what + " needs " + std::to_string(bytes / kMebibyte) + " MiB of working memory; " +
                    std::to_string(available / kMebibyte) + " MiB are available.",
                "Use a smaller volume or batch, or a machine with more memory.");
  }
}

}  // namespace mome
