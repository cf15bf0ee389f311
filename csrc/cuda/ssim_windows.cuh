// What all kernels of ssim share: where windows lie on images, and the formula with its derivatives (csrc/cpu/ssim.h).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/elements.cuh"
#include "cuda/ssim.h"

namespace memad_fast::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kQuantities = 4;  // u, v, u^2, v^2; their means; the derivatives with respect to those

// The argument of every kernel: window (i, j) covers the pixels from (i - pad, j - pad) on, taps each way.
struct Windows {
  SsimPlanes x, y;
  int64_t channels;
  int height, width;
  int rows, cols;  // of windows
  int taps, pad;   // pad > 0: borders are reflected
  float c1, c2;
};

// Mirrors a position outside [0, size) at the border pixels, as torch's "reflect" does, as often as it takes.
__device__ int reflected(int position, int size) {
  while (position < 0 || position >= size) position = position < 0 ? -position : 2 * (size - 1) - position;
  return position;
}

// `factor` for each dimension in which a position is mirrored onto itself. With M = 1 / 2 there and 1 elsewhere, and F
// the filter over the reflected image, M F / M carries derivatives back: F is its own adjoint but for borders.
__device__ float at_mirror(const Windows& in, int row, int col, float factor) {
  if (in.pad == 0) return 1.0f;
  return (row == 0 || row == in.height - 1 ? factor : 1.0f) * (col == 0 || col == in.width - 1 ? factor : 1.0f);
}

template <class T>
__device__ const T* plane_of(const SsimPlanes& planes, int64_t channels, int64_t plane) {
  return static_cast<const T*>(planes.data) + plane / channels * planes.batch_stride +
         plane % channels * planes.channel_stride;
}

// One pair of images.
template <class T>
struct Pair {
  const T *x, *y;
  int64_t x_stride, y_stride;

  __device__ Pair(const Windows& in, int64_t plane)
      : x(plane_of<T>(in.x, in.channels, plane)), y(plane_of<T>(in.y, in.channels, plane)),
        x_stride(in.x.row_stride), y_stride(in.y.row_stride) {}
  __device__ float x_at(int row, int col) const { return to_float(x[row * x_stride + col]); }
  __device__ float y_at(int row, int col) const { return to_float(y[row * y_stride + col]); }
};

// --- formula --------------------------------------------------------------------------------------------------------

// Of one window. The mean of u is E[u] less `shift`: u of a pixel value that the tile or window refers to, so that an
// offset of both images costs no accuracy.
struct Similarity {
  float centred_u, mean_u, mean_v;
  float inverse_luminance, inverse_structure;  // 1 / the denominators
  float dark, rough;                           // 1 - luminance, 1 - structure

  __device__ Similarity(const Windows& in, const float (&mean)[kQuantities], float shift)
      : centred_u(mean[0]), mean_u(mean[0] + shift), mean_v(mean[1]) {
    const float square_v = mean_v * mean_v;
    float variance_u = mean[2] - centred_u * centred_u, variance_v = mean[3] - square_v;
    // Rounding must not make a variance negative; NaN stays.
    if (variance_u < 0.0f) variance_u = 0.0f;
    if (variance_v < 0.0f) variance_v = 0.0f;
    inverse_luminance = 1.0f / (0.5f * (mean_u * mean_u + square_v) + in.c1);
    inverse_structure = 1.0f / (0.5f * (variance_u + variance_v) + in.c2);
    dark = square_v * inverse_luminance;
    rough = variance_v * inverse_structure;
  }

  __device__ float dissimilarity() const { return dark + rough - dark * rough; }  // 1 - SSIM

  // Of grad * SSIM with respect to the four means; the last two doubled, because d(u^2) = 2 u du. With respect to the
  // centred u, so that a pixel's gradient takes its centred u, too.
  __device__ void derivatives(float grad, float (&of)[kQuantities]) const {
    const float luminance = grad * (1.0f - rough) * inverse_luminance;
    const float structure = grad * (1.0f - dark) * inverse_structure;
    of[2] = structure * rough;
    of[3] = structure * (rough - 2.0f);
    of[0] = mean_u * (luminance * dark) - centred_u * of[2];
    of[1] = mean_v * (luminance * (dark - 2.0f)) - mean_v * of[3];
  }
};

// What backward gets: the derivative with respect to the SSIM of windows.
struct GradOfWindows {
  SsimPlanes map;
  int64_t map_col_stride;
  const float* loss;  // null: the map's
  float scale;        // of the loss: -1 / the number of windows
};

// Of one plane's windows, times 1 / M (see at_mirror).
template <class T>
struct GradOfPlane {
  const T* map;
  int64_t row_stride, col_stride;
  float each;  // of all windows, where there is no map's

  __device__ GradOfPlane(const Windows& in, const GradOfWindows& grad, int64_t plane)
      : map(grad.loss ? nullptr : plane_of<T>(grad.map, in.channels, plane)), row_stride(grad.map.row_stride),
        col_stride(grad.map_col_stride), each(grad.loss ? grad.scale * *grad.loss : 0.0f) {}
  __device__ float inner(int row, int col) const {  // not at a border
    return map ? to_float(map[row * row_stride + col * col_stride]) : each;
  }
  __device__ float at(const Windows& in, int row, int col) const {
    return inner(row, col) * at_mirror(in, row, col, 2.0f);
  }
};

// Gradients of a pixel from its (centred) u and v and the derivatives that were carried back to it.
template <class T>
__device__ void store_gradients(
    const Windows& in, int64_t plane, int row, int col, float grad_u, float grad_v, T* grad_x, T* grad_y) {
  const int64_t at = (plane * in.height + row) * in.width + col;
  const float factor = at_mirror(in, row, col, 0.5f);
  grad_x[at] = from_float<T>((grad_u + grad_v) * factor);
  grad_y[at] = from_float<T>((grad_u - grad_v) * factor);
}

// --- sums -----------------------------------------------------------------------------------------------------------

// The sum over the block's threads in one order, for thread 0.
__device__ double block_sum(double own) {
  __shared__ double of_warp[kWarps];
#pragma unroll
  for (int other = 16; other > 0; other /= 2) own += __shfl_xor_sync(0xFFFFFFFFu, own, other);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = own;
  __syncthreads();
  double sum = 0.0;
  for (int warp = 0; warp < kWarps; ++warp) sum += of_warp[warp];
  return sum;
}

// loss = sum of partial[:count] / windows, by one block.
__global__ void __launch_bounds__(kThreads) mean_of_sums(
    const double* partial, int64_t count, double windows, float* loss) {
  double sum = 0.0;
#pragma unroll 8
  for (int64_t i = threadIdx.x; i < count; i += kThreads) sum += partial[i];
  sum = block_sum(sum);
  if (threadIdx.x == 0) *loss = static_cast<float>(sum / windows);
}

}  // namespace
}  // namespace memad_fast::cuda
