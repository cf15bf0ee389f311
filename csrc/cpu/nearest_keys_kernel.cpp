// One level of nearest_keys (see nearest_keys.h and README_nearest_keys.md). Compiled once per vector width; the products of
// codes come from a dot kernel of the instruction set in force.
//
// Work is cut into tasks: a block of queries x a range of keys. A task walks its keys in groups of 64:
//
//             64 keys [steps][64][4]             a tile: 6 queries x 64 keys (AVX-512), all of dim in registers,
//             ┌─────────────────────┐            one broadcast, four loads and 24 dot products for four dimensions
//   6 queries │         tile        │
//   [dim]     └─────────────────────┘
//   next 6    ...
//
// The group stays in the L1 or L2 cache while all queries of the block pass over it; queries stream. Each score is
// compared with its query's threshold as it leaves the registers, and only the few below become candidates.
// Unprepared keys are packed group by group into the thread's own scratch.
// Bytes from memory: the codes once per block of queries (up to 4,096), the queries once per group.
//
// Queries that keep too many candidates are screened again by float32 panels (tiles of 6 queries x 64 keys, one
// broadcast and four fma a dimension), which are packed from the original rows for them alone.
#include "cpu/nearest_keys_codes.h"
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

constexpr int64_t kGroupPanels = kGroupKeys / kPanelKeys;
constexpr int kVectorsPerGroup = static_cast<int>(kGroupKeys) / F32::lanes;
constexpr int kMostTileQueries = 32;  // of any dot kernel
constexpr int64_t kLine = 64;         // of the cache

constexpr int64_t kBlockQueries = 4096;
constexpr int64_t kBlockBytes = int64_t{2} << 20;  // of staged queries, and of their candidates
constexpr int64_t kMinBlockQueries = 96;           // below it, threads share the keys rather than the queries
constexpr int64_t kMinPackingQueries = 1024;       // the same where every task packs its keys itself
constexpr int64_t kRowsAhead = 2;                  // of prefetch in the row-wise screen
constexpr int64_t kRowWiseQueries = 8;             // so few are faster without packing: one pass over the rows
constexpr int64_t kBudgetShare = 16;               // one key in so many may codes leave to float64 before the full path
constexpr int64_t kMinPanelQueries = 8;            // for fewer, panels cost more to pack than float64 to compute

// --- the exact stage ---------------------------------------------------------------------------------------------

// What sorts: smaller is better, then the lower index.
struct Found {
  double rank;
  int64_t index;
};

inline bool better(const Found& a, const Found& b) { return a.rank < b.rank || (a.rank == b.rank && a.index < b.index); }
inline bool better(float a, float b) { return a < b; }

struct Candidate {
  float low;  // lower end of the score
  int64_t index;
};

// Reversed: the most promising is on top of a heap.
inline bool better(const Candidate& a, const Candidate& b) { return a.low > b.low; }

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

// What every score of a query needs of it. All else is apart, so that the queries of a block stay in the cache.
struct Side {
  float scale = 0.0f;            // of its codes
  float norm = 0.0f;             // upper end of the staged norm
  float residual = 0.0f;         // upper end of the norm of what its codes leave out
  float threshold = -kInfinity;  // a key whose lower end is not below it is not among the k nearest
};

// Buffers of one block of queries; query q has a stretch of each.
struct Buffers {
  int64_t k;
  int64_t capacity;  // candidates a query
  Side* sides;
  Candidate* candidates;
  float* uppers;  // heap of the k smallest upper ends
  Found* found;   // heap of the k best, exactly

  static int64_t candidates_for(int64_t k) { return 32 + 4 * smaller(k, 512); }
  static int64_t bytes_per_query(int64_t k) {
    return candidates_for(k) * static_cast<int64_t>(sizeof(Candidate)) + k * static_cast<int64_t>(sizeof(float) + sizeof(Found));
  }
};

// How a query is searched.
enum class Path {
  none,    // it has no neighbours: not finite
  rows,    // screened by float32 distances
  codes,   // screened by integer scores
  panels,  // screened by float32 scores: codes kept too many keys, or cannot hold it
  exact,   // every key in float64: float32 cannot hold it either
};

