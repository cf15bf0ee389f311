// What the forward, the statistics and the backward of bank_attention share: one tile of query rows of a partition, the
// packed bank that it is multiplied with, and the softmax.
//
//     Q [64, D] --(items as columns)--> S [64, M] --softmax, threshold--> V [64, M] --(items as rows)--> read [64, D]
//       product 1, depth D                                                  product 2, depth M
//
// The bank is packed into panels of up to kPanel vectors, [depth][panel]. A product has two schedules over a panel:
//   dense    kRows x (1 to kVectors vectors) in registers; kDepth deep, so that its part of the panel stays in L1
//   listed   one row x the whole panel in registers, over the row's values that are not zero; kSlice deep, likewise
// Listed pays where a good part of the left values is zero, as in the features after a ReLU and in weights below the
// threshold. Each sum is one chain of multiply-adds along the depth in both, and a zero adds nothing: the schedule
// changes no bit of the result. Nor does anything else but the row and the bank: neither its neighbours nor its tile.
#pragma once

#include "core/scratch.h"
#include "core/simd.h"
#include "cpu/bank_attention.h"

namespace memad_fast {
namespace MEMAD_FAST_ISA {

constexpr int kLanes = F32::lanes;

// Dense: accumulators kRows x kVectors, plus kVectors of the panel and one broadcast value: 28 of 32 registers with
// AVX-512, 16 of 16 with AVX2, 11 of 16 with SSE2 (whose multiply-add needs temporaries). Listed: kPanel accumulators
// and a broadcast value.
#if MEMAD_FAST_ISA_LEVEL == 2
constexpr int kRows = 8, kVectors = 3, kPanel = 16;
#elif MEMAD_FAST_ISA_LEVEL == 1
constexpr int kRows = 4, kVectors = 3, kPanel = 13;
#else
constexpr int kRows = 4, kVectors = 2, kPanel = 12;
#endif

constexpr int64_t kTile = 64;             // query rows worked on together; a multiple of kRows
constexpr int64_t kDepth = 128;           // 128 x 3 vectors of 16 floats = 24 KiB
constexpr int64_t kSlice = 512 / kLanes;  // 32 x 16 vectors of 16 floats = 32 KiB; divides kDepth
constexpr int64_t kResidentFloats = int64_t{2} << 20;  // 8 MiB of packed items per thread

constexpr double kNormFloor = 1e-12;  // cosine divides by max(norm, floor)
constexpr float kSumFloor = 1e-12f;   // renormalisation divides by max(sum, floor)
constexpr double kTieBand = 1.0 / (1 << 20);  // weights up to t (1 + band) are not above t

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t n, int64_t unit) { return ceil_div(n, unit) * unit; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline bool is_finite(double x) { return x - x == 0.0; }
inline Scratch floats(int64_t count) { return Scratch(sizeof(float) * static_cast<size_t>(count)); }
inline int64_t tiles_of(const BankAttentionInputs& in) { return ceil_div(in.rows, kTile); }

// A row stride of at least n floats that is an odd number of cache lines: rows then spread over all cache sets.
inline int64_t odd_lines(int64_t n) { return (ceil_div(n, 16) | 1) * 16; }

// How `columns` are cut into panels of at most kPanel vectors, as evenly as possible. All panels have one row stride.
struct Panels {
  int64_t columns, vectors, count, stride;

  explicit Panels(int64_t n)
      : columns(n),
        vectors(ceil_div(n, kLanes)),
        count(ceil_div(vectors, kPanel)),
        stride(count == 0 ? 0 : odd_lines(ceil_div(vectors, count) * kLanes)) {}
  int64_t first(int64_t panel) const { return panel * vectors / count; }  // in vectors
  int64_t size(int64_t panel) const { return first(panel + 1) - first(panel); }
  int64_t start(int64_t panel) const { return first(panel) * kLanes; }  // in columns
  int64_t padded() const { return vectors * kLanes; }
};

// Columns of one panel that a product takes in one go.
struct Block {
  int64_t panel, first, vectors;  // first: vectors of the panel before it
};

// body(block) for blocks of at most `vectors` vectors that cover all panels, cut as evenly as possible.
template <class F>
void each_block(const Panels& panels, int64_t vectors, const F& body) {
  for (int64_t panel = 0; panel < panels.count; ++panel) {
    const int64_t size = panels.size(panel), blocks = ceil_div(size, vectors);
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t first = block * size / blocks;
      body(Block{panel, first, (block + 1) * size / blocks - first});
    }
  }
}

constexpr int64_t kSumsStride = (kPanel * kLanes / 16 | 1) * 16;  // floats, as odd_lines

// --- dense products -------------------------------------------------------------------------------------------------

// The left factor of a product, one value at a time: row r, depth k.
struct ByRow {
  const float* data;
  int64_t stride;
  float at(int64_t r, int64_t k) const { return data[r * stride + k]; }
};
struct ByDepth {
  const float* data;
  int64_t stride;
  float at(int64_t r, int64_t k) const { return data[k * stride + r]; }
};

// c [rows][V vectors] = (add ? c : 0) + a . b, with b [depth][V vectors], depth in order; rows are rounded up to kRows.
template <int V, class Left>
void multiply_rows(Left a, const float* b, int64_t b_stride, int64_t depth, bool add, float* c, int64_t c_stride,
                   int64_t rows) {
  for (int64_t first = 0; first < rows; first += kRows) {
    float* out = c + first * c_stride;
    F32 sum[kRows][V];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 3
      for (int v = 0; v < V; ++v) sum[r][v] = add ? F32::load(out + r * c_stride + v * kLanes) : F32::zero();
    const float* right_row = b;
    for (int64_t k = 0; k < depth; ++k, right_row += b_stride) {
      F32 right[V];
#pragma GCC unroll 3
      for (int v = 0; v < V; ++v) right[v] = F32::load(right_row + v * kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const F32 left = F32::set1(a.at(first + r, k));
#pragma GCC unroll 3
        for (int v = 0; v < V; ++v) sum[r][v] = fma(left, right[v], sum[r][v]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 3
      for (int v = 0; v < V; ++v) sum[r][v].store(out + r * c_stride + v * kLanes);
  }
}

// The same for 1 to kVectors vectors.
template <class Left>
void multiply_dense(Left a, const float* b, int64_t b_stride, int64_t vectors, int64_t depth, bool add, float* c,
                    int64_t c_stride, int64_t rows) {
  if (vectors == 1) return multiply_rows<1>(a, b, b_stride, depth, add, c, c_stride, rows);
  if (vectors == 2) return multiply_rows<2>(a, b, b_stride, depth, add, c, c_stride, rows);
  if constexpr (kVectors >= 3) multiply_rows<3>(a, b, b_stride, depth, add, c, c_stride, rows);
}

// --- left factors ---------------------------------------------------------------------------------------------------

// c[V vectors] = (add ? c : 0) + sum of values[i] * b[offsets[i] ...], in order.
template <int V>
void multiply_listed(const float* values, const int32_t* offsets, int64_t count, const float* b, bool add, float* c) {
  F32 sum[V];
#pragma GCC unroll 16
  for (int v = 0; v < V; ++v) sum[v] = add ? F32::load(c + v * kLanes) : F32::zero();
  for (int64_t i = 0; i < count; ++i) {
    const F32 left = F32::set1(values[i]);
    const float* right = b + offsets[i];
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) sum[v] = fma(left, F32::load(right + v * kLanes), sum[v]);
  }
#pragma GCC unroll 16
  for (int v = 0; v < V; ++v) sum[v].store(c + v * kLanes);
}

// Up to kTile rows of `depth` values, the left factor of products with a packed bank. What pads a row to whole vectors
// is zero; rows that pad their number to a multiple of kRows are of no meaning.
class LeftRows {
 public:
  explicit LeftRows(int64_t depth)
      : depth_(depth),
        stride_(odd_lines(round_up(depth, kLanes))),
        slices_(ceil_div(depth, kSlice)),
        rows_memory_(floats(kTile * stride_)),
        values_memory_(floats(kTile * stride_)),
        offsets_memory_(sizeof(int32_t) * static_cast<size_t>(kTile * stride_)),
        counts_memory_(sizeof(int32_t) * static_cast<size_t>(kTile * slices_)) {}

  int64_t stride() const { return stride_; }
  float* row(int64_t r) const { return rows_memory_.as<float>() + r * stride_; }

  // Chooses the schedule of the products of these rows with panels like `right`; lists the values if need be.
  void prepare(int64_t rows, const Panels& right) {
    int64_t live = 0;
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t k = 0; k < depth_; k += kLanes) live += count(F32::load(row(r) + k) != F32::zero());
    // Estimates in half cycles, twice the count for what is listed (as measured: a slice shares L1 with the rows of c).
    // Listed, a value loads itself and a row of the panel, at two loads a cycle, and waits for the multiply-add before
    // it; the list costs 2 for each value, listed or not. Dense, a value takes one multiply-add a vector, two a cycle.
    const int64_t panel = right.count == 0 ? 1 : ceil_div(right.vectors, right.count);
    const int64_t values = rows * depth_;
    const int64_t listed = 2 * live * (panel + 1 > 8 ? panel + 1 : 8) + 2 * values, dense = values * panel;
    is_listed_ = listed < dense;
    if (is_listed_)
      for (int64_t r = 0; r < rows; ++r) list(r, static_cast<int32_t>(right.stride));
  }

  // Vectors of the right factor that multiply takes at most.
  int64_t vectors_at_once() const { return is_listed_ ? kPanel : kVectors; }

  // c [rows][vectors] = (k > 0 ? c : 0) + [rows][depth from k] . b; k is a multiple of kDepth.
  void multiply(const float* b, int64_t b_stride, int64_t vectors, int64_t k, int64_t depth, float* c, int64_t c_stride,
                int64_t rows) const {
    if (!is_listed_) {
      multiply_dense(ByRow{row(0) + k, stride_}, b, b_stride, vectors, depth, k > 0, c, c_stride, rows);
      return;
    }
    for (int64_t from = 0; from == 0 || from < depth; from += kSlice)
      multiply_slice<kPanel>(b + from * b_stride, vectors, k + from, c, c_stride, rows);
  }

 private:
  void list(int64_t r, int32_t b_stride) {
    int32_t* counts = counts_memory_.as<int32_t>() + r * slices_;
    const I32 step = I32::iota() * I32::set1(b_stride);
    for (int64_t slice = 0; slice < slices_; ++slice) {
      const int64_t from = slice * kSlice, stop = smaller(from + kSlice, depth_);
      float* values = values_memory_.as<float>() + r * stride_ + from;
      int32_t* offsets = offsets_memory_.as<int32_t>() + r * stride_ + from;
      int listed = 0;
      // Whole vectors are stored: what follows the listed values is overwritten by the next, and ends inside the slice.
      for (int64_t k = from; k < stop; k += kLanes) {
        const F32 value = F32::load(row(r) + k);
        const M32 live = value != F32::zero();
        compress(value, live).store(values + listed);
        compress(step + I32::set1(static_cast<int32_t>(k - from) * b_stride), live).store(offsets + listed);
        listed += count(live);
      }
      counts[slice] = listed;
    }
  }

  template <int V>
  void multiply_slice(const float* b, int64_t vectors, int64_t k, float* c, int64_t c_stride, int64_t rows) const {
    if constexpr (V > 1)
      if (vectors < V) return multiply_slice<V - 1>(b, vectors, k, c, c_stride, rows);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t at = r * stride_ + k;
      multiply_listed<V>(values_memory_.as<float>() + at, offsets_memory_.as<int32_t>() + at,
                         counts_memory_.as<int32_t>()[r * slices_ + k / kSlice], b, k > 0, c + r * c_stride);
    }
  }

  const int64_t depth_, stride_, slices_;
  const Scratch rows_memory_, values_memory_, offsets_memory_, counts_memory_;
  bool is_listed_ = false;
};

// --- the bank -------------------------------------------------------------------------------------------------------

template <class T>
double squared_norm(const T* row, int64_t width) {
  F64 low = F64::zero(), high = F64::zero();
  int64_t d = 0;
  const auto add = [&](F32 x) {
    const F64 a = low_f64(x), b = high_f64(x);
    low = low + a * a;
    high = high + b * b;
  };
  for (; d + kLanes <= width; d += kLanes) add(F32::load(row + d));
  if (d < width) add(F32::load_first(row + d, static_cast<int>(width - d)));
  double part[F64::lanes], sum = 0.0;
  (low + high).store(part);
  for (double p : part) sum += p;
  return sum;
}

// The items of one partition in float32 panels: as columns (panels of items, depth D) and as rows (panels of values,
// depth M), with the factor that makes a product q . m_j the logit x_j. A bank of up to kResidentFloats is packed once
// for all tiles of its partition, a larger one kDepth deep at a time, for each tile.
template <class T>
class PackedBank {
 public:
  explicit PackedBank(const BankAttentionInputs& in)
      : in_(in),
        items_(in.items),
        values_(in.width),
        resident_(columns_floats() + rows_floats() <= kResidentFloats),
        memory_(floats(resident_ ? columns_floats() + rows_floats()
                                 : kDepth * (items_.stride > values_.stride ? items_.stride : values_.stride))),
        scale_memory_(floats(2 * items_.padded())) {}

