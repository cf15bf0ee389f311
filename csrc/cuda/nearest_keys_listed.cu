// Queries with lists (see nearest_keys.h): the keys that the screen left, in float64, best first.
//
//   query  -> a team of 4 lanes (k = 1, many queries), a warp, or the 8 warps of a block (few queries, many lists)
//   pair   -> a quad of 4 lanes (nearest_keys_exact.cuh): a warp computes up to 8 listed keys of its query at once
//
// The threshold of a query is the smallest of its lists'. For k = 1 the key with the smallest lower end comes first:
// its exact value lowers the threshold, and most of the others drop out. Then every list in order; each value may lower
// it further. A query with a list that was given up goes to the full path.
//
// Bytes: the listed keys' rows (a few a query), from the L2 cache where the keys fit it. What counts is how many rows
// are under way: a row waits for its lists, then for its first key, then for the others, about 3 us on an H200. Four
// lanes a query put 25,000 queries under way at once, a warp each only 3,200.
#include "cuda/nearest_keys_finish.cuh"

namespace memad_fast::cuda {
namespace {

// --- listed keys ---------------------------------------------------------------------------------------------------

// The lanes that share a query; all of them call each function.
template <int kLanes>
struct Team {
  int lane = static_cast<int>(threadIdx.x % kLanes);
  unsigned lanes = kLanes == 32 ? kWholeWarp : 0xfu << (threadIdx.x % 32 / 4 * 4);

  __device__ unsigned ballot(bool vote) const {
    return __ballot_sync(lanes, vote) >> (kLanes == 32 ? 0 : threadIdx.x % 32 / 4 * 4);
  }
  template <class T>
  __device__ T from(T value, int source) const { return __shfl_sync(lanes, value, source, kLanes); }
  template <class T>
  __device__ T exchange(T value, int step) const { return __shfl_xor_sync(lanes, value, step); }
};

// One query's search of its lists by one team, of `members` that share the lists.
template <int kLanes, class Best>
struct Search {
  const Finish& args;
  int64_t q;  // of the chunk
  int member, members;
  Best best;
  Row query;
  Team<kLanes> team;
  Quad quad;
  double query_square = 0.0;
  float threshold = -kInfinity;
  int64_t computed = 0;

  __device__ Search(const Finish& finish, int64_t q, int member, int members, Found* room)
      : args(finish), q(q), member(member), members(members), best(room, finish.search.k),
        query(finish.search.query, finish.first + q) {
    if (args.search.metric == Metric::cosine) query_square = exact_sum<Product>(quad, query, query);
  }

  // Whether the lists hold all that can be among the nearest; and the threshold of all of them.
  __device__ bool read_thresholds() {
    const Lists& lists = args.lists;
    bool overflown = false;
    threshold = kInfinity;
    for (int64_t i = team.lane; i < lists.of_query(); i += kLanes) {
      threshold = fminf(threshold, lists.thresholds[q * lists.of_query() + i]);
      overflown = overflown || lists.counts[q * lists.of_query() + i] == kOverflow;
    }
    for (int step = kLanes / 2; step > 0; step /= 2) threshold = fminf(threshold, team.exchange(threshold, step));
    return team.ballot(overflown) == 0;
  }

  // look(entry, index of its key; of a lane without one: an entry that is never wanted)
  template <class Look>
  __device__ void for_each_listed(const Look& look) {
    const Lists& lists = args.lists;
    for (int64_t i = member; i < lists.of_query(); i += members) {
      const int64_t list = q * lists.of_query() + i, first_key = i / lists.columns * lists.split_keys;
      const int count = lists.counts[list];
      const Entry* entries = lists.entries + list * lists.capacity;
      for (int base = 0; base < count; base += kLanes) {
        const bool exists = base + team.lane < count;
        const Entry entry = exists ? entries[base + team.lane] : Entry{0, kInfinity};
        look(entry.low, first_key + entry.key);
      }
    }
  }

  __device__ int64_t most_promising() {
    float low = kInfinity;
    int64_t key = kNoKey;
    const auto take = [&](float other_low, int64_t other) {
      if (other != kNoKey && (other_low < low || (other_low == low && other < key))) {
        low = other_low;
        key = other;
      }
    };
    for_each_listed([&](float entry_low, int64_t entry_key) {
      if (entry_low < kInfinity) take(entry_low, entry_key);
    });
    for (int step = kLanes / 2; step > 0; step /= 2) {
      const float other_low = team.exchange(low, step);
      const int64_t other = team.exchange(key, step);
      take(other_low, other);
    }
    return low < threshold ? key : kNoKey;
  }

  __device__ Found exactly(int64_t key) const {
    const double rank = exact_rank(quad, query, query_square, Row(args.search.keys, key), args.search.metric);
    return is_finite(rank) ? Found{rank, key} : nothing();
  }

