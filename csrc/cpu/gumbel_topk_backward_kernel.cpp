// One level of gumbel_topk's backward (see gumbel_topk.h). Compiled once per instruction set.
//
// With g the gradient of a read, h that of its scores, a_j = g . memory_j and w the weights of the read:
//
//   chosen rows    d score_s  = h_s + (renormalized: w_s (a_s - c) / T;  softmax: w_s a_s / T),   c = sum of w a
//                  d memory_s = w_s g
//   all columns    d score_j  = softmax: -w_j c / T;  straight_through: w_j (a_j - c) / T, and d memory_j = w_j g
//   both           d query = sum of d score_j memory_j,   d memory_j += d score_j query
//
// Two loops: over chunks of rows (statistics of the softmax, then d query), and over groups of columns (d memory: each
// thread owns its columns and meets the rows in order, so nothing is summed across threads). Scores and noise are
// recomputed in each, 64 columns at a time; only [N, k] and [N] numbers are kept.
#include "cpu/gumbel_topk_tile.h"

namespace memad_fast {
namespace MEMAD_FAST_ISA {
namespace {

// Columns of a group rounded up to whole tiles, for the product whose tile rows are columns.
constexpr int kColumns = (kGroup + kTileRows - 1) / kTileRows * kTileRows;

bool has_dense_part(Combine combine) { return combine == Combine::softmax || combine == Combine::straight_through; }

// What the first loop leaves for the second.
struct Shared {
  PackedMemory memory;
  const float* rows;    // [groups * 64][stride] float32 memory, zeros where it is not finite; dense reads only
  int64_t stride;       // elements between packed rows: the width rounded up to whole panels
  float* weights;       // [N, k]: d memory = weight * g
  float* score_grads;   // [N, k]: d score of the chosen rows, without the part that all columns have
  float* maximum;       // [N]: largest score
  float* inverse_total; // [N]: 1 / sum of exp((score - maximum) / T)
  float* centre;        // [N]: c
};

// Float32 copies of the gradients of `count` reads, zeros for reads of non-finite queries (NaN constants).
template <class T>
void pack_gradients(const Rows& grad, int64_t first, int64_t count, int64_t stride, const bool* finite, float* to) {
  for (int64_t r = 0; r < kChunk; ++r) {
    float* row = to + r * stride;
    const int64_t kept = r < count && finite[r] ? grad.cols : 0;
    if (kept > 0) widen(grad.row<T>(first + r), kept, row);
    std::memset(row + kept, 0, static_cast<size_t>(stride - kept) * sizeof(float));
  }
}

template <class T>
float dot(const float* a, const T* b, int64_t width) {
  F32 sum = F32::zero();
  int64_t d = 0;
  for (; d + F32::lanes <= width; d += F32::lanes) sum = fma(F32::load(a + d), F32::load(b + d), sum);
  if (d < width) {
    const int rest = static_cast<int>(width - d);
    sum = fma(F32::load_first(a + d, rest), F32::load_first(b + d, rest), sum);
  }
  float lanes[F32::lanes], total = 0.0f;
  sum.store(lanes);
  for (float lane : lanes) total += lane;
  return total;
}

// to += factor * from
template <class T>
void add_scaled(float factor, const T* from, int64_t width, float* to) {
  const F32 scale = F32::set1(factor);
  int64_t d = 0;
  for (; d + F32::lanes <= width; d += F32::lanes) fma(scale, F32::load(from + d), F32::load(to + d)).store(to + d);
  if (d < width) {
    const int rest = static_cast<int>(width - d);
    fma(scale, F32::load_first(from + d, rest), F32::load_first(to + d, rest)).store_first(to + d, rest);
  }
}

template <class T>
void store_row(const float* from, int64_t width, T* to) {
  int64_t d = 0;
  for (; d + F32::lanes <= width; d += F32::lanes) store(F32::load(from + d), to + d);
  for (; d < width; ++d) scalar_to(from[d], to + d);
}

// The packed rows of one chunk.
struct Chunk {
  int64_t first;
  int64_t count;
  const float* queries;
  const float* grads;
  const bool* finite;

