// SIMD vectors for kernel files. Include only from csrc/cpu/*_kernel*.cpp, which CMake compiles once per
// level with MEMAD_FAST_ISA (the namespace) and MEMAD_FAST_ISA_LEVEL (0 portable, 1 avx2, 2 avx512).
//
//   type   lanes (portable / avx2 / avx512)   meaning
//   F32    4 / 8 / 16                         float lanes
//   I32    4 / 8 / 16                         32-bit integer lanes (wrap-around arithmetic)
//   M32    4 / 8 / 16                         one flag a lane
//   F64    2 / 4 / 8                          double lanes
//   I64    2 / 4 / 8                          64-bit integer lanes, each holding a 32-bit word (Philox)
//
// Multiplication and addition are never contracted (the build passes -ffp-contract=off): a fused
// multiply-add is written fma(a, b, c), so what is rounded where can be read off the source. On the
// portable level fma is a rounded product and a rounded sum.
// Loads and stores are unaligned; the *_first(n) forms touch the first n elements only (n <= lanes) and
// read the rest as zero.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/types.h"

#if !defined(MEMAD_FAST_ISA) || !defined(MEMAD_FAST_ISA_LEVEL)
#error "simd.h is for kernel files; CMake defines MEMAD_FAST_ISA and MEMAD_FAST_ISA_LEVEL for them"
#endif

#if MEMAD_FAST_ISA_LEVEL > 0
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace memad_fast {
namespace MEMAD_FAST_ISA {

#if MEMAD_FAST_ISA_LEVEL == 2

struct M32 {
  __mmask16 m;
  bool any() const { return m != 0; }
  uint32_t bits() const { return m; }
  int64_t count() const { return _mm_popcnt_u64(m); }
  M32 operator&(M32 o) const { return {static_cast<__mmask16>(m & o.m)}; }
  M32 operator|(M32 o) const { return {static_cast<__mmask16>(m | o.m)}; }
};

struct I32 {
  static constexpr int lanes = 16;
  __m512i v;
  static I32 set1(int32_t x) { return {_mm512_set1_epi32(x)}; }
  static I32 iota() { return {_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)}; }
  static I32 load(const void* p) { return {_mm512_loadu_si512(p)}; }
  void store(void* p) const { _mm512_storeu_si512(p, v); }
  I32 operator+(I32 o) const { return {_mm512_add_epi32(v, o.v)}; }
  I32 operator-(I32 o) const { return {_mm512_sub_epi32(v, o.v)}; }
  I32 operator*(I32 o) const { return {_mm512_mullo_epi32(v, o.v)}; }
  I32 operator&(I32 o) const { return {_mm512_and_si512(v, o.v)}; }
  I32 operator|(I32 o) const { return {_mm512_or_si512(v, o.v)}; }
  I32 operator^(I32 o) const { return {_mm512_xor_si512(v, o.v)}; }
  template <int n> I32 shl() const { return {_mm512_slli_epi32(v, n)}; }
  template <int n> I32 shr() const { return {_mm512_srli_epi32(v, n)}; }  // logical
};

// High 32 bits of the unsigned products.
inline I32 mul_high(I32 a, I32 b) {
  const __m512i even = _mm512_srli_epi64(_mm512_mul_epu32(a.v, b.v), 32);
  const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64(a.v, 32), _mm512_srli_epi64(b.v, 32));
  return {_mm512_mask_blend_epi32(0xAAAA, even, odd)};
}

struct F32 {
  static constexpr int lanes = 16;
  __m512 v;
  static F32 zero() { return {_mm512_setzero_ps()}; }
  static F32 set1(float x) { return {_mm512_set1_ps(x)}; }
  static F32 load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static F32 load(const f16* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))}; }
  static F32 load(const bf16* p) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
  }
  static F32 load_first(const float* p, int n) {
    return {_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p)};
  }
  static F32 load_first(const f16* p, int n) {
    return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << n) - 1), p))};
  }
  static F32 load_first(const bf16* p, int n) {
    const __m256i half = _mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << n) - 1), p);
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
  }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  void store_first(float* p, int n) const {
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), v);
  }
  F32 operator+(F32 o) const { return {_mm512_add_ps(v, o.v)}; }
  F32 operator-(F32 o) const { return {_mm512_sub_ps(v, o.v)}; }
  F32 operator*(F32 o) const { return {_mm512_mul_ps(v, o.v)}; }
  F32 operator/(F32 o) const { return {_mm512_div_ps(v, o.v)}; }
  M32 operator<(F32 o) const { return {_mm512_cmp_ps_mask(v, o.v, _CMP_LT_OQ)}; }
  M32 operator<=(F32 o) const { return {_mm512_cmp_ps_mask(v, o.v, _CMP_LE_OQ)}; }
  M32 operator>(F32 o) const { return {_mm512_cmp_ps_mask(v, o.v, _CMP_GT_OQ)}; }
  M32 operator==(F32 o) const { return {_mm512_cmp_ps_mask(v, o.v, _CMP_EQ_OQ)}; }
  M32 operator!=(F32 o) const { return {_mm512_cmp_ps_mask(v, o.v, _CMP_NEQ_UQ)}; }  // true where either is NaN
};

