// One level of gumbel_topk's forward (see gumbel_topk.h). Compiled once per instruction set.
//
//   score = query . memory + noise,  top-k by (score descending, column ascending),  read = sum of weight * row
//
// Chunks of rows go to threads; a chunk meets the groups of 64 columns in ascending order:
//
//   for group: product of the chunk; for row: noise -> [running softmax] -> scan into the row's k best
//
// Work per (row, column): D multiply-adds, about 5 vector instructions a lane-vector and D/16 for them, and about 80
// for the noise (Philox 35, two logarithms 45): below D = 256 or so the noise is the cost, not the product.
#include "cpu/gumbel_topk_tile.h"

namespace memad_fast {
namespace MEMAD_FAST_ISA {
namespace {

// The k best (score, column) seen. Empty slots hold (-inf, -1). Columns arrive in ascending order, so a score equal to
// the worst kept never replaces it, and ties go to the lowest column.
//
// Few slots are a list, best first: an insertion passes all of them without a branch to mispredict. More are a heap
// with the worst on top, so that k = M costs M log M.
struct Best {
  static constexpr int64_t kListed = 16;

  float* scores;
  int64_t* columns;
  int64_t k;

  void start() const {
    for (int64_t slot = 0; slot < k; ++slot) {
      scores[slot] = -__builtin_inff();
      columns[slot] = -1;
    }
  }

  float worst() const { return scores[k <= kListed ? k - 1 : 0]; }

  void scan(const float* row, int64_t first_column) const {
    F32 limit = F32::set1(worst());
    for (int c = 0; c < kGroup; c += F32::lanes) {
      uint32_t better = (F32::load(row + c) > limit).bits();
      if (better == 0) continue;
      for (; better != 0; better &= better - 1) {
        const int at = c + __builtin_ctz(better);
        if (k <= kListed)
          insert(row[at], first_column + at);
        else if (row[at] > scores[0])
          sink(row[at], first_column + at, k);
      }
      limit = F32::set1(worst());
    }
  }

  // Sorts best first; returns how many slots are filled.
  int64_t finish() const {
    if (k > kListed) sort_heap();
    int64_t found = 0;
    while (found < k && columns[found] >= 0) ++found;
    return found;
  }

 private:
  // A score that is not better than any listed one leaves the list as it is.
  void insert(float score, int64_t column) const {
    bool shift = false;
    for (int64_t slot = 0; slot < k; ++slot) {
      const float kept = scores[slot];
      const int64_t kept_column = columns[slot];
      shift = shift | (score > kept);
      scores[slot] = shift ? score : kept;
      columns[slot] = shift ? column : kept_column;
      score = shift ? kept : score;
      column = shift ? kept_column : column;
    }
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

// Weights of the chosen rows, best first.
void weigh(Combine combine, const float* scores, int64_t found, const RunningSoftmax& softmax, float inverse,
           float* weights) {
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
  if (combine == Combine::softmax) total = softmax.finish(inverse).total;
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

template <class T>
void read_chunk(const GumbelTopk& args, const PackedMemory& memory, int64_t first, int64_t count, float* queries,
                RunningSoftmax* softmax, float* weights) {
  const int64_t width = args.query.cols, k = args.k;
  const Noise noise{args.noise, args.seed};
  const float inverse = inverse_temperature(args.temperature);
  const bool dense = args.combine == Combine::softmax;
  bool finite[kChunk];
  pack_queries<T>(args.query, first, count, width, queries, finite);
  for (int64_t r = 0; r < count; ++r) {
    Best{args.scores + (first + r) * k, args.indices + (first + r) * k, k}.start();
    softmax[r].start();
  }
  alignas(64) float scores[kChunk * kGroup];
  for (int64_t group = 0; group < memory.groups(); ++group) {
    score_chunk(queries, width, memory, group, noise, first, count, scores);
    for (int64_t r = 0; r < count; ++r) {
      const int64_t row = first + r;
      if (dense) softmax[r].add(scores + r * kGroup, nullptr, inverse);
      Best{args.scores + row * k, args.indices + row * k, k}.scan(scores + r * kGroup, group * kGroup);
    }
  }
  for (int64_t r = 0; r < count; ++r) {
    const Best best{args.scores + (first + r) * k, args.indices + (first + r) * k, k};
    T* read = static_cast<T*>(args.read) + (first + r) * width;
    if (!finite[r]) {
      read_nothing(width, k, read, best.columns, best.scores);
      continue;
    }
    const int64_t found = best.finish();
    weigh(args.combine, best.scores, found, softmax[r], inverse, weights);
    read_rows(args.memory, best.columns, weights, found, read);
    for (int64_t slot = found; slot < k; ++slot) best.scores[slot] = __builtin_nanf("");
  }
}

template <class T>
void forward(const GumbelTopk& args, const ThreadLoop& loop) {
  const Scratch storage(packed_bytes(args.memory));
  const PackedMemory memory = pack_memory<T>(args.memory, storage.as<float>(), loop);
  const int64_t rows = args.query.rows, chunk_rows = rows_per_chunk(rows, loop.threads);
  loop(ceil_div(rows, chunk_rows), 1, [&](int64_t begin, int64_t end) {
    const Scratch queries(static_cast<size_t>(kChunk * args.query.cols) * sizeof(float));
    const Scratch softmax(kChunk * sizeof(RunningSoftmax));
    const Scratch weights(static_cast<size_t>(args.k) * sizeof(float));
    for (int64_t chunk = begin; chunk < end; ++chunk)
      read_chunk<T>(args, memory, chunk * chunk_rows, smaller(chunk_rows, rows - chunk * chunk_rows), queries.as<float>(),
                    softmax.as<RunningSoftmax>(), weights.as<float>());
  });
}

}  // namespace

void gumbel_topk(const GumbelTopk& args, const ThreadLoop& loop) {
  MEMAD_FAST_BY_DTYPE(args.query.dtype, scalar, forward<scalar>(args, loop);)
}

void philox4x32(const uint32_t* counter, int64_t key, uint32_t* words) {
  Philox philox{I64::set1(counter[0]), I64::set1(counter[1]), I64::set1(counter[2]), I64::set1(counter[3])};
  philox.run(key);
  const I64 results[4] = {philox.c0, philox.c1, philox.c2, philox.c3};
  for (int w = 0; w < 4; ++w) {
    uint32_t lanes[I32::lanes];
    interleave_words(results[w], results[w]).store(lanes);
    words[w] = lanes[0];
  }
}

}  // namespace MEMAD_FAST_ISA
}  // namespace memad_fast
