// One level of gumbel_topk's forward (see gumbel_topk.h). Compiled once per instruction set.
//
//   score = query . memory + noise,  top-k by (score descending, column ascending),  read = sum of weight * row
//
// Tasks are (chunk of rows, run of column segments); most calls need one run. A task meets its columns in strips of 256:
//
//   product of the chunk and the strip -> per row: bounds of the noise -> survivors -> their noise -> the row's k best
//
// Work per (row, column): D multiply-adds; per vector of columns D instructions for them, 27 for Philox, 8 for a bound of
// the noise, 2 to compare it. The two logarithms (45) are left to scores whose bound reaches the k-th best so far: a
// comparison of float32 values that are proven to lie on the right side, so nothing that could enter is skipped.
#include "cpu/gumbel_topk_tile.h"

namespace memad_fast {
namespace MEMAD_FAST_ISA {
namespace {

constexpr int kStripGroups = 4, kStrip = kStripGroups * kGroup;

// Softmax sums are closed every 1,024 columns and these parts added in order, so that the columns can be cut there.
constexpr int64_t kSegmentGroups = 16;

// For up to 32 values, none NaN: how many are larger, or equal and before it. `values` and `ranks` have whole vectors.
constexpr int kRanked = 32;
void rank(const float* values, int count, int* ranks) {
  F32 index = to_f32(I32::iota());
  for (int first = 0; first < count; first += F32::lanes, index = index + F32::set1(F32::lanes)) {
    const F32 value = F32::load(values + first);
    I32 above = I32::set1(0);
    for (int other = 0; other < count; ++other) {
      const F32 rival = F32::set1(values[other]);
      const M32 before = (rival == value) & (F32::set1(static_cast<float>(other)) < index);
      above = select((rival > value) | before, above + I32::set1(1), above);
    }
    above.store(ranks + first);
  }
}

// The k best (score, column) seen. Empty slots hold (-inf, -1). Columns arrive in ascending order, so a score equal to
// the worst kept never replaces it, and ties go to the lowest column.
//
// Few slots are a list, best first; it meets up to 16 scores at once, and every slot follows from counting: no branch to
// mispredict. More are a heap with the worst on top, so that k = M costs M log M.
struct Best {
  static constexpr int64_t kListed = 16;
  static constexpr int kOffered = 16;

  float* scores;
  int64_t* columns;
  int64_t k;

  void start() const {
    for (int64_t slot = 0; slot < k; ++slot) {
      scores[slot] = -__builtin_inff();
      columns[slot] = -1;
    }
  }

  // What a score has to exceed: -inf until all slots are filled.
  float worst() const { return scores[k <= kListed ? k - 1 : 0]; }

  // At most kOffered scores, none NaN.
  void offer(const float* more, const int64_t* more_columns, int count) const {
    if (k <= kListed) {
      merge(more, more_columns, count);
      return;
    }
    for (int i = 0; i < count; ++i)
      if (more[i] > scores[0]) sink(more[i], more_columns[i], k);
  }

  // Sorts best first; returns how many slots are filled.
  int64_t finish() const {
    if (k > kListed) sort_heap();
    int64_t found = 0;
    while (found < k && columns[found] >= 0) ++found;
    return found;
  }

 private:
  void merge(const float* more, const int64_t* more_columns, int count) const {
    float values[kRanked], ranked[kRanked];
    int64_t sources[kRanked], ranked_columns[kRanked];
    int ranks[kRanked];
    const int kept = columns[0] < 0 ? 0 : static_cast<int>(k), all = kept + count;
    copy(scores, columns, kept, values, sources);
    copy(more, more_columns, count, values + kept, sources + kept);
    rank(values, all, ranks);
    for (int i = 0; i < all; ++i) {
      ranked[ranks[i]] = values[i];
      ranked_columns[ranks[i]] = sources[i];
    }
    copy(ranked, ranked_columns, all < k ? all : static_cast<int>(k), scores, columns);
  }

