// The screen of nearest_keys (see nearest_keys.h): lower ends of all scores, from int8 products on tensor cores.
//
//   low(q, k) = base_k - b_q (a_k p) - alpha_q rho_k - beta_q nu_k,   p = the product of the codes, exact in int32
//
//               64 keys   64 keys          a block owns 128 queries and walks over the keys of its split, tile by
//              ┌─────────┬─────────┐       tile, 64 dimensions (bytes) at a time; a warp multiplies 64 x 64: 128 sums
//   64 queries │ warp 0  │ warp 2  │ ...   a thread, and for every 32 dimensions 32 mma and 8 ldmatrix (4 KiB of
//              ├─────────┼─────────┤       shared memory for 2 x 64 x 64 x 32 operations: 82 of the 128 bytes a clock
//   64 queries │ warp 1  │ warp 3  │       that Hopper has; 64 x 32 would need 123)
//              └─────────┴─────────┘
//
// The codes of the queries lie in shared memory for the whole walk where they fit, those of the keys come through a
// ring of cp.async stages. Rows of 64 bytes: 16-byte unit u of row r lies at u ^ (r / 2 % 4), so that the eight rows of
// an ldmatrix touch all 32 banks once.
//
// Behind the last dimension of a tile, a thread turns its sums into s = base - b a p in place (convert, multiply, fma,
// minimum: 5 issue slots, the conversion counting twice). With the largest rho and nu of its 64 keys a warp bounds the
// smallest low and the smallest upper end of every row from the smallest s alone; only rows that reach below their
// threshold look at single keys. Lists and thresholds belong to one warp, thresholds are exchanged once a tile, two
// buffers in turn: there are no atomics, and every run gives the same lists.
//
// Bytes (L2): codes of the keys once per 128 queries. Operations: 2 N M D. H200, mma.sync at 1,200 TOP/s and 25,088 x
// 16,384 x 1,024: 0.70 ms, 3.3 GB from L2 meanwhile (4.7 TB/s).
#include "cuda/dynamic_shared.cuh"
#include "cuda/nearest_keys_screen.cuh"
#include "cuda/ptx.cuh"

namespace memad_fast::cuda {
namespace {

constexpr int kWarpRows = 2;           // warps one under the other
constexpr int kChunk = 64;             // dimensions of a stage
constexpr int kUnit = 16;              // bytes of one cp.async
constexpr int kNumbers = 5;            // of a key
constexpr int kRowTiles = 4, kKeyTiles = 8;  // mma tiles of 16 queries x 8 keys in a warp's tile
constexpr int kMany = 4;               // keys of a row and tile that are worth their own upper ends
constexpr int kMostChecked = kMostListed / 32;  // entries of a list a lane holds while it is tightened

template <int kColumns>
constexpr int kStages = kColumns == 2 ? 4 : 3;

// --- shared memory -------------------------------------------------------------------------------------------------

// Of a block, in bytes.
template <int kColumns>
struct SharedLayout {
  static constexpr int kTileKeys = kColumns * kWarpKeys;
  static constexpr int kQueryStage = kTileQueries * kChunk, kKeyStage = kTileKeys * kChunk;
  static constexpr int kNumberStage = kNumbers * kTileKeys * 4;
  static constexpr int kRowBytes = kTileQueries * 4;
  int queries, keys, numbers, rows, thresholds, counts, bytes;

  __host__ __device__ SharedLayout(int64_t dims, bool resident) {
    queries = 0;
    keys = queries + kQueryStage * (resident ? static_cast<int>(dims / kChunk) : kStages<kColumns>);
    numbers = keys + kStages<kColumns> * kKeyStage;
    rows = numbers + kStages<kColumns> * kNumberStage;  // scale, norm, residual, own
    thresholds = rows + 4 * kRowBytes;                  // [2][kColumns][kTileQueries]
    counts = thresholds + 2 * kColumns * kRowBytes;     // [kColumns][kTileQueries]
    bytes = counts + kColumns * kRowBytes;
  }
};

// Where unit `unit` of row `row` of a stage lies.
__device__ __forceinline__ int swizzled(int row, int unit) { return row * kChunk + (unit ^ (row / 2 % 4)) * kUnit; }

// --- what a block knows --------------------------------------------------------------------------------------------

template <int kColumns>
struct Block {
  using Layout = SharedLayout<kColumns>;
  static constexpr int kThreads = kWarpRows * kColumns * 32;