template <class T>
struct Query {
  const T* row = nullptr;
  StagedQuery staged;
  Path path = Path::none;
  float resume = kInfinity;  // the threshold with which panels go on
  int64_t candidates = 0, uppers = 0, found = 0;
  int64_t computed = 0;  // keys, in float64
};

template <class T>
class Task {
 public:
  Task(
      const NearestKeys& args, const ErrorTerms& error, int64_t first_query, int64_t queries, int64_t first_key,
      bool owns_earlier, const Buffers& buffers, Query<T>* states)
      : args_(args), error_(error), first_query_(first_query), queries_(queries), first_key_(first_key),
        owns_earlier_(owns_earlier), buffers_(buffers), states_(states) {}

  Query<T>& operator[](int64_t q) { return states_[q]; }
  Side& side(int64_t q) { return buffers_.sides[q]; }
  int64_t queries() const { return queries_; }
  int64_t skipped() const { return args_.skipped; }
  int64_t k() const { return buffers_.k; }

  // What an upper end of a score has to include of the float64 stage's error, beside the key's part.
  double slack(const Side& side) const {
    const auto norm = static_cast<double>(side.norm);
    return 4.0 * error_.exact * norm * norm + error_.absolute;
  }

  // Key `index` has a score of at least `low`, which is below the threshold.
  void add(int64_t q, int64_t index, float low) {
    Query<T>& state = states_[q];
    if (state.candidates == buffers_.capacity) {
      make_room(q, index);
      if (!(low < side(q).threshold)) return;
    }
    buffers_.candidates[q * buffers_.capacity + state.candidates++] = {low, index};
  }

  // Some key has a score of at most `high`.
  void lower_threshold(int64_t q, double high) {
    Query<T>& state = states_[q];
    const float upper = high < 1e38 ? round_up(high) : kInfinity;
    if (buffers_.k == 1) {
      if (upper < side(q).threshold) side(q).threshold = upper;
      return;
    }
    float* uppers = buffers_.uppers + q * buffers_.k;
    offer(uppers, buffers_.k, state.uppers, upper);
    if (state.uppers == buffers_.k && uppers[0] < side(q).threshold) side(q).threshold = uppers[0];
  }

  // Computes the candidates of query q that are left, the most promising first.
  void compute_candidates(int64_t q) {
    Query<T>& state = states_[q];
    Candidate* heap = buffers_.candidates + q * buffers_.capacity;
    int64_t left = drop_candidates(q);
    for (int64_t at = left / 2; at-- > 0;) sink(heap, left, at, heap[at]);
    while (left > 0 && heap[0].low < side(q).threshold) {
      const int64_t key = heap[0].index;
      const Candidate last = heap[--left];
      if (left > 0) {
        sink(heap, left, 0, last);
        fetch(heap[0].index);
      }
      compute(q, key);
    }
    state.candidates = 0;
  }

  void compute_all(int64_t q, int64_t first, int64_t last) {
    for (int64_t key = first; key < last; ++key) compute(q, key);
  }

  // Forgets all that codes found of query q but the threshold, which stays an upper end.
  void restart(int64_t q) {
    Query<T>& state = states_[q];
    state.candidates = state.uppers = state.found = 0;
    side(q).threshold = state.resume;
    go_on(q);
  }

  // Takes over what earlier searches found of query q. Of several tasks that share it the first keeps it; the threshold
  // serves them all.
  void go_on(int64_t q) {
    if (!args_.ranks) return;
    Query<T>& state = states_[q];
    const int64_t slot = (first_query_ + q) * buffers_.k;
    int64_t count = 0;
    for (; count < buffers_.k && args_.indices[slot + count] >= 0; ++count)
      if (owns_earlier_)
        offer(found(q), buffers_.k, state.found, Found{args_.ranks[slot + count], args_.indices[slot + count] - args_.offset});
    if (count == buffers_.k) lower_to_exact(q, args_.ranks[slot + count - 1]);
  }

  // What was found, best first.
  Found* finish(int64_t q) {
    Found* mine = found(q);
    sort_heap(mine, states_[q].found);
    return mine;
  }

 private:
  Found* found(int64_t q) { return buffers_.found + q * buffers_.k; }

