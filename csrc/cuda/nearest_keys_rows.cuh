// Rows as the kernels of nearest_keys read them: four elements at a time, shifted by the centre, as int8 codes. The
// letters and the proof are those of csrc/cpu/README_nearest_keys.md.
#pragma once

#include <cuda_runtime.h>

#include <cmath>

#include "cuda/nearest_keys.h"

namespace memad_fast::cuda {

constexpr unsigned kWholeWarp = 0xffffffffu;
constexpr double kUnit32 = 0x1p-24;      // rounding error of a float32 operation, relative
constexpr double kUnit64 = 0x1p-53;      // of a float64 one
constexpr double kTiny = 0x1p-126;       // absolute error of a float32 operation that underflows
constexpr double kLargestNorm = 0x1p60;  // squares and products of norms up to it stay finite in float32
constexpr float kSmallestCoded = 0x1p-60f;  // rows below it are all residual: their scale could underflow
constexpr float kKeyLevels = 127.0f;
constexpr float kInfinity = __builtin_huge_valf();

__host__ __device__ inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
__host__ __device__ inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
__host__ __device__ inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

__device__ inline bool is_finite(double x) { return x - x == 0.0; }

// A float32 at or above a finite x within its range, two units at most.
__device__ inline float round_up(double x) { return __double2float_rn(x + fabs(x) * 0x1p-23 + 0x1p-149); }
__device__ inline float round_down(double x) { return -round_up(-x); }

// Errors that hold for all rows of one search; the CPU's terms, since no sum here has more roundings than there.
struct ErrorTerms {
  double exact;      // Gamma: of the float64 stage
  double square;     // sigma: of a squared norm, in float32, relative; infinite where nothing can be screened
  double element;    // of a row, from elements that underflow
  double underflow;  // of a norm, from squares that underflow
  double absolute;   // tau: of a score
};

inline ErrorTerms error_terms(int64_t dim) {
  const auto rounding = [](double n, double unit) {
    const double nu = n * unit;
    return nu < 0.25 ? nu / (1.0 - nu) : static_cast<double>(kInfinity);
  };
  const auto n = static_cast<double>(dim);
  return {rounding(n / 8.0 + 16.0, kUnit64), 1.01 * rounding(n / 16.0 + 16.0, kUnit32), std::sqrt(n) * 4.0 * kTiny,
          std::sqrt(n * kTiny) * 2.0, (4.0 * n + 64.0) * kTiny};
}

// An upper end of a norm from its square in float32.
__device__ inline double norm_above(double square, const ErrorTerms& error) {
  return sqrt(square) * (1.0 + error.square) + error.underflow;
}

// --- elements ------------------------------------------------------------------------------------------------------

__device__ inline float from_half(uint32_t bits) {
  const uint32_t magnitude = (bits & 0x7fffu) << 13, sign = (bits & 0x8000u) << 16;
  const float value = (bits & 0x7c00u) == 0x7c00u ? __uint_as_float(magnitude | 0x7f800000u)
                                                  : __uint_as_float(magnitude) * 0x1p112f;
  return __uint_as_float(__float_as_uint(value) | sign);
}

__device__ inline float from_bfloat(uint32_t bits) { return __uint_as_float(bits << 16); }

// Four elements as they lie in memory, aligned to their size.
struct Halves {
  uint2 bits;
};
struct Bfloats {
  uint2 bits;
};
__device__ inline float4 widen(const float4& x) { return x; }
__device__ inline float4 widen(const Halves& x) {
  return make_float4(
      from_half(x.bits.x & 0xffffu), from_half(x.bits.x >> 16), from_half(x.bits.y & 0xffffu),
      from_half(x.bits.y >> 16));
}
__device__ inline float4 widen(const Bfloats& x) {
  return make_float4(
      from_bfloat(x.bits.x & 0xffffu), from_bfloat(x.bits.x >> 16), from_bfloat(x.bits.y & 0xffffu),
      from_bfloat(x.bits.y >> 16));
}

// One row of a matrix.
struct Row {
  const char* data;
  int64_t width;
  Dtype dtype;
  bool aligned;  // to four elements

  __device__ Row(const Rows& rows, int64_t index) : width(rows.cols), dtype(rows.dtype) {
    const int64_t size = dtype == Dtype::f32 ? 4 : 2;
    data = static_cast<const char*>(rows.data) + index * rows.row_stride * size;
    aligned = reinterpret_cast<uintptr_t>(data) % static_cast<uintptr_t>(4 * size) == 0;
  }

  // Elements i to i + 3, zero beyond the width. i is a multiple of four.
  __device__ float4 four(int64_t i) const {
    if (aligned && i + 4 <= width) {
      if (dtype == Dtype::f32) return fours<float4>()[i / 4];
      return dtype == Dtype::f16 ? widen(fours<Halves>()[i / 4]) : widen(fours<Bfloats>()[i / 4]);
    }
    return make_float4(one(i), one(i + 1), one(i + 2), one(i + 3));
  }

  __device__ float one(int64_t i) const {
    if (i >= width) return 0.0f;
    if (dtype == Dtype::f32) return reinterpret_cast<const float*>(data)[i];
    const uint32_t bits = reinterpret_cast<const uint16_t*>(data)[i];
    return dtype == Dtype::f16 ? from_half(bits) : from_bfloat(bits);
  }