  static void copy(const float* from, const int64_t* from_columns, int count, float* to, int64_t* to_columns) {
    std::memcpy(to, from, static_cast<size_t>(count) * sizeof(float));
    std::memcpy(to_columns, from_columns, static_cast<size_t>(count) * sizeof(int64_t));
  }

  static bool worse(float score, int64_t column, float other_score, int64_t other_column) {
    return score < other_score || (score == other_score && column > other_column);
  }

  // Puts (score, column) at the root of the first `count` slots and lets it sink.
  void sink(float score, int64_t column, int64_t count) const {
    int64_t at = 0;
    for (int64_t child = 1; child < count; child = 2 * at + 1) {
      if (child + 1 < count && worse(scores[child + 1], columns[child + 1], scores[child], columns[child])) ++child;
      if (!worse(scores[child], columns[child], score, column)) break;
      scores[at] = scores[child];
      columns[at] = columns[child];
      at = child;
    }
    scores[at] = score;
    columns[at] = column;
  }

  void sort_heap() const {
    for (int64_t last = k - 1; last > 0; --last) {
      const float score = scores[last];
      const int64_t column = columns[last];
      scores[last] = scores[0];
      columns[last] = columns[0];
      sink(score, column, last);
    }
  }
};

// The largest of some lower bounds of scores in each of 16 classes of columns: k classes with a bound of at least t mean k
// scores of at least t. That starts a row with a limit that few scores reach, where its empty list would take them all
// in turn.
struct Highest {
  static constexpr int kClasses = static_cast<int>(Best::kListed), kParts = kClasses / F32::lanes;
  F32 bounds[kParts];

  Highest() {
    for (F32& bound : bounds) bound = F32::set1(-__builtin_inff());
  }

  void meet(int vector, F32 lower) { bounds[vector % kParts] = max(lower, bounds[vector % kParts]); }  // ignores NaN

  float kth(int64_t k) const {
    float all[kClasses];
    int ranks[kClasses];
    for (int part = 0; part < kParts; ++part) bounds[part].store(all + part * F32::lanes);
    rank(all, kClasses, ranks);
    float bound = 0.0f;
    for (int i = 0; i < kClasses; ++i) bound = ranks[i] == k - 1 ? all[i] : bound;
    return bound;
  }
};

// Which of a group's values are at least `limit`: bit c for column c.
inline uint64_t at_least(const float* values, float limit) {
  uint64_t bits = 0;
  for (int c = 0; c < kGroup; c += F32::lanes)
    bits |= static_cast<uint64_t>((F32::set1(limit) <= F32::load(values + c)).bits()) << c;
  return bits;
}

// The limit to compare with: the k-th best, or what `highest` proves of it; -inf scores stay out in any case.
inline float limit_of(const Best& best, const Highest& highest) {
  float limit = best.worst();
  if (limit == -__builtin_inff() && best.k <= Best::kListed) limit = highest.kth(best.k);
  return limit > -__FLT_MAX__ ? limit : -__FLT_MAX__;
}

// The scores of some rows in one strip that may be among their rows' best. Rows are taken together so that the noise
// of all their survivors is computed in whole vectors, and no row waits for the logarithms of the one before it.
class Survivors {
 public:
  static constexpr int kRows = 16;

  void start() { rows_ = count_ = 0; }

  // Those of a group whose `upper` is at least `limit`; `first` is the group's first column in the strip.
  void add(const float* upper, const float* scores, const uint32_t* words, float limit, int first) {
    uint64_t left = at_least(upper, limit);
    if (left == 0) return;
    const int end = count_ + __builtin_popcountll(left);
    for (int i = 0; i < kBlind; ++i) {  // most groups have fewer: without a branch on how many
      put(count_ + i, __builtin_ctzll(left | uint64_t{1} << 63), scores, words, first);
      left &= left - 1;
    }
    for (int i = count_ + kBlind; i < end; ++i, left &= left - 1) put(i, __builtin_ctzll(left), scores, words, first);
    count_ = end;
  }

  void close_row() { ends_[rows_++] = count_; }

