// Histogram error estimation (PMB, section III-C, eq. 6) on the CPU.
//
//   mu_b        = mean of the `count` smallest values of image b
//   corrected   = max(error - mu_b, 0)
//   score_b     = sum of corrected
//
// The mean is exact: the count-th smallest value t is found without a sort (histogram_correction_kernel.cpp tells
// how), then mu = (sum of values < t + remaining * t) / count, summed in float64. All results are the same for any
// number of threads and at every instruction set. README_histogram_correction.md has the figures.
#pragma once

#include <cstdint>

#include "core/parallel.h"
#include "core/types.h"

namespace memad_fast {

struct HistogramCorrection {
  const void* error;  // [images, pixels]
  Dtype dtype;
  int64_t images;
  int64_t pixels;        // contiguous
  int64_t image_stride;  // in elements
  int64_t count;         // how many of the smallest values of an image make mu; 0 gives mu = 0
  void* corrected;       // [images, pixels], contiguous, of dtype
  float* mu;             // [images]
  float* score;          // [images]
};

// Gradient with respect to error. The mean's gradient is 1 / count for each selected value; values equal
// to the threshold t share what is left equally, so the gradient does not depend on their order.
struct HistogramCorrectionBackward {
  const void* grad_corrected;  // [images, pixels], contiguous, of dtype
  const float* grad_mu;        // [images]
  const float* grad_score;     // [images]
  const void* error;
  const float* mu;
  Dtype dtype;
  int64_t images;
  int64_t pixels;
  int64_t image_stride;
  int64_t count;
  void* grad_error;  // [images, pixels], contiguous, of dtype
};

void histogram_correction(const HistogramCorrection& args, const ThreadLoop& loop);
void histogram_correction_backward(const HistogramCorrectionBackward& args, const ThreadLoop& loop);

}  // namespace memad_fast