  void fetch(int64_t key) const {
    const auto* row = reinterpret_cast<const char*>(args_.keys.template row<T>(key));
    for (int64_t i = 0; i < args_.keys.cols * static_cast<int64_t>(sizeof(T)); i += kLine) __builtin_prefetch(row + i);
  }

  // Forgets those that the threshold has overtaken. Returns how many are left.
  int64_t drop_candidates(int64_t q) {
    Query<T>& state = states_[q];
    Candidate* mine = buffers_.candidates + q * buffers_.capacity;
    int64_t kept = 0;
    for (int64_t i = 0; i < state.candidates; ++i) {
      mine[kept] = mine[i];
      kept += mine[i].low < side(q).threshold;
    }
    return state.candidates = kept;
  }

  // The keys before `index` have filled the buffer of query q. If codes cannot decide them, float32 will: that costs as
  // much as computing one key in eight in float64.
  void make_room(int64_t q, int64_t index) {
    Query<T>& state = states_[q];
    const int64_t kept = drop_candidates(q);
    if (2 * kept <= buffers_.capacity) return;
    const int64_t allowed = buffers_.capacity + (index - first_key_) / kBudgetShare;
    if (state.path == Path::codes && state.computed + kept > allowed) {
      state.path = Path::panels;
      state.resume = side(q).threshold;
      side(q).threshold = -kInfinity;
      state.candidates = 0;
    } else {
      compute_candidates(q);
    }
  }

  void compute(int64_t q, int64_t key) {
    Query<T>& state = states_[q];
    ++state.computed;
    const double rank =
        exact_rank(state.row, state.staged.square, args_.keys.template row<T>(key), args_.keys.cols, args_.metric);
    if (!is_finite(rank)) return;
    offer(found(q), buffers_.k, state.found, Found{rank, key});
    if (state.found == buffers_.k) lower_to_exact(q, found(q)[0].rank);
  }

  // Some k keys have an exact value of at most `worst`.
  void lower_to_exact(int64_t q, double worst) {
    const Query<T>& state = states_[q];
    // The error of an inner product is not known from its value.
    if (args_.metric == Metric::ip || !state.staged.screened) return;
    const double upper = args_.metric == Metric::l2 ? 0.5 * worst * (1.0 + 16.0 * error_.exact) : worst + 16.0 * error_.exact;
    const double high = upper + state.staged.shift;
    if (high < static_cast<double>(side(q).threshold)) side(q).threshold = round_up(high);
  }

  const NearestKeys& args_;
  const ErrorTerms& error_;
  int64_t first_query_, queries_, first_key_;
  bool owns_earlier_;  // what earlier searches found
  Buffers buffers_;
  Query<T>* states_;
};

// --- the screen by codes -----------------------------------------------------------------------------------------

// The keys of one vector.
struct KeySide {
  F32 base, scale, residual, norm;

  KeySide(const KeyCodes& group, int64_t offset)
      : base(F32::load(group.base + offset)), scale(F32::load(group.scale + offset)),
        residual(F32::load(group.residual + offset)), norm(F32::load(group.norm + offset)) {}
};

// The lower end of a score, from its integer product.
inline F32 low_end(const Side& query, const KeySide& key, const int32_t* products) {
  F32 low = fnma(F32::set1(query.scale), to_f32(I32::load(products)) * key.scale, key.base);
  low = fnma(F32::set1(query.norm), key.residual, low);
  return fnma(F32::set1(query.residual), key.norm, low);
}

// An upper end of the smallest score of a group, from the lower ends.
inline float smallest_upper(const Side& query, double slack, const KeyCodes& group, const F32* lows) {
  F32 smallest = F32::set1(kInfinity);
  for (int v = 0; v < kVectorsPerGroup; ++v) {
    const KeySide key(group, v * F32::lanes);
    F32 error = fma(F32::set1(query.norm), key.residual, F32::load(group.slack + v * F32::lanes));
    error = fma(F32::set1(query.residual), key.norm, error);
    // low + 2 error, to within roundings that the enlarged error and the last line cover. A key that is left to the
    // exact stage has a NaN here, which min ignores.
    smallest = min(fma(F32::set1(2.00002f), error, lows[v]), smallest);
  }
  const auto upper = static_cast<double>(reduce_min(smallest));
  if (!(upper < 1e38)) return kInfinity;
  return round_up(upper + 0x1p-20 * __builtin_fabs(upper) + 64.0 * kTiny + slack);
}

