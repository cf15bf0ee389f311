// <cuda_fp16.h> for the model of CUDA (see cuda_runtime.h): conversions only.
#pragma once

#include <cuda_runtime.h>

struct __half {
  uint16_t bits;
};
inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
inline unsigned short __half_as_ushort(__half x) { return x.bits; }

inline float __half2float(__half x) {
  const int exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
  float magnitude = std::ldexp(static_cast<float>(exponent ? fraction + 1024 : fraction), std::max(exponent, 1) - 25);
  if (exponent == 31) magnitude = fraction ? NAN : INFINITY;
  return std::copysign(magnitude, x.bits & 0x8000 ? -1.0f : 1.0f);
}

inline __half __float2half_rn(float x) {
  if (std::isnan(x)) return {0x7FFF};
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const float magnitude = std::fabs(x);
  if (magnitude >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7C00)};
  // In steps of the last bit: half an integer goes to the even one.
  const int exponent = magnitude < 0x1p-14f ? -14 : std::ilogb(magnitude);
  const auto steps = static_cast<int>(std::nearbyint(std::ldexp(magnitude, 10 - exponent)));
  return {static_cast<uint16_t>(sign | ((exponent + 14) * 1024 + steps))};
}
