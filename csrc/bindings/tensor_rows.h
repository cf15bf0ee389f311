// Tensors as the kernels take them, for the bindings of every device.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "core/types.h"

namespace memad_fast {

inline Dtype dtype_of(const torch::stable::Tensor& tensor, const char* name) {
  using torch::headeronly::ScalarType;
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Dtype::f32;
    case ScalarType::Half:
      return Dtype::f16;
    case ScalarType::BFloat16:
      return Dtype::bf16;
    default:
      STD_TORCH_CHECK(
          false, name, ": the ", tensor.is_cuda() ? "cuda" : "cpu",
          " backend takes float32, float16 or bfloat16; use the reference backend for float64");
  }
}

// The tensor itself where its last dimension is contiguous, else a contiguous copy.
inline torch::stable::Tensor last_contiguous(const torch::stable::Tensor& tensor) {
  const bool in_place = tensor.dim() == 0 || tensor.size(-1) <= 1 || tensor.stride(-1) == 1;
  return in_place ? tensor : torch::stable::contiguous(tensor);
}

inline Rows rows_of(const torch::stable::Tensor& matrix, const char* name) {
  STD_TORCH_CHECK(matrix.dim() == 2, name, ": expected 2 dimensions, got ", matrix.dim());
  return {matrix.const_data_ptr(), dtype_of(matrix, name), matrix.size(0), matrix.size(1), matrix.stride(0)};
}

}  // namespace memad_fast