  const Screen& args;
  Layout at;
  char* shared;
  int chunks;            // stages of a tile
  int64_t first_query;   // of the block
  int64_t split, first_key;
  int64_t limit;         // keys of the split, counted from the first
  int warp_row, warp_column, lane;

  __device__ Block(const Screen& screen, char* memory)
      : args(screen), at(screen.dims, screen.resident), shared(memory),
        chunks(static_cast<int>(screen.dims / kChunk)) {
    const int64_t tiles = args.padded / kTileQueries;
    split = blockIdx.x / tiles;
    first_query = blockIdx.x % tiles * kTileQueries;
    first_key = split * args.lists.split_keys;
    const int64_t end = smaller(searched_keys(args.filled, args.keys), first_key + args.lists.split_keys);
    limit = larger(0, end - first_key);
    const int warp = static_cast<int>(threadIdx.x / 32);
    warp_row = warp % kWarpRows;
    warp_column = warp / kWarpRows;
    lane = static_cast<int>(threadIdx.x % 32);
  }

  __device__ float* of_rows(int which) const {
    return reinterpret_cast<float*>(shared + at.rows) + which * kTileQueries;
  }
  __device__ float* scale() const { return of_rows(0); }
  __device__ float* norm() const { return of_rows(1); }
  __device__ float* residual() const { return of_rows(2); }
  __device__ float* own() const { return of_rows(3); }
  __device__ float* thresholds(int parity, int column) const {
    return reinterpret_cast<float*>(shared + at.thresholds) + (parity * kColumns + column) * kTileQueries;
  }
  __device__ int32_t* counts() const {
    return reinterpret_cast<int32_t*>(shared + at.counts) + warp_column * kTileQueries;
  }
  // The five numbers of this warp's 64 keys of a tile: [5][kTileKeys] from here.
  __device__ const float* numbers(int slot) const {
    return reinterpret_cast<const float*>(shared + at.numbers + slot * Layout::kNumberStage) + warp_column * kWarpKeys;
  }
  // The list of a row of the block and this warp's column.
  __device__ int64_t list(int row) const {
    return ((first_query + row) * args.lists.splits + split) * kColumns + warp_column;
  }
  __device__ Entry* entries(int row) const { return args.lists.entries + list(row) * args.lists.capacity; }
};

// --- copies --------------------------------------------------------------------------------------------------------

// `rows` rows of one chunk to a stage. Row r is read at `from` + min(r, last) * stride.
template <int kRows, int kThreads>
__device__ __forceinline__ void fetch_rows(char* stage, const char* from, int last, int stride) {
  const int row = static_cast<int>(threadIdx.x) / 4, unit = static_cast<int>(threadIdx.x) % 4;
#pragma unroll
  for (int r = 0; r < kRows; r += kThreads / 4)
    cp_async_16(stage + swizzled(r + row, unit), from + min(r + row, last) * stride + unit * kUnit);
}

template <int kColumns>
__device__ __forceinline__ void fetch_queries(const Block<kColumns>& block, int chunk, int stage) {
  char* to = block.shared + block.at.queries + stage * SharedLayout<kColumns>::kQueryStage;
  const auto* codes = reinterpret_cast<const char*>(block.args.queries.codes);
  fetch_rows<kTileQueries, Block<kColumns>::kThreads>(
      to, codes + block.first_query * block.args.dims + chunk * kChunk, kTileQueries - 1,
      static_cast<int>(block.args.dims));
}

// The codes of one chunk of a tile of keys, and before the first chunk their numbers. Keys beyond the padding are read
// as the last ones: what they give is not looked at.
template <int kColumns>
__device__ __forceinline__ void fetch_keys(const Block<kColumns>& block, int tile, int chunk, int stage) {
  constexpr int tile_keys = SharedLayout<kColumns>::kTileKeys, threads = Block<kColumns>::kThreads;
  const Screen& args = block.args;
  const int64_t first = block.first_key + int64_t{tile} * tile_keys;
  const auto last = static_cast<int>(smaller(args.padded_keys - first, tile_keys)) - 1;
  char* to = block.shared + block.at.keys + stage * SharedLayout<kColumns>::kKeyStage;
  const auto* codes = reinterpret_cast<const char*>(args.packed) + first * args.dims + chunk * kChunk;
  fetch_rows<tile_keys, threads>(to, codes, last, static_cast<int>(args.dims));
  if (chunk != 0) return;
  char* numbers_to = block.shared + block.at.numbers +
                     tile % kStages<kColumns> * SharedLayout<kColumns>::kNumberStage;
  const auto* numbers = reinterpret_cast<const float*>(args.packed + args.padded_keys * args.dims) + first;
  const int key = 4 * static_cast<int>(threadIdx.x);
  if (key >= tile_keys) return;
#pragma unroll 1
  for (int which = 0; which < kNumbers; ++which)
    cp_async_16(numbers_to + (which * tile_keys + key) * 4, numbers + which * args.padded_keys + min(key, last - 3));
}

// --- products ------------------------------------------------------------------------------------------------------

// Sums of a warp: of mma tile (m, n), queries 16 m + g (0, 1) and 16 m + g + 8 (2, 3), keys 8 n + 2 i (0, 2) and + 1,
// where g = lane / 4 and i = lane % 4.
using Sums = int32_t[kRowTiles][kKeyTiles][4];

__device__ __forceinline__ void multiply(const char* queries, const char* keys, int lane, Sums& sums) {
  const int query = lane % 16, query_unit = lane / 16;
  const int key = lane % 8 + lane / 16 * 8, key_unit = lane / 8 % 2;
#pragma unroll
  for (int step = 0; step < kChunk / 32; ++step) {
    uint32_t b[kKeyTiles / 2][4];
#pragma unroll
    for (int n = 0; n < kKeyTiles / 2; ++n) ldmatrix_x4(b[n], keys + swizzled(n * 16 + key, 2 * step + key_unit));
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
      uint32_t a[4];
      ldmatrix_x4(a, queries + swizzled(m * 16 + query, 2 * step + query_unit));
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n)
        mma_s8_16x8x32(sums[m][n], a, b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]);
    }
  }
}