  const Panels& items() const { return items_; }
  const Panels& values() const { return values_; }

  // x_j = scale()[j] * (q . m_j); NaN for an item that is not finite, 1 for the padding.
  const float* scale() const { return scale_memory_.template as<float>(); }
  // 1 / norm of each item for the cosine, 0 where the norm is at the floor: no gradient through its direction.
  const float* direction() const { return scale() + items_.padded(); }
  bool has_floor_items() const { return has_floor_items_; }

  const T* item(int64_t j) const { return data_ + j * in_.bank_item_stride; }

  void select(int64_t partition) {
    if (partition == partition_) return;
    partition_ = partition;
    data_ = static_cast<const T*>(in_.bank) + partition * in_.bank_partition_stride;
    measure();
    if (!resident_) return;
    for (int64_t panel = 0; panel < items_.count; ++panel)
      pack_columns(items_.start(panel), items_.size(panel), 0, in_.width, columns_at(panel));
    for (int64_t panel = 0; panel < values_.count; ++panel)
      pack_rows(values_.start(panel), values_.size(panel), 0, in_.items, rows_at(panel));
  }

  // Columns of a block of items, [depth of D from d][items]. Valid until the next are asked for.
  const float* columns(const Block& block, int64_t d, int64_t depth) {
    const int64_t first = block.first * kLanes;
    if (resident_) return columns_at(block.panel) + d * items_.stride + first;
    pack_columns(items_.start(block.panel) + first, block.vectors, d, depth, memory_.template as<float>());
    return memory_.template as<float>();
  }

