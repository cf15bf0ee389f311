// Histogram error estimation (PMB, section III-C, eq. 6) on a CUDA device. No torch here: plain pointers and a stream.
//
//   mu_b        = mean of the `count` smallest values of image b
//   corrected   = max(error - mu_b, 0)
//   score_b     = sum of corrected
//
// Exact, without a sort: histogram_correction.cu tells how, README_histogram_correction.md has the figures.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/types.h"

namespace memad_fast::cuda {

struct HistogramCorrection {
  const void* error;  // [images, pixels], contiguous, aligned to 16 bytes
  Dtype dtype;
  int64_t images;
  uint32_t pixels;
  uint32_t count;   // how many of the smallest values of an image make mu; 0 gives mu = 0
  void* corrected;  // [images, pixels], contiguous, of dtype, aligned to 16 bytes
  float* mu;        // [images]
  float* score;     // [images]
};

// Bytes of device memory that the call needs beside its outputs, aligned to 16 bytes. For the current device.
size_t histogram_correction_workspace(const HistogramCorrection& args);

// On the current device. Returns a cudaError_t as int.
int histogram_correction(const HistogramCorrection& args, void* workspace, void* stream);

}  // namespace memad_fast::cuda