// --- scores --------------------------------------------------------------------------------------------------------

// An upper end of a score is its lower end and twice the error in it, taken larger than the roundings here need,
constexpr float kTwice = 2.00002f;
// and what the query adds (see write_query_numbers). None for a key that is left to the exact stage, which gives a NaN.
__device__ __forceinline__ float above(float upper, float own) {
  const float end = upper + fmaf(fabsf(upper), 0x1p-20f, own);
  return end < 1e38f ? end : kInfinity;
}
__device__ __forceinline__ float upper_end(float low, float error, float own) {
  return above(fmaf(kTwice, error, low), own);
}

// The largest of the 64 keys of a warp.
struct Largest {
  float residual, norm, slack;

  __device__ Largest(const float* numbers, int tile_keys, int lane) {
    const auto two = [&](int which) {
      return *reinterpret_cast<const float2*>(numbers + which * tile_keys + 2 * lane);
    };
    const float2 r = two(2), n = two(3), s = two(4);
    residual = warp_max(fmaxf(r.x, r.y));
    norm = warp_max(fmaxf(n.x, n.y));
    // A key that is left to the exact stage gives no upper end.
    slack = warp_max(fmaxf(s.x < kInfinity ? s.x : 0.0f, s.y < kInfinity ? s.y : 0.0f));
  }
};

// Rows of a tile that this lane's quad of lanes shares: 16 m + 8 h + g.
constexpr int kSlots = 2 * kRowTiles;
__device__ __forceinline__ int row_of(int slot, int lane) { return slot * 8 + lane / 4; }