// Where a < b or either is NaN.
inline M32 less_or_nan(F32 a, F32 b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_NGE_UQ)}; }
inline F32 fma(F32 a, F32 b, F32 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline F32 fnma(F32 a, F32 b, F32 c) { return {_mm512_fnmadd_ps(a.v, b.v, c.v)}; }  // c - a b
inline F32 min(F32 a, F32 b) { return {_mm512_min_ps(a.v, b.v)}; }  // b where either is NaN
inline F32 max(F32 a, F32 b) { return {_mm512_max_ps(a.v, b.v)}; }  // b where either is NaN
inline F32 sqrt(F32 a) { return {_mm512_sqrt_ps(a.v)}; }
inline F32 round_nearest(F32 a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline F32 select(M32 m, F32 yes, F32 no) { return {_mm512_mask_blend_ps(m.m, no.v, yes.v)}; }
inline I32 select(M32 m, I32 yes, I32 no) { return {_mm512_mask_blend_epi32(m.m, no.v, yes.v)}; }
inline int count(M32 m) { return __builtin_popcount(m.m); }
inline M32 first_lanes(int n) { return {static_cast<__mmask16>((1u << n) - 1)}; }
inline F32 bit_cast_f32(I32 a) { return {_mm512_castsi512_ps(a.v)}; }
inline I32 bit_cast_i32(F32 a) { return {_mm512_castps_si512(a.v)}; }
// The flagged lanes in order, from lane 0; what the other lanes hold is not said.
inline F32 compress(F32 a, M32 m) { return {_mm512_maskz_compress_ps(m.m, a.v)}; }
inline F32 to_f32(I32 a) { return {_mm512_cvtepi32_ps(a.v)}; }           // from signed
inline I32 to_i32(F32 a) { return {_mm512_cvtps_epi32(a.v)}; }           // nearest

// 64-bit lanes that hold one 32-bit word each: products read the low halves only.
struct I64 {
  static constexpr int lanes = 8;
  __m512i v;
  static I64 set1(int64_t x) { return {_mm512_set1_epi64(x)}; }
  static I64 iota() { return {_mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7)}; }
  I64 operator+(I64 o) const { return {_mm512_add_epi64(v, o.v)}; }
  I64 operator^(I64 o) const { return {_mm512_xor_si512(v, o.v)}; }
  I64 high_word() const { return {_mm512_srli_epi64(v, 32)}; }
};
inline I64 mul_words(I64 a, I64 b) { return {_mm512_mul_epu32(a.v, b.v)}; }
// The low words, alternating: even[0], odd[0], even[1], ...
inline I32 interleave_words(I64 even, I64 odd) {
  const __m512 words = _mm512_castsi512_ps(even.v);
  return {_mm512_castps_si512(_mm512_mask_moveldup_ps(words, 0xAAAA, _mm512_castsi512_ps(odd.v)))};
}

// rows[i] lane j <-> rows[j] lane i, i and j < lanes.
inline void transpose(F32* rows) {
  __m512 pairs[16], fours[16];
  for (int i = 0; i < 16; i += 2) {
    pairs[i] = _mm512_unpacklo_ps(rows[i].v, rows[i + 1].v);
    pairs[i + 1] = _mm512_unpackhi_ps(rows[i].v, rows[i + 1].v);
  }
  for (int i = 0; i < 16; i += 4) {
    for (int half = 0; half < 2; ++half) {
      const __m512d low = _mm512_castps_pd(pairs[i + half]), high = _mm512_castps_pd(pairs[i + 2 + half]);
      fours[i + 2 * half] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
      fours[i + 2 * half + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
    }
  }
  for (int i = 0; i < 4; ++i) {
    const __m512 a = _mm512_shuffle_f32x4(fours[i], fours[i + 4], 0x88);
    const __m512 b = _mm512_shuffle_f32x4(fours[i], fours[i + 4], 0xDD);
    const __m512 c = _mm512_shuffle_f32x4(fours[i + 8], fours[i + 12], 0x88);
    const __m512 d = _mm512_shuffle_f32x4(fours[i + 8], fours[i + 12], 0xDD);
    rows[i].v = _mm512_shuffle_f32x4(a, c, 0x88);
    rows[i + 8].v = _mm512_shuffle_f32x4(a, c, 0xDD);
    rows[i + 4].v = _mm512_shuffle_f32x4(b, d, 0x88);
    rows[i + 12].v = _mm512_shuffle_f32x4(b, d, 0xDD);
  }
}

struct F64 {
  static constexpr int lanes = 8;
  __m512d v;
  static F64 zero() { return {_mm512_setzero_pd()}; }
  static F64 set1(double x) { return {_mm512_set1_pd(x)}; }
  static F64 load(const double* p) { return {_mm512_loadu_pd(p)}; }
  void store(double* p) const { _mm512_storeu_pd(p, v); }
  F64 operator+(F64 o) const { return {_mm512_add_pd(v, o.v)}; }
  F64 operator-(F64 o) const { return {_mm512_sub_pd(v, o.v)}; }
  F64 operator*(F64 o) const { return {_mm512_mul_pd(v, o.v)}; }
};
inline F64 low_f64(F32 a) { return {_mm512_cvtps_pd(_mm512_castps512_ps256(a.v))}; }
inline F64 high_f64(F32 a) {
  return {_mm512_cvtps_pd(_mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(a.v), 1)))};
}

