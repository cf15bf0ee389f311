// What the two last stages of nearest_keys share: the best keys of a query so far, and how they become results.
//
//   listed   queries whose lists hold all that can be among the nearest (nearest_keys_listed.cu)
//   full     the other ones: every key (nearest_keys_full.cu)
#pragma once

#include "cuda/nearest_keys_exact.cuh"
#include "cuda/nearest_keys_screen.cuh"

namespace memad_fast::cuda {

constexpr int kFinishThreads = 256, kFinishWarps = kFinishThreads / 32;
constexpr int kFinishBlocks = 3;  // that a multiprocessor holds: as many are launched, they take queries in turn

struct Finish {
  NearestKeys search;
  int64_t first, count;  // rows of the query
  ErrorTerms error;
  QueryCodes queries;    // path null: nothing was screened, all rows take the full path
  Lists lists;
  Found* found;          // [blocks][kFinishWarps][k]; k > 1 only
};

// Queries of a chunk of `count` whose listed keys a block computes at a time, and how many lanes share one.
struct ListedShape {
  int lanes;   // 4 (k = 1 and many queries) or 32
  int warps;   // of 32 lanes that share a query: 1, or all of the block (few queries, many lists)
  int blocks;
};

ListedShape listed_shape(int64_t count, int64_t k, int64_t lists, int multiprocessors);
int full_blocks(int64_t count, int multiprocessors);

cudaError_t finish_listed(const Finish& args, const ListedShape& shape, cudaStream_t stream);
cudaError_t finish_full(const Finish& args, int blocks, cudaStream_t stream);

// --- the best so far -----------------------------------------------------------------------------------------------

// Of a team, for k = 1: in registers, the same in all its lanes.
struct Single {
  Found best = nothing();

  __device__ Single(Found*, int64_t) {}
  __device__ void offer(const Found& item) {
    if (better(item, best)) best = item;
  }
  __device__ bool full() const { return best.index != kNoKey; }
  __device__ double worst() const { return best.rank; }
};

// Of a warp, for any k: sorted, in memory. All lanes call offer with the same item.
struct Sorted {
  Found* found;
  int64_t k, count = 0;

  __device__ Sorted(Found* room, int64_t most) : found(room), k(most) {}
  __device__ void offer(const Found& item) {
    if (count == k && !better(item, found[k - 1])) return;
    const int lane = static_cast<int>(threadIdx.x % 32);
    int64_t at = 0;
    for (int64_t base = 0; base < count; base += 32) {
      const bool before = base + lane < count && better(found[base + lane], item);
      const int ahead = __popc(__ballot_sync(kWholeWarp, before));
      at += ahead;
      if (ahead < 32) break;
    }
    // The items from there on move up by one, the last ones first.
    for (int64_t top = smaller(count, k - 1); top > at; top -= 32) {
      const int64_t to = top - lane;
      const Found moved = to > at ? found[to - 1] : nothing();
      __syncwarp();
      if (to > at) found[to] = moved;
      __syncwarp();
    }
    if (lane == 0) found[at] = item;
    count = smaller(count + 1, k);
    __syncwarp();
  }
  __device__ bool full() const { return count == k; }
  __device__ double worst() const { return found[k - 1].rank; }
};

// --- results -------------------------------------------------------------------------------------------------------

__device__ inline void write_slot(const NearestKeys& search, int64_t row, int64_t slot, const Found& item) {
  const bool exists = item.index != kNoKey;
  const double value = search.metric == Metric::ip ? __dsub_rn(0.0, item.rank) : item.rank;
  search.distances[row * search.k + slot] = exists ? __double2float_rn(value) : __uint_as_float(0x7fc00000u);
  search.indices[row * search.k + slot] = item.index;
}

__device__ inline void write_counts(const NearestKeys& search, int64_t row, int64_t computed, bool full) {
  if (search.survivors) search.survivors[row] = computed;
  if (search.full_path) search.full_path[row] = full;
}

// --- a block's work on one query -----------------------------------------------------------------------------------

// What the warps of a block found.
struct Shares {
  Found best[kFinishWarps];
  int64_t counts[kFinishWarps], computed[kFinishWarps];
};

__device__ inline void put_share(Shares& shares, const Single& best, int64_t computed) {
  const int warp = static_cast<int>(threadIdx.x / 32);
  shares.best[warp] = best.best;
  shares.computed[warp] = computed;
}
__device__ inline void put_share(Shares& shares, const Sorted& best, int64_t computed) {
  const int warp = static_cast<int>(threadIdx.x / 32);
  shares.counts[warp] = best.count;
  shares.computed[warp] = computed;
}

// Writes one query's results from the shares of all warps. Every thread of the block calls it.
__device__ inline void merge(const Finish& args, int64_t q, const Single&, Shares& shares, Found*, bool full) {
  if (threadIdx.x != 0) return;
  Found best = nothing();
  int64_t computed = 0;
  for (int warp = 0; warp < kFinishWarps; ++warp) {
    if (better(shares.best[warp], best)) best = shares.best[warp];
    computed += shares.computed[warp];
  }
  write_slot(args.search, args.first + q, 0, best);
  write_counts(args.search, args.first + q, computed, full);
}

// Every item's place is the number of better ones in all shares.
__device__ inline void merge(const Finish& args, int64_t q, const Sorted&, Shares& shares, Found* found, bool full) {
  const int64_t k = args.search.k, row = args.first + q;
  int64_t total = 0, computed = 0;
  for (int warp = 0; warp < kFinishWarps; ++warp) {
    const int64_t count = shares.counts[warp];
    total += count;
    computed += shares.computed[warp];
    for (int64_t i = threadIdx.x; i < count; i += kFinishThreads) {
      const Found item = found[warp * k + i];
      int64_t place = i;
      for (int other = 0; other < kFinishWarps; ++other) {
        if (other == warp) continue;
        int64_t low = 0, high = shares.counts[other];
        while (low < high) {
          const int64_t middle = (low + high) / 2;
          if (better(found[other * k + middle], item)) low = middle + 1;
          else high = middle;
        }
        place += low;
      }
      if (place < k) write_slot(args.search, row, place, item);
    }
  }
  for (int64_t slot = total + threadIdx.x; slot < k; slot += kFinishThreads)
    write_slot(args.search, row, slot, nothing());
  if (threadIdx.x == 0) write_counts(args.search, row, computed, full);
}

__device__ inline void write_own(const Finish& args, int64_t q, const Single& best, int lane) {
  if (lane == 0) write_slot(args.search, args.first + q, 0, best.best);
}
__device__ inline void write_own(const Finish& args, int64_t q, const Sorted& best, int lane) {
  for (int64_t slot = lane; slot < args.search.k; slot += 32)
    write_slot(args.search, args.first + q, slot, slot < best.count ? best.found[slot] : nothing());
}

}  // namespace memad_fast::cuda
