// The full path of nearest_keys (see nearest_keys.h): every key in float64, for queries that codes cannot hold or
// decide.
//
// A block takes one such query at a time; its 64 quads of lanes share the keys, each warp keeps its k best. Slow, but
// right: 4 N M D bytes from the L2 cache and N M D float64 terms, if all queries come here. H200, all of 25,088 x
// 16,384 x 1,024: 1.7 TB at about 5.5 TB/s, and two conversions to float64 a term at 16 a clock and multiprocessor: 0.2
// to 0.3 s.
#include "cuda/nearest_keys_finish.cuh"

namespace memad_fast::cuda {
namespace {

template <class Best>
__device__ void search_all_keys(const Finish& args, int64_t q, Shares& shares, Found* found) {
  const int warp = static_cast<int>(threadIdx.x / 32);
  const Quad quad;
  const Row query(args.search.query, args.first + q);
  const double query_square = exact_sum<Product>(quad, query, query);
  const bool finite = is_finite(query_square);
  const int64_t limit = finite ? searched_keys(args.search.filled, args.search.keys.rows) : 0;
  Best best(found + warp * args.search.k, args.search.k);
  int64_t computed = 0;
  for (int64_t base = warp * 8; base < limit; base += kFinishThreads / 4) {
    const int64_t key = base + threadIdx.x % 32 / 4;
    Found item = nothing();
    if (key < limit) {
      const double rank = exact_rank(quad, query, query_square, Row(args.search.keys, key), args.search.metric);
      if (is_finite(rank)) item = {rank, key};
    }
    for (int from = 0; from < 32; from += 4) {
      const Found other{__shfl_sync(kWholeWarp, item.rank, from), __shfl_sync(kWholeWarp, item.index, from)};
      if (other.index != kNoKey) best.offer(other);
    }
    computed += smaller(8, limit - base);
  }
  put_share(shares, best, computed);
  __syncthreads();
  merge(args, q, best, shares, found, finite);
  __syncthreads();
}

template <class Best>
__global__ void __launch_bounds__(kFinishThreads, kFinishBlocks) search_all(const __grid_constant__ Finish args) {
  __shared__ Shares shares;
  Found* found = args.found + static_cast<int64_t>(blockIdx.x) * kFinishWarps * args.search.k;
  const Path* path = args.queries.path;
  // Queries go round the blocks, so that neighbours, which are often alike, go to different ones. A block looks at the
  // paths of as many at once as it has threads.
  for (int64_t turn = 0; turn * gridDim.x + blockIdx.x < args.count; turn += kFinishThreads) {
    const int64_t mine = (turn + threadIdx.x) * gridDim.x + blockIdx.x;
    if (__syncthreads_or(mine < args.count && (!path || path[mine] == Path::full)) == 0) continue;
    for (int64_t t = turn; t < turn + kFinishThreads && t * gridDim.x + blockIdx.x < args.count; ++t) {
      const int64_t q = t * gridDim.x + blockIdx.x;
      if (!path || path[q] == Path::full) search_all_keys<Best>(args, q, shares, found);
    }
  }
}

}  // namespace

int full_blocks(int64_t count, int multiprocessors) {
  return static_cast<int>(smaller(count, int64_t{kFinishBlocks} * multiprocessors));
}

cudaError_t finish_full(const Finish& args, int blocks, cudaStream_t stream) {
  cudaLaunchConfig_t launch{};
  launch.gridDim = dim3(static_cast<unsigned>(blocks));
  launch.blockDim = dim3(kFinishThreads);
  launch.stream = stream;
  return cudaLaunchKernelEx(&launch, args.search.k > 1 ? search_all<Sorted> : search_all<Single>, args);
}

}  // namespace memad_fast::cuda
