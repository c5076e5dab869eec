#include "resample.hpp"

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "parallel.hpp"

namespace mome {
namespace {

using Point = std::array<double, 3>;

void require_affine(const Matrix4& matrix) {
  const bool finite =
      std::all_of(matrix.begin(), matrix.end(), [](double x) { return std::isfinite(x); });
  if (!finite || matrix[12] != 0.0 || matrix[13] != 0.0 || matrix[14] != 0.0 || matrix[15] != 1.0) {
    throw Error("argument.matrix", "The index matrix is not a finite affine.",
                "It is 4 x 4 with the last row 0 0 0 1.");
  }
}

template <typename T>
T from_double(double value) {
  if constexpr (std::is_same_v<T, std::uint8_t>) {
    return static_cast<std::uint8_t>(value + 0.5);
  } else {
    return static_cast<T>(value);
  }
}

// Linear interpolation of one volume at points anywhere.
template <typename T>
class Linear {
 public:
  Linear(TensorView<const T, 3> in, T fill)
      : in_(in),
        fill_(fill),
        last_{static_cast<double>(in.shape[0] - 1), static_cast<double>(in.shape[1] - 1),
              static_cast<double>(in.shape[2] - 1)},
        rows_(in.shape[2]),
        planes_(in.shape[1] * in.shape[2]) {}

  T operator()(const Point& at) const {
    const auto [x, y, z] = at;
    if (x >= 0.0 && x < last_[0] && y >= 0.0 && y < last_[1] && z >= 0.0 && z < last_[2]) {
      return inside(x, y, z);
    }
    if (x > -1.0 && x < last_[0] + 1.0 && y > -1.0 && y < last_[1] + 1.0 && z > -1.0 &&
        z < last_[2] + 1.0) {
      return at_the_border(at);
    }
    return fill_;
  }

 private:
  // All eight neighbours exist; a cast rounds down because no coordinate is negative.
  T inside(double x, double y, double z) const {
    const auto i = static_cast<std::int64_t>(x);
    const auto j = static_cast<std::int64_t>(y);
    const auto k = static_cast<std::int64_t>(z);
    const double fx = x - static_cast<double>(i);
    const double fy = y - static_cast<double>(j);
    const double fz = z - static_cast<double>(k);
    const T* near = in_.data + i * planes_ + j * rows_ + k;
    const T* far = near + planes_;
    const auto along = [fz](const T* pair) {
      const auto first = static_cast<double>(pair[0]);
      return first + fz * (static_cast<double>(pair[1]) - first);
    };
    const auto mix = [](double a, double b, double fraction) { return a + fraction * (b - a); };
    return from_double<T>(mix(mix(along(near), along(near + rows_), fy),
                              mix(along(far), along(far + rows_), fy), fx));
  }

  T at_the_border(const Point& at) const {
    double sum = 0.0;
    for (int corner = 0; corner < 8; ++corner) {
      double weight = 1.0;
      bool exists = true;
      Index3 index{};
      for (std::size_t axis = 0; axis < 3; ++axis) {
        const double low = std::floor(at[axis]);
        const bool high = (corner >> axis & 1) != 0;
        const double fraction = at[axis] - low;
        weight *= high ? fraction : 1.0 - fraction;
        index[axis] = static_cast<std::int64_t>(low) + (high ? 1 : 0);
        exists = exists && index[axis] >= 0 && index[axis] < in_.shape[axis];
      }
      if (weight > 0.0) {
        sum += weight * static_cast<double>(exists ? *in_(index[0], index[1], index[2]) : fill_);
      }
    }
    return from_double<T>(sum);
  }

  TensorView<const T, 3> in_;
  T fill_;
  Point last_;
  std::int64_t rows_;
  std::int64_t planes_;
};

template <typename T>
class Nearest {
 public:
  Nearest(TensorView<const T, 3> in, T fill) : in_(in), fill_(fill) {}

  T operator()(const Point& at) const {
    Index3 index{};
    for (std::size_t axis = 0; axis < 3; ++axis) {
      const double shifted = at[axis] + 0.5;
      if (!(shifted >= 0.0 && shifted < static_cast<double>(in_.shape[axis]))) {
        return fill_;
      }
      index[axis] = static_cast<std::int64_t>(shifted);
    }
    return *in_(index[0], index[1], index[2]);
  }

 private:
  TensorView<const T, 3> in_;
  T fill_;
};

template <typename T, typename Sampler>
void sample(const Sampler& sampler, const Matrix4& m, TensorView<T, 3> out) {
  require_affine(m);
  const auto [depth, height, width] = out.shape;
  parallel_for(
      depth * height, 0, [&, height = height, width = width](std::int64_t begin, std::int64_t end) {
        for (std::int64_t row = begin; row < end; ++row) {
          const auto i = static_cast<double>(row / height);
          const auto j = static_cast<double>(row % height);
          Point origin{};
          for (std::size_t axis = 0; axis < 3; ++axis) {
            origin[axis] = m[4 * axis] * i + m[4 * axis + 1] * j + m[4 * axis + 3];
          }
          T* values = out.data + row * width;
          for (std::int64_t column = 0; column < width; ++column) {
            const auto k = static_cast<double>(column);
            values[column] =
                sampler({origin[0] + m[2] * k, origin[1] + m[6] * k, origin[2] + m[10] * k});
          }
        }
      });
}

}  // namespace

void resample_linear(TensorView<const float, 3> in, const Matrix4& matrix, float fill,
                     TensorView<float, 3> out) {
  sample(Linear<float>(in, fill), matrix, out);
}

void resample_linear(TensorView<const std::uint8_t, 3> in, const Matrix4& matrix, std::uint8_t fill,
                     TensorView<std::uint8_t, 3> out) {
  sample(Linear<std::uint8_t>(in, fill), matrix, out);
}

void resample_nearest(TensorView<const float, 3> in, const Matrix4& matrix, float fill,
                      TensorView<float, 3> out) {
  sample(Nearest<float>(in, fill), matrix, out);
}

void resample_nearest(TensorView<const std::uint8_t, 3> in, const Matrix4& matrix,
                      std::uint8_t fill, TensorView<std::uint8_t, 3> out) {
  sample(Nearest<std::uint8_t>(in, fill), matrix, out);
}

}  // namespace mome
