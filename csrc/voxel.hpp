#pragma once

#include <cmath>
#include <cstdint>

// What the runner does for one voxel, for the processor and for the GPU. The GPU runs the bodies
// below, one thread a voxel (cuda/), and so do its tests on the CPU. The runner in host memory does
// the same row by row (host_stage.cpp), bit for bit; softmax and argmax it takes from here.
#ifdef __CUDACC__
#define MOME_BOTH __host__ __device__
#else
#define MOME_BOTH
#endif

namespace mome {

struct Voxel {
  std::int64_t d, h, w;
};

struct Box {
  std::int64_t d, h, w;

  MOME_BOTH std::int64_t size() const { return d * h * w; }
  MOME_BOTH bool holds(const Voxel& at) const {
    return at.d >= 0 && at.d < d && at.h >= 0 && at.h < h && at.w >= 0 && at.w < w;
  }
  MOME_BOTH std::int64_t index(const Voxel& at) const { return (at.d * h + at.h) * w + at.w; }
  MOME_BOTH Voxel voxel(std::int64_t index) const {
    return {index / w / h, index / w % h, index % w};
  }
};

// A window of the image and the flips in which the engine sees it.
struct Window {
  Voxel start;  // negative where zeros are padded before the image
  bool flip_d, flip_h, flip_w;

  // The engine's voxel as a voxel of the window, and back.
  MOME_BOTH Voxel turned(const Box& patch, const Voxel& at) const {
    return {flip_d ? patch.d - 1 - at.d : at.d, flip_h ? patch.h - 1 - at.h : at.h,
            flip_w ? patch.w - 1 - at.w : at.w};
  }
  MOME_BOTH Voxel in_image(const Voxel& at) const {
    return {start.d + at.d, start.h + at.h, start.w + at.w};
  }
};

MOME_BOTH inline bool is_finite(float value) { return value - value == 0.0F; }

// Element i of what the engine gets for a window, (C, patch).
struct Gather {
  const float* image;  // (C, shape)
  Box shape;
  Box patch;
  Window window;
  float* out;

  MOME_BOTH void operator()(std::int64_t i) const {
    const std::int64_t channel = i / patch.size();
    const Voxel seen = patch.voxel(i % patch.size());
    const Voxel at = window.in_image(window.turned(patch, seen));
    out[i] = shape.holds(at) ? image[channel * shape.size() + shape.index(at)] : 0.0F;
  }
};

// Adds element i of what the engine made of a window, (M, patch), to the sums (M, shape). Sets
// `not_finite` if it is NaN or infinity. Bodies of one window touch different sums.
struct Accumulate {
  const float* maps;
  const float* weights;  // (patch)
  Box shape;
  Box patch;
  Window window;
  float* sums;
  int* not_finite;

  MOME_BOTH void operator()(std::int64_t i) const {
    const float value = maps[i];
    if (!is_finite(value)) {
      *not_finite = 1;
    }
    const Voxel inside = window.turned(patch, patch.voxel(i % patch.size()));
    const Voxel at = window.in_image(inside);
    if (shape.holds(at)) {
      sums[i / patch.size() * shape.size() + shape.index(at)] +=
          weights[patch.index(inside)] * value;
    }
  }
};

// Divides the sums of voxel i, (M, shape), by the weights that went into them: those of the windows
// that hold it, in their order, times the number of flips.
struct Divide {
  const Voxel* starts;
  std::int64_t windows;
  const float* weights;  // (patch)
  Box shape;
  Box patch;
  float flips;
  std::int64_t maps;
  float* sums;
  int* not_finite;

  MOME_BOTH void operator()(std::int64_t i) const {
    const Voxel at = shape.voxel(i);
    float total = 0.0F;
    for (std::int64_t n = 0; n < windows; ++n) {
      const Voxel inside{at.d - starts[n].d, at.h - starts[n].h, at.w - starts[n].w};
      if (patch.holds(inside)) {
        total += weights[patch.index(inside)];
      }
    }
    for (std::int64_t map = 0; map < maps; ++map) {
      float& sum = sums[map * shape.size() + i];
      sum /= total * flips;
      if (!is_finite(sum)) {
        *not_finite = 1;
      }
    }
  }
};

// Probabilities of voxel i from logits (N, voxels): exp(l) / sum exp(l). `out` may be `logits`.
struct Softmax {
  const float* logits;
  std::int64_t classes;
  std::int64_t voxels;
  float* out;

  MOME_BOTH void operator()(std::int64_t i) const {
    float largest = logits[i];
    for (std::int64_t n = 1; n < classes; ++n) {
      const float logit = logits[n * voxels + i];
      largest = logit > largest ? logit : largest;
    }
    float sum = 0.0F;
    for (std::int64_t n = 0; n < classes; ++n) {
      const float term = std::exp(logits[n * voxels + i] - largest);
      out[n * voxels + i] = term;
      sum += term;
    }
    for (std::int64_t n = 0; n < classes; ++n) {
      out[n * voxels + i] /= sum;
    }
  }
};

// The class of the largest logit of voxel i, the lowest of equals.
struct Argmax {
  const float* logits;  // (N, voxels)
  std::int64_t classes;
  std::int64_t voxels;
  std::uint8_t* labels;

  MOME_BOTH void operator()(std::int64_t i) const {
    std::int64_t best = 0;
    for (std::int64_t n = 1; n < classes; ++n) {
      if (logits[n * voxels + i] > logits[best * voxels + i]) {
        best = n;
      }
    }
    labels[i] = static_cast<std::uint8_t>(best);
  }
};

}  // namespace mome