  // A block of the items' values, [items from j][values].
  const float* rows(const Block& block, int64_t j, int64_t depth) {
    const int64_t first = block.first * kLanes;
    if (resident_) return rows_at(block.panel) + j * values_.stride + first;
    pack_rows(values_.start(block.panel) + first, block.vectors, j, depth, memory_.template as<float>());
    return memory_.template as<float>();
  }

 private:
  int64_t columns_floats() const { return items_.count * items_.stride * in_.width; }
  int64_t rows_floats() const { return values_.count * values_.stride * in_.items; }
  float* columns_at(int64_t panel) const { return memory_.template as<float>() + panel * items_.stride * in_.width; }
  float* rows_at(int64_t panel) const {
    return memory_.template as<float>() + columns_floats() + panel * values_.stride * in_.items;
  }

  void measure() {
    float* scale = scale_memory_.template as<float>();
    float* direction = scale + items_.padded();
    has_floor_items_ = false;
    for (int64_t j = 0; j < items_.padded(); ++j) {
      scale[j] = 1.0f;
      direction[j] = 0.0f;
      if (j >= in_.items) continue;
      const double norm = __builtin_sqrt(squared_norm(item(j), in_.width));
      const double divisor = in_.cosine ? (norm > kNormFloor ? norm : kNormFloor) : 1.0;
      scale[j] = is_finite(norm) ? static_cast<float>(1.0 / (divisor * in_.temperature)) : __builtin_nanf("");
      const bool at_floor = in_.cosine && norm <= kNormFloor;
      direction[j] = at_floor ? 0.0f : static_cast<float>(1.0 / divisor);
      has_floor_items_ = has_floor_items_ || at_floor;
    }
  }

