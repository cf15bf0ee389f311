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

// Keys of the ten rounds. Kept in memory as whole vectors: the rounds read them as operands.
struct PhiloxKeys {
  I64 low[10], high[10];
  uint32_t first_low[2], first_high[2];  // of the first two rounds

  explicit PhiloxKeys(int64_t seed) {
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32);
    for (int round = 0; round < 10; ++round) {
      low[round] = I64::set1(k0);
      high[round] = I64::set1(k1);
      if (round < 2) {
        first_low[round] = k0;
        first_high[round] = k1;
      }
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
  }
};

constexpr uint32_t kPhiloxM0 = 0xD2511F53, kPhiloxM1 = 0xCD9E8D57;

// Four words for each of I64::lanes counters. Words live in 64-bit lanes: the multiplication reads the low halves
// only, so the high halves may hold anything and one multiplication gives both result words in place.
struct Philox {
  I64 c0, c1, c2, c3;

  void rounds(const PhiloxKeys& keys, int first, int last) {
    const I64 m0 = I64::set1(kPhiloxM0), m1 = I64::set1(kPhiloxM1);
    for (int round = first; round < last; ++round) {
      const I64 p0 = mul_words(c0, m0), p1 = mul_words(c2, m1);
      c0 = p1.high_word() ^ c1 ^ keys.low[round];
      c1 = p1;
      c2 = p0.high_word() ^ c3 ^ keys.high[round];
      c3 = p0;
    }
  }
};

// The random words of one row's kNoiseColumns columns, I32::lanes neighbouring columns a vector.
struct NoiseWords {
  static constexpr int kVectors = kNoiseColumns / I32::lanes;
  I32 words[kVectors];
};

// What the first two rounds of a group's 16 blocks share across rows. In round 1 one product depends on the block
// alone and the other on the row alone, and so do the two of round 2: per row only two xors of these rounds are left.
class NoiseGroup {
 public:
  NoiseGroup() = default;

  // For rows with the high word of `row`.
  NoiseGroup(const PhiloxKeys& keys, int64_t group, int64_t row) {
    const int64_t first = group * kBlocks;
    row_high_ = static_cast<uint64_t>(row) >> 32;
    block_high_ = static_cast<uint64_t>(first) >> 32;  // 16 aligned blocks never differ in it
    for (int part = 0; part < kParts; ++part) {
      // Even blocks in the first half of the parts, odd ones in the second: interleaving gives neighbours.
      const int64_t start = first + part % kPairs * I32::lanes + part / kPairs;
      const I64 block = I64::set1(start) + I64::iota() + I64::iota();
      const I64 p0 = mul_words(block, I64::set1(kPhiloxM0));
      const I64 p1 = mul_words(p0.high_word() ^ I64::set1(static_cast<int64_t>(row_high_)) ^ keys.high[0],
                               I64::set1(kPhiloxM1));
      c0_[part] = p1.high_word();
      c1_[part] = p1;
      c2_[part] = p0;
    }
  }

  bool serves(int64_t row) const { return static_cast<uint64_t>(row) >> 32 == row_high_; }

  NoiseWords draw(const PhiloxKeys& keys, int64_t row) const {
    const uint64_t p1 = static_cast<uint64_t>(static_cast<uint32_t>(row)) * kPhiloxM1;
    const uint64_t p0 = (p1 >> 32 ^ block_high_ ^ keys.first_low[0]) * kPhiloxM0;
    const I64 c0 = I64::set1(static_cast<int64_t>(p1 ^ keys.first_low[1]));
    const I64 c2 = I64::set1(static_cast<int64_t>(p0 >> 32 ^ keys.first_high[1]));
    const I64 c3 = I64::set1(static_cast<int64_t>(p0));
    Philox parts[kParts];
    for (int part = 0; part < kParts; ++part) {
      parts[part] = {c0_[part] ^ c0, c1_[part], c2_[part] ^ c2, c3};
      parts[part].rounds(keys, 2, 10);
    }
    NoiseWords drawn;
    for (int pair = 0; pair < kPairs; ++pair) {
      const Philox &even = parts[pair], &odd = parts[kPairs + pair];
      drawn.words[pair] = interleave_words(even.c0, odd.c0);
      drawn.words[kPairs + pair] = interleave_words(even.c1, odd.c1);
      drawn.words[2 * kPairs + pair] = interleave_words(even.c2, odd.c2);
      drawn.words[3 * kPairs + pair] = interleave_words(even.c3, odd.c3);
    }
    return drawn;
  }

 private:
  static constexpr int kBlocks = 16;
  static constexpr int kPairs = kBlocks / I32::lanes, kParts = 2 * kPairs;

  uint64_t row_high_, block_high_;
  I64 c0_[kParts], c1_[kParts], c2_[kParts];
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

// high is never below the noise of `words`; low never above it. Without a logarithm: with u = 1 - v = U * 2^-24,
//
//   noise = -log(-log1p(-u)) <= -log(u) - u / 2       as -log1p(-u) / u >= exp(u / 2)
//
// and for log2(U) the bits of U as a float, read as an integer, which are at most 0.0861 * 2^23 too low. Where u <= 3/4 the
// two inequalities together lose at most 0.2983; above it low is -inf. The
// constants leave 2e-4 for rounding; a test compares all 2^23 values.
struct NoiseBounds {
  F32 low, high;

  explicit NoiseBounds(I32 words) {
    const I32 complement = (words.shr<8>() ^ I32::set1(0x00FFFFFF)) | I32::set1(1);  // U
    const F32 u = to_f32(complement);
    const F32 log2 = to_f32(bit_cast_i32(u));  // * 2^-23 - 127
    high = fma(log2, F32::set1(-0x1.62e43p-24f), fma(u, F32::set1(-0x1p-25f), F32::set1(104.6655f)));
    low = select(u <= F32::set1(0x1.8p23f), high - F32::set1(0.2990f), F32::set1(-__builtin_inff()));
  }
};

constexpr float kLargestNoise = 16.64f;  // v = 1 - 2^-24 gives 16.6355

}  // namespace MEMAD_FAST_ISA
}  // namespace memad_fast
