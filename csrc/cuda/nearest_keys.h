// The k nearest keys of each query, exactly, on a CUDA device. csrc/cpu/README_nearest_keys.md has the bound and its
// proof, README_nearest_keys.md here what differs. No torch here: plain pointers and a stream.
//
//   encode    query rows as int8 codes, with the numbers that bound a score
//   screen    int8 products on tensor cores; the few keys whose lower end reaches below the smallest upper end so far
//             go to lists
//   finish    the listed keys in float64 from the original rows; a query whose list overflowed, or that codes cannot
//             hold, takes every key (the full path)
//
// Packed keys (uint8, no header; keys padded to 128, dimensions to 64), in this order:
//
//   codes    int8    [keys][dims]  zeros in the padding
//   numbers  float32 [5][keys]     base, scale, residual, norm, slack, as in csrc/cpu/nearest_keys.h; padding: base
//                                  +infinity, the others 0
//   centre   float32 [dims]
//
// All functions return a cudaError_t as int.
#pragma once

#include <cstdint>

#include "core/types.h"

namespace memad_fast::cuda {

enum class Metric : int { l2 = 0, cosine = 1, ip = 2 };

struct PackedLayout {
  int64_t keys, dims;  // padded

  PackedLayout(int64_t rows, int64_t dim)
      : keys((rows + 127) / 128 * 128), dims(dim > 0 ? (dim + 63) / 64 * 64 : 64) {}
  int64_t numbers() const { return keys * dims; }
  int64_t centre() const { return keys * (dims + 20); }
  int64_t bytes() const { return centre() + 4 * dims; }
};

// Packs all rows of `keys` to packed[PackedLayout(rows, cols).bytes()], aligned to 16 bytes.
int prepare_keys(const Rows& keys, Metric metric, uint8_t* packed, void* stream);

// Packs rows[0, count) of `keys` again, around the old centre. A row outside the keys is skipped.
int prepare_keys_rows(
    const Rows& keys, Metric metric, uint8_t* packed, const int64_t* rows, int64_t count, void* stream);

struct NearestKeys {
  Rows query;             // [N, D]
  Rows keys;              // [M, D], the original rows
  const int64_t* filled;  // only the first so many keys (clamped to 0 to M), read on the device; null: all
  const uint8_t* packed;  // of all keys
  int64_t k;              // 1 or more; slots beyond the finite keys get NaN and -1
  Metric metric;
  float* distances;               // [N, k]
  int64_t* indices;               // [N, k]
  int64_t* survivors = nullptr;   // [N] if not null: how many keys were computed in float64
  bool* full_path = nullptr;      // [N] if not null: whether all keys were
};

// Bytes of workspace that the search takes on the current device: at most 64 MiB + 64 N k, or what 128 queries
// take if that is more; for k > 64, 384 k a multiprocessor instead.
int nearest_keys_workspace(const NearestKeys& args, int64_t* bytes);

// `workspace` is aligned to 256 bytes.
int nearest_keys(const NearestKeys& args, uint8_t* workspace, void* stream);

// read[n] = values[indices[n]], NaN where the index is -1. `read` is contiguous.
int gather_values(const Rows& values, const int64_t* indices, int64_t count, void* read, void* stream);

}  // namespace memad_fast::cuda
