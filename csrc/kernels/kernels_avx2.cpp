// Compiled with the flags of AVX2 and FMA: nothing here may run before the processor was asked.
#include "table.hpp"

namespace mome {

const Kernels& avx2_kernels() {
  static constexpr Kernels kTable = kernels_of<Avx2>("avx2");
  return kTable;
}

}  // namespace mome
