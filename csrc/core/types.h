// Element types and strided views that kernels take. Plain data, no torch.
#pragma once

#include <cstdint>

namespace memad_fast {

struct f16 { uint16_t bits; };
struct bf16 { uint16_t bits; };

enum class Dtype : int { f32 = 0, f16 = 1, bf16 = 2 };

// A [rows, cols] matrix read in place: columns are contiguous, rows lie row_stride elements apart
// (0 for an expanded tensor, negative never).
struct Rows {
  const void* data;
  Dtype dtype;
  int64_t rows;
  int64_t cols;
  int64_t row_stride;

  template <class T>
  const T* row(int64_t index) const { return static_cast<const T*>(data) + index * row_stride; }
};

}  // namespace memad_fast

// Runs `body` with `scalar` as the element type of a Dtype: MEMAD_FAST_BY_DTYPE(dtype, scalar, { ... });
#define MEMAD_FAST_BY_DTYPE(dtype, scalar, ...)                     \
  switch (dtype) {                                                  \
    case ::memad_fast::Dtype::f32: { using scalar = float; __VA_ARGS__ } break;              \
    case ::memad_fast::Dtype::f16: { using scalar = ::memad_fast::f16; __VA_ARGS__ } break;  \
    case ::memad_fast::Dtype::bf16: { using scalar = ::memad_fast::bf16; __VA_ARGS__ } break; \
  }
