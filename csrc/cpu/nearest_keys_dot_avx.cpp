// The dot kernels of nearest_keys (see nearest_keys_dot.h) for AVX2 and AVX-512, with and without VNNI: compiled once for
// each of the four. Everything stays in registers over all steps: 6 x 2 sums of 16 registers, or 6 x 4 of 32. Twelve sums keep
// two vpdpbusd of five cycles each under way; eight do not.
#include <immintrin.h>

#include <cstring>

#include "cpu/nearest_keys_dot.h"

namespace memad_fast {
namespace MEMAD_FAST_ISA {
namespace {

#if defined(__AVX512F__)
using Vector = __m512i;
constexpr int kTileQueries = 6, kTileVectors = 4, kSingleVectors = 4;
inline Vector load(const void* p) { return _mm512_loadu_si512(p); }
inline void store(void* p, Vector a) { _mm512_storeu_si512(p, a); }
inline Vector broadcast(int32_t x) { return _mm512_set1_epi32(x); }
inline Vector times(Vector a, Vector b) { return _mm512_mullo_epi32(a, b); }
#else
using Vector = __m256i;
constexpr int kTileQueries = 6, kTileVectors = 2, kSingleVectors = 8;
inline Vector load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline void store(void* p, Vector a) { _mm256_storeu_si256(static_cast<__m256i*>(p), a); }
inline Vector broadcast(int32_t x) { return _mm256_set1_epi32(x); }
inline Vector times(Vector a, Vector b) { return _mm256_mullo_epi32(a, b); }
#endif
constexpr int kLanes = sizeof(Vector) / sizeof(int32_t);

// sum + four products of unsigned with signed bytes in each lane.
#if defined(__AVX512VNNI__) && defined(__AVX512F__)
constexpr int kLevels = 127, kOffset = 128;
inline Vector dot4(Vector sum, Vector query, Vector keys) { return _mm512_dpbusd_epi32(sum, query, keys); }
#elif defined(__AVXVNNI__)
constexpr int kLevels = 127, kOffset = 128;
inline Vector dot4(Vector sum, Vector query, Vector keys) { return _mm256_dpbusd_avx_epi32(sum, query, keys); }
#elif defined(__AVX512F__)
constexpr int kLevels = 63, kOffset = 64;  // 2 * 127 * 127 fits the int16 in between
inline Vector dot4(Vector sum, Vector query, Vector keys) {
  return _mm512_add_epi32(sum, _mm512_madd_epi16(_mm512_maddubs_epi16(query, keys), _mm512_set1_epi16(1)));
}
#else
constexpr int kLevels = 63, kOffset = 64;
inline Vector dot4(Vector sum, Vector query, Vector keys) {
  return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(query, keys), _mm256_set1_epi16(1)));
}
#endif

template <int queries, int vectors>
void multiply(const DotGroup& group) {
  for (int64_t first = 0; first < kGroupKeys; first += vectors * kLanes) {
    const int8_t* keys = group.keys + first * kStepDims;
    Vector sum[queries][vectors];
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
      const Vector start = times(load(group.code_sums + first + v * kLanes), broadcast(-kOffset));
#pragma GCC unroll 8
      for (int r = 0; r < queries; ++r) sum[r][v] = start;
    }
    for (int64_t step = 0; step < group.steps; ++step) {
      Vector key[vectors];
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) key[v] = load(keys + step * kStepBytes + v * static_cast<int>(sizeof(Vector)));
#pragma GCC unroll 8
      for (int r = 0; r < queries; ++r) {
        int32_t codes;
        std::memcpy(&codes, group.queries + r * group.stride + step * kStepDims, sizeof(codes));
        const Vector query = broadcast(codes);
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v) sum[r][v] = dot4(sum[r][v], query, key[v]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < queries; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) store(group.products + r * kGroupKeys + first + v * kLanes, sum[r][v]);
  }
}

}  // namespace

const DotKernel dot_kernel = {
    kTileQueries, kLevels, kOffset, multiply<kTileQueries, kTileVectors>, multiply<1, kSingleVectors>};

}  // namespace MEMAD_FAST_ISA
}  // namespace memad_fast