  template <class Four>
  __device__ const Four* fours() const { return reinterpret_cast<const Four*>(data); }
};

// --- a warp and a row ----------------------------------------------------------------------------------------------

template <class T>
__device__ T warp_sum(T x) {
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(kWholeWarp, x, step);
  return x;
}

__device__ inline float warp_max(float x) {
  for (int step = 16; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(kWholeWarp, x, step));
  return x;
}

// |row|^2 in float64, the same in all lanes.
__device__ inline double square_of(const Row& row) {
  double sum = 0.0;
  for (int64_t i = 4 * (threadIdx.x % 32); i < row.width; i += 128) {
    const float4 x = row.four(i);
    sum += static_cast<double>(x.x) * x.x + static_cast<double>(x.y) * x.y;
    sum += static_cast<double>(x.z) * x.z + static_cast<double>(x.w) * x.w;
  }
  return warp_sum(sum);
}

__device__ inline double unit_scale(double square) { return square > 0.0 ? 1.0 / sqrt(square) : 0.0; }

// A row as the screen holds it: shifted by the centre or not, scaled to length 1 or not, rounded once.
struct Staging {
  Row row;
  const float* centre;  // [dims] or null
  double scale;
  bool scaled;

  __device__ float4 four(int64_t i) const { return shifted(row.four(i), i); }
  __device__ float4 shifted(const float4& x, int64_t i) const {
    const float4 c = centre ? *reinterpret_cast<const float4*>(centre + i) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (!scaled) return make_float4(x.x - c.x, x.y - c.y, x.z - c.z, x.w - c.w);
    return make_float4(scaled_one(x.x, c.x), scaled_one(x.y, c.y), scaled_one(x.z, c.z), scaled_one(x.w, c.w));
  }
  __device__ float scaled_one(float x, float c) const {
    return __double2float_rn(static_cast<double>(x) * scale - static_cast<double>(c));
  }
};

// What a warp finds of a row: the rest is arithmetic in float64 that no element needs.
struct Measured {
  bool finite;     // the original row
  float square;    // of the staged one, within sigma
  float scale;     // of its codes
  float residual;  // square of what the codes leave out, within sigma
};

// An upper end of the norm of what the codes leave out of a row of this norm.
__device__ inline double residual_above(const Measured& row, double norm, const ErrorTerms& error) {
  return norm_above(static_cast<double>(row.residual), error) + 4.0 * kUnit32 * norm;
}

__device__ inline uint32_t code(float x, float inverse, float step, float& residual) {
  const int n = __float2int_rn(x * inverse);
  const float rest = fmaf(-step, static_cast<float>(n), x);
  residual = fmaf(rest, rest, residual);
  return static_cast<uint32_t>(n) & 0xffu;
}

// Measures a row, and writes its codes to out[0, dims). Those of a row that no screen can hold are of no use.
__device__ inline Measured quantise(const Staging& staging, int64_t dims, int8_t* out) {
  bool finite = true;
  float square = 0.0f, largest = 0.0f, residual = 0.0f;
  for (int64_t i = 4 * (threadIdx.x % 32); i < dims; i += 128) {
    const float4 raw = staging.row.four(i), x = staging.shifted(raw, i);
    finite = finite && raw.x - raw.x == 0.0f && raw.y - raw.y == 0.0f && raw.z - raw.z == 0.0f && raw.w - raw.w == 0.0f;
    square = fmaf(x.x, x.x, square);
    square = fmaf(x.y, x.y, square);
    square = fmaf(x.z, x.z, square);
    square = fmaf(x.w, x.w, square);
    largest = fmaxf(fmaxf(fmaxf(fabsf(x.x), fabsf(x.y)), fmaxf(fabsf(x.z), fabsf(x.w))), largest);
  }
  largest = warp_max(largest);
  const bool coded = largest >= kSmallestCoded;
  const float step = coded ? largest / kKeyLevels : 0.0f, inverse = coded ? kKeyLevels / largest : 0.0f;
  for (int64_t i = 4 * (threadIdx.x % 32); i < dims; i += 128) {
    const float4 x = staging.four(i);
    const uint32_t a = code(x.x, inverse, step, residual), b = code(x.y, inverse, step, residual);
    const uint32_t c = code(x.z, inverse, step, residual), d = code(x.w, inverse, step, residual);
    *reinterpret_cast<uint32_t*>(out + i) = a | b << 8 | c << 16 | d << 24;
  }
  return {__all_sync(kWholeWarp, finite) != 0, warp_sum(square), step, warp_sum(residual)};
}

__device__ inline void no_codes(int64_t dims, int8_t* out) {
  for (int64_t i = 4 * (threadIdx.x % 32); i < dims; i += 128) *reinterpret_cast<uint32_t*>(out + i) = 0;
}

// Every thread of the block calls it; the same number for all of them.
__device__ inline double centre_norm_of(const float* centre, int64_t dims) {
  double sum = 0.0;  // every warp sums all of it: no shared memory, and the centre stays in the cache
  for (int64_t i = threadIdx.x % 32; i < dims; i += 32) sum += static_cast<double>(centre[i]) * centre[i];
  return sqrt(warp_sum(sum));
}

}  // namespace memad_fast::cuda