#elif MEMAD_FAST_ISA_LEVEL == 1

struct M32 {
  __m256 m;
  bool any() const { return _mm256_movemask_ps(m) != 0; }
  uint32_t bits() const { return static_cast<uint32_t>(_mm256_movemask_ps(m)); }
  int64_t count() const { return _mm_popcnt_u64(bits()); }
  M32 operator&(M32 o) const { return {_mm256_and_ps(m, o.m)}; }
  M32 operator|(M32 o) const { return {_mm256_or_ps(m, o.m)}; }
};

struct I32 {
  static constexpr int lanes = 8;
  __m256i v;
  static I32 set1(int32_t x) { return {_mm256_set1_epi32(x)}; }
  static I32 iota() { return {_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)}; }
  static I32 load(const void* p) { return {_mm256_loadu_si256(static_cast<const __m256i*>(p))}; }
  void store(void* p) const { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }
  I32 operator+(I32 o) const { return {_mm256_add_epi32(v, o.v)}; }
  I32 operator-(I32 o) const { return {_mm256_sub_epi32(v, o.v)}; }
  I32 operator*(I32 o) const { return {_mm256_mullo_epi32(v, o.v)}; }
  I32 operator&(I32 o) const { return {_mm256_and_si256(v, o.v)}; }
  I32 operator|(I32 o) const { return {_mm256_or_si256(v, o.v)}; }
  I32 operator^(I32 o) const { return {_mm256_xor_si256(v, o.v)}; }
  template <int n> I32 shl() const { return {_mm256_slli_epi32(v, n)}; }
  template <int n> I32 shr() const { return {_mm256_srli_epi32(v, n)}; }
};

inline I32 mul_high(I32 a, I32 b) {
  const __m256i even = _mm256_srli_epi64(_mm256_mul_epu32(a.v, b.v), 32);
  const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64(a.v, 32), _mm256_srli_epi64(b.v, 32));
  return {_mm256_blend_epi32(even, odd, 0xAA)};
}

inline __m256i first_mask(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

struct F32 {
  static constexpr int lanes = 8;
  __m256 v;
  static F32 zero() { return {_mm256_setzero_ps()}; }
  static F32 set1(float x) { return {_mm256_set1_ps(x)}; }
  static F32 load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static F32 load(const f16* p) { return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))}; }
  static F32 load(const bf16* p) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16))};
  }
  static F32 load_first(const float* p, int n) { return {_mm256_maskload_ps(p, first_mask(n))}; }
  static F32 load_first(const f16* p, int n) {
    f16 part[lanes] = {};
    std::memcpy(part, p, static_cast<size_t>(n) * sizeof(f16));
    return load(part);
  }
  static F32 load_first(const bf16* p, int n) {
    bf16 part[lanes] = {};
    std::memcpy(part, p, static_cast<size_t>(n) * sizeof(bf16));
    return load(part);
  }
  void store(float* p) const { _mm256_storeu_ps(p, v); }
  void store_first(float* p, int n) const { _mm256_maskstore_ps(p, first_mask(n), v); }
  F32 operator+(F32 o) const { return {_mm256_add_ps(v, o.v)}; }
  F32 operator-(F32 o) const { return {_mm256_sub_ps(v, o.v)}; }
  F32 operator*(F32 o) const { return {_mm256_mul_ps(v, o.v)}; }
  F32 operator/(F32 o) const { return {_mm256_div_ps(v, o.v)}; }
  M32 operator<(F32 o) const { return {_mm256_cmp_ps(v, o.v, _CMP_LT_OQ)}; }
  M32 operator<=(F32 o) const { return {_mm256_cmp_ps(v, o.v, _CMP_LE_OQ)}; }
  M32 operator>(F32 o) const { return {_mm256_cmp_ps(v, o.v, _CMP_GT_OQ)}; }
  M32 operator==(F32 o) const { return {_mm256_cmp_ps(v, o.v, _CMP_EQ_OQ)}; }
  M32 operator!=(F32 o) const { return {_mm256_cmp_ps(v, o.v, _CMP_NEQ_UQ)}; }
};

