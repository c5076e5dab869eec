#pragma once

#include <array>

#include "conv3d.hpp"
#include "pointwise.hpp"

namespace mome {

// All kernels of an instruction set, the convolutions with the largest tiles first.
template <typename S>
inline constexpr std::array<ConvolutionKernel, 5> kConvolutions{
    convolution_kernel<S, Winograd4, Winograd4>("Winograd F(4x4x4)"),
    convolution_kernel<S, Winograd2, Winograd2>("Winograd F(2x2x2)"),
    convolution_kernel<S, Direct, Direct>("direct"),
    convolution_kernel<S, Winograd2Stride2, Winograd4Stride2>("polyphase F(2x4x4)"),
    convolution_kernel<S, DirectStride2, DirectStride2>("direct, stride 2"),
};

template <typename S>
constexpr Kernels kernels_of(const char* name) {
  return {.name = name,
          .width = S::kWidth,
          .convolutions = kConvolutions<S>,
          .stem = {.packed_size = &StemTask<S>::packed_size,
                   .pack = &StemTask<S>::pack,
                   .tasks = &StemTask<S>::tasks,
                   .scratch = &StemTask<S>::scratch,
                   .run = &StemTask<S>::run},
          .upsampling = {.packed_size = &UpsamplingTask<S>::packed_size,
                         .pack = &UpsamplingTask<S>::pack,
                         .tasks = &UpsamplingTask<S>::tasks,
                         .scratch = &UpsamplingTask<S>::scratch,
                         .run = &UpsamplingTask<S>::run},
          .head = {.packed_size = &matrix_size<S>,
                   .pack = &HeadTask<S>::pack,
                   .tasks = &HeadTask<S>::tasks,
                   .scratch = &HeadTask<S>::scratch,
                   .run = &HeadTask<S>::run,
                   .fuse = &HeadTask<S>::fuse}};
}

}  // namespace mome
