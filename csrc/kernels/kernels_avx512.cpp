// Compiled with the flags of AVX-512: nothing here may run before the processor was asked. A build
// with MOME_EMULATE_AVX512, for tests only, compiles the same for AVX2.
#include "table.hpp"

namespace mome {
namespace {

#if defined(MOME_EMULATE_AVX512)
constexpr const char* kName = "avx512-emulated";
#else
constexpr const char* kName = "avx512";
#endif

}  // namespace

const Kernels& avx512_kernels() {
  static constexpr Kernels kTable = kernels_of<Avx512>(kName);
  return kTable;
}

}  // namespace mome