inline M32 less_or_nan(F32 a, F32 b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_NGE_UQ)}; }
inline F32 fma(F32 a, F32 b, F32 c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline F32 fnma(F32 a, F32 b, F32 c) { return {_mm256_fnmadd_ps(a.v, b.v, c.v)}; }
inline F32 min(F32 a, F32 b) { return {_mm256_min_ps(a.v, b.v)}; }
inline F32 max(F32 a, F32 b) { return {_mm256_max_ps(a.v, b.v)}; }
inline F32 sqrt(F32 a) { return {_mm256_sqrt_ps(a.v)}; }
inline F32 round_nearest(F32 a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline F32 select(M32 m, F32 yes, F32 no) { return {_mm256_blendv_ps(no.v, yes.v, m.m)}; }
inline I32 select(M32 m, I32 yes, I32 no) {
  return {_mm256_castps_si256(_mm256_blendv_ps(_mm256_castsi256_ps(no.v), _mm256_castsi256_ps(yes.v), m.m))};
}
inline int count(M32 m) { return __builtin_popcount(m.bits()); }
inline M32 first_lanes(int n) { return {_mm256_castsi256_ps(first_mask(n))}; }
inline F32 bit_cast_f32(I32 a) { return {_mm256_castsi256_ps(a.v)}; }
inline I32 bit_cast_i32(F32 a) { return {_mm256_castps_si256(a.v)}; }
// For each mask of 8 lanes, the places of its flagged lanes, one byte each.
struct CompressTable {
  uint64_t places[256];
  constexpr CompressTable() : places{} {
    for (int mask = 0; mask < 256; ++mask)
      for (int lane = 0, found = 0; lane < 8; ++lane)
        if (mask >> lane & 1) places[mask] |= static_cast<uint64_t>(lane) << (8 * found++);
  }
};
inline constexpr CompressTable compress_table;
inline F32 compress(F32 a, M32 m) {
  const __m128i places = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(compress_table.places + m.bits()));
  return {_mm256_permutevar8x32_ps(a.v, _mm256_cvtepu8_epi32(places))};
}
inline F32 to_f32(I32 a) { return {_mm256_cvtepi32_ps(a.v)}; }
inline I32 to_i32(F32 a) { return {_mm256_cvtps_epi32(a.v)}; }

struct I64 {
  static constexpr int lanes = 4;
  __m256i v;
  static I64 set1(int64_t x) { return {_mm256_set1_epi64x(x)}; }
  static I64 iota() { return {_mm256_setr_epi64x(0, 1, 2, 3)}; }
  I64 operator+(I64 o) const { return {_mm256_add_epi64(v, o.v)}; }
  I64 operator^(I64 o) const { return {_mm256_xor_si256(v, o.v)}; }
  I64 high_word() const { return {_mm256_srli_epi64(v, 32)}; }
};
inline I64 mul_words(I64 a, I64 b) { return {_mm256_mul_epu32(a.v, b.v)}; }
inline I32 interleave_words(I64 even, I64 odd) {
  return {_mm256_blend_epi32(even.v, _mm256_slli_epi64(odd.v, 32), 0xAA)};
}

inline void transpose(F32* rows) {
  __m256 fours[8];
  for (int i = 0; i < 8; i += 4) {
    for (int half = 0; half < 2; ++half) {
      const __m256 low = half ? _mm256_unpackhi_ps(rows[i].v, rows[i + 1].v) : _mm256_unpacklo_ps(rows[i].v, rows[i + 1].v);
      const __m256 high = half ? _mm256_unpackhi_ps(rows[i + 2].v, rows[i + 3].v)
                               : _mm256_unpacklo_ps(rows[i + 2].v, rows[i + 3].v);
      fours[i + 2 * half] = _mm256_shuffle_ps(low, high, 0x44);
      fours[i + 2 * half + 1] = _mm256_shuffle_ps(low, high, 0xEE);
    }
  }
  for (int i = 0; i < 4; ++i) {
    rows[i].v = _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x20);
    rows[i + 4].v = _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x31);
  }
}