// An upper end of the score of key `offset` of a group, from its lower end.
inline double upper_end(const Side& query, double slack, const KeyCodes& group, int64_t offset, float low) {
  const double error = static_cast<double>(group.slack[offset]) +
                       static_cast<double>(query.norm) * static_cast<double>(group.residual[offset]) +
                       static_cast<double>(query.residual) * static_cast<double>(group.norm[offset]);
  return static_cast<double>(low) + 2.0 * error * 1.000001 + slack;
}

// The keys of a group whose lower end is below the threshold, one bit each.
inline uint64_t lanes_below(const F32* low, float threshold) {
  uint64_t below = 0;
  for (int v = 0; v < kVectorsPerGroup; ++v)
    below |= uint64_t{(low[v] < F32::set1(threshold)).bits()} << (v * F32::lanes);
  return below;
}

// Adds the keys of a group whose lower end is below the threshold, and lowers it. Where there are many (the first group),
// the smallest upper end of all comes first, so that few pass.
template <class T>
__attribute__((noinline)) void consider_group(
    Task<T>& task, int64_t q, int64_t first_key, int64_t last_key, const int32_t* products, const KeyCodes& group) {
  constexpr int many = 4;
  Side& side = task.side(q);
  const double slack = task.slack(side);
  const int64_t count = smaller(kGroupKeys, last_key - first_key);
  alignas(64) float lows[kGroupKeys];
  F32 low[kVectorsPerGroup];
  for (int v = 0; v < kVectorsPerGroup; ++v) {
    low[v] = low_end(side, KeySide(group, v * F32::lanes), products + v * F32::lanes);
    low[v].store(lows + v * F32::lanes);
  }
  uint64_t below = lanes_below(low, side.threshold);
  if (count < kGroupKeys || first_key < task.skipped()) {
    if (count < kGroupKeys) below &= (uint64_t{1} << count) - 1;
    if (first_key < task.skipped()) below &= ~uint64_t{0} << (task.skipped() - first_key);
  } else if (task.k() == 1 && __builtin_popcountll(below) > many) {
    const float upper = smallest_upper(side, slack, group, low);
    if (upper < side.threshold) side.threshold = upper;
    below = lanes_below(low, side.threshold);
  }
  for (; below; below &= below - 1) {
    const int j = __builtin_ctzll(below);
    if (!(lows[j] < side.threshold)) continue;
    task.add(q, first_key + j, lows[j]);
    task.lower_threshold(q, upper_end(side, slack, group, j, lows[j]));
  }
}

// Whether a query has a lower end below its threshold in a group, for `queries` of them, which share the loads of the keys'
// numbers.
template <int queries>
inline void reaches_below(const Side* sides, const int32_t* products, const KeyCodes& group, bool* below) {
  F32 smallest[queries];
#pragma GCC unroll 4
  for (int r = 0; r < queries; ++r) smallest[r] = F32::set1(kInfinity);
#pragma GCC unroll 16
  for (int v = 0; v < kVectorsPerGroup; ++v) {
    const KeySide key(group, v * F32::lanes);
#pragma GCC unroll 4
    for (int r = 0; r < queries; ++r)
      smallest[r] = min(low_end(sides[r], key, products + r * kGroupKeys + v * F32::lanes), smallest[r]);
  }
#pragma GCC unroll 4
  for (int r = 0; r < queries; ++r) below[r] = (smallest[r] < F32::set1(sides[r].threshold)).any();
}

template <class T>
void screen_products(
    Task<T>& task, int64_t first_query, int64_t count, const int32_t* products, const KeyCodes& group,
    int64_t first_key, int64_t last_key) {
  constexpr int together = 2;
  for (int64_t r = 0; r < count; r += together) {
    bool below[together] = {};
    const Side* sides = &task.side(first_query + r);
    if (count - r >= together) {
      reaches_below<together>(sides, products + r * kGroupKeys, group, below);
    } else {
      reaches_below<1>(sides, products + r * kGroupKeys, group, below);
    }
    for (int i = 0; i < together; ++i)
      if (__builtin_expect(below[i], 0))
        consider_group(task, first_query + r + i, first_key, last_key, products + (r + i) * kGroupKeys, group);
  }
}

