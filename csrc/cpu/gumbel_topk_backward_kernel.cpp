// One level of gumbel_topk's backward (see gumbel_topk.h). Compiled once per instruction set.
//
// With g the gradient of a read, h that of its scores, a_j = g . memory_j and w the weights of the read:
//
//   chosen rows    d score_s  = h_s + (renormalized: w_s (a_s - c) / T;  softmax: w_s a_s / T),   c = sum of w a
//                  d memory_s = w_s g
//   all columns    d score_j  = softmax: -w_j c / T;  straight_through: w_j (a_j - c) / T, and d memory_j = w_j g
//   both           d query = sum of d score_j memory_j,   d memory_j += d score_j query
//
// The dense reads go through blocks of rows whose scores and values of all columns fit the caches, and each product is
// made once:
//
//   rows of a block, shared out by chunks:     score = query . memory, a = g . memory -> w, d score -> d query
//   columns, shared out by groups of 64:       d memory += d score transposed . query + w transposed . g
//
// A thread owns its rows, then its columns, and meets the block's rows in order: nothing is summed across threads.
#include "cpu/gumbel_topk_tile.h"

namespace memad_fast {
namespace MEMAD_FAST_ISA {
namespace {

// Scores kept for one block: 4 MiB, and as much for the values. More rows mean fewer passes over d memory.
constexpr int64_t kBlockScores = 1 << 20;

// Most rows of a chunk. Wide rows gain from meeting the memory less often; narrow ones from scores and values that stay in
// L2 (1.5 MiB at 4,096 columns and 48 rows), as little work comes upon each of them.
constexpr int64_t kNarrowChunk = 48, kWideChunk = 192, kWide = 256;

bool has_dense_part(Combine combine) { return combine == Combine::softmax || combine == Combine::straight_through; }

// Sizes, and what the loops hand on. Matrices of one block are laid out by groups: [groups][row_stride][64].
struct Shared {
  int64_t groups;
  int64_t stride;      // elements between packed rows of width D
  int64_t block_rows;  // rows of a block; from the shape alone, as the order of sums follows from it
  int64_t row_stride;  // odd, so that a row's groups lie in different sets of the caches

  float* packed;        // [groups] ItemGroup
  float* items;         // [groups * 64][stride], zeros where a row is not finite
  float* queries;       // [block_rows][stride], zeros where a row is not finite
  float* grads;         // [block_rows][stride], zeros there too
  float* weights;       // of the block: scores, then w
  float* score_grads;   // of the block: a, then d score
  float* grad_items;    // [groups * 64][stride]
  float* slot_weights;  // [N, k]: d memory = weight * g
  float* slot_grads;    // [N, k]: d score of the chosen rows, without the part that all columns have

