#pragma once

#include <array>

// How a 3-tap convolution (zero padding 1) is computed along one axis: kOut outputs from kIn inputs
// through kPoints products, as (A^T)((G w) * (B^T x)) (Lavin and Gray, arXiv:1509.09308). Three
// axes are independent, so a 3x3x3 convolution names a scheme for each. Input 0 of a tile lies at
// kStride * (first output) - 1.
//   input(x, xs, y, ys)    y[p * ys] = sum over i of B^T[p][i] x[i * xs], p < kPoints
//   output(m, ms, y, ys)   y[o * ys] = sum over p of A^T[o][p] m[p * ms], o < kOut
//   kKernel                the rows of G that differ; point p takes row kRow[p]
// The polynomial points 0, +-1/sqrt2, +-sqrt2, infinity keep float32 errors 3 to 10 times below
// those of the textbook's 0, +-1, +-2 (the form +-c, +-1/c is of Alam et al., arXiv:2201.10369).
namespace mome {

inline constexpr double kA = 0.70710678118654752440;  // 1 / sqrt 2
inline constexpr double kB = 1.41421356237309504880;  // sqrt 2

// The taps themselves: no saving, no rounding, nothing computed that is not used.
struct Direct {
  static constexpr int kStride = 1;
  static constexpr int kOut = 1;
  static constexpr int kIn = 3;
  static constexpr int kPoints = 3;
  static constexpr std::array<std::array<double, 3>, 3> kKernel{{{1, 0, 0}, {0, 1, 0}, {0, 0, 1}}};
  static constexpr std::array<int, 3> kRow{0, 1, 2};

  template <typename V>
  static void input(const V* x, int xs, V* y, int ys) {
    for (int p = 0; p < kPoints; ++p) {
      y[p * ys] = x[p * xs];
    }
  }

  template <typename V>
  static void output(const V* m, int ms, V* y, int /*ys*/) {
    y[0] = m[0] + m[ms] + m[2 * ms];
  }
};

struct DirectStride2 : Direct {
  static constexpr int kStride = 2;
};

// F(2, 3), points 0, +-1, infinity.
struct Winograd2 {
  static constexpr int kStride = 1;
  static constexpr int kOut = 2;
  static constexpr int kIn = 4;
  static constexpr int kPoints = 4;
  static constexpr std::array<std::array<double, 3>, 4> kKernel{
      {{1, 0, 0}, {0.5, 0.5, 0.5}, {0.5, -0.5, 0.5}, {0, 0, 1}}};
  static constexpr std::array<int, 4> kRow{0, 1, 2, 3};

  template <typename V>
  static void input(const V* x, int xs, V* y, int ys) {
    y[0] = x[0] - x[2 * xs];
    y[ys] = x[xs] + x[2 * xs];
    y[2 * ys] = x[2 * xs] - x[xs];
    y[3 * ys] = x[3 * xs] - x[xs];
  }

  template <typename V>
  static void output(const V* m, int ms, V* y, int ys) {
    y[0] = m[0] + m[ms] + m[2 * ms];
    y[ys] = m[ms] - m[2 * ms] + m[3 * ms];
  }
};

// F(4, 3), points 0, +-a, +-b, infinity; ab = 1, a^2 + b^2 = 5/2.
struct Winograd4 {
  static constexpr int kStride = 1;
  static constexpr int kOut = 4;
  static constexpr int kIn = 6;
  static constexpr int kPoints = 6;
  static constexpr std::array<std::array<double, 3>, 6> kKernel{{
      {1, 0, 0},
      {-2.0 / 3, -2.0 / 3 * kA, -1.0 / 3},
      {-2.0 / 3, 2.0 / 3 * kA, -1.0 / 3},
      {1.0 / 6, kB / 6, 1.0 / 3},
      {1.0 / 6, -kB / 6, 1.0 / 3},
      {0, 0, 1},
  }};
  static constexpr std::array<int, 6> kRow{0, 1, 2, 3, 4, 5};

  template <typename V>
  static void input(const V* x, int xs, V* y, int ys) {
    constexpr float kAf = static_cast<float>(kA);
    constexpr float kBf = static_cast<float>(kB);
    const V x1 = x[xs];
    const V x2 = x[2 * xs];
    const V x3 = x[3 * xs];
    const V x4 = x[4 * xs];
    const V even_a = x4 - 2.0F * x2;
    const V odd_a = kAf * x3 - kBf * x1;
    const V even_b = x4 - 0.5F * x2;
    const V odd_b = kBf * x3 - kAf * x1;
    y[0] = x[0] + (x4 - 2.5F * x2);
    y[5 * ys] = x1 + (x[5 * xs] - 2.5F * x3);
    y[ys] = even_a + odd_a;
    y[2 * ys] = even_a - odd_a;
    y[3 * ys] = even_b + odd_b;
    y[4 * ys] = even_b - odd_b;
  }