struct F64 {
  static constexpr int lanes = 4;
  __m256d v;
  static F64 zero() { return {_mm256_setzero_pd()}; }
  static F64 set1(double x) { return {_mm256_set1_pd(x)}; }
  static F64 load(const double* p) { return {_mm256_loadu_pd(p)}; }
  void store(double* p) const { _mm256_storeu_pd(p, v); }
  F64 operator+(F64 o) const { return {_mm256_add_pd(v, o.v)}; }
  F64 operator-(F64 o) const { return {_mm256_sub_pd(v, o.v)}; }
  F64 operator*(F64 o) const { return {_mm256_mul_pd(v, o.v)}; }
};
inline F64 low_f64(F32 a) { return {_mm256_cvtps_pd(_mm256_castps256_ps128(a.v))}; }
inline F64 high_f64(F32 a) { return {_mm256_cvtps_pd(_mm256_extractf128_ps(a.v, 1))}; }

#else  // portable: four lanes that the compiler maps to SSE2 or NEON

struct M32 {
  typedef int32_t native __attribute__((vector_size(16)));
  native m;
  bool any() const { return bits() != 0; }
#if defined(__SSE2__)
  uint32_t bits() const { return static_cast<uint32_t>(_mm_movemask_ps((__m128)m)); }
#else
  uint32_t bits() const {
    return (m[0] & 1u) | (m[1] & 2u) | (m[2] & 4u) | (m[3] & 8u);
  }
#endif
  // A nibble for each value of bits().
  int64_t count() const { return static_cast<int64_t>((0x4332322132212110u >> (4 * bits())) & 7u); }
  M32 operator&(M32 o) const { return {m & o.m}; }
  M32 operator|(M32 o) const { return {m | o.m}; }
};

struct I32 {
  static constexpr int lanes = 4;
  typedef uint32_t native __attribute__((vector_size(16)));
  native v;
  static I32 set1(int32_t x) { const uint32_t u = static_cast<uint32_t>(x); return {native{u, u, u, u}}; }
  static I32 iota() { return {native{0, 1, 2, 3}}; }
  static I32 load(const void* p) { I32 r; std::memcpy(&r.v, p, sizeof(r.v)); return r; }
  void store(void* p) const { std::memcpy(p, &v, sizeof(v)); }
  I32 operator+(I32 o) const { return {v + o.v}; }
  I32 operator-(I32 o) const { return {v - o.v}; }
  I32 operator*(I32 o) const { return {v * o.v}; }
  I32 operator&(I32 o) const { return {v & o.v}; }
  I32 operator|(I32 o) const { return {v | o.v}; }
  I32 operator^(I32 o) const { return {v ^ o.v}; }
  template <int n> I32 shl() const { return {v << n}; }
  template <int n> I32 shr() const { return {v >> n}; }
};

inline I32 mul_high(I32 a, I32 b) {
  I32 r;
  for (int i = 0; i < I32::lanes; ++i)
    r.v[i] = static_cast<uint32_t>((static_cast<uint64_t>(a.v[i]) * b.v[i]) >> 32);
  return r;
}

