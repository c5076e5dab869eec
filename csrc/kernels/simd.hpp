#pragma once

#include <immintrin.h>

#include <cstdint>

// One vector type for every instruction set: kernels are written once, as templates over a Simd,
// and compiled in a translation unit per instruction set. The arithmetic is that of the compiler's
// vector extension, so the 16-lane form also compiles, and is tested, where there is only AVX2.
//
// Loops over an array of vectors that should stay in registers carry `#pragma GCC unroll`:
// otherwise GCC 12 keeps the array on the stack (83 % of the processor's peak instead of 99 % in
// the matrix product).
namespace mome {

// Results of more numbers than this are written past the caches, which would not hold them until
// they are read.
inline constexpr std::int64_t kStreamed = 1 << 22;

template <typename T, int Lanes>
struct VectorOf {
  typedef T Type __attribute__((vector_size(Lanes * sizeof(T))));
};

// kWidth: lanes, and channels of a block of a tensor. kRows x kColumns: accumulators of the matrix
// product, chosen so that they, a column of weights and one broadcast fit the registers.
struct Avx2 {
  static constexpr int kWidth = 8;
  static constexpr int kRows = 6;
  static constexpr int kColumns = 2;
  using Vector = VectorOf<float, kWidth>::Type;
};

struct Avx512 {
  static constexpr int kWidth = 16;
  static constexpr int kRows = 8;
  static constexpr int kColumns = 2;
  using Vector = VectorOf<float, kWidth>::Type;
};

// The compiler fuses products and sums (-ffp-contract=fast on these files); nothing is reordered.
template <typename S>
inline typename S::Vector load(const float* from) {
  return *reinterpret_cast<const typename S::Vector*>(from);
}

template <typename S>
inline void store(float* to, typename S::Vector value) {
  *reinterpret_cast<typename S::Vector*>(to) = value;
}

// Past the caches: for results that are larger than they are. `to` is a whole cache line's part; a
// fence must follow before another thread reads it.
template <typename S>
inline void store_streaming(float* to, typename S::Vector value) {
  const auto* halves = reinterpret_cast<const __m256*>(&value);
  for (int half = 0; half < S::kWidth / 8; ++half) {
    _mm256_stream_ps(to + 8 * half, halves[half]);
  }
}

template <typename S>
inline typename S::Vector broadcast(float value) {
  return value - typename S::Vector{};
}

template <typename S>
inline typename S::Vector maximum(typename S::Vector a, typename S::Vector b) {
  return a > b ? a : b;
}

}  // namespace mome