// Screens one group, and meanwhile fetches the `next_bytes` behind its codes, some lines for each tile.
template <class T>
void screen_codes(
    Task<T>& task, const DotKernel& dot, const uint8_t* queries, int64_t stride, int64_t steps, const KeyCodes& group,
    int64_t first_key, int64_t last_key, int64_t next_bytes) {
  alignas(64) int32_t products[kMostTileQueries * kGroupKeys];
  const int8_t* next = group.codes + steps * kStepBytes;
  const int8_t* fetched = next;
  int64_t q = 0;
  while (q < task.queries()) {
    // A tile costs as much as a few single queries.
    const int64_t left = task.queries() - q;
    const bool tile = 4 * left > dot.queries;
    const DotGroup rows{queries + q * stride, stride, group.codes, group.sum, steps, products};
    const int64_t count = tile ? smaller(left, dot.queries) : 1;
    (tile ? dot.tile : dot.single)(rows);
    screen_products(task, q, count, products, group, first_key, last_key);
    q += count;
    for (; fetched < next + next_bytes * q / task.queries(); fetched += kLine) __builtin_prefetch(fetched, 0, 2);
  }
}

// Stages the queries of a block as codes, and what the bound needs of each.
template <class T>
void stage_codes(
    const NearestKeys& args, const DotKernel& dot, int64_t first, const float* centre, double centre_norm,
    const ErrorTerms& error, float* staged, uint8_t* codes, int64_t stride, Task<T>& task) {
  const int64_t dim = args.query.cols, count = task.queries();
  for (int64_t q = 0; q < ceil_div(count, dot.queries) * dot.queries; ++q) {
    uint8_t* row = codes + q * stride;
    int64_t coded = 0;
    if (q < count) {
      Query<T>& state = task[q];
      Side& side = task.side(q);
      state = {};
      side = {};
      state.row = args.query.row<T>(first + q);
      state.staged = stage_query(state.row, centre, centre_norm, dim, args.metric, error, staged);
      if (state.staged.screened) {
        side.norm = round_up(state.staged.norm);
        state.path = dim <= kMaxDotDim ? Path::codes : Path::panels;
      } else if (state.staged.finite) {
        state.path = Path::exact;
      }
      if (state.path == Path::codes) {
        const Codes quantised = quantise(staged, dim, dot.levels, dot.offset, row);
        side.scale = quantised.scale;
        side.residual = round_up(residual_above(quantised, state.staged.norm, error));
        side.threshold = kInfinity;
        coded = staged_dim(dim);
      }
    }
    std::memset(row + coded, dot.offset, static_cast<size_t>(stride - coded));
  }
}

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
    Task<T>& task, int64_t q, int64_t first_key, int64_t last_key, F32 low, uint32_t lanes, const Panels& panel,
    int64_t offset) {
  float lows[F32::lanes];
  low.store(lows);
  const Side& side = task.side(q);
  for (; lanes; lanes &= lanes - 1) {
    const int lane = __builtin_ctz(lanes);
    const int64_t key = first_key + lane;
    if (key >= last_key || key < task.skipped() || !(lows[lane] < side.threshold)) continue;
    const double error = static_cast<double>(panel.slack[offset + lane]) +
                         static_cast<double>(side.norm) * static_cast<double>(panel.slope[offset + lane]);
    task.add(q, key, lows[lane]);
    task.lower_threshold(q, static_cast<double>(lows[lane]) + 2.0 * error * 1.000001 + task.slack(side));
  }
}

// One tile of the queries that `which` lists: products, lower ends, candidates. `first_key` is the first of `panel`.
template <class T, int panels>
void screen_tile(
    Task<T>& task, const int64_t* which, int64_t count, const float* queries, const Panels& panel, int64_t dim,
    int64_t first_key, int64_t last_key) {
  constexpr int64_t keys = panels * kPanelKeys;
  alignas(64) float products[kTileQueries * keys];
  multiply<panels>(queries, panel.panels, dim, products);
  for (int64_t r = 0; r < count; ++r) {
    const Side& side = task.side(which[r]);
    const F32 norm = F32::set1(side.norm);
    for (int64_t offset = 0; offset < keys; offset += F32::lanes) {
      const F32 height = F32::load(panel.base + offset) - F32::load(products + r * keys + offset);
      const F32 low = fnma(norm, F32::load(panel.slope + offset), height);
      const M32 below = low < F32::set1(side.threshold);
      if (__builtin_expect(below.any(), 0))
        consider_lanes(task, which[r], first_key + offset, last_key, low, below.bits(), panel, offset);
    }
  }
}