  void pack_columns(int64_t start, int64_t vectors, int64_t d, int64_t depth, float* out) const {
    constexpr int64_t kBlock = 16;  // rows of the panel written together: 16 KiB
    for (int64_t block = 0; block < depth; block += kBlock) {
      const int64_t stop = smaller(block + kBlock, depth);
      for (int64_t i = 0; i < vectors * kLanes; ++i) {
        const int64_t j = start + i;
        if (j < in_.items) {
          const T* from = item(j) + d;
          for (int64_t k = block; k < stop; ++k) out[k * items_.stride + i] = scalar_from(from[k]);
        } else {
          for (int64_t k = block; k < stop; ++k) out[k * items_.stride + i] = 0.0f;
        }
      }
    }
  }

  void pack_rows(int64_t start, int64_t vectors, int64_t j, int64_t depth, float* out) const {
    for (int64_t k = 0; k < depth; ++k, out += values_.stride) {
      const T* from = item(j + k) + start;
      for (int64_t v = 0; v < vectors; ++v) {
        const int64_t left = in_.width - start - v * kLanes;
        (left >= kLanes ? F32::load(from + v * kLanes)
                        : F32::load_first(from + v * kLanes, static_cast<int>(left))).store(out + v * kLanes);
      }
    }
  }

  const BankAttentionInputs& in_;
  const Panels items_, values_;
  const bool resident_;
  const Scratch memory_, scale_memory_;
  const T* data_ = nullptr;
  int64_t partition_ = -1;
  bool has_floor_items_ = false;
};

// out [rows, M] = left [rows, D] . items^T
template <class T>
void against_items(PackedBank<T>& bank, int64_t width, const LeftRows& left, int64_t rows, const LeftRows& out) {
  const Panels& items = bank.items();
  each_block(items, left.vectors_at_once(), [&](const Block& block) {
    float* sums = out.row(0) + items.start(block.panel) + block.first * kLanes;
    for (int64_t d = 0; d == 0 || d < width; d += kDepth) {
      const int64_t depth = smaller(kDepth, width - d);
      left.multiply(bank.columns(block, d, depth), items.stride, block.vectors, d, depth, sums, out.stride(), rows);
    }
  });
}

// body(sums, start, count) for left [rows, M] . items, some columns at a time: sums [rows, kPanel vectors] are those of
// `count` values from `start` on.
template <class T, class F>
void over_items(PackedBank<T>& bank, const LeftRows& left, int64_t rows, float* sums, const F& body) {
  const Panels& values = bank.values();
  const int64_t items = bank.items().columns;
  each_block(values, left.vectors_at_once(), [&](const Block& block) {
    for (int64_t j = 0; j < items; j += kDepth) {
      const int64_t depth = smaller(kDepth, items - j);
      left.multiply(bank.rows(block, j, depth), values.stride, block.vectors, j, depth, sums, kSumsStride, rows);
    }
    const int64_t start = values.start(block.panel) + block.first * kLanes;
    body(sums, start, smaller(block.vectors * kLanes, values.columns - start));
  });
}

// --- rows of the query ----------------------------------------------------------------------------------------------

// Row factors of the cosine: unit = (q * pre) * scale. Two steps, so that norms above 1e37 have a normal reciprocal.
struct RowScale {
  float pre, scale;
  bool at_floor;
};

template <class T>
RowScale row_scale(const T* row, int64_t width, bool cosine) {
  if (!cosine) return {1.0f, 1.0f, false};
  F32 squares = F32::zero();
  int64_t d = 0;
  for (; d + kLanes <= width; d += kLanes) {
    const F32 x = F32::load(row + d);
    squares = fma(x, x, squares);
  }
  if (d < width) {
    const F32 x = F32::load_first(row + d, static_cast<int>(width - d));
    squares = fma(x, x, squares);
  }
  const float square = reduce_add(squares);
  // Where no square can have overflowed, nor lost more than rounding to underflow, float32 does.
  if (square > 1e-20f && square < 1e30f) return {1.0f, 1.0f / __builtin_sqrtf(square), false};
  const double norm = __builtin_sqrt(squared_norm(row, width));
  const float pre = norm > 1e18 ? 0x1p-64f : 1.0f;
  return {pre, static_cast<float>(1.0 / ((norm > kNormFloor ? norm : kNormFloor) * pre)), norm <= kNormFloor};
}

template <class T>
void load_row(const T* from, int64_t width, RowScale by, float* to) {
  const F32 pre = F32::set1(by.pre), scale = F32::set1(by.scale);
  int64_t d = 0;
  for (; d + kLanes <= width; d += kLanes) (F32::load(from + d) * pre * scale).store(to + d);
  if (d < width) (F32::load_first(from + d, static_cast<int>(width - d)) * pre * scale).store(to + d);
}

// Where rows [first, first + rows) of a partition lie.
template <class T>
struct RowPointers {
  T* row[kTile];

