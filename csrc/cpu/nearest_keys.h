// The k nearest keys of each query, exactly, on the CPU. README_nearest_keys.md has the bound and its proof.
//
//   screen    score(q, k) = h_k - q'.k', q' and k' shifted by a common centre; h_k = |k'|^2 / 2 (l2) or 0. The product is
//             that of int8 codes; |score - true score| <= a bound from the norms of what the codes leave out. So a key whose
//             lower end lies above the k-th smallest upper end so far cannot be among the k nearest: it is dropped
//   exact     what is left is computed in float64 from the original rows, in one order of summation on every
//             instruction set; best first, ties to the lowest index
//   full      a query that keeps too many keys is screened again in float32
//
// Packed keys, the same bytes on every instruction set (padded = rows rounded up to 64, steps = dim / 4 rounded up):
//
//   header 64 B | centre [dim, padded to 16] | base, scale, residual, norm, slack, sum [padded] each | 64-byte aligned:
//   groups [padded / 64][steps][64][4] | room that a tile may read
//
//   base        h_k - slack, rounded down: lower end of the score for a query of norm 0.
//               +infinity: never returned (a non-finite key, padding). -infinity: always left to the exact stage.
//   scale       of the codes: k' = scale codes + residual
//   residual    norm of what the codes leave out, and what else errs per unit of the query's norm, rounded up
//   norm        of scale * codes, rounded up: the error per unit of the norm of the query's own residual
//   slack       error that does not depend on the query, rounded up
//   sum         of the codes (int32), to take out the offset of unsigned queries
#pragma once

#include <cstdint>

#include "core/parallel.h"
#include "core/types.h"
#include "cpu/nearest_keys_dot.h"

namespace memad_fast {

enum class Metric : int { l2 = 0, cosine = 1, ip = 2 };

struct PackedHeader {
  char magic[8];
  int64_t rows;
  int64_t dim;
  int64_t metric;
  int64_t unused[4];
};
static_assert(sizeof(PackedHeader) == 64);

// Offsets of the parts of a packed buffer, in bytes. The numbers of a key are six arrays in the order above.
struct PackedLayout {
  int64_t padded, steps, centre, numbers, codes, bytes;

  PackedLayout(int64_t rows, int64_t dim)
      : padded((rows + kGroupKeys - 1) / kGroupKeys * kGroupKeys),
        steps((dim + kStepDims - 1) / kStepDims),
        centre(static_cast<int64_t>(sizeof(PackedHeader))),
        numbers(centre + (dim + 15) / 16 * 64),
        codes(numbers + 6 * 4 * padded),
        bytes(codes + padded * steps * kStepDims + kGroupOverrun) {}
};

struct NearestKeys {
  Rows query;             // [N, D]
  Rows keys;              // [M, D], the original rows
  int64_t searched;       // only keys [skipped, searched), 0 to M
  const uint8_t* packed;  // of all keys, or null
  int64_t packed_size;    // in bytes
  int64_t k;              // 1 or more; slots beyond the finite keys get NaN and -1
  Metric metric;
  float* distances;  // [N, k]
  int64_t* indices;  // [N, k]
  int64_t* survivors = nullptr;  // [N] if not null: how many keys were computed in float64
  bool* full_path = nullptr;     // [N] if not null: whether codes did not suffice
  int64_t skipped = 0;           // see searched
  double* ranks = nullptr;       // [N, k] if not null, instead of distances: the search goes on from what these and `indices`
                                 // hold, and leaves the best of both there. -q.k for ip
  int64_t offset = 0;            // the index of the first row of `keys`
};

// Throws std::invalid_argument if `packed` is not a packed form of these keys for this metric.
void nearest_keys(const NearestKeys& args, const ThreadLoop& loop);

struct PrepareKeys {
  Rows keys;
  int64_t capacity;  // keys that there is room for, at least as many as there are: the others are never returned
  Metric metric;
  uint8_t* packed;  // [PackedLayout(capacity, dim).bytes]
};

void prepare_keys(const PrepareKeys& args, const ThreadLoop& loop);

// Packs rows[0, count) of `keys` again, around the old centre.
struct PrepareKeysRows {
  Rows keys;
  Metric metric;
  uint8_t* packed;
  int64_t packed_size;
  const int64_t* rows;
  int64_t count;
};

// Throws std::invalid_argument as nearest_keys does, and for a row outside the keys.
void prepare_keys_rows(const PrepareKeysRows& args);

// Gradient of sum(grad * distances). Slots with index -1 give none.
struct NearestKeysBackward {
  const float* grad;       // [N, k]
  Rows query;              // [N, D]
  Rows keys;               // [M, D]
  const int64_t* indices;  // [N, k]
  int64_t k;
  Metric metric;
  void* out;               // [N, D] or [M, D], contiguous, of the inputs' dtype
};

void nearest_keys_backward_query(const NearestKeysBackward& args, const ThreadLoop& loop);
void nearest_keys_backward_keys(const NearestKeysBackward& args, const ThreadLoop& loop);

}  // namespace memad_fast