// Searches the queries that `which` lists among keys [first, last), in passes of as many as kBlockBytes hold.
template <class T>
void search_panels(
    Task<T>& task, const NearestKeys& args, const int64_t* which, int64_t count, const float* centre,
    double centre_norm, const ErrorTerms& error, int64_t first, int64_t last) {
  const int64_t dim = args.query.cols, row = staged_dim(dim);
  const int64_t most = larger(kBlockBytes / (4 * larger(dim, 1)) / kTileQueries, 1) * kTileQueries;
  const int64_t rows = smaller(most, ceil_div(count, kTileQueries) * kTileQueries);
  const Scratch interleaved(sizeof(float) * static_cast<size_t>(rows * dim));
  const Scratch staged(sizeof(float) * static_cast<size_t>(kPanelKeys * row));
  const Scratch group(sizeof(float) * static_cast<size_t>(kGroupKeys * (dim + 3)));
  float* own = group.as<float>();
  const Panels panels{own + 3 * kGroupKeys, own, own + kGroupKeys, own + 2 * kGroupKeys};
  for (int64_t begin = 0; begin < count; begin += rows, which += rows) {
    const int64_t queries = smaller(rows, count - begin);
    for (int64_t q = 0; q < ceil_div(queries, kTileQueries) * kTileQueries; ++q) {
      float* tile = interleaved.as<float>() + q / kTileQueries * kTileQueries * dim + q % kTileQueries;
      if (q < queries) {
        stage_query(task[which[q]].row, centre, centre_norm, dim, args.metric, error, staged.as<float>());
        task.restart(which[q]);
      }
      for (int64_t i = 0; i < dim; ++i) tile[i * kTileQueries] = q < queries ? staged.as<float>()[i] : 0.0f;
    }
    for (int64_t key = first; key < last; key += kGroupKeys) {
      const int64_t count_panels = smaller(kGroupPanels, ceil_div(last - key, kPanelKeys));
      for (int64_t p = 0; p < count_panels; ++p)
        pack_panel<T>(
            args.keys, key + p * kPanelKeys, centre, centre_norm, args.metric, error, staged.as<float>(),
            panels.from(p * kPanelKeys, dim));
      for (int64_t q = 0; q < queries; q += kTileQueries) {
        const float* tile = interleaved.as<float>() + q * dim;
        const int64_t left = smaller(kTileQueries, queries - q);
        if (count_panels == kTilePanels) {
          screen_tile<T, kTilePanels>(task, which + q, left, tile, panels, dim, key, last);
        } else {
          for (int64_t p = 0; p < count_panels; ++p)
            screen_tile<T, 1>(
                task, which + q, left, tile, panels.from(p * kPanelKeys, dim), dim, key + p * kPanelKeys, last);
        }
      }
    }
    for (int64_t q = 0; q < queries; ++q) task.compute_candidates(which[q]);
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
void stage_rows(const NearestKeys& args, int64_t first, Task<T>& task) {
  for (int64_t q = 0; q < task.queries(); ++q) {
    Query<T>& state = task[q];
    state = {};
    task.side(q) = {};
    state.row = args.query.row<T>(first + q);
    state.staged.finite = is_finite(inner_product(state.row, state.row, args.query.cols));
    if (!state.staged.finite) continue;
    state.path = Path::rows;
    task.side(q).threshold = kInfinity;
  }
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
        if (!(low < static_cast<double>(task.side(q).threshold))) continue;
        task.add(q, key, round_down(low));
        task.lower_threshold(q, distance * high_factor + error.absolute);
      } else if (task.side(q).threshold > -kInfinity) {  // overflow, or not finite: the exact stage tells
        task.add(q, key, -kInfinity);
      }
    }
  }
}

