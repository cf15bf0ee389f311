// What the forward and the backward kernels of gumbel_topk share: packed rows, and the product of one tile.
//
//               64 columns = one run of noise = 64 / kPanel panels
//             +---------+---------+- ...
//   kTileRows | C = A.B | in registers, kDepth steps of D at a time
//             +---------+---------+- ...
//   ...       up to a chunk of rows
//
// A dot product is one chain of multiply-adds along D, whatever tile it falls in: that makes a row's scores independent
// of the batch and of threads.
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

// Rows that share one pass over the packed memory. A memory that fits the L2 cache is read again for every 48 rows; a
// larger one comes from L3 or beyond, once for as many rows as L2 keeps packed (384 at D = 512). All are multiples of
// every kTileRows.
constexpr int64_t kSmallChunk = 48, kLargeChunk = 384;
constexpr int64_t kSmallMemory = 1 << 17, kPackedRows = 208 << 10;  // elements

// Steps of D per pass over a chunk: a panel's part (24 KiB at 64 columns) stays in L1.
constexpr int64_t kDepth = 96;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Elements between rows that tiles walk down: a multiple of a cache line, and an odd one, as rows a power of two apart
// would share few sets of the L1 cache.
inline int64_t padded_width(int64_t width) { return (ceil_div(width, 16) | 1) * 16; }

inline int64_t most_chunk_rows(int64_t items, int64_t width) {
  if (items * width <= kSmallMemory) return kSmallChunk;
  const int64_t kept = kPackedRows / padded_width(width) / kSmallChunk * kSmallChunk;
  return kept < kSmallChunk ? kSmallChunk : smaller(kept, kLargeChunk);
}

// Rounds the first `count` lanes to the element type of `to`.
template <class T>
inline void store_rest(F32 x, int count, T* to) {
  float lanes[F32::lanes];
  x.store(lanes);
  for (int i = 0; i < count; ++i) scalar_to(lanes[i], to + i);
}

// c[r][0..kPanel) = or += sum over t < count of a[r * a_row + t * a_step] * b[t * b_step + 0..kPanel).
template <bool accumulate, int tile_rows = kTileRows>
inline void multiply_tile(const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t b_step, int64_t count,
                          float* c, int64_t c_row) {
  F32 sum[tile_rows][kVectors];
  for (int r = 0; r < tile_rows; ++r)
    for (int v = 0; v < kVectors; ++v)
      sum[r][v] = accumulate ? F32::load(c + r * c_row + v * F32::lanes) : F32::zero();
  for (int64_t t = 0; t < count; ++t) {
    F32 row[kVectors];
    for (int v = 0; v < kVectors; ++v) row[v] = F32::load(b + t * b_step + v * F32::lanes);
    for (int r = 0; r < tile_rows; ++r) {
      const F32 factor = F32::set1(a[r * a_row + t * a_step]);
      for (int v = 0; v < kVectors; ++v) sum[r][v] = fma(factor, row[v], sum[r][v]);
    }
  }
  for (int r = 0; r < tile_rows; ++r)
    for (int v = 0; v < kVectors; ++v) sum[r][v].store(c + r * c_row + v * F32::lanes);
}

inline F32 finite_or_nan(F32 x) { return x - x; }  // 0 or NaN

// Widens one row to float32; tells whether all of it is finite.
template <class T>
bool widen(const T* from, int64_t count, float* to) {
  F32 doubt = F32::zero();
  int64_t d = 0;
  for (; d + F32::lanes <= count; d += F32::lanes) {
    const F32 x = F32::load(from + d);
    doubt = doubt + finite_or_nan(x);
    x.store(to + d);
  }
  if (d < count) {
    const F32 x = F32::load_first(from + d, static_cast<int>(count - d));
    doubt = doubt + finite_or_nan(x);
    x.store_first(to + d, static_cast<int>(count - d));
  }
  return reduce_add(doubt) == 0.0f;
}

template <class T>
bool all_finite(const T* row, int64_t count) {
  F32 doubt = F32::zero();
  int64_t d = 0;
  for (; d + F32::lanes <= count; d += F32::lanes) doubt = doubt + finite_or_nan(F32::load(row + d));
  if (d < count) doubt = doubt + finite_or_nan(F32::load_first(row + d, static_cast<int>(count - d)));
  return reduce_add(doubt) == 0.0f;
}

// 64 memory rows in float32, ready for the product: panels[column / kPanel][d][column % kPanel]. penalty is 0 for a row
// that can be chosen, -inf for a non-finite one and beyond the last; the panels have zeros there.
struct ItemGroup {
  float* penalty;
  float* panels;

  static int64_t elements(int64_t width) { return kGroup * (width + 1); }
  static ItemGroup at(float* storage) { return {storage, storage + kGroup}; }
};

