// One level of nearest_keys (see nearest_keys.h and README_nearest_keys.md). Compiled once per instruction set.
//
// Work is cut into tasks: a block of queries x a range of keys. A task walks its keys in groups of 64:
//
//             64 keys = 4 panels [dim][16]           a tile: 6 queries x 4 vectors of 16 keys (AVX-512),
//             ┌────┬────┬────┬────┐                  6 x 2 of 8 (AVX2), 2 x 4 of 4 (portable);
//   6 queries │tile│tile│tile│tile│  accumulators    all of dim in registers, one broadcast and one
//   [dim][6]  └────┴────┴────┴────┘  in registers    fma per query and vector
//   next 6    ...
//
// The group stays in the L1 or L2 cache while all queries of the block pass over it; queries stream. Scores never leave
// the registers: each is compared with its query's threshold, and only the few below it become candidates.
// Unprepared keys are packed group by group into the thread's own scratch.
// Bytes from memory: the keys once per block of queries (up to 1,024), the queries once per group.
#include "cpu/nearest_keys_panels.h"

namespace memad_fast {
namespace MEMAD_FAST_ISA {
namespace {

constexpr int kVectorsPerPanel = static_cast<int>(kPanelKeys) / F32::lanes;
#if MEMAD_FAST_ISA_LEVEL == 2
constexpr int kTileQueries = 6, kTilePanels = 4;  // 24 accumulators of 32 registers
#elif MEMAD_FAST_ISA_LEVEL == 1
constexpr int kTileQueries = 6, kTilePanels = 1;  // 12 of 16
#else
constexpr int kTileQueries = 2, kTilePanels = 1;  // 8 of 16
#endif

constexpr int64_t kGroupPanels = 4;
constexpr int64_t kGroupKeys = kGroupPanels * kPanelKeys;

constexpr int64_t kBlockQueries = 1024;          // packing a group costs less than 2 % of screening so many queries
constexpr int64_t kBlockBytes = int64_t{2} << 20;  // of staged queries, and of their candidates
constexpr int64_t kMinBlockQueries = 96;         // below it, threads share the keys rather than the queries
constexpr int64_t kMinPackingQueries = 512;  // the same where every task packs its keys itself
constexpr int64_t kRowsAhead = 2;        // of prefetch in the row-wise screen
constexpr int64_t kRowWiseQueries = 4;           // so few are faster without packing: one pass over the rows

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// --- the exact stage ---------------------------------------------------------------------------------------------

// What sorts: smaller is better, then the lower index.
struct Found {
  double rank;
  int64_t index;
};

inline bool better(const Found& a, const Found& b) { return a.rank < b.rank || (a.rank == b.rank && a.index < b.index); }
inline bool better(float a, float b) { return a < b; }

// A binary heap with the worst on top, of the best `capacity` offered.
template <class Item>
void sink(Item* heap, int64_t size, int64_t at, Item item) {
  for (int64_t child; (child = 2 * at + 1) < size; at = child) {
    if (child + 1 < size && better(heap[child], heap[child + 1])) ++child;
    if (!better(item, heap[child])) break;
    heap[at] = heap[child];
  }
  heap[at] = item;
}

template <class Item>
void offer(Item* heap, int64_t capacity, int64_t& size, Item item) {
  if (size == capacity) {
    if (better(item, heap[0])) sink(heap, size, 0, item);
    return;
  }
  int64_t at = size++;
  while (at > 0 && better(heap[(at - 1) / 2], item)) {
    heap[at] = heap[(at - 1) / 2];
    at = (at - 1) / 2;
  }
  heap[at] = item;
}

// Heap to best first.
template <class Item>
void sort_heap(Item* heap, int64_t size) {
  for (int64_t last = size - 1; last > 0; --last) {
    const Item item = heap[last];
    heap[last] = heap[0];
    sink(heap, last, 0, item);
  }
}

template <class T>
double exact_rank(const T* query, double query_square, const T* key, int64_t dim, Metric metric) {
  if (metric == Metric::l2) return squared_distance(query, key, dim);
  const double product = inner_product(query, key, dim);
  if (metric == Metric::ip) return -product;
  const double key_square = inner_product(key, key, dim);
  if (!is_finite(key_square)) return key_square;
  const double value = 1.0 - cosine(product, query_square, key_square);
  return value < 0.0 ? 0.0 : (value > 2.0 ? 2.0 : value);
}

// --- one query of a task -----------------------------------------------------------------------------------------

struct Candidate {
  float low;  // lower end of the score
  int64_t index;
};

// Buffers of one block of queries; query q has a stretch of each.
struct Buffers {
  int64_t k;
  int64_t capacity;  // candidates a query
  Candidate* candidates;
  float* uppers;  // heap of the k smallest upper ends
  Found* found;   // heap of the k best, exactly

