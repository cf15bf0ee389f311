// What the forward and the backward kernels of gumbel_topk share: packed memory, and one tile of scores.
//
//               64 columns = one run of noise = 64 / kPanel panels
//             +---------+---------+- ...
//   kTileRows | C = A.B | in registers, kDepth steps of D at a time
//             +---------+---------+- ...
//   ...       up to kChunk rows; then noise is added to the chunk's scores, and its rows are scanned
//
// A dot product is one chain of multiply-adds along D, whatever tile it falls in: that, and columns visited in
// ascending order, make a row's result independent of the batch and of threads.
#pragma once

#include "core/parallel.h"
#include "core/philox.h"
#include "core/scratch.h"
#include "core/simd.h"
#include "cpu/gumbel_topk.h"

namespace memad_fast {
namespace MEMAD_FAST_ISA {

// Accumulators + one row of B + one broadcast fit the registers: 24 + 4 + 1 of 32, 12 + 2 + 1 of 16, and 8 + 2 + 2 of
// 16 where a multiply-add needs a temporary.
#if MEMAD_FAST_ISA_LEVEL == 2
constexpr int kTileRows = 6, kVectors = 4;
#elif MEMAD_FAST_ISA_LEVEL == 1
constexpr int kTileRows = 6, kVectors = 2;
#else
constexpr int kTileRows = 4, kVectors = 2;
#endif
constexpr int kPanel = kVectors * F32::lanes;
constexpr int kGroup = kNoiseColumns;

// Rows that share one pass over the packed memory: each panel is then read from memory once for 48 rows, and the rows'
// packed copies (96 KiB at D = 512) stay in the L2 cache beside it. A multiple of every kTileRows.
constexpr int64_t kChunk = 48;

// Steps of D per pass over the chunk: a panel's part (24 KiB at 64 columns) and the chunk's scores (12 KiB) share L1.
constexpr int64_t kDepth = 96;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// At most kChunk, fewer where there are too few rows for every thread. Results do not depend on it.
inline int64_t rows_per_chunk(int64_t rows, int threads) {
  const int64_t share = ceil_div(ceil_div(rows, threads < 1 ? 1 : threads), kTileRows) * kTileRows;
  return share < kChunk ? (share < kTileRows ? kTileRows : share) : kChunk;
}

// Rounds the first `count` lanes to the element type of `to`.
template <class T>
inline void store_rest(F32 x, int count, T* to) {
  float lanes[F32::lanes];
  x.store(lanes);
  for (int i = 0; i < count; ++i) scalar_to(lanes[i], to + i);
}

// c[r][0..kPanel) = or += sum over t < count of a[r * a_row + t * a_step] * b[t * b_step + 0..kPanel).
template <bool accumulate>
inline void multiply_tile(const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t b_step, int64_t count,
                          float* c, int64_t c_row) {
  F32 sum[kTileRows][kVectors];
  for (int r = 0; r < kTileRows; ++r)
    for (int v = 0; v < kVectors; ++v)
      sum[r][v] = accumulate ? F32::load(c + r * c_row + v * F32::lanes) : F32::zero();
  for (int64_t t = 0; t < count; ++t) {
    F32 row[kVectors];
    for (int v = 0; v < kVectors; ++v) row[v] = F32::load(b + t * b_step + v * F32::lanes);
    for (int r = 0; r < kTileRows; ++r) {
      const F32 factor = F32::set1(a[r * a_row + t * a_step]);
      for (int v = 0; v < kVectors; ++v) sum[r][v] = fma(factor, row[v], sum[r][v]);
    }
  }
  for (int r = 0; r < kTileRows; ++r)
    for (int v = 0; v < kVectors; ++v) sum[r][v].store(c + r * c_row + v * F32::lanes);
}

// Widens one row to float32; tells whether all of it is finite.
template <class T>
bool widen(const T* from, int64_t count, float* to) {
  M32 finite = F32::zero() == F32::zero();
  int64_t d = 0;
  for (; d + F32::lanes <= count; d += F32::lanes) {
    const F32 x = F32::load(from + d);
    finite = finite & (x - x == F32::zero());
    x.store(to + d);
  }
  if (d < count) {
    const F32 x = F32::load_first(from + d, static_cast<int>(count - d));
    finite = finite & (x - x == F32::zero());
    x.store_first(to + d, static_cast<int>(count - d));
  }
  return finite.bits() == (F32::zero() == F32::zero()).bits();
}

// The memory in float32, panel by panel: panels[column / kPanel][d][column % kPanel], padded to whole groups.
// penalty is 0 for a row that can be chosen, -inf for a non-finite one and for padding.
struct PackedMemory {
  int64_t items;
  int64_t width;
  float* panels;
  float* penalty;