  void add_noise() {
    for (int i = 0; i < count_; i += F32::lanes)
      (F32::load(scores_ + i) + gumbel_from_words(I32::load(words_ + i))).store(scores_ + i);
  }

  // Those of one row, in ascending order of columns.
  void offer(int row, int64_t first_column, const Best& best) const {
    int64_t columns[Best::kOffered];
    for (int at = row == 0 ? 0 : ends_[row - 1]; at < ends_[row]; at += Best::kOffered) {
      const int count = static_cast<int>(smaller(Best::kOffered, ends_[row] - at));
      for (int i = 0; i < count; ++i) columns[i] = first_column + columns_[at + i];
      best.offer(scores_ + at, columns, count);
    }
  }

 private:
  static constexpr int kBlind = 4;
  static constexpr int kMost = kRows * kStrip + kBlind + F32::lanes;  // whole vectors, and what was put blindly

  void put(int at, int column, const float* scores, const uint32_t* words, int first) {
    scores_[at] = scores[column];
    columns_[at] = first + column;
    if (words != nullptr) words_[at] = words[column];
  }

  int rows_, count_, ends_[kRows];
  float scores_[kMost];
  uint32_t words_[kMost];
  int columns_[kMost];
};

// Offers final scores of `rows` rows in a strip; `best` gives a row's list.
template <class BestOf>
void choose(const float* scores, int64_t rows, int groups, int64_t first_column, const BestOf& best,
            Survivors& survivors) {
  for (int64_t block = 0; block < rows; block += Survivors::kRows) {
    const int count = static_cast<int>(smaller(Survivors::kRows, rows - block));
    survivors.start();
    for (int r = 0; r < count; ++r) {
      const float* row = scores + (block + r) * kStrip;
      Highest highest;
      if (best(block + r).worst() == -__builtin_inff())
        for (int v = 0; v < groups * kGroup / F32::lanes; ++v) highest.meet(v, F32::load(row + v * F32::lanes));
      const float limit = limit_of(best(block + r), highest);
      for (int column = 0; column < groups * kGroup; column += kGroup)
        survivors.add(row + column, row + column, nullptr, limit, column);
      survivors.close_row();
    }
    for (int r = 0; r < count; ++r) survivors.offer(r, first_column, best(block + r));
  }
}

// The same for scores that still lack their noise.
class NoisyStrip {
 public:
  NoisyStrip(const PhiloxKeys& keys, int64_t first_group, int groups, int64_t row)
      : keys_(keys), first_group_(first_group), groups_(groups) {
    share(row);
  }

  // `first` is the number of the first row, which the noise depends on.
  template <class BestOf>
  void choose(const float* raw, int64_t first, int64_t rows, const BestOf& best, Survivors& survivors) {
    for (int64_t block = 0; block < rows; block += Survivors::kRows) {
      const int count = static_cast<int>(smaller(Survivors::kRows, rows - block));
      survivors.start();
      for (int r = 0; r < count; ++r) {
        screen(raw + (block + r) * kStrip, first + block + r, best(block + r), survivors);
        survivors.close_row();
      }
      survivors.add_noise();
      for (int r = 0; r < count; ++r) survivors.offer(r, first_group_ * kGroup, best(block + r));
    }
  }

 private:
  void share(int64_t row) {
    for (int group = 0; group < groups_; ++group) shared_[group] = NoiseGroup(keys_, first_group_ + group, row);
  }

  void screen(const float* raw, int64_t row, const Best& best, Survivors& survivors) {
    if (!shared_[0].serves(row)) share(row);
    const bool empty = best.worst() == -__builtin_inff();
    Highest highest;
    if (empty)
      for (int group = 0; group < groups_; ++group) bound(raw, row, group, &highest);
    const float limit = limit_of(best, highest);
    for (int group = 0; group < groups_; ++group) {
      const int first = group * kGroup;
      if (!empty) {
        if (!reaches(raw + first, limit)) continue;
        bound(raw, row, group, nullptr);
      }
      survivors.add(upper_ + first, raw + first, words_ + first, limit, first);
    }
  }