inline float scalar_from(float x) { return x; }
inline float scalar_from(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
inline float scalar_from(f16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  uint32_t bits;
  float value;
  if (magnitude >= 0x7c00u) {  // infinity, NaN
    bits = sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13);
  } else if (magnitude >= 0x0400u) {
    bits = sign | ((magnitude << 13) + 0x38000000u);
  } else {  // subnormal: magnitude * 2^-24 is exact in float
    value = static_cast<float>(magnitude) * 5.9604644775390625e-08f;
    return sign ? -value : value;
  }
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

struct F32 {
  static constexpr int lanes = 4;
  typedef float native __attribute__((vector_size(16)));
  native v;
  static F32 zero() { return {native{0, 0, 0, 0}}; }
  static F32 set1(float x) { return {native{x, x, x, x}}; }
  static F32 load(const float* p) { F32 r; std::memcpy(&r.v, p, sizeof(r.v)); return r; }
  template <class T> static F32 load(const T* p) {
    return {native{scalar_from(p[0]), scalar_from(p[1]), scalar_from(p[2]), scalar_from(p[3])}};
  }
  template <class T> static F32 load_first(const T* p, int n) {
    F32 r = zero();
    for (int i = 0; i < n; ++i) r.v[i] = scalar_from(p[i]);
    return r;
  }
  void store(float* p) const { std::memcpy(p, &v, sizeof(v)); }
  void store_first(float* p, int n) const {
    for (int i = 0; i < n; ++i) p[i] = v[i];
  }
  F32 operator+(F32 o) const { return {v + o.v}; }
  F32 operator-(F32 o) const { return {v - o.v}; }
  F32 operator*(F32 o) const { return {v * o.v}; }
  F32 operator/(F32 o) const { return {v / o.v}; }
  M32 operator<(F32 o) const { return {v < o.v}; }
  M32 operator<=(F32 o) const { return {v <= o.v}; }
  M32 operator>(F32 o) const { return {v > o.v}; }
  M32 operator==(F32 o) const { return {v == o.v}; }
  M32 operator!=(F32 o) const { return {v != o.v}; }
};

inline M32 less_or_nan(F32 a, F32 b) { return {~(a.v >= b.v)}; }
inline F32 fma(F32 a, F32 b, F32 c) { return {a.v * b.v + c.v}; }
inline F32 fnma(F32 a, F32 b, F32 c) { return {c.v - a.v * b.v}; }
inline F32 min(F32 a, F32 b) { return {a.v < b.v ? a.v : b.v}; }
inline F32 max(F32 a, F32 b) { return {a.v > b.v ? a.v : b.v}; }
inline F32 sqrt(F32 a) {
  return {F32::native{__builtin_sqrtf(a.v[0]), __builtin_sqrtf(a.v[1]), __builtin_sqrtf(a.v[2]), __builtin_sqrtf(a.v[3])}};
}
inline F32 select(M32 m, F32 yes, F32 no) { return {m.m ? yes.v : no.v}; }
inline I32 select(M32 m, I32 yes, I32 no) { return {m.m ? yes.v : no.v}; }
inline int count(M32 m) { return -(m.m[0] + m.m[1] + m.m[2] + m.m[3]); }
inline M32 first_lanes(int n) { return {M32::native{0, 1, 2, 3} < M32::native{n, n, n, n}}; }
inline F32 bit_cast_f32(I32 a) { F32 r; std::memcpy(&r.v, &a.v, sizeof(r.v)); return r; }
inline I32 bit_cast_i32(F32 a) { I32 r; std::memcpy(&r.v, &a.v, sizeof(r.v)); return r; }
inline F32 compress(F32 a, M32 m) {
  const uint32_t flags = m.bits();
  F32 r = a;
  for (uint32_t lane = 0, found = 0; lane < F32::lanes; ++lane) {
    r.v[found] = a.v[lane];
    found += flags >> lane & 1u;
  }
  return r;
}
inline F32 to_f32(I32 a) { return {__builtin_convertvector((M32::native)a.v, F32::native)}; }
// Nearest, for |a| < 2^22: adding 1.5 * 2^23 leaves the rounded integer in the low bits.
inline F32 round_nearest(F32 a) {
  const F32 magic = F32::set1(12582912.0f);
  return (a + magic) - magic;
}
inline I32 to_i32(F32 a) {
  return {(I32::native)__builtin_convertvector(round_nearest(a).v, M32::native)};
}

struct I64 {
  static constexpr int lanes = 2;
  typedef uint64_t native __attribute__((vector_size(16)));
  native v;
  static I64 set1(int64_t x) { const uint64_t u = static_cast<uint64_t>(x); return {native{u, u}}; }
  static I64 iota() { return {native{0, 1}}; }
  I64 operator+(I64 o) const { return {v + o.v}; }
  I64 operator^(I64 o) const { return {v ^ o.v}; }
  I64 high_word() const { return {v >> 32}; }
};
inline I64 mul_words(I64 a, I64 b) {
#if defined(__SSE2__)
  return {(I64::native)_mm_mul_epu32((__m128i)a.v, (__m128i)b.v)};
#else
  return {(a.v & 0xffffffffu) * (b.v & 0xffffffffu)};
#endif
}
inline I32 interleave_words(I64 even, I64 odd) {
  return {(I32::native)((even.v & 0xffffffffu) | (odd.v << 32))};
}

inline void transpose(F32* rows) {
  for (int i = 0; i < F32::lanes; ++i) {
    for (int j = 0; j < i; ++j) {
      const float upper = rows[j].v[i];
      rows[j].v[i] = rows[i].v[j];
      rows[i].v[j] = upper;
    }
  }
}

struct F64 {
  static constexpr int lanes = 2;
  typedef double native __attribute__((vector_size(16)));
  native v;
  static F64 zero() { return {native{0, 0}}; }
  static F64 set1(double x) { return {native{x, x}}; }
  static F64 load(const double* p) { F64 r; std::memcpy(&r.v, p, sizeof(r.v)); return r; }
  void store(double* p) const { std::memcpy(p, &v, sizeof(v)); }
  F64 operator+(F64 o) const { return {v + o.v}; }
  F64 operator-(F64 o) const { return {v - o.v}; }
  F64 operator*(F64 o) const { return {v * o.v}; }
};
inline F64 low_f64(F32 a) { return {F64::native{a.v[0], a.v[1]}}; }
inline F64 high_f64(F32 a) { return {F64::native{a.v[2], a.v[3]}}; }

#endif

#if MEMAD_FAST_ISA_LEVEL > 0
// One element to and from float, with the rounding (nearest, ties to even) that torch uses.
inline float scalar_from(float x) { return x; }
inline float scalar_from(f16 x) { return _cvtsh_ss(x.bits); }
inline float scalar_from(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
inline void scalar_to(float x, f16* p) { p->bits = static_cast<uint16_t>(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT)); }
#else
inline void scalar_to(float x, f16* p) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  const uint32_t sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {  // NaN
    half = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // rounds to 65536 or more
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // subnormal in float16: adding 0.5 rounds at 2^-24
    float shifted;
    std::memcpy(&shifted, &magnitude, sizeof(shifted));
    shifted += 0.5f;
    std::memcpy(&half, &shifted, sizeof(half));
    half -= 0x3f000000u;
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  p->bits = static_cast<uint16_t>(sign | half);
}
#endif
inline void scalar_to(float x, float* p) { *p = x; }
inline void scalar_to(float x, bf16* p) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  if ((bits & 0x7fffffffu) > 0x7f800000u) {
    p->bits = 0x7fc0u;
    return;
  }
  p->bits = static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// The low byte of each lane.
#if MEMAD_FAST_ISA_LEVEL == 2
inline void store_bytes(I32 a, void* p) { _mm_storeu_si128(static_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a.v)); }
#else
inline void store_bytes(I32 a, void* p) {
  int32_t part[I32::lanes];
  a.store(part);
  for (int i = 0; i < I32::lanes; ++i) static_cast<uint8_t*>(p)[i] = static_cast<uint8_t>(part[i]);
}
#endif
inline F32 abs(F32 a) { return bit_cast_f32(bit_cast_i32(a) & I32::set1(0x7fffffff)); }

