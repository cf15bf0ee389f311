// ssim for windows that are too wide for tiles in shared memory: every thread adds up taps * taps pixels of its window
// (forward) or windows of its pixel (backward) in device memory. Right for any window; slow.
#pragma once

#include "cuda/ssim_windows.cuh"

namespace memad_fast::cuda {
namespace {

// The normalised Gaussian, as `gaussian` of ssim.cu; by one thread, since its sums have one order.
__global__ void weigh(int taps, double sigma, double* exact, float* weights) {
  const int radius = taps / 2;
  double sum = 0.0, others = 0.0;
  for (int i = 0; i < taps; ++i) {
    const double distance = static_cast<double>(i - radius) / sigma;
    exact[i] = exp(-0.5 * distance * distance);
    sum += exact[i];
  }
  for (int i = 0; i < taps; ++i) {
    weights[i] = static_cast<float>(exact[i] / sum);
    if (i != radius) others += static_cast<double>(weights[i]);
  }
  weights[radius] = static_cast<float>(1.0 - others);
}

// The pixel in the middle of a window: each window refers to its own.
__device__ int middle(const Windows& in, int window) { return window - in.pad + in.taps / 2; }

template <class T>
__device__ Similarity wide_window(const Windows& in, const float* weights, int64_t plane, int row, int col) {
  const Pair<T> images(in, plane);
  const float x_middle = images.x_at(middle(in, row), middle(in, col));
  const float y_middle = images.y_at(middle(in, row), middle(in, col));
  float mean[kQuantities] = {};
  for (int k = 0; k < in.taps; ++k) {
    const int pixel_row = reflected(row - in.pad + k, in.height);
    float across[kQuantities] = {};
    for (int l = 0; l < in.taps; ++l) {
      const int pixel_col = reflected(col - in.pad + l, in.width);
      const float x = images.x_at(pixel_row, pixel_col), y = images.y_at(pixel_row, pixel_col);
      const float u = (x - x_middle) + (y - y_middle), v = x - y;
      across[0] += weights[l] * u;
      across[1] += weights[l] * v;
      across[2] += weights[l] * (u * u);
      across[3] += weights[l] * (v * v);
    }
    for (int q = 0; q < kQuantities; ++q) mean[q] += weights[k] * across[q];
  }
  return Similarity(in, mean, x_middle + y_middle);
}

// The place that a thread of a grid over planes of rows x cols works on.
struct Place {
  int64_t plane;
  int row, col;

  __device__ Place(int rows, int cols) {
    const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    plane = index / cols / rows;
    row = static_cast<int>(index / cols % rows);
    col = static_cast<int>(index % cols);
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads) wide_map(Windows in, const float* weights, int64_t planes, T* map) {
  const Place at(in.rows, in.cols);
  if (at.plane >= planes) return;
  const Similarity window = wide_window<T>(in, weights, at.plane, at.row, at.col);
  map[(at.plane * in.rows + at.row) * in.cols + at.col] = from_float<T>(1.0f - window.dissimilarity());
}

template <class T>
__global__ void __launch_bounds__(kThreads) wide_loss(
    Windows in, const float* weights, int64_t planes, double* partial) {
  const Place at(in.rows, in.cols);
  double sum = 0.0;
  if (at.plane < planes) sum = wide_window<T>(in, weights, at.plane, at.row, at.col).dissimilarity();
  sum = block_sum(sum);
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

// derivatives[plane - first, rows, cols] of the planes from `first` on.
template <class T>
__global__ void __launch_bounds__(kThreads) wide_derivatives(
    Windows in, const float* weights, GradOfWindows grad, int64_t first, int64_t planes, float4* derivatives) {
  const Place at(in.rows, in.cols);
  if (at.plane >= planes) return;
  const int64_t plane = first + at.plane;
  const GradOfPlane<T> grad_of(in, grad, plane);
  float of[kQuantities];
  wide_window<T>(in, weights, plane, at.row, at.col).derivatives(grad_of.at(in, at.row, at.col), of);
  derivatives[(at.plane * in.rows + at.row) * in.cols + at.col] = make_float4(of[0], of[1], of[2], of[3]);
}

template <class T>
__global__ void __launch_bounds__(kThreads) wide_gradients(
    Windows in, const float* weights, int64_t first, int64_t planes, const float4* derivatives, T* grad_x, T* grad_y) {
  const Place at(in.height, in.width);
  if (at.plane >= planes) return;
  const int64_t plane = first + at.plane;
  const Pair<T> images(in, plane);
  const float x = images.x_at(at.row, at.col), y = images.y_at(at.row, at.col), v = x - y;
  float grad_u = 0.0f, grad_v = 0.0f;
  for (int k = 0; k < in.taps; ++k) {
    int row = at.row + in.pad - in.taps + 1 + k;
    if (in.pad > 0) row = reflected(row, in.rows);
    if (row < 0 || row >= in.rows) continue;
    float across_u = 0.0f, across_v = 0.0f;
    for (int l = 0; l < in.taps; ++l) {
      int col = at.col + in.pad - in.taps + 1 + l;
      if (in.pad > 0) col = reflected(col, in.cols);
      if (col < 0 || col >= in.cols) continue;
      const float4 of = derivatives[(at.plane * in.rows + row) * in.cols + col];
      const float u = (x - images.x_at(middle(in, row), middle(in, col))) +
                      (y - images.y_at(middle(in, row), middle(in, col)));
      across_u += weights[l] * (of.x + u * of.z);
      across_v += weights[l] * (of.y + v * of.w);
    }
    grad_u += weights[k] * across_u;
    grad_v += weights[k] * across_v;
  }
  store_gradients(in, plane, at.row, at.col, grad_u, grad_v, grad_x, grad_y);
}

}  // namespace
}  // namespace memad_fast::cuda