// Turns the sums into s = base - b a p, as bits of floats, infinite from key `left` on. smallest[slot]: of this lane's
// 16 keys.
__device__ __forceinline__ void scores(
    const float* query_scale, const float* numbers, int tile_keys, int left, int lane, Sums& sums,
    float (&smallest)[kSlots]) {
  float scale[kSlots];
#pragma unroll
  for (int slot = 0; slot < kSlots; ++slot) {
    scale[slot] = -query_scale[row_of(slot, lane)];
    smallest[slot] = kInfinity;
  }
#pragma unroll
  for (int n = 0; n < kKeyTiles; ++n) {
    const int key = n * 8 + lane % 4 * 2;
    float2 base = *reinterpret_cast<const float2*>(numbers + key);
    const float2 step = *reinterpret_cast<const float2*>(numbers + tile_keys + key);
    if (key >= left) base.x = kInfinity;
    if (key + 1 >= left) base.y = kInfinity;
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      int32_t* sum = &sums[slot / 2][n][slot % 2 * 2];
      const float x = fmaf(scale[slot], static_cast<float>(sum[0]) * step.x, base.x);
      const float y = fmaf(scale[slot], static_cast<float>(sum[1]) * step.y, base.y);
      smallest[slot] = fminf(smallest[slot], fminf(x, y));
      sum[0] = __float_as_int(x);
      sum[1] = __float_as_int(y);
    }
  }
}

// What a row needs for its scores.
struct QuerySide {
  float norm, residual, own;
};

// Lower ends of one slot's row from s, for this lane's 16 keys.
using Lows = float[2 * kKeyTiles];

__device__ __forceinline__ unsigned lows_below(const Lows& lows, float threshold) {
  unsigned below = 0;
#pragma unroll
  for (int j = 0; j < 2 * kKeyTiles; ++j) below |= static_cast<unsigned>(lows[j] < threshold) << j;
  return below;
}

// The smallest upper end of the lane's 16 keys, before what upper_end adds for the query.
__device__ __forceinline__ float smallest_upper(
    const QuerySide& query, const float* numbers, int tile_keys, int lane, const Lows& lows) {
  float smallest = kInfinity;
#pragma unroll
  for (int n = 0; n < kKeyTiles; ++n) {
    const int key = n * 8 + lane % 4 * 2;
    const float2 rho = *reinterpret_cast<const float2*>(numbers + 2 * tile_keys + key);
    const float2 nu = *reinterpret_cast<const float2*>(numbers + 3 * tile_keys + key);
    const float2 slack = *reinterpret_cast<const float2*>(numbers + 4 * tile_keys + key);
    const float x = fmaf(query.residual, nu.x, fmaf(query.norm, rho.x, slack.x));
    const float y = fmaf(query.residual, nu.y, fmaf(query.norm, rho.y, slack.y));
    // A key that is left to the exact stage has a NaN here, which the minimum ignores.
    smallest = fminf(smallest, fmaf(kTwice, x, lows[2 * n]));
    smallest = fminf(smallest, fmaf(kTwice, y, lows[2 * n + 1]));
  }
  return smallest;
}

__device__ __forceinline__ int quad_sum(int x) {
  x += __shfl_xor_sync(kWholeWarp, x, 1);
  return x + __shfl_xor_sync(kWholeWarp, x, 2);
}
__device__ __forceinline__ float quad_min(float x) {
  x = fminf(x, __shfl_xor_sync(kWholeWarp, x, 1));
  return fminf(x, __shfl_xor_sync(kWholeWarp, x, 2));
}

// Appends the keys of one slot's rows whose lower end is below the threshold, which it may lower. All lanes of the warp
// take part, with `looks` where the row may have one.
__device__ __forceinline__ void append(
    const QuerySide& query, const float* numbers, int tile_keys, int32_t first_key, int slot, bool looks, bool single,
    int lane, int capacity, const Sums& sums, Entry* entries, int32_t* count, float& threshold) {
  Lows lows;
#pragma unroll
  for (int n = 0; n < kKeyTiles; ++n) {
    const int key = n * 8 + lane % 4 * 2;
    const float2 rho = *reinterpret_cast<const float2*>(numbers + 2 * tile_keys + key);
    const float2 nu = *reinterpret_cast<const float2*>(numbers + 3 * tile_keys + key);
    const int32_t* s = &sums[slot / 2][n][slot % 2 * 2];
    lows[2 * n] = fmaf(-query.residual, nu.x, fmaf(-query.norm, rho.x, __int_as_float(s[0])));
    lows[2 * n + 1] = fmaf(-query.residual, nu.y, fmaf(-query.norm, rho.y, __int_as_float(s[1])));
  }
  unsigned below = looks ? lows_below(lows, threshold) : 0;
  int total = quad_sum(__popc(below));
  if (single && __any_sync(kWholeWarp, total > kMany)) {
    const float upper = quad_min(smallest_upper(query, numbers, tile_keys, lane, lows));
    threshold = fminf(threshold, above(upper, query.own));
    below = looks ? lows_below(lows, threshold) : 0;
    total = quad_sum(__popc(below));
  }
  const int before = *count;
  __syncwarp();
  if (before + total > capacity) {  // the row takes the full path
    below = 0;
    threshold = -kInfinity;
  }
  if (looks && lane % 4 == 0) *count = before + total > capacity ? kOverflow : before + total;
  // Places behind those of the quad's lower lanes.
  const int mine = __popc(below), neighbour = __shfl_xor_sync(kWholeWarp, mine, 1);
  const int pair = __shfl_xor_sync(kWholeWarp, mine + neighbour, 2);
  Entry* next = entries + before + (lane % 2 ? neighbour : 0) + (lane / 2 % 2 ? pair : 0);
#pragma unroll
  for (int j = 0; j < 2 * kKeyTiles; ++j)
    if (below >> j & 1) *next++ = {first_key + j / 2 * 8 + lane % 4 * 2 + j % 2, lows[j]};
}