// Rounds the lanes to the element type of p (nearest, ties to even).
inline void store(F32 a, float* p) { a.store(p); }
#if MEMAD_FAST_ISA_LEVEL == 2
inline void store(F32 a, f16* p) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
#elif MEMAD_FAST_ISA_LEVEL == 1
inline void store(F32 a, f16* p) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
#else
inline void store(F32 a, f16* p) {
  for (int i = 0; i < F32::lanes; ++i) scalar_to(a.v[i], p + i);
}
#endif
inline void store(F32 a, bf16* p) {
  const I32 bits = bit_cast_i32(a);
  const I32 odd = bits.shr<16>() & I32::set1(1);
  const I32 rounded = select(a == a, (bits + I32::set1(0x7fff) + odd).shr<16>(), I32::set1(0x7fc0));
#if MEMAD_FAST_ISA_LEVEL == 2
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(rounded.v));
#elif MEMAD_FAST_ISA_LEVEL == 1
  const __m256i words = _mm256_packus_epi32(rounded.v, rounded.v);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(_mm256_permute4x64_epi64(words, 0x08)));
#else
  for (int i = 0; i < F32::lanes; ++i) p[i].bits = static_cast<uint16_t>(rounded.v[i]);
#endif
}
template <class T>
inline void store_first(F32 a, T* p, int n) {
  float part[F32::lanes];
  a.store(part);
  for (int i = 0; i < n; ++i) scalar_to(part[i], p + i);
}

// Sums and extrema over the lanes, halves onto halves in a fixed order (the same at every call). The extrema take the
// higher lane where either is NaN.
#if MEMAD_FAST_ISA_LEVEL == 0
#define MEMAD_FAST_REDUCE(name, expression, vector_op)              \
  inline float name(F32 lanes) {                                    \
    float part[F32::lanes];                                         \
    lanes.store(part);                                              \
    for (int width = F32::lanes / 2; width > 0; width /= 2)         \
      for (int i = 0; i < width; ++i) {                             \
        const float a = part[i], b = part[i + width];               \
        part[i] = expression;                                       \
      }                                                             \
    return part[0];                                                 \
  }