  static int64_t candidates_for(int64_t k) { return 32 + 4 * smaller(k, 512); }
  static int64_t bytes_per_query(int64_t k) {
    return candidates_for(k) * static_cast<int64_t>(sizeof(Candidate)) + k * static_cast<int64_t>(sizeof(float) + sizeof(Found));
  }
};

template <class T>
struct Query {
  const T* row;
  double square;         // |q|^2, not finite for a query that has no neighbours
  float norm;            // upper end of the staged query's norm
  double slack;          // error of the float64 stage, from the query's norm
  float threshold;       // a key whose lower end is not below it is not among the k nearest; -infinity: not screened
  bool exact_only;       // the screen cannot hold it
  int64_t candidates = 0, uppers = 0, found = 0;
};

template <class T>
class Task {
 public:
  Task(const NearestKeys& args, int64_t queries, const Buffers& buffers, Query<T>* states)
      : args_(args), queries_(queries), buffers_(buffers), states_(states) {}

  Query<T>& operator[](int64_t q) { return states_[q]; }
  int64_t queries() const { return queries_; }
  int64_t k() const { return buffers_.k; }

  // Key `index` has a score within [low, high] and low < threshold.
  void consider(int64_t q, int64_t index, float low, double high) {
    Query<T>& state = states_[q];
    Candidate* mine = buffers_.candidates + q * buffers_.capacity;
    if (state.candidates == buffers_.capacity) make_room(q);
    mine[state.candidates++] = {low, index};
    const float upper = high < 1e38 ? round_up(high) : kInfinity;
    float* uppers = buffers_.uppers + q * buffers_.k;
    offer(uppers, buffers_.k, state.uppers, upper);
    if (state.uppers == buffers_.k && uppers[0] < state.threshold) state.threshold = uppers[0];
  }

  // All that remains of query q, exactly: candidates, or every key of [first, last) where it was not screened.
  // Afterwards found holds the best first.
  void finish(int64_t q, int64_t first, int64_t last) {
    Query<T>& state = states_[q];
    if (state.exact_only) {
      for (int64_t key = first; key < last; ++key) compute(q, key);
    } else {
      compute_candidates(q);
    }
    sort_heap(found(q), state.found);
  }

  Found* found(int64_t q) { return buffers_.found + q * buffers_.k; }

 private:
  void make_room(int64_t q) {
    Query<T>& state = states_[q];
    Candidate* mine = buffers_.candidates + q * buffers_.capacity;
    int64_t kept = 0;
    for (int64_t i = 0; i < state.candidates; ++i)
      if (mine[i].low < state.threshold) mine[kept++] = mine[i];
    state.candidates = kept;
    if (2 * kept > buffers_.capacity) compute_candidates(q);
  }

  void compute_candidates(int64_t q) {
    Query<T>& state = states_[q];
    const Candidate* mine = buffers_.candidates + q * buffers_.capacity;
    for (int64_t i = 0; i < state.candidates; ++i)
      if (mine[i].low < state.threshold) compute(q, mine[i].index);
    state.candidates = 0;
  }

  void compute(int64_t q, int64_t key) {
    Query<T>& state = states_[q];
    const double rank =
        exact_rank(state.row, state.square, args_.keys.template row<T>(key), args_.keys.cols, args_.metric);
    if (is_finite(rank)) offer(found(q), buffers_.k, state.found, Found{rank, key});
  }