// --- tasks -------------------------------------------------------------------------------------------------------

struct Plan {
  bool row_wise;
  int64_t block;       // queries of a task
  int64_t blocks;
  int64_t start;       // the first group that is not skipped
  int64_t range;       // keys of a task
  int64_t ranges;

  Plan(const NearestKeys& args, int64_t query_bytes, int threads) {
    const int64_t count = args.query.rows;
    start = args.skipped / kGroupKeys * kGroupKeys;
    const int64_t searched = larger(args.searched - start, 0);
    row_wise = !args.packed && count <= kRowWiseQueries && args.metric == Metric::l2;
    const int64_t bytes = larger(query_bytes, Buffers::bytes_per_query(args.k));
    const int64_t most = larger(smaller(kBlockQueries, kBlockBytes / bytes), kMostTileQueries);
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
  const bool negated = args.metric == Metric::ip && !args.ranks;
  for (int64_t j = 0; j < args.k; ++j) {
    const int64_t slot = query * args.k + j;
    const bool exists = j < count;
    const double value = exists ? (negated ? 0.0 - found[j].rank : found[j].rank) : __builtin_nan("");
    if (args.ranks) {
      args.ranks[slot] = value;
    } else {
      args.distances[slot] = static_cast<float>(value);
    }
    args.indices[slot] = exists ? found[j].index + args.offset : -1;
  }
}

// What one task found of a query.
struct Part {
  int64_t found, computed;
  bool full_path;
};

void write_counts(const NearestKeys& args, int64_t query, int64_t computed, bool full_path) {
  if (args.survivors) args.survivors[query] = computed;
  if (args.full_path) args.full_path[query] = full_path;
}

template <class T>
void search(const NearestKeys& args, const DotKernel& dot, const ThreadLoop& loop) {
  const int64_t dim = args.query.cols, k = args.k, steps = code_steps(dim);
  const int64_t stride = larger(ceil_div(dim, kQueryAlignment), 1) * kQueryAlignment;
  const Plan plan(args, stride, loop.threads);
  const ErrorTerms error(dim);

  const Scratch own_centre(sizeof(float) * static_cast<size_t>(staged_dim(dim)));
  const float* centre = own_centre.as<float>();
  KeyCodes packed{};
  if (args.packed) {
    const PackedLayout layout(args.keys.rows, dim);
    uint8_t* buffer = const_cast<uint8_t*>(args.packed);  // the search only reads it
    centre = packed_centre(buffer, layout);
    packed = packed_codes(buffer, layout);
  } else if (!plan.row_wise) {
    mean_key<T>(args.keys, args.metric, own_centre.as<float>());
  }
  const double centre_norm = plan.row_wise ? 0.0 : norm_of(centre, dim);

  // Several ranges of keys leave their k best here, [query][range][k] with the counts, to be merged.
  const bool merged = plan.ranges > 1;
  const size_t partial = merged ? static_cast<size_t>(args.query.rows * plan.ranges) : 0;
  const Scratch partial_found(sizeof(Found) * partial * static_cast<size_t>(k));
  const Scratch partial_counts(sizeof(Part) * partial);

  loop(plan.blocks * plan.ranges, 1, [&](int64_t begin, int64_t end) {
    const bool packs = !args.packed && !plan.row_wise;
    const auto block = static_cast<size_t>(ceil_div(plan.block, dot.queries) * dot.queries);
    const Scratch codes(plan.row_wise ? 0 : block * static_cast<size_t>(stride));
    const Scratch room(static_cast<size_t>(pack_scratch_bytes(dim)));
    const Scratch numbers(packs ? 6 * sizeof(float) * kGroupKeys : 0);
    const Scratch group_codes(packs ? static_cast<size_t>(steps * kStepBytes + kGroupOverrun) : 0);
    const Scratch states(sizeof(Query<T>) * block);
    const Scratch sides(sizeof(Side) * block);
    const Scratch which(sizeof(int64_t) * block);
    const Scratch candidates(sizeof(Candidate) * block * static_cast<size_t>(Buffers::candidates_for(k)));
    const Scratch uppers(sizeof(float) * block * static_cast<size_t>(k));
    const Scratch found(sizeof(Found) * block * static_cast<size_t>(k));
    const Buffers buffers{
        k, Buffers::candidates_for(k), sides.as<Side>(), candidates.as<Candidate>(), uppers.as<float>(), found.as<Found>()};
    const KeyCodes own_group = key_codes(numbers.as<float>(), kGroupKeys, group_codes.as<int8_t>());

    for (int64_t t = begin; t < end; ++t) {
      const int64_t first_query = t / plan.ranges * plan.block;
      const int64_t queries = smaller(plan.block, args.query.rows - first_query);
      const int64_t first_key = plan.start + t % plan.ranges * plan.range;
      const int64_t last_key = smaller(first_key + plan.range, args.searched);
      Task<T> task(args, error, first_query, queries, first_key, t % plan.ranges == 0, buffers, states.as<Query<T>>());
      if (plan.row_wise) {
        stage_rows(args, first_query, task);
        for (int64_t q = 0; q < queries; ++q) task.go_on(q);
        screen_rows(task, args, larger(first_key, args.skipped), last_key, error);
      } else {
        stage_codes(
            args, dot, first_query, centre, centre_norm, error, room.as<float>(), codes.as<uint8_t>(), stride, task);
        for (int64_t q = 0; q < queries; ++q) task.go_on(q);
        for (int64_t key = first_key; key < last_key; key += kGroupKeys) {
          const KeyCodes group = packs ? own_group : packed.from(key, steps);
          if (packs) pack_group<T>(args.keys, key, centre, centre_norm, args.metric, error, room.as<void>(), group);
          const int64_t next_bytes = packs || key + kGroupKeys >= last_key ? 0 : steps * kStepBytes;
          screen_codes(task, dot, codes.as<uint8_t>(), stride, steps, group, key, last_key, next_bytes);
        }
      }
      int64_t left = 0;
      for (int64_t q = 0; q < queries; ++q) {
        task.compute_candidates(q);
        if (task[q].path == Path::panels) which.as<int64_t>()[left++] = q;
      }
      const bool panels = left >= kMinPanelQueries;
      if (panels)
        search_panels(task, args, which.as<int64_t>(), left, centre, centre_norm, error, first_key, last_key);
      for (int64_t q = 0; q < queries; ++q) {
        if (task[q].path == Path::exact || (task[q].path == Path::panels && !panels)) {
          task.restart(q);
          task.compute_all(q, larger(first_key, args.skipped), last_key);
        }
        const Query<T>& state = task[q];
        const Found* best = task.finish(q);
        const bool full = state.path == Path::panels || state.path == Path::exact;
        if (merged) {
          const int64_t slot = (first_query + q) * plan.ranges + t % plan.ranges;
          partial_counts.as<Part>()[slot] = {state.found, state.computed, full};
          std::memcpy(partial_found.as<Found>() + slot * k, best, sizeof(Found) * static_cast<size_t>(state.found));
        } else {
          write_result(args, first_query + q, best, state.found);
          write_counts(args, first_query + q, state.computed, full);
        }
      }
    }
  });
  if (!merged) return;

  loop(args.query.rows, 64, [&](int64_t begin, int64_t end) {
    const Scratch memory(sizeof(Found) * static_cast<size_t>(k));
    Found* best = memory.as<Found>();
    for (int64_t q = begin; q < end; ++q) {
      int64_t count = 0, computed = 0;
      bool full_path = false;
      for (int64_t slot = q * plan.ranges; slot < (q + 1) * plan.ranges; ++slot) {
        const Part& part = partial_counts.as<Part>()[slot];
        computed += part.computed;
        full_path = full_path || part.full_path;
        for (int64_t j = 0; j < part.found; ++j) offer(best, k, count, partial_found.as<Found>()[slot * k + j]);
      }
      sort_heap(best, count);
      write_result(args, q, best, count);
      write_counts(args, q, computed, full_path);
    }
  });
}

}  // namespace

void nearest_keys(const NearestKeys& args, const DotKernel& dot, const ThreadLoop& loop) {
  if (args.query.rows == 0) return;
  MEMAD_FAST_BY_DTYPE(args.query.dtype, scalar, search<scalar>(args, dot, loop);)
}

}  // namespace MEMAD_FAST_ISA
}  // namespace memad_fast