  int64_t groups() const { return ceil_div(items, kGroup); }
  const float* group(int64_t index) const { return panels + index * kGroup * width; }
};

inline size_t packed_bytes(const Rows& memory) {
  return static_cast<size_t>(ceil_div(memory.rows, kGroup) * kGroup * (memory.cols + 1)) * sizeof(float);
}

template <class T>
PackedMemory pack_memory(const Rows& memory, float* storage, const ThreadLoop& loop) {
  const int64_t items = memory.rows, width = memory.cols;
  const int64_t padded = ceil_div(items, kGroup) * kGroup;
  const PackedMemory packed{items, width, storage + padded, storage};
  loop(padded / kPanel, kGroup / kPanel, [&](int64_t begin, int64_t end) {
    const int64_t stride = width + 16;  // rows a power of two apart would share few sets of the L1 cache
    const Scratch wide_rows(static_cast<size_t>(kPanel * stride) * sizeof(float));
    float* wide = wide_rows.as<float>();
    for (int64_t panel = begin; panel < end; ++panel) {
      for (int64_t c = 0; c < kPanel; ++c) {
        const int64_t column = panel * kPanel + c;
        const bool usable = column < items && widen(memory.row<T>(column), width, wide + c * stride);
        packed.penalty[column] = usable ? 0.0f : -__builtin_inff();
        if (!usable) std::memset(wide + c * stride, 0, static_cast<size_t>(width) * sizeof(float));
      }
      float* to = packed.panels + panel * kPanel * width;
      for (int64_t d = 0; d < width; ++d)
        for (int64_t c = 0; c < kPanel; ++c) to[d * kPanel + c] = wide[c * stride + d];
    }
  });
  return packed;
}

// Float32 copies of `count` rows from `first`, `stride` elements apart, followed by zeros up to kChunk rows. A row with
// a NaN or an infinity becomes zeros too, and finite[r] says so.
template <class T>
void pack_queries(const Rows& query, int64_t first, int64_t count, int64_t stride, float* to, bool* finite) {
  for (int64_t r = 0; r < kChunk; ++r) {
    float* row = to + r * stride;
    finite[r] = r < count && widen(query.row<T>(first + r), query.cols, row);
    const int64_t kept = finite[r] ? query.cols : 0;
    std::memset(row + kept, 0, static_cast<size_t>(stride - kept) * sizeof(float));
  }
}

struct Noise {
  bool on;
  int64_t seed;
};

// products[r][0..kGroup) = a[r] . memory for the packed rows of a chunk; whole tiles are written.
inline void multiply_chunk(const float* a, int64_t a_row, int64_t rows, const PackedMemory& memory, int64_t group,
                           float* products) {
  const float* panel = memory.group(group);
  for (int column = 0; column < kGroup; column += kPanel, panel += kPanel * memory.width) {
    for (int64_t tile = 0; tile < rows; tile += kTileRows)
      multiply_tile<false>(a + tile * a_row, a_row, 1, panel, kPanel, smaller(kDepth, memory.width),
                           products + tile * kGroup + column, kGroup);
    for (int64_t depth = kDepth; depth < memory.width; depth += kDepth)
      for (int64_t tile = 0; tile < rows; tile += kTileRows)
        multiply_tile<true>(a + tile * a_row + depth, a_row, 1, panel + depth * kPanel, kPanel,
                            smaller(kDepth, memory.width - depth), products + tile * kGroup + column, kGroup);
  }
}

// scores[r][0..kGroup) of a chunk whose first row is `first` of the batch.
inline void score_chunk(const float* queries, int64_t query_row, const PackedMemory& memory, int64_t group,
                        const Noise& noise, int64_t first, int64_t rows, float* scores) {
  multiply_chunk(queries, query_row, rows, memory, group, scores);
  for (int64_t r = 0; r < rows; ++r) {
    float* at = scores + r * kGroup;
    if (noise.on) add_gumbel_noise(noise.seed, first + r, group, at);
    for (int c = 0; c < kGroup; c += F32::lanes)
      (F32::load(at + c) + F32::load(memory.penalty + group * kGroup + c)).store(at + c);
  }
}

// 1 / temperature in float32, kept off 0 and infinity so that its product with a score gap is never 0 * inf.
inline float inverse_temperature(double temperature) {
  const double inverse = 1.0 / temperature;
  return inverse > __FLT_MAX__ ? __FLT_MAX__ : (inverse < __FLT_MIN__ ? __FLT_MIN__ : static_cast<float>(inverse));
}

inline float exp_scalar(float x) {
  float lanes[F32::lanes];
  exp(F32::set1(x)).store(lanes);
  return lanes[0];
}

// Softmax statistics of one row, gathered group by group, each lane with its own maximum: no reduction across lanes
// until the row is done. `weighted` is the sum of exp(score) times a second tile, where there is one.
struct RunningSoftmax {
  float maximum[F32::lanes];
  float total[F32::lanes];
  float weighted[F32::lanes];