  const NearestKeys& args_;
  int64_t queries_;
  Buffers buffers_;
  Query<T>* states_;
};

// --- the screen by panels ----------------------------------------------------------------------------------------

// q' . k' of kTileQueries queries with `panels` panels, to products[query][key]. Not inlined: the accumulators need all
// registers, and what the caller does with its candidates would push them out.
template <int panels>
__attribute__((noinline)) void multiply(const float* queries, const float* keys, int64_t dim, float* products) {
  constexpr int vectors = panels * kVectorsPerPanel;
  F32 sum[kTileQueries][vectors];
#pragma GCC unroll 8
  for (int r = 0; r < kTileQueries; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) sum[r][v] = F32::zero();
  for (int64_t i = 0; i < dim; ++i) {
    F32 key[vectors];
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v)
      key[v] = F32::load(
          keys + (v / kVectorsPerPanel) * dim * kPanelKeys + i * kPanelKeys + (v % kVectorsPerPanel) * F32::lanes);
#pragma GCC unroll 8
    for (int r = 0; r < kTileQueries; ++r) {
      const F32 x = F32::set1(queries[i * kTileQueries + r]);
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) sum[r][v] = fma(x, key[v], sum[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kTileQueries; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) sum[r][v].store(products + (r * vectors + v) * F32::lanes);
}

// Offers the keys of one vector whose lower end is below the threshold.
template <class T>
__attribute__((noinline)) void consider_lanes(
    Task<T>& task, int64_t q, int64_t first_key, int64_t last_key, F32 low, uint32_t lanes, const PackedView<float>& panel,
    int64_t offset) {
  float lows[F32::lanes];
  low.store(lows);
  Query<T>& state = task[q];
  for (; lanes; lanes &= lanes - 1) {
    const int lane = __builtin_ctz(lanes);
    const int64_t key = first_key + lane;
    if (key >= last_key || !(lows[lane] < state.threshold)) continue;
    const double error = static_cast<double>(panel.slack[offset + lane]) +
                         static_cast<double>(state.norm) * static_cast<double>(panel.slope[offset + lane]);
    task.consider(q, key, lows[lane], static_cast<double>(lows[lane]) + 2.0 * error * 1.000001 + state.slack);
  }
}

// The first threshold of a query, k = 1: the smallest upper end of its first keys, so that they need not pass one by one.
template <class T>
float smallest_upper(const Query<T>& state, const float* products, const PackedView<float>& panel, int64_t keys) {
  const F32 norm = F32::set1(state.norm);
  F32 smallest = F32::set1(kInfinity);
  for (int64_t offset = 0; offset < keys; offset += F32::lanes) {
    const F32 slack = F32::load(panel.slack + offset);
    const F32 above = fma(norm, F32::load(panel.slope + offset), slack + slack);
    const F32 height = F32::load(panel.base + offset) - F32::load(products + offset);
    // high = score + norm slope + slack = height + above, to within roundings that the enlarged `above` and the last line
    // cover. A key that is left to the exact stage has a NaN here, which min ignores.
    smallest = min(fma(F32::set1(1.00001f), above, height), smallest);
  }
  float lanes[F32::lanes];
  smallest.store(lanes);
  double upper = static_cast<double>(kInfinity);
  for (const float lane : lanes) upper = static_cast<double>(lane) < upper ? static_cast<double>(lane) : upper;
  if (!(upper < 1e38)) return kInfinity;
  return round_up(upper + 0x1p-20 * __builtin_fabs(upper) + 64.0 * kTiny + state.slack);
}

// One tile: products, lower ends, candidates. `first_key` is the index of the first key of `panel`.
template <class T, int panels>
void screen_tile(
    Task<T>& task, int64_t first_query, const float* queries, const PackedView<float>& panel, int64_t dim,
    int64_t first_key, int64_t last_key) {
  constexpr int64_t keys = panels * kPanelKeys;
  alignas(64) float products[kTileQueries * keys];
  multiply<panels>(queries, panel.panels, dim, products);
  const int64_t count = smaller(kTileQueries, task.queries() - first_query);
  for (int64_t r = 0; r < count; ++r) {
    Query<T>& state = task[first_query + r];
    if (state.threshold == kInfinity && task.k() == 1 && first_key + keys <= last_key)
      state.threshold = smallest_upper(state, products + r * keys, panel, keys);
    const F32 norm = F32::set1(-state.norm);
    for (int64_t offset = 0; offset < keys; offset += F32::lanes) {
      const F32 height = F32::load(panel.base + offset) - F32::load(products + r * keys + offset);
      const F32 low = fma(norm, F32::load(panel.slope + offset), height);
      const M32 below = low < F32::set1(state.threshold);
      if (__builtin_expect(below.any(), 0))
        consider_lanes(task, first_query + r, first_key + offset, last_key, low, below.bits(), panel, offset);
    }
  }
}

template <class T>
void screen_panels(
    Task<T>& task, int64_t first_query, const float* queries, const PackedView<float>& panel, int64_t dim,
    int64_t first_key, int64_t last_key, int64_t panels) {
#if MEMAD_FAST_ISA_LEVEL == 2
  if (panels == 4) return screen_tile<T, 4>(task, first_query, queries, panel, dim, first_key, last_key);
#endif
  for (int64_t p = 0; p < panels; ++p)
    screen_tile<T, 1>(
        task, first_query, queries, panel_at(panel, p, dim), dim, first_key + p * kPanelKeys, last_key);
}

// Stages the queries of a block, interleaved by kTileQueries, and what the bound needs of each.
template <class T>
void stage_queries(
    const NearestKeys& args, int64_t first, int64_t count, const float* centre, const ErrorTerms& error, float* staged,
    float* interleaved, Query<T>* states) {
  const int64_t dim = args.query.cols;
  for (int64_t q = 0; q < ceil_div(count, kTileQueries) * kTileQueries; ++q) {
    float* tile = interleaved + q / kTileQueries * kTileQueries * dim + q % kTileQueries;
    bool screened = false;
    if (q < count) {
      Query<T>& state = states[q];
      state = {};
      state.row = args.query.row<T>(first + q);
      state.square = inner_product(state.row, state.row, dim);
      state.threshold = -kInfinity;
      if (is_finite(state.square)) {
        if (args.metric == Metric::l2) {
          stage_shifted(state.row, centre, dim, staged);
        } else {
          stage_scaled(state.row, args.metric == Metric::ip ? 1.0 : unit_scale(state.square), nullptr, dim, staged);
        }
        const double norm = norm_of(staged, dim) * (1.0 + 4.0 * kUnit32) + error.element;
        screened = norm < kLargestNorm;
        state.exact_only = !screened;
        if (screened) {
          state.norm = round_up(norm);
          state.slack = args.metric == Metric::l2 ? 4.0 * error.exact * norm * norm : 0.0;
          state.threshold = kInfinity;
        }
      }
    }
    for (int64_t i = 0; i < dim; ++i) tile[i * kTileQueries] = screened ? staged[i] : 0.0f;
  }
}

// --- the screen by rows: few queries, l2 -----------------------------------------------------------------------

// Sum of (q - k)^2 in float32: only relative errors, so it needs neither centre nor norms.
// `next` is fetched meanwhile: rows are short for the processor's own prefetcher.
template <class T>
inline float row_distance(const T* query, const T* key, const T* next, int64_t dim) {
  constexpr int kSums = 4;  // enough to hide the latency of the fma
  F32 sum[kSums] = {F32::zero(), F32::zero(), F32::zero(), F32::zero()};
  int64_t i = 0;
  for (; i + kSums * F32::lanes <= dim; i += kSums * F32::lanes)
#pragma GCC unroll 4
    for (int j = 0; j < kSums; ++j) {
      __builtin_prefetch(next + i + j * F32::lanes);
      const F32 d = F32::load(query + i + j * F32::lanes) - F32::load(key + i + j * F32::lanes);
      sum[j] = fma(d, d, sum[j]);
    }
  for (; i < dim; i += F32::lanes) {
    const int count = static_cast<int>(smaller(F32::lanes, dim - i));
    const F32 d = F32::load_first(query + i, count) - F32::load_first(key + i, count);
    sum[0] = fma(d, d, sum[0]);
  }
  return reduce_add((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

template <class T>
void screen_rows(Task<T>& task, const NearestKeys& args, int64_t first, int64_t last, const ErrorTerms& error) {
  const double low_factor = 1.0 - error.relative - 32.0 * error.exact;
  const double high_factor = 1.0 + 2.0 * error.relative + 32.0 * error.exact;
  for (int64_t key = first; key < last; ++key) {
    const T* row = args.keys.row<T>(key);
    const T* next = args.keys.row<T>(smaller(key + kRowsAhead, last - 1));
    for (int64_t q = 0; q < task.queries(); ++q) {
      const auto distance = static_cast<double>(row_distance(task[q].row, row, next, args.keys.cols));
      if (distance < 1e37 && is_finite(error.relative)) {
        const double low = distance * low_factor - error.absolute;
        if (low < static_cast<double>(task[q].threshold))
          task.consider(q, key, round_down(low), distance * high_factor + error.absolute);
      } else if (task[q].threshold > -kInfinity) {  // overflow, or not finite: the exact stage tells
        task.consider(q, key, -kInfinity, static_cast<double>(kInfinity));
      }
    }
  }
}

// --- tasks -------------------------------------------------------------------------------------------------------

struct Plan {
  bool row_wise;
  int64_t block;       // queries of a task
  int64_t blocks;
  int64_t range;       // keys of a task
  int64_t ranges;

  Plan(const NearestKeys& args, int threads) {
    const int64_t count = args.query.rows, dim = larger(args.query.cols, 1), searched = args.searched;
    row_wise = count <= kRowWiseQueries && args.metric == Metric::l2;
    int64_t most = smaller(kBlockQueries, kBlockBytes / (4 * dim));
    most = larger(smaller(most, kBlockBytes / Buffers::bytes_per_query(args.k)), kTileQueries);
    blocks = larger(ceil_div(count, most), smaller(threads, count / (args.packed ? kMinBlockQueries : kMinPackingQueries)));
    if (blocks > 1) blocks = ceil_div(blocks, threads) * threads;
    block = ceil_div(count, blocks);
    blocks = ceil_div(count, block);
    ranges = larger(1, smaller(threads / blocks, searched / kGroupKeys));
    range = larger(ceil_div(ceil_div(searched, ranges), kGroupKeys) * kGroupKeys, 1);
    ranges = larger(1, ceil_div(searched, range));
  }
};

void write_result(const NearestKeys& args, int64_t query, const Found* found, int64_t count) {
  float* distances = args.distances + query * args.k;
  int64_t* indices = args.indices + query * args.k;
  for (int64_t j = 0; j < args.k; ++j) {
    const bool exists = j < count;
    const double value = exists ? (args.metric == Metric::ip ? 0.0 - found[j].rank : found[j].rank) : __builtin_nan("");
    distances[j] = static_cast<float>(value);
    indices[j] = exists ? found[j].index : -1;
  }
}

template <class T>
void search(const NearestKeys& args, const ThreadLoop& loop) {
  const int64_t dim = args.query.cols, k = args.k;
  const Plan plan(args, loop.threads);
  const ErrorTerms error(dim);

  const Scratch own_centre(sizeof(float) * static_cast<size_t>(dim));
  PackedView<float> packed{own_centre.as<float>(), nullptr, nullptr, nullptr, nullptr};
  if (args.packed) {
    // The search only reads it.
    packed = packed_view<float>(const_cast<uint8_t*>(args.packed), args.keys.rows, dim);
  } else if (!plan.row_wise) {
    mean_key<T>(args.keys, args.metric, packed.centre);
  }
  const double centre_norm = plan.row_wise ? 0.0 : norm_of(packed.centre, dim);

  // Several ranges of keys leave their k best here, [query][range][k] with the counts, to be merged.
  const bool merged = plan.ranges > 1;
  const size_t partial = merged ? static_cast<size_t>(args.query.rows * plan.ranges) : 0;
  const Scratch partial_found(sizeof(Found) * partial * static_cast<size_t>(k));
  const Scratch partial_count(sizeof(int64_t) * partial);

  loop(plan.blocks * plan.ranges, 1, [&](int64_t begin, int64_t end) {
    const size_t block = static_cast<size_t>(ceil_div(plan.block, kTileQueries) * kTileQueries);
    const bool packs = !args.packed && !plan.row_wise;
    const Scratch interleaved(plan.row_wise ? 0 : sizeof(float) * block * static_cast<size_t>(dim));
    const Scratch staged(sizeof(float) * static_cast<size_t>(kPanelKeys * dim));
    const Scratch group(packs ? sizeof(float) * static_cast<size_t>(kGroupKeys * (dim + 3)) : 0);
    const Scratch states(sizeof(Query<T>) * block);
    const Scratch candidates(sizeof(Candidate) * block * static_cast<size_t>(Buffers::candidates_for(k)));
    const Scratch uppers(sizeof(float) * block * static_cast<size_t>(k));
    const Scratch found(sizeof(Found) * block * static_cast<size_t>(k));
    const Buffers buffers{
        k, Buffers::candidates_for(k), candidates.as<Candidate>(), uppers.as<float>(), found.as<Found>()};
    float* own = group.as<float>();
    const PackedView<float> own_group{
        packed.centre, own + 3 * kGroupKeys, own, own + kGroupKeys, own + 2 * kGroupKeys};

    for (int64_t t = begin; t < end; ++t) {
      const int64_t first_query = t / plan.ranges * plan.block;
      const int64_t queries = smaller(plan.block, args.query.rows - first_query);
      const int64_t first_key = t % plan.ranges * plan.range;
      const int64_t last_key = smaller(first_key + plan.range, args.searched);
      Task<T> task(args, queries, buffers, states.as<Query<T>>());
      if (plan.row_wise) {
        for (int64_t q = 0; q < queries; ++q) {
          Query<T>& state = task[q];
          state = {};
          state.row = args.query.row<T>(first_query + q);
          state.square = inner_product(state.row, state.row, dim);
          state.threshold = is_finite(state.square) ? kInfinity : -kInfinity;
        }
        screen_rows(task, args, first_key, last_key, error);
      } else {
        stage_queries(
            args, first_query, queries, packed.centre, error, staged.as<float>(), interleaved.as<float>(), &task[0]);
        for (int64_t key = first_key; key < last_key; key += kGroupKeys) {
          const int64_t panels = smaller(kGroupPanels, ceil_div(last_key - key, kPanelKeys));
          PackedView<float> view = own_group;
          if (packs) {
            for (int64_t p = 0; p < panels; ++p)
              pack_panel<T>(
                  args.keys, key / kPanelKeys + p, packed.centre, centre_norm, args.metric, error, staged.as<float>(),
                  panel_at(own_group, p, dim));
          } else {
            view = panel_at(packed, key / kPanelKeys, dim);
          }
          for (int64_t q = 0; q < queries; q += kTileQueries)
            screen_panels(task, q, interleaved.as<float>() + q * dim, view, dim, key, last_key, panels);
        }
      }
      for (int64_t q = 0; q < queries; ++q) {
        task.finish(q, first_key, last_key);
        if (merged) {
          const int64_t slot = (first_query + q) * plan.ranges + t % plan.ranges;
          partial_count.as<int64_t>()[slot] = task[q].found;
          std::memcpy(
              partial_found.as<Found>() + slot * k, task.found(q), sizeof(Found) * static_cast<size_t>(task[q].found));
        } else {
          write_result(args, first_query + q, task.found(q), task[q].found);
        }
      }
    }
  });
  if (!merged) return;

  loop(args.query.rows, 64, [&](int64_t begin, int64_t end) {
    const Scratch memory(sizeof(Found) * static_cast<size_t>(k));
    Found* best = memory.as<Found>();
    for (int64_t q = begin; q < end; ++q) {
      int64_t count = 0;
      for (int64_t slot = q * plan.ranges; slot < (q + 1) * plan.ranges; ++slot)
        for (int64_t j = 0; j < partial_count.as<int64_t>()[slot]; ++j)
          offer(best, k, count, partial_found.as<Found>()[slot * k + j]);
      sort_heap(best, count);
      write_result(args, q, best, count);
    }
  });
}

}  // namespace

void nearest_keys(const NearestKeys& args, const ThreadLoop& loop) {
  if (args.query.rows == 0) return;
  MEMAD_FAST_BY_DTYPE(args.query.dtype, scalar, search<scalar>(args, loop);)
}

}  // namespace MEMAD_FAST_ISA
}  // namespace memad_fast
