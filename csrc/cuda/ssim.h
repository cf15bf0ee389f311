// Structural similarity (Wang et al. 2004; PMB eq. 8, 9) on a CUDA device: map, loss and their gradients. No torch
// here: plain pointers and a stream. The formula, in u = x + y and v = x - y, is that of csrc/cpu/ssim.h:
//
//   1 - luminance = E[v]^2 / ((E[u]^2 + E[v]^2) / 2 + C1)
//   1 - structure = V[v]   / ((V[u]   + V[v]  ) / 2 + C2),      V[q] = E[q^2] - E[q]^2
//   SSIM = luminance * structure
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/types.h"

namespace memad_fast::cuda {

// A batch of planes [batch, channels, height, width]; the last dimension is contiguous. Strides in elements.
struct SsimPlanes {
  const void* data;
  int64_t batch_stride, channel_stride, row_stride;
};

struct SsimInput {
  SsimPlanes x, y;
  Dtype dtype;
  int64_t batch, channels;
  int64_t height, width;  // below 2^30
  int64_t window_size;    // odd
  double sigma, data_range;
  bool reflect;  // one window per pixel, borders reflected; else one per position that lies inside the image

  int64_t margin() const { return reflect ? 0 : window_size - 1; }
  int64_t window_rows() const { return height - margin(); }
  int64_t window_cols() const { return width - margin(); }
  int64_t planes() const { return batch * channels; }
};

// Gradients with respect to x and y of the map (grad_map) or of the loss (grad_loss); the other one is null.
struct SsimBackward {
  SsimInput input;
  SsimPlanes grad_map;         // of dtype, one element a window
  int64_t grad_map_col_stride;
  const float* grad_loss;
  void* grad_x;  // like x, contiguous
  void* grad_y;
};

// Each call needs device memory, aligned to 16 bytes, beside its outputs: none up to windows of 33 but for the loss
// (8 bytes a tile). Calls run on the current device and return a cudaError_t as int.
size_t ssim_map_workspace(const SsimInput& args);
int ssim_map(const SsimInput& args, void* map, void* workspace, void* stream);  // map: one element a window, contiguous

size_t ssim_loss_workspace(const SsimInput& args);
int ssim_loss(const SsimInput& args, float* loss, void* workspace, void* stream);  // the mean of 1 - SSIM

size_t ssim_backward_workspace(const SsimBackward& args);
int ssim_backward(const SsimBackward& args, void* workspace, void* stream);

}  // namespace memad_fast::cuda