  // Scores of one group and, for straight_through, a = g . memory.
  void load(const GumbelTopkBackward& args, const Shared& shared, int64_t group, float* scores, float* values) const {
    score_chunk(queries, shared.stride, shared.memory, group, {args.noise, args.seed}, first, count, scores);
    if (args.combine == Combine::straight_through)
      multiply_chunk(grads, shared.stride, count, shared.memory, group, values);
  }
};

// One row of a group: scores become softmax weights (in place) and values become d score.
void differentiate_row(Combine combine, const Shared& shared, int64_t row, float inverse, float* scores,
                       float* values) {
  const F32 top = F32::set1(shared.maximum[row]), share = F32::set1(shared.inverse_total[row]);
  const F32 centre = F32::set1(shared.centre[row]), scale = F32::set1(inverse);
  for (int c = 0; c < kGroup; c += F32::lanes) {
    const F32 score = F32::load(scores + c);
    const F32 usable = select(score == score, score, F32::set1(-__builtin_inff()));
    const F32 weight = exp((usable - top) * scale) * share;
    const F32 value = combine == Combine::straight_through ? F32::load(values + c) : F32::zero();
    weight.store(scores + c);
    (weight * (value - centre) * scale).store(values + c);
  }
}

// Maximum and sum of each row's softmax, and c where it is a sum over all columns.
void gather_statistics(const GumbelTopkBackward& args, const Shared& shared, const Chunk& chunk, float inverse,
                       RunningSoftmax* softmax) {
  alignas(64) float scores[kChunk * kGroup], values[kChunk * kGroup];
  const bool through = args.combine == Combine::straight_through;
  for (int64_t r = 0; r < chunk.count; ++r) softmax[r].start();
  for (int64_t group = 0; group < shared.memory.groups(); ++group) {
    chunk.load(args, shared, group, scores, values);
    for (int64_t r = 0; r < chunk.count; ++r)
      softmax[r].add(scores + r * kGroup, through ? values + r * kGroup : nullptr, inverse);
  }
  for (int64_t r = 0; r < chunk.count; ++r) {
    const RunningSoftmax::Result result = softmax[r].finish(inverse);
    const int64_t row = chunk.first + r;
    shared.maximum[row] = result.maximum;
    shared.inverse_total[row] = result.total > 0.0f ? 1.0f / result.total : (result.total == 0.0f ? 0.0f : result.total);
    shared.centre[row] = result.weighted * shared.inverse_total[row];
  }
}

// Weights and score gradients of the chosen rows of one query; c too where it is a sum over them.
template <class T>
void differentiate_chosen(const GumbelTopkBackward& args, const Shared& shared, int64_t row, const float* grad,
                          float inverse) {
  const int64_t k = args.k, *columns = args.indices + row * k;
  const float* scores = args.scores + row * k;
  float *weights = shared.weights + row * k, *score_grads = shared.score_grads + row * k;
  int64_t found = 0;
  while (found < k && columns[found] >= 0) ++found;
  for (int64_t slot = 0; slot < found; ++slot) score_grads[slot] = args.grad_scores[row * k + slot];
  switch (args.combine) {
    case Combine::sum:
    case Combine::mean:
      for (int64_t slot = 0; slot < found; ++slot)
        weights[slot] = args.combine == Combine::sum ? 1.0f : 1.0f / static_cast<float>(found);
      return;
    case Combine::straight_through:
      for (int64_t slot = 0; slot < found; ++slot) weights[slot] = 0.0f;
      return;
    default:
      break;
  }
  if (found == 0) return;
  const bool all = args.combine == Combine::softmax;
  const float top = all ? shared.maximum[row] : scores[0];
  float total = 0.0f;
  for (int64_t slot = 0; slot < found; ++slot) {
    weights[slot] = exp_scalar((scores[slot] - top) * inverse);
    total += weights[slot];
  }
  const float share = all ? shared.inverse_total[row] : 1.0f / total;
  float centre = 0.0f;
  for (int64_t slot = 0; slot < found; ++slot) {
    weights[slot] *= share;
    centre += weights[slot] * dot(grad, args.memory.row<T>(columns[slot]), args.memory.cols);
  }
  for (int64_t slot = 0; slot < found; ++slot) {
    const float value = dot(grad, args.memory.row<T>(columns[slot]), args.memory.cols);
    score_grads[slot] += weights[slot] * (all ? value : value - centre) * inverse;
  }
  if (all) shared.centre[row] = centre;
}

// d query += d score . memory over all columns.
void add_dense_query_gradient(const GumbelTopkBackward& args, const Shared& shared, const Chunk& chunk, float inverse,
                              float* grad_queries) {
  alignas(64) float scores[kChunk * kGroup], values[kChunk * kGroup];
  for (int64_t group = 0; group < shared.memory.groups(); ++group) {
    const float* items = shared.rows + group * kGroup * shared.stride;
    chunk.load(args, shared, group, scores, values);
    for (int64_t r = 0; r < chunk.count; ++r)
      differentiate_row(args.combine, shared, chunk.first + r, inverse, scores + r * kGroup, values + r * kGroup);
    std::memset(values + chunk.count * kGroup, 0, static_cast<size_t>(kChunk - chunk.count) * kGroup * sizeof(float));
    for (int64_t d = 0; d < shared.stride; d += kPanel)
      for (int64_t tile = 0; tile < chunk.count; tile += kTileRows)
        multiply_tile<true>(values + tile * kGroup, kGroup, 1, items + d, shared.stride, kGroup,
                            grad_queries + tile * shared.stride + d, shared.stride);
  }
}

// Buffers of one thread: packed queries and gradients, and as many rows of results.
struct Buffers {
  const Scratch storage;
  float *queries, *grads, *results;

