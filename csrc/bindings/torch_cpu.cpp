// torch.ops.memad_fast.* for CPU tensors, over the LibTorch stable ABI (target 2.10: one binary serves every
// later torch). Schemas, fake kernels and autograd are in Python (memad_fast/ops); checks with ValueError and
// TypeError are made there too. The checks here are the second line, for direct calls of torch.ops.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cmath>
#include <optional>
#include <string>
#include <tuple>

#include "core/parallel.h"
#include "core/types.h"
#include "cpu/histogram_correction.h"

namespace {

using memad_fast::Dtype;
using memad_fast::Rows;
using memad_fast::ThreadLoop;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

ThreadLoop torch_loop() {
  const auto run = [](int64_t begin, int64_t end, int64_t grain, ThreadLoop::Body body, const void* context) {
    torch::stable::parallel_for(begin, end, grain, [body, context](int64_t from, int64_t to) { body(from, to, context); });
  };
  return {run, static_cast<int>(torch::stable::get_num_threads())};
}

Dtype dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Dtype::f32;
    case ScalarType::Half:
      return Dtype::f16;
    case ScalarType::BFloat16:
      return Dtype::bf16;
    default:
      STD_TORCH_CHECK(false, name, ": the cpu backend takes float32, float16 or bfloat16; use the reference backend for float64");
  }
}

// The tensor itself where its last dimension is contiguous, else a contiguous copy.
Tensor last_contiguous(const Tensor& tensor) {
  const bool in_place = tensor.dim() == 0 || tensor.size(-1) <= 1 || tensor.stride(-1) == 1;
  return in_place ? tensor : torch::stable::contiguous(tensor);
}

Rows rows_of(const Tensor& matrix, const char* name) {
  STD_TORCH_CHECK(matrix.dim() == 2, name, ": expected 2 dimensions, got ", matrix.dim());
  return {matrix.const_data_ptr(), dtype_of(matrix, name), matrix.size(0), matrix.size(1), matrix.stride(0)};
}

// --- histogram_correction ---------------------------------------------------------------------------------

int64_t pixels_of(const Tensor& error) {
  int64_t pixels = 1;
  for (int64_t d = 1; d < error.dim(); ++d) pixels *= error.size(d);
  return pixels;
}

int64_t smallest_count(double fraction, int64_t pixels) {
  STD_TORCH_CHECK(fraction >= 0.0 && fraction <= 1.0, "fraction: expected 0 to 1, got ", fraction);
  return static_cast<int64_t>(std::floor(fraction * static_cast<double>(pixels)));
}

std::tuple<Tensor, Tensor, Tensor> histogram_correction(const Tensor& error, double fraction) {
  STD_TORCH_CHECK(error.dim() >= 1, "error: expected at least 1 dimension [B, ...], got 0");
  const Tensor images = torch::stable::contiguous(error);
  const int64_t batch = images.size(0), pixels = pixels_of(images);
  Tensor corrected = torch::stable::empty_like(images);
  Tensor mu = torch::stable::new_empty(images, {batch}, ScalarType::Float);
  Tensor score = torch::stable::new_empty(images, {batch}, ScalarType::Float);
  memad_fast::histogram_correction(
      {images.const_data_ptr(), dtype_of(images, "error"), batch, pixels, pixels, smallest_count(fraction, pixels),
       corrected.mutable_data_ptr(), mu.mutable_data_ptr<float>(), score.mutable_data_ptr<float>()},
      torch_loop());
  return {corrected, mu, score};
}

Tensor histogram_correction_backward(
    const Tensor& grad_corrected, const Tensor& grad_mu, const Tensor& grad_score, const Tensor& error,
    const Tensor& mu, double fraction) {
  const Tensor images = torch::stable::contiguous(error), grad = torch::stable::contiguous(grad_corrected);
  const Tensor grad_means = torch::stable::contiguous(grad_mu), grad_sums = torch::stable::contiguous(grad_score);
  const int64_t batch = images.size(0), pixels = pixels_of(images);
  Tensor grad_error = torch::stable::empty_like(images);
  memad_fast::histogram_correction_backward(
      {grad.const_data_ptr(), grad_means.const_data_ptr<float>(), grad_sums.const_data_ptr<float>(),
       images.const_data_ptr(), mu.const_data_ptr<float>(), dtype_of(images, "error"), batch, pixels, pixels,
       smallest_count(fraction, pixels), grad_error.mutable_data_ptr()},
      torch_loop());
  return grad_error;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(memad_fast, CPU, m) {
  m.impl("histogram_correction", TORCH_BOX(&histogram_correction));
  m.impl("histogram_correction_backward", TORCH_BOX(&histogram_correction_backward));
}
