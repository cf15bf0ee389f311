// The innermost loop of the screen of nearest_keys: integer products of a few queries with a group of 64 keys.
//
// Keys lie in groups [steps][64][4]: four dimensions of 64 keys, then the next four; codes are -127 to 127. Queries lie in rows
// of `stride` bytes, a multiple of 64, codes within -levels to levels; the byte stored is code + offset, for instructions
// whose first operand is unsigned. What lies beyond the keys' dimensions holds the code 0.
//
//   level          instruction            queries x keys in registers     levels  offset
//   portable       SSE2: pmaddwd          8 x 4                           127     0
//                  NEON: smull, smlal     3 x 8                           127     0       (two products fit int16)
//   avx2           vpmaddubsw, vpmaddwd   6 x 16                          63      64      (two products fit int16)
//   avx2_vnni      vpdpbusd               6 x 16                          127     128
//   avx512         vpmaddubsw, vpmaddwd   6 x 64                          63      64
//   avx512_vnni    vpdpbusd               6 x 64                          127     128
//   amx            tdpbssd                32 x 32                         127     0
//   neon_dotprod   sdot                   4 x 16                          127     0
#pragma once

#include <cstdint>

namespace memad_fast {

constexpr int64_t kGroupKeys = 64;
constexpr int64_t kStepDims = 4;
constexpr int64_t kStepBytes = kGroupKeys * kStepDims;
constexpr int64_t kQueryAlignment = 64;
// Bytes that a kernel may read, and multiply by zeros of the queries, behind the last group (AMX: a tile of 16 steps).
constexpr int64_t kGroupOverrun = 16 * kStepBytes;
// Longest rows whose sums stay within int32: 255 * 127 * dim < 2^31.
constexpr int64_t kMaxDotDim = 65536;

struct DotGroup {
  const uint8_t* queries;
  int64_t stride;
  const int8_t* keys;
  const int32_t* code_sums;  // [64], the sum of each key's codes, which takes the queries' offset out
  int64_t steps;             // dimensions / 4, rounded up
  int32_t* products;         // [queries][64]
};

struct DotKernel {
  int queries;  // of a tile
  int levels;
  int offset;
  void (*tile)(const DotGroup& group);    // `queries` of them
  void (*single)(const DotGroup& group);  // one query
};

// One for each instruction set that the build has.
namespace portable { extern const DotKernel dot_kernel; }
namespace avx2 { extern const DotKernel dot_kernel; }
namespace avx2_vnni { extern const DotKernel dot_kernel; }
namespace avx512 { extern const DotKernel dot_kernel; }
namespace avx512_vnni { extern const DotKernel dot_kernel; }
namespace amx { extern const DotKernel dot_kernel; }
namespace neon_dotprod { extern const DotKernel dot_kernel; }

// That of the instruction set in force.
const DotKernel& active_dot_kernel();

}  // namespace memad_fast
