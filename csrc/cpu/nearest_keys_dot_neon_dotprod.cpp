// The dot kernel of nearest_keys (see nearest_keys_dot.h) for NEON with dot products: 4 queries x 16 keys in 16 of 32
// registers.
//
// Two steps at a time: a register holds those of one query, and each sdot picks one of them. (To load four codes and repeat
// them costs a vector operation of its own on most cores.) Where the number of steps is odd, the last pair reads a step
// behind the keys' dimensions: there the queries hold zeros.
#include <arm_neon.h>

#include "cpu/nearest_keys_dot.h"

namespace memad_fast {
namespace neon_dotprod {
namespace {

constexpr int kLanes = 4;

// One step, the `lane`-th of the two in each register of `query`.
template <int lane, int queries, int vectors>
inline void add_step(int32x4_t (&sum)[queries][vectors], const int8x8_t (&query)[queries], const int8_t* keys) {
#pragma GCC unroll 8
  for (int v = 0; v < vectors; ++v) {
    const int8x16_t key = vld1q_s8(keys + lane * kStepBytes + v * 16);
#pragma GCC unroll 8
    for (int r = 0; r < queries; ++r) sum[r][v] = vdotq_lane_s32(sum[r][v], key, query[r], lane);
  }
}

template <int queries, int vectors>
void multiply(const DotGroup& group) {
  for (int64_t first = 0; first < kGroupKeys; first += vectors * kLanes) {
    int32x4_t sum[queries][vectors];
#pragma GCC unroll 8
    for (int r = 0; r < queries; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) sum[r][v] = vdupq_n_s32(0);
    for (int64_t step = 0; step < group.steps; step += 2) {
      int8x8_t query[queries];
#pragma GCC unroll 8
      for (int r = 0; r < queries; ++r)
        query[r] = vreinterpret_s8_u8(vld1_u8(group.queries + r * group.stride + step * kStepDims));
      const int8_t* keys = group.keys + step * kStepBytes + first * kStepDims;
      add_step<0>(sum, query, keys);
      add_step<1>(sum, query, keys);
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