  static bool reaches(const float* raw, float limit) {
    const F32 noise = F32::set1(kLargestNoise), least = F32::set1(limit);
    M32 any = least <= F32::load(raw) + noise;
    for (int c = F32::lanes; c < kGroup; c += F32::lanes) any = any | (least <= F32::load(raw + c) + noise);
    return any.any();
  }

  // Draws the words of a group, and bounds its scores from above and, for `highest`, from below.
  void bound(const float* raw, int64_t row, int group, Highest* highest) {
    const NoiseWords drawn = shared_[group].draw(keys_, row);
    for (int v = 0; v < NoiseWords::kVectors; ++v) {
      const int column = group * kGroup + v * F32::lanes;
      const NoiseBounds noise(drawn.words[v]);
      const F32 score = F32::load(raw + column);
      drawn.words[v].store(words_ + column);
      (score + noise.high).store(upper_ + column);
      if (highest != nullptr) highest->meet(v, score + noise.low);
    }
  }

  const PhiloxKeys& keys_;
  int64_t first_group_;
  int groups_;
  NoiseGroup shared_[kStripGroups];
  alignas(64) uint32_t words_[kStrip];
  alignas(64) float upper_[kStrip];
};

// The softmax sum of some columns: exp((score - maximum) / T) added up.
struct SoftmaxPart {
  float maximum;
  float total;

  void add(const SoftmaxPart& other, float inverse) {
    const float top = maximum > other.maximum ? maximum : other.maximum;
    total = total * exp_scalar((maximum - top) * inverse) + other.total * exp_scalar((other.maximum - top) * inverse);
    maximum = top;
  }
};

// The same while it is gathered, each lane with its own maximum: no reduction across lanes until a segment is done.
struct RunningSoftmax {
  float maximum[F32::lanes];
  float total[F32::lanes];

  void start() {
    F32::set1(-__FLT_MAX__).store(maximum);
    F32::zero().store(total);
  }

  // Scores of one group; a NaN counts as -inf.
  void add(const float* scores, float inverse) {
    const F32 scale = F32::set1(inverse), nothing = F32::set1(-__builtin_inff());
    F32 score[kGroup / F32::lanes], highest = nothing;
    for (int v = 0; v < kGroup / F32::lanes; ++v) {
      const F32 x = F32::load(scores + v * F32::lanes);
      score[v] = select(x == x, x, nothing);
      highest = max(highest, score[v]);
    }
    F32 top = F32::load(maximum), sum = F32::load(total);
    if ((highest > top).any()) {
      const F32 raised = max(top, highest);
      sum = sum * exp((top - raised) * scale);
      top = raised;
      top.store(maximum);
    }
    F32 part = F32::zero();
    for (int v = 0; v < kGroup / F32::lanes; ++v) part = part + exp((score[v] - top) * scale);
    (sum + part).store(total);
  }

  SoftmaxPart finish(float inverse) const {
    SoftmaxPart part{reduce_max(F32::load(maximum)), 0.0f};
    float shrink[F32::lanes];
    exp((F32::load(maximum) - F32::set1(part.maximum)) * F32::set1(inverse)).store(shrink);
    for (int lane = 0; lane < F32::lanes; ++lane) part.total += total[lane] * shrink[lane];
    return part;
  }
};

// How rows and columns are cut into tasks: rows first; columns too where the rows are too few for all threads.
struct Plan {
  int64_t rows, groups, segments;
  int64_t chunk_rows, chunks;
  int64_t run_groups, runs;  // groups of a run of segments

  Plan(const GumbelTopk& args, int threads)
      : rows(args.query.rows), groups(ceil_div(args.memory.rows, kGroup)), segments(ceil_div(groups, kSegmentGroups)) {
    const int64_t most = most_chunk_rows(args.memory.rows, args.memory.cols);
    chunks = ceil_div(rows, most);
    runs = 1;
    if (chunks < threads) {
      runs = smaller(segments, ceil_div(threads, chunks));
      chunks = smaller(ceil_div(rows, kTileRows), ceil_div(threads, runs));
    } else {
      chunks = round_up(chunks, threads);
    }
    chunk_rows = round_up(ceil_div(rows, chunks), kTileRows);
    chunks = ceil_div(rows, chunk_rows);
    run_groups = ceil_div(segments, runs) * kSegmentGroups;
    runs = ceil_div(groups, run_groups);
  }

