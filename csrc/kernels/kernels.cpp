#include "kernels.hpp"

#include <algorithm>
#include <cstdlib>
#include <initializer_list>
#include <map>
#include <string>
#include <vector>

#include "../cpu.hpp"
#include "../error.hpp"

namespace mome {
namespace {

bool has(const std::map<std::string, bool>& features, std::initializer_list<const char*> names) {
  return std::all_of(names.begin(), names.end(), [&](const char* name) {
    const auto found = features.find(name);
    return found != features.end() && found->second;
  });
}

std::vector<const Kernels*> find_available() {
  std::vector<const Kernels*> found{&reference_kernels()};
#if defined(__x86_64__)
  const auto features = cpu_features();
  const bool avx2 = has(features, {"avx2", "fma"});
  if (avx2) {
    found.push_back(&avx2_kernels());
  }
#if defined(MOME_EMULATE_AVX512)
  const bool avx512 = avx2;
#else
  const bool avx512 = avx2 && has(features, {"avx512f", "avx512bw", "avx512vl", "avx512dq"});
#endif
  if (avx512) {
    found.push_back(&avx512_kernels());
  }
#endif
  return found;
}

std::string names_of(std::span<const Kernels* const> kernels) {
  std::string names;
  for (const Kernels* each : kernels) {
    names += (names.empty() ? "" : ", ") + std::string(each->name);
  }
  return names;
}

}  // namespace

const ConvolutionKernel& Kernels::convolution(int stride, const Index3& out) const {
  // Large tiles save most, but their transformed weights outweigh what small maps save.
  // Milliseconds of packing and convolving 320 -> 320 channels, one thread, EPYC with AVX2: at 12^3
  // voxels F(4x4x4) 38, F(2x2x2) 49; at 8^3 32, 23 and direct 42; at 4^3 26, 14 and 13.
  const std::int64_t edge = std::min({out[0], out[1], out[2]});
  const std::size_t first = stride == 1 ? 0 : 3;
  if (stride == 1) {
    return convolutions[first + (edge >= 12 ? 0 : edge >= 6 ? 1 : 2)];
  }
  return convolutions[first + (edge >= 8 ? 0 : 1)];
}

std::span<const Kernels* const> available_kernels() {
  static const std::vector<const Kernels*> kFound = find_available();
  return kFound;
}

const Kernels& chosen_kernels(std::int64_t channels) {
  const auto available = available_kernels();
  const char* wanted = std::getenv("MOME_CPU");
  if (wanted == nullptr || *wanted == '\0') {
    if (available.size() == 1) {
      throw Error("engine.missing", "The engine native needs a processor with AVX2.",
                  "Take the engine onnxruntime or openvino.");
    }
    // Blocks that are half empty cost what full ones do: with 8 channels, a window of the
    // demonstration model took 0.134 s with AVX2 and 0.193 s with AVX-512.
    const bool half_empty = available.size() > 2 && 2 * channels <= available.back()->width;
    return half_empty ? *available[available.size() - 2] : *available.back();
  }
  for (const Kernels* each : available) {
    if (std::string(wanted) == each->name) {
      return *each;
    }
  }
  throw Error("engine.cpu", "MOME_CPU is '" + std::string(wanted) + "'.",
              "This processor has: " + names_of(available) + ".");
}

}  // namespace mome