  RowPointers(const PartitionRows& from, int64_t partition, int64_t first, int64_t rows) {
    T* base = static_cast<T*>(from.data) + partition * from.partition_stride;
    for (int64_t r = 0; r < rows; ++r) row[r] = base + from.offset(first + r);
  }
};

// The rows of a tile are far apart: strips of a feature map lie whole pages from each other, where no hardware prefetch
// looks. So a row is asked for when one kAhead bytes before it is worked on.
constexpr int64_t kAhead = 4096;
template <class T>
int64_t rows_ahead(int64_t width) {
  const int64_t rows = kAhead / (static_cast<int64_t>(sizeof(T)) * (width < 1 ? 1 : width));
  return rows < 1 ? 1 : rows;
}
template <int is_written, class T>
void prefetch(const T* row, int64_t width) {
  for (int64_t d = 0; d < width; d += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(row + d, is_written);
}

// The rows in float32, of norm 1 for the cosine.
template <class T>
void load_rows(const RowPointers<T>& from, int64_t rows, int64_t width, bool cosine, RowScale* scales,
               const LeftRows& to) {
  const int64_t ahead = rows_ahead<T>(width);
  for (int64_t r = 0; r < rows; ++r) {
    if (r + ahead < rows) prefetch<0>(from.row[r + ahead], width);
    scales[r] = row_scale(from.row[r], width, cosine);
    load_row(from.row[r], width, scales[r], to.row(r));
  }
}

// Values [start, start + count) of the rows: sums [rows, count] times a factor for each row.
template <class T>
void store_rows(const float* sums, int64_t start, int64_t count, const float* factor, int64_t rows,
                const RowPointers<T>& to) {
  const int64_t ahead = rows_ahead<T>(count);
  for (int64_t r = 0; r < rows; ++r, sums += kSumsStride) {
    if (r + ahead < rows) prefetch<1>(to.row[r + ahead] + start, count);
    T* out = to.row[r] + start;
    const F32 by = F32::set1(factor[r]);
    int64_t d = 0;
    for (; d + kLanes <= count; d += kLanes) store(F32::load(sums + d) * by, out + d);
    if (d < count) store_first(F32::load(sums + d) * by, out + d, static_cast<int>(count - d));
  }
}

// --- the softmax ----------------------------------------------------------------------------------------------------

// The softmax of one row, not divided by its sum: e_j = exp(x_j - top), p_j = e_j / sum.
struct RowSoftmax {
  float top;
  float sum;    // NaN if the row has a NaN
  float cut;    // a weight is kept if e_j > cut
  float shift;  // and is then e_j - shift

  bool is_nan() const { return !(sum == sum); }
};

inline float largest_logit(const BankAttentionInputs& in, const float* scale, const float* s) {
  const int64_t whole = in.items / kLanes * kLanes;
  F32 largest = F32::set1(-__builtin_inff());
  for (int64_t j = 0; j < whole; j += kLanes) largest = max(F32::load(s + j) * F32::load(scale + j), largest);
  float top = reduce_max(largest);
  for (int64_t j = whole; j < in.items; ++j) {
    const float logit = s[j] * scale[j];
    top = logit > top ? logit : top;
  }
  return top;
}

// Products s_j -> weights e_j, x_j = s_j scale_j; e may be s. e is padded with zeros to whole vectors.
inline RowSoftmax softmax_row(const BankAttentionInputs& in, const float* scale, const float* s, float* e) {
  // Cosines differ by 2 at most. Where that cannot overflow, the first logit serves as well as the largest: equal
  // logits still have weights of exactly 1.
  const bool is_bounded = in.cosine && in.temperature >= 0.05;
  const float top = is_bounded ? s[0] * scale[0] : largest_logit(in, scale, s);
  const F32 tops = F32::set1(top), log2_e = F32::set1(1.44269504f);
  const auto weight = [&](int64_t j) {
    return exp2_to_127((F32::load(s + j) * F32::load(scale + j) - tops) * log2_e);
  };
  const int64_t whole = in.items / kLanes * kLanes;
  F32 total = F32::zero();
  for (int64_t j = 0; j < whole; j += kLanes) {
    const F32 e_j = weight(j);
    e_j.store(e + j);
    total = total + e_j;
  }
  if (whole < in.items) {
    const F32 e_j = select(first_lanes(static_cast<int>(in.items - whole)), weight(whole), F32::zero());
    e_j.store(e + whole);
    total = total + e_j;
  }
  RowSoftmax row{top, reduce_add(total), -1.0f, 0.0f};
  if (in.shrink == Shrink::none) return row;
  // In float64, so that equal weights and t = 1 / M meet the threshold exactly and the band covers the rest.
  row.cut = static_cast<float>(in.threshold * (1.0 + kTieBand) * static_cast<double>(row.sum));
  if (in.shrink == Shrink::soft) row.shift = static_cast<float>(in.threshold * static_cast<double>(row.sum));
  return row;
}

}  // namespace MEMAD_FAST_ISA
}  // namespace memad_fast
