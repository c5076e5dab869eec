// Compiled with the flags of AVX-512: nothing here may run before the processor was asked.
#include "table.hpp"

namespace mome {

const Kernels& avx512_kernels() {
  static constexpr Kernels kTable = kernels_of<Avx512>("avx512");
  return kTable;
}

}  // namespace mome
