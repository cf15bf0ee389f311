// The dot kernel of nearest_keys (see nearest_keys_dot.h) with what every processor of its kind has: SSE2 on x86-64, NEON on
// aarch64, plain C++ elsewhere.
#if defined(__SSE2__)
#include <emmintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include <cstring>

#include "cpu/nearest_keys_dot.h"

namespace memad_fast {
namespace portable {
namespace {

#if defined(__SSE2__)

// pmaddwd adds the products of two pairs of 16-bit numbers in each lane, so codes are widened: the even dimensions of a step
// and the odd ones. Keys are widened as they come, once for all queries of a tile. Queries are widened, and repeated for
// the four keys of a vector, once for all keys of the group, as many steps at a time as stay in the L1 cache.
constexpr int kTileQueries = 8;  // 8 sums, 2 halves of the keys and 2 products of 16 registers
constexpr int64_t kLanes = 4;
constexpr int64_t kChunkSteps = 64;  // 16 KiB of queries, 16 KiB of keys

struct Halves {
  __m128i even, odd;
};
inline Halves widen(__m128i codes) {
  return {_mm_srai_epi16(_mm_slli_epi16(codes, 8), 8), _mm_srai_epi16(codes, 8)};
}

template <int queries>
void multiply(const DotGroup& group) {
  Halves widened[kChunkSteps][queries];
  int64_t first_step = 0;
  do {
    const int64_t steps = group.steps - first_step < kChunkSteps ? group.steps - first_step : kChunkSteps;
    for (int r = 0; r < queries; ++r) {
      const uint8_t* row = group.queries + r * group.stride + first_step * kStepDims;
      for (int64_t step = 0; step < steps; ++step) {
        int32_t codes;
        std::memcpy(&codes, row + step * kStepDims, sizeof(codes));
        widened[step][r] = widen(_mm_set1_epi32(codes));
      }
    }
    for (int64_t first = 0; first < kGroupKeys; first += kLanes) {
      const int8_t* keys = group.keys + first_step * kStepBytes + first * kStepDims;
      auto* products = reinterpret_cast<__m128i*>(group.products + first);
      constexpr int64_t row = kGroupKeys / kLanes;
      __m128i sum[queries];
#pragma GCC unroll 8
      for (int r = 0; r < queries; ++r) sum[r] = first_step ? _mm_loadu_si128(products + r * row) : _mm_setzero_si128();
      for (int64_t step = 0; step < steps; ++step) {
        const Halves key = widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(keys + step * kStepBytes)));
#pragma GCC unroll 8
        for (int r = 0; r < queries; ++r) {
          sum[r] = _mm_add_epi32(sum[r], _mm_madd_epi16(key.even, widened[step][r].even));
          sum[r] = _mm_add_epi32(sum[r], _mm_madd_epi16(key.odd, widened[step][r].odd));
        }
      }
#pragma GCC unroll 8
      for (int r = 0; r < queries; ++r) _mm_storeu_si128(products + r * row, sum[r]);
    }
    first_step += kChunkSteps;
  } while (first_step < group.steps);
}

#elif defined(__aarch64__)

// Two products fit 16 bits (2 * 127 * 127 < 2^15): smull and smlal multiply two steps, sadalp adds neighbouring pairs to 32-bit
// sums, of which a key has two until the end: 12 of 32 registers. (With 4 queries gcc keeps some sums in memory.) Where the
// number of steps is odd, the last pair reads a step behind the keys' dimensions: there the queries hold zeros.
constexpr int kTileQueries = 3;
constexpr int kVectors = 2;
constexpr int64_t kLanes = 4;

template <int queries>
void multiply(const DotGroup& group) {
  for (int64_t first = 0; first < kGroupKeys; first += kVectors * kLanes) {
    const int8_t* keys = group.keys + first * kStepDims;
    int32x4_t low[queries][kVectors], high[queries][kVectors];
#pragma GCC unroll 8
    for (int r = 0; r < queries; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) low[r][v] = high[r][v] = vdupq_n_s32(0);
    for (int64_t step = 0; step < group.steps; step += 2) {
      int8x16_t key[kVectors], next[kVectors];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        key[v] = vld1q_s8(keys + step * kStepBytes + v * 16);
        next[v] = vld1q_s8(keys + (step + 1) * kStepBytes + v * 16);
      }
#pragma GCC unroll 8
      for (int r = 0; r < queries; ++r) {
        int32_t codes[2];
        std::memcpy(codes, group.queries + r * group.stride + step * kStepDims, sizeof(codes));
        const int8x16_t now = vreinterpretq_s8_s32(vdupq_n_s32(codes[0]));
        const int8x16_t then = vreinterpretq_s8_s32(vdupq_n_s32(codes[1]));
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) {
          const int16x8_t pair = vmull_s8(vget_low_s8(key[v]), vget_low_s8(now));
          low[r][v] = vpadalq_s16(low[r][v], vmlal_s8(pair, vget_low_s8(next[v]), vget_low_s8(then)));
          high[r][v] = vpadalq_s16(high[r][v], vmlal_high_s8(vmull_high_s8(key[v], now), next[v], then));
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < queries; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v)
        vst1q_s32(group.products + r * kGroupKeys + first + v * kLanes, vpaddq_s32(low[r][v], high[r][v]));
  }
}

#else

constexpr int kTileQueries = 1;

template <int queries>
void multiply(const DotGroup& group) {
  static_assert(queries == 1);
  for (int64_t j = 0; j < kGroupKeys; ++j) group.products[j] = 0;
  for (int64_t step = 0; step < group.steps; ++step) {
    const int8_t* keys = group.keys + step * kStepBytes;
    int8_t query[kStepDims];
    std::memcpy(query, group.queries + step * kStepDims, sizeof(query));
    for (int64_t j = 0; j < kGroupKeys; ++j)
      for (int64_t i = 0; i < kStepDims; ++i) group.products[j] += query[i] * keys[j * kStepDims + i];
  }
}

#endif

}  // namespace

const DotKernel dot_kernel = {kTileQueries, 127, 0, multiply<kTileQueries>, multiply<1>};

}  // namespace portable
}  // namespace memad_fast
