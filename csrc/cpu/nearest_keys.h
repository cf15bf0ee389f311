// The k nearest keys of each query, exactly, on the CPU. README_nearest_keys.md has the bound and its proof.
//
//   screen    score(q, k) = h_k - q'.k'   in float32, q' and k' shifted by a common centre; h_k = |k'|^2 / 2 (l2) or 0
//             |score - true score| <= a bound from the norms, so a key whose lower end lies above the k-th smallest
//             upper end so far cannot be among the k nearest: it is dropped
//   exact     what is left is computed in float64 from the original rows, in one order of summation on every
//             instruction set; best first, ties to the lowest index
//
// Packed keys, the same bytes on every instruction set (padded = rows rounded up to 16):
//
//   header 64 B | centre [dim, padded to 16] | panels [padded / 16][dim][16] | base [padded] | slope [padded] | slack [padded]
//
//   panel       16 keys, dimension by dimension: one vector load brings one dimension of 16 (8, 4) keys
//   base        h_k - slack, rounded down: lower end of the score for a query of norm 0.
//               +infinity: never returned (a non-finite key, padding). -infinity: always left to the exact stage.
//   slope       error per unit of the query's norm, rounded up
//   slack       error that does not depend on the query, rounded up
#pragma once

#include <cstdint>

#include "core/parallel.h"
#include "core/types.h"

namespace memad_fast {

enum class Metric : int { l2 = 0, cosine = 1, ip = 2 };

constexpr int64_t kPanelKeys = 16;

struct PackedHeader {
  char magic[8];
  int64_t rows;
  int64_t dim;
  int64_t metric;
  int64_t unused[4];
};
static_assert(sizeof(PackedHeader) == 64);

// Where the parts of a packed buffer lie. `Float` is float or const float.
template <class Float>
struct PackedView {
  Float* centre;
  Float* panels;
  Float* base;
  Float* slope;
  Float* slack;
};

static inline int64_t padded_rows(int64_t rows) { return (rows + kPanelKeys - 1) / kPanelKeys * kPanelKeys; }
static inline int64_t padded_centre(int64_t dim) { return (dim + 15) / 16 * 16; }

static inline int64_t packed_bytes(int64_t rows, int64_t dim) {
  return static_cast<int64_t>(sizeof(PackedHeader)) +
         static_cast<int64_t>(sizeof(float)) * (padded_centre(dim) + padded_rows(rows) * (dim + 3));
}

template <class Float, class Byte>
static inline PackedView<Float> packed_view(Byte* buffer, int64_t rows, int64_t dim) {
  Float* centre = reinterpret_cast<Float*>(buffer + sizeof(PackedHeader));
  Float* panels = centre + padded_centre(dim);
  Float* base = panels + padded_rows(rows) * dim;
  return {centre, panels, base, base + padded_rows(rows), base + 2 * padded_rows(rows)};
}

struct NearestKeys {
  Rows query;             // [N, D]
  Rows keys;              // [M, D], the original rows
  int64_t searched;       // only the first so many keys, 0 to M
  const uint8_t* packed;  // of all keys, or null
  int64_t packed_size;    // in bytes
  int64_t k;              // 1 or more; slots beyond the finite keys get NaN and -1
  Metric metric;
  float* distances;  // [N, k]
  int64_t* indices;  // [N, k]
};

// Throws std::invalid_argument if `packed` is not a packed form of these keys for this metric.
void nearest_keys(const NearestKeys& args, const ThreadLoop& loop);

struct PrepareKeys {
  Rows keys;
  Metric metric;
  uint8_t* packed;  // [packed_bytes(rows, dim)]
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
