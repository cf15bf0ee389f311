// The screen of nearest_keys: what it reads, what it leaves to the exact stage, and what it takes of a multiprocessor.
#pragma once

#include "cuda/nearest_keys_encode.cuh"

namespace memad_fast::cuda {

constexpr int kTileQueries = 128;
constexpr int kWarpQueries = 64;      // rows of a warp's tile
constexpr int kWarpKeys = 64;         // columns of a warp's tile, and the most it can add to a list at once
// Room that a list has before every tile. For k = 1 a threshold is known from the first keys on, and few pass; with more
// than this the query takes the full path.
__host__ __device__ constexpr int room_for_tile(int64_t k) { return k == 1 ? 16 : kWarpKeys; }
constexpr int kMostListed = 256;      // entries of one list
constexpr int64_t kMostScreenedK = 64;  // more do not fit a list beside the keys of one tile
constexpr int64_t kMostCodedDims = 65536;  // an integer product of more could overflow

// A key that may be among the nearest: its place behind the first key of the split, and the lower end of its score.
struct alignas(8) Entry {
  int32_t key;
  float low;
};

// The lists of one chunk of queries. A split is a range of keys; each warp column of a block has its own list.
struct Lists {
  Entry* entries;     // [query][split][column][capacity], queries rounded up to kWarpQueries
  int32_t* counts;    // [query][split][column]; kOverflow: the query takes the full path
  float* thresholds;  // [query][split][column]: an upper end of the k-th smallest score
  int capacity, columns;
  int64_t splits, split_keys;
  __host__ __device__ int64_t of_query() const { return splits * columns; }
};
constexpr int32_t kOverflow = -1;

// How the screen of rows of so many dimensions runs.
struct ScreenShape {
  int columns;    // warps side by side: 2 (tiles of 128 keys, two blocks a multiprocessor) or 4 (256 keys, one block)
  bool resident;  // the codes of the queries stay in shared memory; else they are streamed like those of the keys
  int shared_bytes;
  int blocks;     // that a multiprocessor holds
  int tile_keys() const { return columns * kWarpKeys; }
};

// `shared_bytes`: what a block may have.
ScreenShape screen_shape(int64_t dims, int shared_bytes);

struct Screen {
  QueryCodes queries;
  int64_t count, padded;  // queries; their rows, a multiple of kTileQueries
  int64_t dims;
  const uint8_t* packed;
  int64_t keys, padded_keys;
  const int64_t* filled;
  int k;
  Lists lists;
  bool resident;
};

cudaError_t screen(const Screen& args, const ScreenShape& shape, cudaStream_t stream);

// How many keys are searched.
__device__ inline int64_t searched_keys(const int64_t* filled, int64_t keys) {
  return filled ? larger(0, smaller(*filled, keys)) : keys;
}

}  // namespace memad_fast::cuda