// --- lists ---------------------------------------------------------------------------------------------------------

// Unsigned integers in the order of floats.
__device__ inline uint32_t ordered(float x) {
  const uint32_t bits = __float_as_uint(x);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ inline float from_ordered(uint32_t x) { return __uint_as_float(x & 0x80000000u ? x & 0x7fffffffu : ~x); }

// Forgets the entries of a row's list that the threshold has overtaken. For k > 1 the k-th smallest upper end of the
// list lowers the threshold first. The whole warp works on one row. Returns how many are left.
template <int kColumns>
__device__ int tighten(const Block<kColumns>& block, int row, float& threshold) {
  const Screen& args = block.args;
  const int lane = block.lane, count = block.counts()[row], k = args.k;
  Entry* entries = block.entries(row);
  Entry mine[kMostChecked];
#pragma unroll
  for (int j = 0; j < kMostChecked; ++j)
    mine[j] = j * 32 + lane < count ? entries[j * 32 + lane] : Entry{0, kInfinity};
  if (k > 1 && count >= k) {
    const auto* numbers = reinterpret_cast<const float*>(args.packed + args.padded_keys * args.dims) + block.first_key;
    uint32_t upper[kMostChecked];
#pragma unroll
    for (int j = 0; j < kMostChecked; ++j) {
      const float* of_key = numbers + mine[j].key;
      float error = fmaf(block.norm()[row], of_key[2 * args.padded_keys], of_key[4 * args.padded_keys]);
      error = fmaf(block.residual()[row], of_key[3 * args.padded_keys], error);
      upper[j] = ordered(j * 32 + lane < count ? upper_end(mine[j].low, error, block.own()[row]) : kInfinity);
    }
    // The largest number that fewer than k are below: the k-th smallest, bit by bit.
    uint32_t kth = 0;
    for (uint32_t bit = 0x80000000u; bit; bit >>= 1) {
      int below = 0;
#pragma unroll
      for (int j = 0; j < kMostChecked; ++j) below += __popc(__ballot_sync(kWholeWarp, upper[j] < (kth | bit)));
      if (below < k) kth |= bit;
    }
    threshold = fminf(threshold, from_ordered(kth));
  }
  int kept = 0;
#pragma unroll
  for (int j = 0; j < kMostChecked; ++j) {
    const bool keeps = mine[j].low < threshold;
    const unsigned all = __ballot_sync(kWholeWarp, keeps);
    if (keeps) entries[kept + __popc(all & ((1u << lane) - 1))] = mine[j];
    kept += __popc(all);
  }
  __syncwarp();
  return kept;
}

// For the warp's rows whose list another tile is likely to overfill: makes room, or gives the row up.
template <int kColumns>
__device__ void make_room(const Block<kColumns>& block, float* thresholds) {
  const int most = block.args.lists.capacity - room_for_tile(block.args.k);
  int32_t* counts = block.counts();
  for (int half = 0; half < 2; ++half) {
    const int first = block.warp_row * kWarpQueries + half * 32;
    for (unsigned full = __ballot_sync(kWholeWarp, counts[first + block.lane] > most); full; full &= full - 1) {
      const int row = first + __ffs(static_cast<int>(full)) - 1;
      float threshold = thresholds[row];
      const int kept = tighten(block, row, threshold);
      if (block.lane == 0) {
        counts[row] = kept > most ? kOverflow : kept;
        thresholds[row] = kept > most ? -kInfinity : threshold;
      }
      __syncwarp();
    }
  }
}

// The sums of one tile are complete: adds to the lists of the warp's rows, and lowers their thresholds.
template <int kColumns>
__device__ __forceinline__ void consider(const Block<kColumns>& block, int tile, Sums& sums) {
  constexpr int tile_keys = SharedLayout<kColumns>::kTileKeys;
  const int lane = block.lane;
  const int32_t first_key = tile * tile_keys + block.warp_column * kWarpKeys;
  const float* numbers = block.numbers(tile % kStages<kColumns>);
  const Largest largest(numbers, tile_keys, lane);
  float smallest[kSlots];
  const auto left = static_cast<int>(smaller(block.limit - first_key, kWarpKeys));
  scores(block.scale() + block.warp_row * kWarpQueries, numbers, tile_keys, left, lane, sums, smallest);
  const int parity = tile % 2;
#pragma unroll
  for (int slot = 0; slot < kSlots; ++slot) {
    const int row = block.warp_row * kWarpQueries + row_of(slot, lane);
    const float least = quad_min(smallest[slot]);
    const QuerySide query{block.norm()[row], block.residual()[row], block.own()[row]};
    // fma is monotonic: no low of the row is below this one, and the key of the smallest s has an upper end of at most
    // that of this one with the largest errors.
    const float low = fmaf(-query.residual, largest.norm, fmaf(-query.norm, largest.residual, least));
    float threshold = kInfinity;
#pragma unroll
    for (int column = 0; column < kColumns; ++column)
      threshold = fminf(threshold, block.thresholds(parity ^ 1, column)[row]);
    const bool single = block.args.k == 1;
    if (single && low > -kInfinity) {
      const float error = fmaf(query.residual, largest.norm, fmaf(query.norm, largest.residual, largest.slack));
      threshold = fminf(threshold, upper_end(low, error, query.own));
    }
    const bool looks = low < threshold;
    if (__any_sync(kWholeWarp, looks))
      append(
          query, numbers, tile_keys, first_key, slot, looks, single, lane, block.args.lists.capacity, sums,
          block.entries(row), block.counts() + row, threshold);
    if (lane % 4 == 0) block.thresholds(parity, block.warp_column)[row] = threshold;
  }
  __syncwarp();
  make_room(block, block.thresholds(parity, block.warp_column));
}

// --- the kernel ----------------------------------------------------------------------------------------------------

template <int kColumns>
__device__ void load_rows(const Block<kColumns>& block) {
  const QueryCodes& from = block.args.queries;
  for (int row = static_cast<int>(threadIdx.x); row < kTileQueries; row += Block<kColumns>::kThreads) {
    const int64_t query = block.first_query + row;
    block.scale()[row] = from.scale[query];
    block.norm()[row] = from.norm[query];
    block.residual()[row] = from.residual[query];
    block.own()[row] = from.own[query];
    const float threshold = from.path[query] == Path::screened ? kInfinity : -kInfinity;
    for (int column = 0; column < kColumns; ++column) {
      block.thresholds(0, column)[row] = block.thresholds(1, column)[row] = threshold;
      reinterpret_cast<int32_t*>(block.shared + block.at.counts)[column * kTileQueries + row] = 0;
    }
  }
}

// What the warp's lists came to; for k > 1 with the last threshold that they allow.
template <int kColumns>
__device__ void store_lists(const Block<kColumns>& block, int parity) {
  float* thresholds = block.thresholds(parity, block.warp_column);
  int32_t* counts = block.counts();
  for (int row = block.warp_row * kWarpQueries; block.args.k > 1 && row < (block.warp_row + 1) * kWarpQueries; ++row) {
    if (counts[row] < block.args.k) continue;
    float threshold = thresholds[row];
    const int kept = tighten(block, row, threshold);
    if (block.lane == 0) {
      counts[row] = kept;
      thresholds[row] = threshold;
    }
    __syncwarp();
  }
  for (int row = block.warp_row * kWarpQueries + block.lane; row < (block.warp_row + 1) * kWarpQueries; row += 32) {
    block.args.lists.counts[block.list(row)] = counts[row];
    block.args.lists.thresholds[block.list(row)] = thresholds[row];
  }
}

template <int kColumns>
__global__ void __launch_bounds__(kWarpRows* kColumns * 32, kColumns == 2 ? 2 : 1)
    screen_keys(const __grid_constant__ Screen args) {
  using Layout = SharedLayout<kColumns>;
  constexpr int stages = kStages<kColumns>;
  const Block<kColumns> block(args, dynamic_shared());
  const auto tiles = static_cast<int>(ceil_div(block.limit, Layout::kTileKeys));
  load_rows(block);
  if (args.resident)
    for (int chunk = 0; chunk < block.chunks; ++chunk) fetch_queries(block, chunk, chunk);

  // Chunks of tiles follow one another through the stages; the next one to fetch is some stages ahead.
  int next_tile = 0, next_chunk = 0, next_stage = 0;
  const auto fetch = [&] {
    if (next_tile < tiles) {
      if (!args.resident) fetch_queries(block, next_chunk, next_stage);
      fetch_keys(block, next_tile, next_chunk, next_stage);
      next_stage = next_stage + 1 == stages ? 0 : next_stage + 1;
      if (++next_chunk == block.chunks) {
        next_chunk = 0;
        ++next_tile;
      }
    }
    cp_async_commit();
  };
  for (int ahead = 0; ahead < stages - 1; ++ahead) fetch();

  // Padding queries have no neighbours: a warp of them only helps to copy.
  const bool works = block.first_query + block.warp_row * kWarpQueries < args.count;
  int stage = 0;
  for (int tile = 0; tile < tiles; ++tile) {
    Sums sums;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[m][n][i] = 0;
    int chunk = 0;
    do {
      cp_async_wait<stages - 2>();
      __syncthreads();  // this step's stage has come, and the one before it is free
      fetch();
      const int query_stage = args.resident ? chunk : stage;
      const char* queries = block.shared + block.at.queries + query_stage * Layout::kQueryStage;
      const char* keys = block.shared + block.at.keys + stage * Layout::kKeyStage;
      queries += block.warp_row * kWarpQueries * kChunk;
      keys += block.warp_column * kWarpKeys * kChunk;
      if (works) multiply(queries, keys, block.lane, sums);
      stage = stage + 1 == stages ? 0 : stage + 1;
    } while (++chunk < block.chunks);
    if (works) consider(block, tile, sums);
  }
  cp_async_wait<0>();
  __syncthreads();
  if (works) store_lists(block, (tiles + 1) % 2);
}

template <int kColumns>
cudaError_t launch_screen(const Screen& args, const ScreenShape& shape, cudaStream_t stream) {
  if (const cudaError_t error = cudaFuncSetAttribute(
          screen_keys<kColumns>, cudaFuncAttributeMaxDynamicSharedMemorySize, shape.shared_bytes);
      error != cudaSuccess)
    return error;
  cudaLaunchConfig_t launch{};
  launch.gridDim = dim3(static_cast<unsigned>(args.padded / kTileQueries * args.lists.splits));
  launch.blockDim = dim3(Block<kColumns>::kThreads);
  launch.dynamicSmemBytes = static_cast<size_t>(shape.shared_bytes);
  launch.stream = stream;
  return cudaLaunchKernelEx(&launch, screen_keys<kColumns>, args);
}

}  // namespace

ScreenShape screen_shape(int64_t dims, int shared_bytes) {
  // Every block takes 1 KiB more of its multiprocessor, which has that much beside its largest block.
  constexpr int reserved = 1024;
  const int64_t resident_dims = smaller(dims, 1 << 16);  // more must not overflow an int
  const int narrow = SharedLayout<2>(resident_dims, true).bytes, wide = SharedLayout<4>(resident_dims, true).bytes;
  if (2 * (narrow + reserved) <= shared_bytes + reserved) return {2, true, narrow, 2};
  if (wide <= shared_bytes) return {4, true, wide, 1};
  return {4, false, SharedLayout<4>(dims, false).bytes, 1};
}

cudaError_t screen(const Screen& args, const ScreenShape& shape, cudaStream_t stream) {
  return shape.columns == 2 ? launch_screen<2>(args, shape, stream) : launch_screen<4>(args, shape, stream);
}

}  // namespace memad_fast::cuda