  int64_t first(int64_t chunk) const { return chunk * chunk_rows; }
  int64_t last(int64_t chunk) const { return smaller(rows, (chunk + 1) * chunk_rows); }

  // Tasks that meet a group only once pack it for themselves, while it is in their cache.
  bool shares_packing() const { return chunks > 1; }
};

// What the tasks leave for the reads.
struct Found {
  int64_t rows, k;
  float* scores;       // [runs][rows][k], the best of each run of columns; the op's own outputs where there is one run
  int64_t* columns;
  SoftmaxPart* parts;  // [rows][segments], for "softmax"
  bool* finite;        // [rows]

  Best best(int64_t run, int64_t row) const { return {scores + (run * rows + row) * k, columns + (run * rows + row) * k, k}; }
};

// Buffers of one thread.
struct Buffers {
  const Scratch numbers, states, chosen;
  const int64_t stride;  // of queries
  float *scores, *group, *queries;
  RunningSoftmax* softmax;
  Survivors* survivors;

  Buffers(const Plan& plan, int64_t width)
      : numbers(static_cast<size_t>(plan.chunk_rows * (kStrip + padded_width(width)) + ItemGroup::elements(width)) *
                sizeof(float)),
        states(static_cast<size_t>(plan.chunk_rows) * sizeof(RunningSoftmax)),
        chosen(sizeof(Survivors)),
        stride(padded_width(width)),
        scores(numbers.as<float>()),
        group(scores + plan.chunk_rows * kStrip),
        queries(group + ItemGroup::elements(width)),
        softmax(states.as<RunningSoftmax>()),
        survivors(chosen.as<Survivors>()) {}
};

// The best columns of one chunk of rows in one run of columns. `packed` is the shared memory, or null.
template <class T>
void choose_chunk(const GumbelTopk& args, const Plan& plan, const float* packed, int64_t chunk, int64_t run,
                  const Buffers& buffers, const Found& found) {
  const int64_t first = plan.first(chunk), count = plan.last(chunk) - first, width = args.query.cols;
  const int64_t begin = run * plan.run_groups, end = smaller(begin + plan.run_groups, plan.groups);
  const bool dense = args.combine == Combine::softmax;
  const float inverse = inverse_temperature(args.temperature);
  const PhiloxKeys keys(args.seed);
  bool finite[kLargeChunk];
  pack_rows<T>(args.query, first, count, round_up(count, kTileRows), buffers.stride, buffers.queries, finite);
  if (run == 0) std::memcpy(found.finite + first, finite, static_cast<size_t>(count) * sizeof(bool));
  for (int64_t r = 0; r < count; ++r) found.best(run, first + r).start();

  for (int64_t strip = begin; strip < end; strip += kStripGroups) {
    const int groups = static_cast<int>(smaller(kStripGroups, end - strip));
    for (int group = 0; group < groups; ++group) {
      ItemGroup items = ItemGroup::at(buffers.group);
      if (packed == nullptr)
        pack_group<T>(args.memory, strip + group, items);
      else
        items = ItemGroup::at(const_cast<float*>(packed) + (strip + group) * ItemGroup::elements(width));
      float* scores = buffers.scores + group * kGroup;
      multiply_group(buffers.queries, buffers.stride, count, items.panels, width, scores, kStrip);
      add_penalty(items.penalty, count, scores, kStrip);
    }
    const auto best = [&](int64_t r) { return found.best(run, first + r); };
    if (args.noise && !dense) {
      NoisyStrip(keys, strip, groups, first).choose(buffers.scores, first, count, best, *buffers.survivors);
      continue;
    }
    for (int group = 0; args.noise && group < groups; ++group)
      add_noise(keys, strip + group, first, count, buffers.scores + group * kGroup, kStrip);
    choose(buffers.scores, count, groups, strip * kGroup, best, *buffers.survivors);
    const bool opens = strip % kSegmentGroups == 0, closes = strip + groups == end || (strip + groups) % kSegmentGroups == 0;
    for (int64_t r = 0; dense && r < count; ++r) {
      RunningSoftmax& softmax = buffers.softmax[r];
      if (opens) softmax.start();
      for (int group = 0; group < groups; ++group) softmax.add(buffers.scores + r * kStrip + group * kGroup, inverse);
      if (closes) found.parts[(first + r) * plan.segments + strip / kSegmentGroups] = softmax.finish(inverse);
    }
  }
}

// Weights of the chosen rows, best first. `all` is the softmax sum over all columns, relative to the largest score.
void weigh(Combine combine, const float* scores, int64_t found, float all, float inverse, float* weights) {
  if (found == 0) return;
  if (combine == Combine::sum || combine == Combine::mean) {
    const float weight = combine == Combine::sum ? 1.0f : 1.0f / static_cast<float>(found);
    for (int64_t slot = 0; slot < found; ++slot) weights[slot] = weight;
    return;
  }
  float total = 0.0f;
  for (int64_t slot = 0; slot < found; ++slot) {
    weights[slot] = exp_scalar((scores[slot] - scores[0]) * inverse);
    total += weights[slot];
  }
  if (combine == Combine::softmax) total = all;
  for (int64_t slot = 0; slot < found; ++slot) weights[slot] /= total;
}

// read = sum of weights[slot] * memory[columns[slot]], slots in order.
template <class T>
void read_rows(const Rows& memory, const int64_t* columns, const float* weights, int64_t found, T* read) {
  int64_t d = 0;
  for (; d + F32::lanes <= memory.cols; d += F32::lanes) {
    F32 sum = F32::zero();
    for (int64_t slot = 0; slot < found; ++slot)
      sum = fma(F32::set1(weights[slot]), F32::load(memory.row<T>(columns[slot]) + d), sum);
    store(sum, read + d);
  }
  if (d == memory.cols) return;
  const int rest = static_cast<int>(memory.cols - d);
  F32 sum = F32::zero();
  for (int64_t slot = 0; slot < found; ++slot)
    sum = fma(F32::set1(weights[slot]), F32::load_first(memory.row<T>(columns[slot]) + d, rest), sum);
  store_rest(sum, rest, read + d);
}

template <class T>
void read_nothing(int64_t width, int64_t k, T* read, int64_t* indices, float* scores) {
  for (int64_t d = 0; d < width; ++d) scalar_to(__builtin_nanf(""), read + d);
  for (int64_t slot = 0; slot < k; ++slot) {
    indices[slot] = -1;
    scores[slot] = __builtin_nanf("");
  }
}

// The outputs of one row: merges what the runs of columns found, in their order.
template <class T>
void read_row(const GumbelTopk& args, const Plan& plan, const Found& found, int64_t row, float* weights) {
  const int64_t width = args.query.cols, k = args.k;
  const Best best{args.scores + row * k, args.indices + row * k, k};
  T* read = static_cast<T*>(args.read) + row * width;
  if (!found.finite[row]) {
    read_nothing(width, k, read, best.columns, best.scores);
    return;
  }
  if (plan.runs > 1) {
    best.start();
    for (int64_t run = 0; run < plan.runs; ++run) {
      const Best part = found.best(run, row);
      const int64_t filled = part.finish();
      for (int64_t slot = 0; slot < filled; slot += Best::kOffered)
        best.offer(part.scores + slot, part.columns + slot, static_cast<int>(smaller(Best::kOffered, filled - slot)));
    }
  }
  const int64_t filled = best.finish();
  SoftmaxPart all{best.scores[0], 0.0f};
  if (args.combine == Combine::softmax)
    for (int64_t segment = 0; segment < plan.segments; ++segment)
      all.add(found.parts[row * plan.segments + segment], inverse_temperature(args.temperature));
  weigh(args.combine, best.scores, filled, all.total, inverse_temperature(args.temperature), weights);
  read_rows(args.memory, best.columns, weights, filled, read);
  for (int64_t slot = filled; slot < k; ++slot) best.scores[slot] = __builtin_nanf("");
}

template <class T>
void forward(const GumbelTopk& args, const ThreadLoop& loop) {
  if (args.query.rows == 0) return;
  const Plan plan(args, loop.threads);
  const int64_t rows = plan.rows, k = args.k, width = args.query.cols, elements = ItemGroup::elements(width);
  const bool dense = args.combine == Combine::softmax, cut = plan.runs > 1;

  const Scratch packed(plan.shares_packing() ? static_cast<size_t>(plan.groups * elements) * sizeof(float) : 0);
  if (plan.shares_packing())
    loop(plan.groups, 1, [&](int64_t begin, int64_t end) {
      for (int64_t group = begin; group < end; ++group)
        pack_group<T>(args.memory, group, ItemGroup::at(packed.as<float>() + group * elements));
    });

  const Scratch finite(static_cast<size_t>(rows) * sizeof(bool));
  const Scratch parts(dense ? static_cast<size_t>(rows * plan.segments) * sizeof(SoftmaxPart) : 0);
  const Scratch columns(cut ? static_cast<size_t>(plan.runs * rows * k) * sizeof(int64_t) : 0);
  const Scratch scores(cut ? static_cast<size_t>(plan.runs * rows * k) * sizeof(float) : 0);
  const Found found{rows, k, cut ? scores.as<float>() : args.scores,
                    cut ? columns.as<int64_t>() : args.indices, parts.as<SoftmaxPart>(), finite.as<bool>()};

  loop(plan.chunks * plan.runs, 1, [&](int64_t begin, int64_t end) {
    const Buffers buffers(plan, width);
    for (int64_t task = begin; task < end; ++task)
      choose_chunk<T>(args, plan, plan.shares_packing() ? packed.as<float>() : nullptr, task / plan.runs,
                      task % plan.runs, buffers, found);
  });
  loop(rows, 1 + 32768 / (k * (width + 64)), [&](int64_t begin, int64_t end) {
    const Scratch weights(static_cast<size_t>(k) * sizeof(float));
    for (int64_t row = begin; row < end; ++row) read_row<T>(args, plan, found, row, weights.as<float>());
  });
}

}  // namespace

void gumbel_topk(const GumbelTopk& args, const ThreadLoop& loop) {
  MEMAD_FAST_BY_DTYPE(args.query.dtype, scalar, forward<scalar>(args, loop);)
}

void philox4x32(const uint32_t* counter, int64_t key, uint32_t* words) {
  Philox philox{I64::set1(counter[0]), I64::set1(counter[1]), I64::set1(counter[2]), I64::set1(counter[3])};
  philox.rounds(PhiloxKeys(key), 0, 10);
  const I64 results[4] = {philox.c0, philox.c1, philox.c2, philox.c3};
  for (int w = 0; w < 4; ++w) {
    uint32_t lanes[I32::lanes];
    interleave_words(results[w], results[w]).store(lanes);
    words[w] = lanes[0];
  }
}

void gumbel_noise(const uint32_t* words, int64_t count, float* low, float* noise, float* high) {
  for (int64_t i = 0; i < count; i += I32::lanes) {
    const int part = static_cast<int>(smaller(I32::lanes, count - i));
    uint32_t lanes[I32::lanes] = {};
    std::memcpy(lanes, words + i, static_cast<size_t>(part) * sizeof(uint32_t));
    const NoiseBounds bounds(I32::load(lanes));
    store_first(bounds.low, low + i, part);
    store_first(gumbel_from_words(I32::load(lanes)), noise + i, part);
    store_first(bounds.high, high + i, part);
  }
}

}  // namespace MEMAD_FAST_ISA
}  // namespace memad_fast