  int64_t at(int64_t group, int64_t row) const { return (group * row_stride + row) * kGroup; }
};

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

// Float32 copies of the gradients of `count` reads, zeros for reads of non-finite queries (NaN constants) and to a whole
// tile.
template <class T>
void pack_gradients(const Rows& grad, int64_t first, int64_t count, int64_t stride, const bool* finite, float* to) {
  for (int64_t r = 0; r < round_up(count, kTileRows); ++r) {
    float* row = to + r * stride;
    const int64_t kept = r < count && finite[r] ? grad.cols : 0;
    if (kept > 0) widen(grad.row<T>(first + r), kept, row);
    std::memset(row + kept, 0, static_cast<size_t>(stride - kept) * sizeof(float));
  }
}

// The softmax of one row, and c for straight_through.
struct RowSoftmax {
  float maximum, inverse_total, centre;
};

// Weights and score gradients of the chosen rows of one query; c too where it is a sum over them.
template <class T>
void differentiate_chosen(const GumbelTopkBackward& args, const Shared& shared, int64_t row, const float* grad,
                          float inverse, RowSoftmax* softmax) {
  const int64_t k = args.k, *columns = args.indices + row * k;
  const float* scores = args.scores + row * k;
  float *weights = shared.slot_weights + row * k, *score_grads = shared.slot_grads + row * k;
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
  const float top = all ? softmax->maximum : scores[0];
  float total = 0.0f;
  for (int64_t slot = 0; slot < found; ++slot) {
    weights[slot] = exp_scalar((scores[slot] - top) * inverse);
    total += weights[slot];
  }
  const float share = all ? softmax->inverse_total : 1.0f / total;
  float centre = 0.0f;
  for (int64_t slot = 0; slot < found; ++slot) {
    weights[slot] *= share;
    centre += weights[slot] * dot(grad, args.memory.row<T>(columns[slot]), args.memory.cols);
  }
  for (int64_t slot = 0; slot < found; ++slot) {
    const float value = dot(grad, args.memory.row<T>(columns[slot]), args.memory.cols);
    score_grads[slot] += weights[slot] * (all ? value : value - centre) * inverse;
  }
  if (all) softmax->centre = centre;
}

// Turns a row's scores into exp((score - maximum) / T), and sums them: lane by lane, columns in ascending order.
RowSoftmax exponentiate_row(const GumbelTopkBackward& args, const Shared& shared, int64_t row, float inverse) {
  const F32 nothing = F32::set1(-__builtin_inff()), scale = F32::set1(inverse);
  F32 highest = F32::set1(-__FLT_MAX__);
  for (int64_t group = 0; group < shared.groups; ++group) {
    const float* scores = shared.weights + shared.at(group, row);
    for (int c = 0; c < kGroup; c += F32::lanes) highest = max(F32::load(scores + c), highest);  // ignores NaN
  }
  RowSoftmax softmax{reduce_max(highest), 0.0f, 0.0f};
  const F32 top = F32::set1(softmax.maximum);
  const bool through = args.combine == Combine::straight_through;
  F32 total = F32::zero(), weighted = F32::zero();
  for (int64_t group = 0; group < shared.groups; ++group) {
    float* scores = shared.weights + shared.at(group, row);
    const float* values = shared.score_grads + shared.at(group, row);
    for (int c = 0; c < kGroup; c += F32::lanes) {
      const F32 score = F32::load(scores + c);
      const F32 weight = exp((select(score == score, score, nothing) - top) * scale);
      weight.store(scores + c);
      total = total + weight;
      if (through) weighted = fma(weight, F32::load(values + c), weighted);
    }
  }
  const float sum = reduce_add(total);
  softmax.inverse_total = sum > 0.0f ? 1.0f / sum : (sum == 0.0f ? 0.0f : sum);
  if (through) softmax.centre = reduce_add(weighted) * softmax.inverse_total;
  return softmax;
}

// Exponentials become weights, and values become d score.
void differentiate_row(const GumbelTopkBackward& args, const Shared& shared, int64_t row, float inverse,
                       const RowSoftmax& softmax) {
  const F32 share = F32::set1(softmax.inverse_total), centre = F32::set1(softmax.centre), scale = F32::set1(inverse);
  const bool through = args.combine == Combine::straight_through;
  for (int64_t group = 0; group < shared.groups; ++group) {
    float *weights = shared.weights + shared.at(group, row), *values = shared.score_grads + shared.at(group, row);
    for (int c = 0; c < kGroup; c += F32::lanes) {
      const F32 weight = F32::load(weights + c) * share, value = through ? F32::load(values + c) : F32::zero();
      weight.store(weights + c);
      (weight * (value - centre) * scale).store(values + c);
    }
  }
}

// Scores of a chunk of rows against all columns and, for straight_through, a = g . memory. `row` is the chunk's first
// row in the block, `first` in the batch.
void score_chunk(const GumbelTopkBackward& args, const Shared& shared, const PhiloxKeys& keys, int64_t row,
                 int64_t first, int64_t count) {
  const int64_t width = args.query.cols, stride = shared.stride;
  for (int64_t group = 0; group < shared.groups; ++group) {
    const ItemGroup items = ItemGroup::at(shared.packed + group * ItemGroup::elements(width));
    float* scores = shared.weights + shared.at(group, row);
    multiply_group(shared.queries + row * stride, stride, count, items.panels, width, scores, kGroup);
    if (args.combine == Combine::straight_through)
      multiply_group(shared.grads + row * stride, stride, count, items.panels, width,
                     shared.score_grads + shared.at(group, row), kGroup);
    if (args.noise) add_noise(keys, group, first, count, scores, kGroup);
    add_penalty(items.penalty, count, scores, kGroup);
  }
}

// d query += d score . memory over all columns.
void add_dense_query_gradient(const Shared& shared, int64_t row, int64_t count, float* results) {
  for (int64_t group = 0; group < shared.groups; ++group) {
    const float* score_grads = shared.score_grads + shared.at(group, row);
    const float* items = shared.items + group * kGroup * shared.stride;
    for (int64_t d = 0; d + kPanel <= shared.stride; d += kPanel)
      for (int64_t tile = 0; tile < count; tile += kTileRows)
        multiply_tile<true>(score_grads + tile * kGroup, kGroup, 1, items + d, shared.stride, kGroup,
                            results + tile * shared.stride + d, shared.stride);
  }
}

// Gradients of the queries of one chunk; leaves weights and d score of its rows, all columns and chosen ones.
template <class T>
void differentiate_queries(const GumbelTopkBackward& args, const Shared& shared, const PhiloxKeys& keys, int64_t row,
                           int64_t first, int64_t count, float* results) {
  const int64_t width = args.query.cols, stride = shared.stride, k = args.k;
  const float inverse = inverse_temperature(args.temperature);
  const bool dense = has_dense_part(args.combine);
  float *queries = shared.queries + row * stride, *grads = shared.grads + row * stride;
  bool finite[kWideChunk];
  pack_rows<T>(args.query, first, count, round_up(count, kTileRows), stride, queries, finite);
  pack_gradients<T>(args.grad_read, first, count, stride, finite, grads);
  std::memset(results, 0, static_cast<size_t>(round_up(count, kTileRows) * stride) * sizeof(float));

  if (dense) score_chunk(args, shared, keys, row, first, count);
  for (int64_t r = 0; r < count; ++r) {
    RowSoftmax softmax{};
    if (dense) softmax = exponentiate_row(args, shared, row + r, inverse);
    differentiate_chosen<T>(args, shared, first + r, grads + r * stride, inverse, &softmax);
    if (dense) differentiate_row(args, shared, row + r, inverse, softmax);
  }
  if (dense) add_dense_query_gradient(shared, row, count, results);
  for (int64_t r = 0; r < count; ++r) {
    float* result = results + r * stride;
    for (int64_t slot = (first + r) * k; slot < (first + r + 1) * k; ++slot)
      if (args.indices[slot] >= 0)
        add_scaled(shared.slot_grads[slot], args.memory.row<T>(args.indices[slot]), width, result);
    if (!finite[r]) std::memset(result, 0, static_cast<size_t>(width) * sizeof(float));
    store_row(result, width, static_cast<T*>(args.grad_query) + (first + r) * width);
  }
}

// c[0..64)[0..kPanel) += a transposed . b over `count` rows of a [rows][64] and b.
inline void multiply_columns(const float* a, const float* b, int64_t b_step, int64_t count, float* c, int64_t c_row) {
  constexpr int rest = kGroup % kTileRows;
  for (int column = 0; column + kTileRows <= kGroup; column += kTileRows)
    multiply_tile<true>(a + column, 1, kGroup, b, b_step, count, c + column * c_row, c_row);
  if constexpr (rest > 0) {
    constexpr int column = kGroup - rest;
    multiply_tile<true, rest>(a + column, 1, kGroup, b, b_step, count, c + column * c_row, c_row);
  }
}

// What a block of `count` rows adds to d memory of one group over all columns.
void add_dense_memory_gradient(const GumbelTopkBackward& args, const Shared& shared, int64_t group, int64_t count) {
  const int64_t stride = shared.stride;
  float* to = shared.grad_items + group * kGroup * stride;
  for (int64_t row = 0; row < count; row += kDepth) {
    const int64_t rows = smaller(kDepth, count - row), at = shared.at(group, row);
    for (int64_t d = 0; d + kPanel <= stride; d += kPanel) {
      multiply_columns(shared.score_grads + at, shared.queries + row * stride + d, stride, rows, to + d, stride);
      if (args.combine == Combine::straight_through)
        multiply_columns(shared.weights + at, shared.grads + row * stride + d, stride, rows, to + d, stride);
    }
  }
}

// Gradient of one memory row: `result` holds what came over all columns; the rows that chose it are added in order.
template <class T>
void differentiate_item(const GumbelTopkBackward& args, const Shared& shared, const Choices& choices, int64_t item,
                        float* result) {
  const int64_t width = args.memory.cols;
  for (int64_t at = choices.starts[item]; at < choices.starts[item + 1]; ++at) {
    const int64_t pair = choices.pairs[at], row = pair / args.k;
    if (args.combine != Combine::straight_through)
      add_scaled(shared.slot_weights[pair], args.grad_read.row<T>(row), width, result);
    add_scaled(shared.slot_grads[pair], args.query.row<T>(row), width, result);
  }
  store_row(result, width, static_cast<T*>(args.grad_memory) + item * width);
}

// The memory in both layouts: panels for products along D, rows for products along the items.
template <class T>
void pack_memory(const GumbelTopkBackward& args, const Shared& shared, const ThreadLoop& loop) {
  loop(shared.groups, 1, [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group) {
      bool finite[kGroup];
      pack_group<T>(args.memory, group, ItemGroup::at(shared.packed + group * ItemGroup::elements(args.memory.cols)));
      const int64_t first = group * kGroup;
      pack_rows<T>(args.memory, first, smaller(kGroup, args.memory.rows - first), kGroup, shared.stride,
                   shared.items + first * shared.stride, finite);
    }
  });
}

template <class T>
void backward(const GumbelTopkBackward& args, const Choices& choices, const ThreadLoop& loop) {
  const int64_t rows = args.query.rows, items = args.memory.rows, chosen = rows * args.k;
  const bool dense = has_dense_part(args.combine);
  Shared shared{};
  shared.groups = ceil_div(items, kGroup);
  shared.stride = padded_width(round_up(args.query.cols, kPanel));
  const int64_t most_rows = args.query.cols < kWide ? kNarrowChunk : kWideChunk;
  const int64_t most = kBlockScores / (shared.groups * kGroup) / kNarrowChunk * kNarrowChunk;
  shared.block_rows = smaller(rows, most < kNarrowChunk ? kNarrowChunk : most);
  shared.row_stride = round_up(shared.block_rows, kTileRows) | 1;

  const auto floats = [](int64_t count) { return static_cast<size_t>(count) * sizeof(float); };
  const int64_t item_rows = dense ? shared.groups * kGroup : 0, scores = item_rows * shared.row_stride;
  const Scratch packed(floats(item_rows / kGroup * ItemGroup::elements(args.memory.cols)));
  const Scratch item_storage(floats(2 * item_rows * shared.stride));
  const Scratch rows_storage(floats(2 * (shared.block_rows + kTileRows) * shared.stride));
  const Scratch score_storage(floats(2 * scores));
  const Scratch slots(floats(2 * chosen));
  shared.packed = packed.as<float>();
  shared.items = item_storage.as<float>();
  shared.grad_items = shared.items + item_rows * shared.stride;
  shared.queries = rows_storage.as<float>();
  shared.grads = shared.queries + (shared.block_rows + kTileRows) * shared.stride;
  shared.weights = score_storage.as<float>();
  shared.score_grads = shared.weights + scores;
  shared.slot_weights = slots.as<float>();
  shared.slot_grads = shared.slot_weights + chosen;

  if (dense) {
    pack_memory<T>(args, shared, loop);
    std::memset(shared.grad_items, 0, floats(item_rows * shared.stride));
  }
  for (int64_t block = 0; block < rows; block += shared.block_rows) {
    const int64_t count = smaller(shared.block_rows, rows - block);
    const int64_t pieces = round_up(ceil_div(count, most_rows), loop.threads < 1 ? 1 : loop.threads);
    const int64_t chunk_rows = round_up(ceil_div(count, pieces), kTileRows);
    loop(ceil_div(count, chunk_rows), 1, [&](int64_t begin, int64_t end) {
      const Scratch results(floats(chunk_rows * shared.stride));
      const PhiloxKeys keys(args.seed);
      for (int64_t row = begin * chunk_rows; row < smaller(count, end * chunk_rows); row += chunk_rows)
        differentiate_queries<T>(args, shared, keys, row, block + row, smaller(chunk_rows, count - row),
                                 results.as<float>());
    });
    if (!dense) continue;
    loop(shared.groups, 1, [&](int64_t begin, int64_t end) {
      for (int64_t group = begin; group < end; ++group) add_dense_memory_gradient(args, shared, group, count);
    });
  }
  loop(items, 16, [&](int64_t begin, int64_t end) {
    const Scratch row(floats(shared.stride));
    for (int64_t item = begin; item < end; ++item) {
      float* result = dense ? shared.grad_items + item * shared.stride : row.as<float>();
      if (!dense) std::memset(result, 0, floats(shared.stride));
      differentiate_item<T>(args, shared, choices, item, result);
    }
  });
}

}  // namespace

void gumbel_topk_backward(const GumbelTopkBackward& args, const Choices& choices, const ThreadLoop& loop) {
  MEMAD_FAST_BY_DTYPE(args.query.dtype, scalar, backward<scalar>(args, choices, loop);)
}

}  // namespace MEMAD_FAST_ISA
}  // namespace memad_fast