  void start() {
    F32::set1(-__FLT_MAX__).store(maximum);
    F32::zero().store(total);
    F32::zero().store(weighted);
  }

  // Scores of one group; a NaN counts as -inf. `values` may be null.
  void add(const float* scores, const float* values, float inverse) {
    const F32 scale = F32::set1(inverse), nothing = F32::set1(-__builtin_inff());
    F32 score[kGroup / F32::lanes], highest = nothing;
    for (int v = 0; v < kGroup / F32::lanes; ++v) {
      const F32 x = F32::load(scores + v * F32::lanes);
      score[v] = select(x == x, x, nothing);
      highest = max(highest, score[v]);
    }
    F32 top = F32::load(maximum), sum = F32::load(total), product = F32::load(weighted);
    if ((highest > top).any()) {
      const F32 raised = max(top, highest), shrink = exp((top - raised) * scale);
      sum = sum * shrink;
      product = product * shrink;
      top = raised;
      top.store(maximum);
    }
    F32 part = F32::zero();
    for (int v = 0; v < kGroup / F32::lanes; ++v) {
      const F32 weight = exp((score[v] - top) * scale);
      part = part + weight;
      if (values != nullptr) product = fma(weight, F32::load(values + v * F32::lanes), product);
    }
    (sum + part).store(total);
    product.store(weighted);
  }

  struct Result {
    float maximum;
    float total;
    float weighted;
  };

  Result finish(float inverse) const {
    Result result{maximum[0], 0.0f, 0.0f};
    for (float m : maximum) result.maximum = m > result.maximum ? m : result.maximum;
    float shrink[F32::lanes];
    exp((F32::load(maximum) - F32::set1(result.maximum)) * F32::set1(inverse)).store(shrink);
    for (int lane = 0; lane < F32::lanes; ++lane) {
      result.total += total[lane] * shrink[lane];
      result.weighted += weighted[lane] * shrink[lane];
    }
    return result;
  }
};

}  // namespace MEMAD_FAST_ISA
}  // namespace memad_fast
