// The dot kernel of nearest_keys (see nearest_keys_dot.h) for NEON with dot products: 4 queries x 16 keys in 16 of 32
// registers.
#include <arm_neon.h>

#include "cpu/nearest_keys_dot.h"

namespace memad_fast {
namespace neon_dotprod {
namespace {

constexpr int kLanes = 4;

template <int queries, int vectors>
void multiply(const DotGroup& group) {
  for (int64_t first = 0; first < kGroupKeys; first += vectors * kLanes) {
    const int8_t* keys = group.keys + first * kStepDims;
    int32x4_t sum[queries][vectors];
#pragma GCC unroll 8
    for (int r = 0; r < queries; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) sum[r][v] = vdupq_n_s32(0);
    for (int64_t step = 0; step < group.steps; ++step) {
      int8x16_t key[vectors];
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) key[v] = vld1q_s8(keys + step * kStepBytes + v * 16);
#pragma GCC unroll 8
      for (int r = 0; r < queries; ++r) {
        const uint8_t* codes = group.queries + r * group.stride + step * kStepDims;
        const int8x16_t query = vreinterpretq_s8_s32(vld1q_dup_s32(reinterpret_cast<const int32_t*>(codes)));
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v) sum[r][v] = vdotq_s32(sum[r][v], key[v], query);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < queries; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) vst1q_s32(group.products + r * kGroupKeys + first + v * kLanes, sum[r][v]);
  }
}

}  // namespace

const DotKernel dot_kernel = {4, 127, 0, multiply<4, 4>, multiply<1, 8>};

}  // namespace neon_dotprod
}  // namespace memad_fast
