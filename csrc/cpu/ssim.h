// Structural similarity (Wang et al. 2004; PMB eq. 8, 9) on the CPU: map, loss and their gradients.
//
// With u = x + y, v = x - y and E the Gaussian-weighted mean over a window (so that x and y enter alike):
//
//   1 - luminance = E[v]^2 / ((E[u]^2 + E[v]^2) / 2 + C1)
//   1 - structure = V[v]   / ((V[u]   + V[v]  ) / 2 + C2),      V[q] = E[q^2] - E[q]^2
//   SSIM = luminance * structure
//
// This is the usual (2 mu_x mu_y + C1)(2 s_xy + C2) / ((mu_x^2 + mu_y^2 + C1)(s_x^2 + s_y^2 + C2)), with two advantages:
// four filtered quantities instead of five, and 1 - SSIM comes without cancellation where x is close to y, so it is
// exactly 0 for identical images.
#pragma once

#include <cstdint>

#include "core/parallel.h"
#include "core/types.h"

namespace memad_fast {

// A batch of planes [batch, channels, height, width]; the last dimension is contiguous.
struct Planes {
  const void* data;
  int64_t batch_stride;  // in elements
  int64_t channel_stride;
  int64_t row_stride;
};

struct SsimInput {
  Planes x;
  Planes y;
  Dtype dtype;
  int64_t batch;
  int64_t channels;
  int64_t height;
  int64_t width;
  int64_t window_size;  // odd
  double sigma;
  double data_range;
  bool reflect;  // one window per pixel, borders reflected; else one per position that lies inside the image

  int64_t margin() const { return reflect ? 0 : window_size - 1; }
  int64_t window_rows() const { return height - margin(); }
  int64_t window_cols() const { return width - margin(); }
  int64_t planes() const { return batch * channels; }
};

struct SsimMap {
  SsimInput input;
  void* map;  // [batch, channels, window_rows, window_cols], contiguous, of dtype
};

struct SsimLoss {
  SsimInput input;
  float* loss;  // mean of 1 - SSIM
};

// Gradients with respect to x and y of the map (grad_map) or of the loss (grad_loss); the other one is null.
struct SsimBackward {
  SsimInput input;
  const void* grad_map;  // like the map
  const float* grad_loss;
  void* grad_x;  // like x, contiguous
  void* grad_y;
};

void ssim_map(const SsimMap& args, const ThreadLoop& loop);
void ssim_loss(const SsimLoss& args, const ThreadLoop& loop);
void ssim_backward(const SsimBackward& args, const ThreadLoop& loop);

}  // namespace memad_fast