  Buffers(int64_t stride, int64_t result_rows)
      : storage(static_cast<size_t>((2 * kChunk + result_rows) * stride) * sizeof(float)),
        queries(storage.as<float>()), grads(queries + kChunk * stride), results(grads + kChunk * stride) {}
};

template <class T>
void differentiate_queries(const GumbelTopkBackward& args, const Shared& shared, int64_t first, int64_t count,
                           const Buffers& buffers, RunningSoftmax* softmax) {
  const int64_t width = args.query.cols, stride = shared.stride;
  const float inverse = inverse_temperature(args.temperature);
  bool finite[kChunk];
  pack_queries<T>(args.query, first, count, stride, buffers.queries, finite);
  pack_gradients<T>(args.grad_read, first, count, stride, finite, buffers.grads);
  const Chunk chunk{first, count, buffers.queries, buffers.grads, finite};
  std::memset(buffers.results, 0, static_cast<size_t>(kChunk * stride) * sizeof(float));

  if (has_dense_part(args.combine)) gather_statistics(args, shared, chunk, inverse, softmax);
  for (int64_t r = 0; r < count; ++r)
    differentiate_chosen<T>(args, shared, first + r, buffers.grads + r * stride, inverse);
  if (has_dense_part(args.combine)) add_dense_query_gradient(args, shared, chunk, inverse, buffers.results);
  for (int64_t r = 0; r < count; ++r) {
    float* result = buffers.results + r * stride;
    for (int64_t slot = (first + r) * args.k; slot < (first + r + 1) * args.k; ++slot)
      if (args.indices[slot] >= 0)
        add_scaled(shared.score_grads[slot], args.memory.row<T>(args.indices[slot]), width, result);
    if (!finite[r]) std::memset(result, 0, static_cast<size_t>(width) * sizeof(float));
    store_row(result, width, static_cast<T*>(args.grad_query) + (first + r) * width);
  }
}

// d memory of one group over all columns: d scores transposed . queries, and weights transposed . g.
template <class T>
void add_dense_memory_gradient(const GumbelTopkBackward& args, const Shared& shared, int64_t group,
                               const Buffers& buffers, float* grad_items) {
  alignas(64) float scores[kChunk * kGroup], values[kChunk * kGroup];
  float weights[kChunk * kColumns], score_grads[kChunk * kColumns];
  const float inverse = inverse_temperature(args.temperature);
  const int64_t stride = shared.stride;
  for (int64_t first = 0; first < args.query.rows; first += kChunk) {
    const int64_t count = smaller(kChunk, args.query.rows - first);
    bool finite[kChunk];
    pack_queries<T>(args.query, first, count, stride, buffers.queries, finite);
    pack_gradients<T>(args.grad_read, first, count, stride, finite, buffers.grads);
    const Chunk chunk{first, count, buffers.queries, buffers.grads, finite};
    std::memset(weights, 0, sizeof(weights));
    std::memset(score_grads, 0, sizeof(score_grads));
    chunk.load(args, shared, group, scores, values);
    for (int64_t r = 0; r < count; ++r) {
      if (!finite[r]) continue;
      differentiate_row(args.combine, shared, first + r, inverse, scores + r * kGroup, values + r * kGroup);
      std::memcpy(weights + r * kColumns, scores + r * kGroup, kGroup * sizeof(float));
      std::memcpy(score_grads + r * kColumns, values + r * kGroup, kGroup * sizeof(float));
    }
    for (int column = 0; column < kColumns; column += kTileRows) {
      for (int64_t d = 0; d < stride; d += kPanel) {
        float* to = grad_items + column * stride + d;
        multiply_tile<true>(score_grads + column, 1, kColumns, buffers.queries + d, stride, count, to, stride);
        if (args.combine == Combine::straight_through)
          multiply_tile<true>(weights + column, 1, kColumns, buffers.grads + d, stride, count, to, stride);
      }
    }
  }
}

template <class T>
void differentiate_memory(const GumbelTopkBackward& args, const Shared& shared, const Choices& choices, int64_t group,
                          const Buffers& buffers) {
  const int64_t width = args.memory.cols, stride = shared.stride, first = group * kGroup;
  std::memset(buffers.results, 0, static_cast<size_t>(kColumns * stride) * sizeof(float));
  if (has_dense_part(args.combine)) add_dense_memory_gradient<T>(args, shared, group, buffers, buffers.results);
  for (int64_t item = first; item < smaller(first + kGroup, args.memory.rows); ++item) {
    float* result = buffers.results + (item - first) * stride;
    for (int64_t at = choices.starts[item]; at < choices.starts[item + 1]; ++at) {
      const int64_t pair = choices.pairs[at], row = pair / args.k;
      if (args.combine != Combine::straight_through)
        add_scaled(shared.weights[pair], args.grad_read.row<T>(row), width, result);
      add_scaled(shared.score_grads[pair], args.query.row<T>(row), width, result);
    }
    store_row(result, width, static_cast<T*>(args.grad_memory) + item * width);
  }
}

// Float32 memory rows, zeros where a row is not finite and beyond the last.
template <class T>
void widen_memory(const Rows& memory, int64_t stride, float* to, const ThreadLoop& loop) {
  loop(ceil_div(memory.rows, kGroup) * kGroup, kGroup, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      float* row = to + item * stride;
      const bool usable = item < memory.rows && widen(memory.row<T>(item), memory.cols, row);
      const int64_t kept = usable ? memory.cols : 0;
      std::memset(row + kept, 0, static_cast<size_t>(stride - kept) * sizeof(float));
    }
  });
}

template <class T>
void backward(const GumbelTopkBackward& args, const Choices& choices, const ThreadLoop& loop) {
  const int64_t rows = args.query.rows, items = args.memory.rows, chosen = rows * args.k;
  const bool dense = has_dense_part(args.combine);
  const int64_t stride = ceil_div(args.query.cols, kPanel) * kPanel, groups = ceil_div(items, kGroup);
  const Scratch panels(packed_bytes(args.memory));
  const Scratch wide_rows(dense ? static_cast<size_t>(groups * kGroup * stride) * sizeof(float) : 0);
  const Scratch numbers(static_cast<size_t>(2 * chosen + 3 * rows) * sizeof(float));
  float* at = numbers.as<float>();
  const Shared shared{pack_memory<T>(args.memory, panels.as<float>(), loop), wide_rows.as<float>(), stride,
                      at, at + chosen, at + 2 * chosen, at + 2 * chosen + rows, at + 2 * chosen + 2 * rows};
  if (dense) widen_memory<T>(args.memory, stride, wide_rows.as<float>(), loop);

  const int64_t chunk_rows = rows_per_chunk(rows, loop.threads);
  loop(ceil_div(rows, chunk_rows), 1, [&](int64_t begin, int64_t end) {
    const Buffers buffers(stride, kChunk);
    const Scratch softmax(kChunk * sizeof(RunningSoftmax));
    for (int64_t chunk = begin; chunk < end; ++chunk)
      differentiate_queries<T>(args, shared, chunk * chunk_rows, smaller(chunk_rows, rows - chunk * chunk_rows),
                               buffers, softmax.as<RunningSoftmax>());
  });

  loop(groups, 1, [&](int64_t begin, int64_t end) {
    const Buffers buffers(stride, kColumns);
    for (int64_t group = begin; group < end; ++group) differentiate_memory<T>(args, shared, choices, group, buffers);
  });
}

}  // namespace

void gumbel_topk_backward(const GumbelTopkBackward& args, const Choices& choices, const ThreadLoop& loop) {
  MEMAD_FAST_BY_DTYPE(args.query.dtype, scalar, backward<scalar>(args, choices, loop);)
}

}  // namespace MEMAD_FAST_ISA
}  // namespace memad_fast