  template <typename V>
  static void output(const V* m, int ms, V* y, int ys) {
    constexpr float kAf = static_cast<float>(kA);
    constexpr float kBf = static_cast<float>(kB);
    const V sum_a = m[ms] + m[2 * ms];
    const V difference_a = m[ms] - m[2 * ms];
    const V sum_b = m[3 * ms] + m[4 * ms];
    const V difference_b = m[3 * ms] - m[4 * ms];
    y[0] = m[0] + sum_a + sum_b;
    y[ys] = kAf * difference_a + kBf * difference_b;
    y[2 * ys] = 0.5F * sum_a + 2.0F * sum_b;
    y[3 * ys] = m[5 * ms] + 0.5F * kAf * difference_a + 2.0F * kBf * difference_b;
  }
};

// Stride 2 in two phases: out[o] = w1 x[2o] + (w0 x[2o-1] + w2 x[2o+1]). The samples between, a
// 2-tap convolution, go through F(2, 2) with the points 0, 1, infinity; the even ones are products
// as they are, and share one row of G.
struct Winograd2Stride2 {
  static constexpr int kStride = 2;
  static constexpr int kOut = 2;
  static constexpr int kIn = 5;
  static constexpr int kPoints = 5;
  static constexpr std::array<std::array<double, 3>, 4> kKernel{
      {{1, 0, 0}, {1, 0, 1}, {0, 0, 1}, {0, 1, 0}}};
  static constexpr std::array<int, 5> kRow{0, 1, 2, 3, 3};

  template <typename V>
  static void input(const V* x, int xs, V* y, int ys) {
    y[0] = x[0] - x[2 * xs];
    y[ys] = x[2 * xs];
    y[2 * ys] = x[4 * xs] - x[2 * xs];
    y[3 * ys] = x[xs];
    y[4 * ys] = x[3 * xs];
  }

  template <typename V>
  static void output(const V* m, int ms, V* y, int ys) {
    y[0] = m[0] + m[ms] + m[3 * ms];
    y[ys] = m[ms] + m[2 * ms] + m[4 * ms];
  }
};

// The same with F(4, 2): points +-a, +-b, infinity.
struct Winograd4Stride2 {
  static constexpr int kStride = 2;
  static constexpr int kOut = 4;
  static constexpr int kIn = 9;
  static constexpr int kPoints = 9;
  static constexpr std::array<std::array<double, 3>, 6> kKernel{{
      {-kB / 3, 0, -1.0 / 3},
      {kB / 3, 0, -1.0 / 3},
      {kA / 3, 0, 1.0 / 3},
      {-kA / 3, 0, 1.0 / 3},
      {0, 0, 1},
      {0, 1, 0},
  }};
  static constexpr std::array<int, 9> kRow{0, 1, 2, 3, 4, 5, 5, 5, 5};

  template <typename V>
  static void input(const V* x, int xs, V* y, int ys) {
    constexpr float kAf = static_cast<float>(kA);
    constexpr float kBf = static_cast<float>(kB);
    const V x0 = x[0];
    const V x1 = x[2 * xs];
    const V x2 = x[4 * xs];
    const V x3 = x[6 * xs];
    const V even_a = kAf * x2 - kBf * x0;  // a x^2 - a b^2
    const V odd_a = x3 - 2.0F * x1;        // x^3 - b^2 x
    const V even_b = kBf * x2 - kAf * x0;
    const V odd_b = x3 - 0.5F * x1;
    y[0] = odd_a + even_a;
    y[ys] = odd_a - even_a;
    y[2 * ys] = odd_b + even_b;
    y[3 * ys] = odd_b - even_b;
    y[4 * ys] = x0 + (x[8 * xs] - 2.5F * x2);
    for (int o = 0; o < kOut; ++o) {
      y[(5 + o) * ys] = x[(2 * o + 1) * xs];
    }
  }

  template <typename V>
  static void output(const V* m, int ms, V* y, int ys) {
    constexpr float kAf = static_cast<float>(kA);
    constexpr float kBf = static_cast<float>(kB);
    const V sum_a = m[0] + m[ms];
    const V difference_a = m[0] - m[ms];
    const V sum_b = m[2 * ms] + m[3 * ms];
    const V difference_b = m[2 * ms] - m[3 * ms];
    y[0] = m[5 * ms] + sum_a + sum_b;
    y[ys] = m[6 * ms] + kAf * difference_a + kBf * difference_b;
    y[2 * ys] = m[7 * ms] + 0.5F * sum_a + 2.0F * sum_b;
    y[3 * ys] = m[8 * ms] + m[4 * ms] + 0.5F * kAf * difference_a + 2.0F * kBf * difference_b;
  }
};

}  // namespace mome