template <class T>
void pack_group(const Rows& memory, int64_t group, ItemGroup to) {
  const int64_t width = memory.cols;
  for (int first = 0; first < kGroup; first += F32::lanes) {
    const T* rows[F32::lanes];
    for (int lane = 0; lane < F32::lanes; ++lane) {
      const int64_t item = group * kGroup + first + lane;
      const bool usable = item < memory.rows && all_finite(memory.row<T>(item), width);
      rows[lane] = usable ? memory.row<T>(item) : nullptr;
      to.penalty[first + lane] = usable ? 0.0f : -__builtin_inff();
    }
    float* panel = to.panels + first / kPanel * kPanel * width + first % kPanel;
    for (int64_t d = 0; d < width; d += F32::lanes) {
      const int count = static_cast<int>(smaller(F32::lanes, width - d));
      F32 block[F32::lanes];
      for (int lane = 0; lane < F32::lanes; ++lane)
        block[lane] = rows[lane] == nullptr   ? F32::zero()
                      : count == F32::lanes ? F32::load(rows[lane] + d)
                                            : F32::load_first(rows[lane] + d, count);
      transpose(block);
      for (int step = 0; step < count; ++step) block[step].store(panel + (d + step) * kPanel);
    }
  }
}

// Float32 copies of `count` rows from `first`, `stride` elements apart with zeros between, then zero rows up to `padded`.
// A row with a NaN or an infinity becomes zeros too, and finite[r] says so.
template <class T>
void pack_rows(const Rows& rows, int64_t first, int64_t count, int64_t padded, int64_t stride, float* to,
               bool* finite) {
  for (int64_t r = 0; r < padded; ++r) {
    float* row = to + r * stride;
    const bool usable = r < count && widen(rows.row<T>(first + r), rows.cols, row);
    if (r < count) finite[r] = usable;
    const int64_t kept = usable ? rows.cols : 0;
    std::memset(row + kept, 0, static_cast<size_t>(stride - kept) * sizeof(float));
  }
}

// c[r][0..kGroup) = a[r] . memory for the packed rows of a chunk; whole tiles are written. While a part of the panels is
// used by one tile after another, the part behind it is asked for.
inline void multiply_group(const float* a, int64_t a_row, int64_t rows, const float* panels, int64_t width, float* c,
                           int64_t c_row) {
  constexpr int64_t line = 64 / sizeof(float);
  const int64_t part = smaller(kDepth, width) * kPanel;
  const int64_t share = rows > kSmallChunk ? round_up(ceil_div(part, ceil_div(rows, kTileRows)), line) : 0;
  for (int column = 0; column < kGroup; column += kPanel) {
    const float* panel = panels + column * width;
    for (int64_t depth = 0; depth == 0 || depth < width; depth += kDepth) {
      const float *b = panel + depth * kPanel, *ahead = b + part;
      const int64_t steps = smaller(kDepth, width - depth);
      for (int64_t tile = 0; tile < rows; tile += kTileRows, ahead += share) {
        for (int64_t at = 0; at < share; at += line) __builtin_prefetch(ahead + at, 0, 2);
        const float* factors = a + tile * a_row + depth;
        float* to = c + tile * c_row + column;
        if (depth == 0)
          multiply_tile<false>(factors, a_row, 1, b, kPanel, steps, to, c_row);
        else
          multiply_tile<true>(factors, a_row, 1, b, kPanel, steps, to, c_row);
      }
    }
  }
}

// Adds a group's penalties to `rows` rows of scores.
inline void add_penalty(const float* penalty, int64_t rows, float* scores, int64_t stride) {
  M32 none = F32::zero() == F32::zero();
  for (int c = 0; c < kGroup; c += F32::lanes) none = none & (F32::load(penalty + c) == F32::zero());
  if (none.bits() == (F32::zero() == F32::zero()).bits()) return;
  for (int64_t r = 0; r < rows; ++r)
    for (int c = 0; c < kGroup; c += F32::lanes) {
      float* at = scores + r * stride + c;
      (F32::load(at) + F32::load(penalty + c)).store(at);
    }
}

// Adds their noise to a group's scores of `rows` rows; `first` is the number of the first.
inline void add_noise(const PhiloxKeys& keys, int64_t group, int64_t first, int64_t rows, float* scores,
                      int64_t stride) {
  NoiseGroup shared(keys, group, first);
  for (int64_t r = 0; r < rows; ++r) {
    if (!shared.serves(first + r)) shared = NoiseGroup(keys, group, first + r);
    const NoiseWords drawn = shared.draw(keys, first + r);
    for (int v = 0; v < NoiseWords::kVectors; ++v) {
      float* at = scores + r * stride + v * F32::lanes;
      (F32::load(at) + gumbel_from_words(drawn.words[v])).store(at);
    }
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

}  // namespace MEMAD_FAST_ISA
}  // namespace memad_fast
