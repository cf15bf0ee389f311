// Elements of tensors as float32 and back.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <type_traits>

#include "core/types.h"

namespace memad_fast::cuda {

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(f16 x) { return __half2float(__ushort_as_half(x.bits)); }
__device__ inline float to_float(bf16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }

// Rounded to the nearest, ties to even.
template <class T>
__device__ T from_float(float x) {
  if constexpr (sizeof(T) == 4) return x;
  else if constexpr (std::is_same_v<T, f16>) return {__half_as_ushort(__float2half_rn(x))};
  else return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
}

}  // namespace memad_fast::cuda