  __device__ void offer(const Found& item) {
    if (item.index != kNoKey) best.offer(item);
  }

  // The k best so far have a score of at most this (the error of an inner product is not known from its value).
  __device__ void lower_threshold() {
    if (args.search.metric == Metric::ip || !best.full()) return;
    const double worst = best.worst(), error = 16.0 * args.error.exact;
    const double upper = args.search.metric == Metric::l2 ? 0.5 * worst * (1.0 + error) : worst + error;
    const double high = upper + args.queries.shift[q];
    if (high < static_cast<double>(threshold)) threshold = round_up(high);
  }

  // Computes the wanted ones of the lanes' keys, a quad each, as many at once as there are quads.
  __device__ void compute_wanted(float low, int64_t key, int64_t skipped) {
    constexpr int quads = kLanes / 4;
    const int mine = team.lane / 4;
    for (unsigned left = team.ballot(low < threshold && key != skipped); left;) {
      unsigned rest = left;
      for (int j = 0; j < mine; ++j) rest &= rest - 1;
      const bool has = rest != 0;
      const int64_t its_key = team.from(key, has ? __ffs(static_cast<int>(rest)) - 1 : 0);
      const Found item = has ? exactly(its_key) : nothing();
      const int round = static_cast<int>(smaller(quads, __popc(left)));
      for (int j = 0; j < round; ++j) {
        offer({team.from(item.rank, 4 * j), team.from(item.index, 4 * j)});
        left &= left - 1;
      }
      computed += round;
      lower_threshold();
      left &= team.ballot(low < threshold);
    }
  }

  __device__ void run() {
    int64_t first = kNoKey;
    if (args.search.k == 1) {
      first = most_promising();
      if (first != kNoKey) {
        offer(exactly(first));
        ++computed;
        lower_threshold();
      }
    }
    for_each_listed([&](float low, int64_t key) { compute_wanted(low, key, first); });
  }
};

// --- the kernel ----------------------------------------------------------------------------------------------------

// `members`: warps that share a query, 1 or all of the block.
template <int kLanes, class Best>
__global__ void __launch_bounds__(kFinishThreads, kFinishBlocks) search_lists(const __grid_constant__ Finish args, int members) {
  __shared__ Shares shares;
  const int team = static_cast<int>(threadIdx.x) / kLanes, lane = static_cast<int>(threadIdx.x % kLanes);
  const int at_once = kFinishThreads / kLanes / members, member = team % members;
  Found* found = args.found + static_cast<int64_t>(blockIdx.x) * kFinishWarps * args.search.k;
  Found* own = found + threadIdx.x / 32 * args.search.k;

  for (int64_t q = blockIdx.x * int64_t{at_once} + team / members; q < args.count; q += gridDim.x * int64_t{at_once}) {
    const Path path = args.queries.path[q];
    Search<kLanes, Best> search(args, q, member, members, own);
    const bool complete = path == Path::none || (path == Path::screened && search.read_thresholds());
    if (path == Path::screened && complete) search.run();
    if (members > 1) {  // all warps are at this query
      put_share(shares, search.best, search.computed);
      __syncthreads();
      if (complete) merge(args, q, search.best, shares, found, false);
      __syncthreads();
    } else if (complete) {
      write_own(args, q, search.best, lane);
      if (lane == 0) write_counts(args.search, args.first + q, search.computed, false);
    }
    if (!complete && lane == 0 && member == 0) args.queries.path[q] = Path::full;
  }
}

}  // namespace

ListedShape listed_shape(int64_t count, int64_t k, int64_t lists, int multiprocessors) {
  const int64_t blocks = int64_t{kFinishBlocks} * multiprocessors;
  ListedShape shape{32, 1, 1};
  if (k == 1 && count >= 8 * blocks * kFinishWarps) shape.lanes = 4;
  else if (lists >= 2 * kFinishWarps && count <= blocks) shape.warps = kFinishWarps;
  const int64_t at_once = kFinishThreads / shape.lanes / shape.warps;
  shape.blocks = static_cast<int>(smaller(ceil_div(count, at_once), blocks));
  return shape;
}

cudaError_t finish_listed(const Finish& args, const ListedShape& shape, cudaStream_t stream) {
  cudaLaunchConfig_t launch{};
  launch.gridDim = dim3(static_cast<unsigned>(shape.blocks));
  launch.blockDim = dim3(kFinishThreads);
  launch.stream = stream;
  if (args.search.k > 1) return cudaLaunchKernelEx(&launch, search_lists<32, Sorted>, args, shape.warps);
  if (shape.lanes == 32) return cudaLaunchKernelEx(&launch, search_lists<32, Single>, args, shape.warps);
  return cudaLaunchKernelEx(&launch, search_lists<4, Single>, args, shape.warps);
}

}  // namespace memad_fast::cuda
