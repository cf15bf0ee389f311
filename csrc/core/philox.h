// Philox4x32-10 and the Gumbel noise made from it, for kernel files (see simd.h). memad_fast/_noise.py says the same
// in torch and defines both: every backend must give these bits.
//
//   key     = (seed low, seed high)
//   counter = (block low, block high, row low, row high)
//   block   = 16 * (column / 64) + column % 16,   word of the block = (column / 16) % 4
//
// so a vector of neighbouring blocks gives four vectors of neighbouring columns, and no word is shuffled or wasted.
// Source: J. Salmon, M. Moraes, R. Dror, D. Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
#pragma once

#include "core/simd.h"

namespace memad_fast {
namespace MEMAD_FAST_ISA {

constexpr int kNoiseColumns = 64;  // columns whose noise comes from one run of 16 blocks

// Four words for each of I64::lanes counters. Words live in 64-bit lanes: the multiplication reads the low halves
// only, so the high halves may hold anything and one multiplication gives both result words in place.
struct Philox {
  I64 c0, c1, c2, c3;

  void run(int64_t seed) {
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32);
    const I64 m0 = I64::set1(0xD2511F53), m1 = I64::set1(0xCD9E8D57);
    for (int round = 0; round < 10; ++round) {
      const I64 p0 = mul_words(c0, m0), p1 = mul_words(c2, m1);
      c0 = p1.high_word() ^ c1 ^ I64::set1(k0);
      c1 = p1;
      c2 = p0.high_word() ^ c3 ^ I64::set1(k1);
      c3 = p0;
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
  }
};

// Natural logarithm of positive normal floats within 1 ulp. The order of these operations, each rounded on its own, is
// part of the definition of the noise: do not fuse or re-associate them.
inline F32 log_unfused(F32 x) {
  const I32 bits = bit_cast_i32(x) + I32::set1(0x3F800000 - 0x3F3504F3);
  const F32 exponent = to_f32(bits.shr<23>() - I32::set1(127));
  const F32 f = bit_cast_f32((bits & I32::set1(0x007FFFFF)) + I32::set1(0x3F3504F3)) - F32::set1(1.0f);
  const F32 square = f * f;
  const F32 fourth = square * square;
  const F32 p01 = F32::set1(0x1.555554p-2f) + F32::set1(-0x1.000226p-2f) * f;
  const F32 p23 = F32::set1(0x1.99a008p-3f) + F32::set1(-0x1.547244p-3f) * f;
  const F32 p45 = F32::set1(0x1.22da1cp-3f) + F32::set1(-0x1.0d8542p-3f) * f;
  const F32 p67 = F32::set1(0x1.055b6ep-3f) + F32::set1(-0x1.38b584p-4f) * f;
  const F32 p = (p01 + square * p23) + fourth * (p45 + square * p67);
  F32 tail = (square * f) * p;
  tail = tail + exponent * F32::set1(-0x1.bd0106p-13f);
  tail = tail - square * F32::set1(0.5f);
  return (f + tail) + exponent * F32::set1(0x1.63p-1f);
}

inline F32 negate(F32 x) { return bit_cast_f32(bit_cast_i32(x) ^ I32::set1(INT32_MIN)); }

// -log(-log(v)), v = (word / 256 | 1) * 2^-24: v = 1 - u exactly, so log(v) is log1p(-u) with nothing lost.
inline F32 gumbel_from_words(I32 words) {
  const F32 v = to_f32(words.shr<8>() | I32::set1(1)) * F32::set1(0x1p-24f);
  return negate(log_unfused(negate(log_unfused(v))));
}

// Adds the noise of columns [64 * group, 64 * group + 64) of `row` to scores[64].
inline void add_gumbel_noise(int64_t seed, int64_t row, int64_t group, float* scores) {
  constexpr int blocks = 16;
  for (int first = 0; first < blocks; first += I32::lanes) {
    I32 words[4];
    Philox even, odd;
    const int64_t block = group * blocks + first;
    even.c0 = I64::set1(block) + I64::iota() + I64::iota();
    odd.c0 = even.c0 + I64::set1(1);
    even.c1 = odd.c1 = I64::set1(block >> 32);
    even.c2 = odd.c2 = I64::set1(row);
    even.c3 = odd.c3 = I64::set1(row >> 32);
    even.run(seed);
    odd.run(seed);
    words[0] = interleave_words(even.c0, odd.c0);
    words[1] = interleave_words(even.c1, odd.c1);
    words[2] = interleave_words(even.c2, odd.c2);
    words[3] = interleave_words(even.c3, odd.c3);
    for (int w = 0; w < 4; ++w) {
      float* at = scores + w * blocks + first;
      (F32::load(at) + gumbel_from_words(words[w])).store(at);
    }
  }
}

}  // namespace MEMAD_FAST_ISA
}  // namespace memad_fast