#else
inline __m256 low_half(F32 a) {
#if MEMAD_FAST_ISA_LEVEL == 2
  return _mm512_castps512_ps256(a.v);
#else
  return a.v;
#endif
}
#if MEMAD_FAST_ISA_LEVEL == 2
#define MEMAD_FAST_EIGHT(vector_op, lanes) \
  _mm256_##vector_op(low_half(lanes), _mm512_extractf32x8_ps(lanes.v, 1))
#else
#define MEMAD_FAST_EIGHT(vector_op, lanes) low_half(lanes)
#endif
#define MEMAD_FAST_REDUCE(name, expression, vector_op)                                               \
  inline float name(F32 lanes) {                                                                     \
    const __m256 eight = MEMAD_FAST_EIGHT(vector_op, lanes);                                         \
    const __m128 four = _mm_##vector_op(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1)); \
    const __m128 two = _mm_##vector_op(four, _mm_movehl_ps(four, four));                             \
    return _mm_cvtss_f32(_mm_##vector_op(two, _mm_movehdup_ps(two)));                                \
  }
#endif
MEMAD_FAST_REDUCE(reduce_add, a + b, add_ps)
MEMAD_FAST_REDUCE(reduce_max, a > b ? a : b, max_ps)
MEMAD_FAST_REDUCE(reduce_min, a < b ? a : b, min_ps)
#undef MEMAD_FAST_REDUCE
#undef MEMAD_FAST_EIGHT

// e^x to about 1 ulp for x in [-87.3, 88.7]; below it 0, above it infinity; NaN stays NaN.
// Cody-Waite reduction x = n ln2 + r, |r| <= ln2 / 2, and a degree-6 polynomial in r.
inline F32 exp(F32 x) {
  const F32 low = F32::set1(-87.336544f), high = F32::set1(88.72283f);
  const F32 clamped = min(max(x, low), high);
  const F32 n = round_nearest(clamped * F32::set1(1.44269504f));
  F32 r = fma(n, F32::set1(-0.693359375f), clamped);
  r = fma(n, F32::set1(2.12194440e-4f), r);
  F32 p = F32::set1(1.9875691500e-4f);
  p = fma(p, r, F32::set1(1.3981999507e-3f));
  p = fma(p, r, F32::set1(8.3334519073e-3f));
  p = fma(p, r, F32::set1(4.1665795894e-2f));
  p = fma(p, r, F32::set1(1.6666665459e-1f));
  p = fma(p, r, F32::set1(5.0000001201e-1f));
  p = fma(p, r * r, r) + F32::set1(1.0f);
  // 2^n in two steps, so that n = 128 does not overflow the exponent field.
  const I32 half = to_i32(n * F32::set1(0.5f)), rest = to_i32(n) - half;
  const I32 bias = I32::set1(127);
  F32 y = p * bit_cast_f32((half + bias).shl<23>()) * bit_cast_f32((rest + bias).shl<23>());
  y = select(x < low, F32::zero(), y);
  y = select(x > high, F32::set1(__builtin_inff()), y);
  return select(x == x, y, x);
}

inline I32 compress(I32 a, M32 m) { return bit_cast_i32(compress(bit_cast_f32(a), m)); }

// 2^x to 1 ulp for x in [-126, 127]; below it 0; NaN stays NaN. Above 127 of no meaning: for callers that know their x.
// x = n + r, |r| <= 1/2, and a polynomial in r (least largest relative error, 2^-29, with the constant term 1).
inline F32 exp2_to_127(F32 x) {
  // The low bits of x + magic are n + 127: the exponent field of 2^n.
  const F32 low = F32::set1(-126.0f), magic = F32::set1(12582912.0f + 127.0f);
  const F32 shifted = max(low, x) + magic;
  const F32 r = x - (shifted - magic);
  F32 p = F32::set1(1.535336341476068e-4f);
  p = fma(p, r, F32::set1(1.3398873852565885e-3f));
  p = fma(p, r, F32::set1(9.61843691766262e-3f));
  p = fma(p, r, F32::set1(5.5503323674201965e-2f));
  p = fma(p, r, F32::set1(2.4022647738456726e-1f));
  p = fma(p, r, F32::set1(6.931471824645996e-1f));
  p = fma(p, r, F32::set1(1.0f));
  return select(x < low, F32::zero(), p * bit_cast_f32(bit_cast_i32(shifted).shl<23>()));
}

}  // namespace MEMAD_FAST_ISA
}  // namespace memad_fast
