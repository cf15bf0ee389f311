// One level of bank_attention (see bank_attention.h). Compiled once per instruction set.
//
//   a tile: 64 query rows of one partition            one product: kRows x (1 to 3 vectors) in registers
//
//     Q [64, D] --(items as columns)--> X [64, M] --softmax, threshold--> V [64, M] --(items as rows)--> read [64, D]
//       GEMM 1, depth D                                                      GEMM 2, depth M
//
//   The backward adds dV = G . bank^T (beside GEMM 1), dQ = dX . bank, and for the bank V^T . G + dX^T . Q.
//
// The items are packed into panels of 1 to 3 vectors, [depth][panel], in slices of at most 128 deep: a slice
// (24 KiB) stays in L1 while all rows of the tile pass over it. A bank of up to kResidentFloats is packed once for all
// tiles of its partition, a larger one slice by slice for each tile. Arithmetic and its order are the same either way
// and for any number of rows, so a row's result depends on nothing but the row and the bank.
#include "cpu/bank_attention.h"

#include "core/scratch.h"
#include "core/simd.h"

namespace memad_fast {
namespace MEMAD_FAST_ISA {
namespace {

constexpr int kLanes = F32::lanes;

// Accumulators kRows x kVectors, plus kVectors of the panel and one broadcast value: 28 of 32 registers with AVX-512,
// 16 of 16 with AVX2, 11 of 16 with SSE2 (whose multiply-add needs temporaries).
#if MEMAD_FAST_ISA_LEVEL == 2
constexpr int kRows = 8, kVectors = 3;
#elif MEMAD_FAST_ISA_LEVEL == 1
constexpr int kRows = 4, kVectors = 3;
#else
constexpr int kRows = 4, kVectors = 2;
#endif

constexpr int64_t kTile = 64;    // query rows worked on together; a multiple of kRows
constexpr int64_t kDepth = 128;  // depth of a slice: 128 x 3 vectors of 16 floats = 24 KiB
constexpr int64_t kResidentFloats = int64_t{2} << 20;  // 8 MiB of packed items per thread

// The backward cuts the rows of a partition into chunks, so that few partitions still feed many threads. Each chunk has
// a partial gradient of the bank; they are added in order. The cut depends on shapes alone, never on threads.
constexpr int64_t kChunks = 32;                     // partitions x chunks aimed at
constexpr int64_t kPartialFloats = int64_t{8} << 20;  // 32 MiB of partial gradients in all

constexpr double kNormFloor = 1e-12;  // cosine divides by max(norm, floor)
constexpr float kSumFloor = 1e-12f;   // renormalisation divides by max(sum, floor)
constexpr double kTieBand = 1.0 / (1 << 20);  // weights up to t (1 + band) are not above t

inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline bool is_finite(double x) { return x - x == 0.0; }

// A row stride of at least n floats that is an odd number of cache lines: rows then spread over all cache sets.
inline int64_t odd_lines(int64_t n) { return (((n + 15) / 16) | 1) * 16; }

// --- products -------------------------------------------------------------------------------------------------------

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

// c[kRows][V vectors] = (add ? c : 0) + a . b, with b [depth][V vectors], depth in order.
template <int V, class Left>
inline void multiply_block(Left a, const float* b, int64_t b_stride, int64_t depth, bool add, float* c, int64_t c_stride) {
  F32 sum[kRows][V];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) sum[r][v] = add ? F32::load(c + r * c_stride + v * kLanes) : F32::zero();
  for (int64_t k = 0; k < depth; ++k, b += b_stride) {
    F32 right[V];
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) right[v] = F32::load(b + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const F32 left = F32::set1(a.at(r, k));
#pragma GCC unroll 3
      for (int v = 0; v < V; ++v) sum[r][v] = fma(left, right[v], sum[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) sum[r][v].store(c + r * c_stride + v * kLanes);
}

template <int V>
void multiply_rows(const float* a, int64_t a_stride, const float* b, int64_t depth, bool add, float* c,
                   int64_t c_stride, int64_t rows) {
  for (int64_t r = 0; r < rows; r += kRows)
    multiply_block<V>(ByRow{a + r * a_stride, a_stride}, b, V * kLanes, depth, add, c + r * c_stride, c_stride);
}

// c [rows][vectors] = (add ? c : 0) + a [rows][depth] . b, b packed; rows are rounded up to kRows.
void multiply(const float* a, int64_t a_stride, const float* b, int64_t vectors, int64_t depth, bool add, float* c,
              int64_t c_stride, int64_t rows) {
  if (vectors == 1) return multiply_rows<1>(a, a_stride, b, depth, add, c, c_stride, rows);
  if (vectors == 2) return multiply_rows<2>(a, a_stride, b, depth, add, c, c_stride, rows);
  if constexpr (kVectors >= 3) multiply_rows<3>(a, a_stride, b, depth, add, c, c_stride, rows);
}

template <int V>
void add_transposed_rows(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t depth, float* c,
                         int64_t c_stride, int64_t rows) {
  for (int64_t r = 0; r < rows; r += kRows)
    multiply_block<V>(ByDepth{a + r, a_stride}, b, b_stride, depth, true, c + r * c_stride, c_stride);
}

// c [rows][vectors] += a^T . b for a [depth][rows] and b [depth][vectors]; rows are rounded up to kRows.
void add_transposed(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t vectors, int64_t depth,
                    float* c, int64_t c_stride, int64_t rows) {
  if (vectors == 1) return add_transposed_rows<1>(a, a_stride, b, b_stride, depth, c, c_stride, rows);
  if (vectors == 2) return add_transposed_rows<2>(a, a_stride, b, b_stride, depth, c, c_stride, rows);
  if constexpr (kVectors >= 3) add_transposed_rows<3>(a, a_stride, b, b_stride, depth, c, c_stride, rows);
}

// How `columns` are cut into panels of at most kVectors vectors, as evenly as possible.
struct Panels {
  int64_t columns, vectors, count;

  explicit Panels(int64_t n) : columns(n), vectors((n + kLanes - 1) / kLanes), count((vectors + kVectors - 1) / kVectors) {}
  int64_t first(int64_t panel) const { return panel * vectors / count; }  // in vectors
  int64_t size(int64_t panel) const { return first(panel + 1) - first(panel); }
  int64_t start(int64_t panel) const { return first(panel) * kLanes; }  // in columns
  int64_t padded() const { return vectors * kLanes; }
};

// --- the bank -------------------------------------------------------------------------------------------------------

template <class T>
struct SquaredNorm {
  static double of(const T* row, int64_t width) {
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
};

// The items of one partition in float32 panels: as columns (panels of items, depth D) and as rows (panels of values,
// depth M), with the factor that makes a product q . m_j the logit x_j.
template <class T>
class PackedBank {
 public:
  explicit PackedBank(const BankAttentionInputs& in)
      : in_(in),
        items_(in.items),
        values_(in.width),
        resident_(floats(in) <= kResidentFloats),
        memory_(sizeof(float) * static_cast<size_t>(resident_ ? floats(in) : kDepth * kVectors * kLanes)),
        scale_memory_(sizeof(float) * static_cast<size_t>(2 * items_.padded())) {}

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
      pack_columns(panel, 0, in_.width, columns_at(panel));
    for (int64_t panel = 0; panel < values_.count; ++panel) pack_rows(panel, 0, in_.items, rows_at(panel));
  }

  // A panel of items, [depth of D from d][items]. Valid until the next slice is asked for.
  const float* columns(int64_t panel, int64_t d, int64_t depth) {
    if (resident_) return columns_at(panel) + d * items_.size(panel) * kLanes;
    pack_columns(panel, d, depth, memory_.template as<float>());
    return memory_.template as<float>();
  }

  // A panel of values, [items from j][values].
  const float* rows(int64_t panel, int64_t j, int64_t depth) {
    if (resident_) return rows_at(panel) + j * values_.size(panel) * kLanes;
    pack_rows(panel, j, depth, memory_.template as<float>());
    return memory_.template as<float>();
  }

 private:
  static int64_t floats(const BankAttentionInputs& in) {
    return Panels(in.items).padded() * in.width + Panels(in.width).padded() * in.items;
  }
  float* columns_at(int64_t panel) const { return memory_.template as<float>() + items_.start(panel) * in_.width; }
  float* rows_at(int64_t panel) const {
    return memory_.template as<float>() + items_.padded() * in_.width + values_.start(panel) * in_.items;
  }

  void measure() {
    float* scale = scale_memory_.template as<float>();
    float* direction = scale + items_.padded();
    has_floor_items_ = false;
    for (int64_t j = 0; j < items_.padded(); ++j) {
      scale[j] = 1.0f;
      direction[j] = 0.0f;
      if (j >= in_.items) continue;
      const double norm = __builtin_sqrt(SquaredNorm<T>::of(item(j), in_.width));
      const double divisor = in_.cosine ? (norm > kNormFloor ? norm : kNormFloor) : 1.0;
      scale[j] = is_finite(norm) ? static_cast<float>(1.0 / (divisor * in_.temperature)) : __builtin_nanf("");
      const bool at_floor = in_.cosine && norm <= kNormFloor;
      direction[j] = at_floor ? 0.0f : static_cast<float>(1.0 / divisor);
      has_floor_items_ = has_floor_items_ || at_floor;
    }
  }

  void pack_columns(int64_t panel, int64_t d, int64_t depth, float* out) const {
    constexpr int64_t kBlock = 64;  // rows of the panel written together: 12 KiB
    const int64_t width = items_.size(panel) * kLanes;
    for (int64_t block = 0; block < depth; block += kBlock) {
      const int64_t stop = smaller(block + kBlock, depth);
      for (int64_t i = 0; i < width; ++i) {
        const int64_t j = items_.start(panel) + i;
        if (j < in_.items) {
          const T* from = item(j) + d;
          for (int64_t k = block; k < stop; ++k) out[k * width + i] = scalar_from(from[k]);
        } else {
          for (int64_t k = block; k < stop; ++k) out[k * width + i] = 0.0f;
        }
      }
    }
  }

  void pack_rows(int64_t panel, int64_t j, int64_t depth, float* out) const {
    const int64_t vectors = values_.size(panel), start = values_.start(panel);
    for (int64_t k = 0; k < depth; ++k) {
      const T* from = item(j + k) + start;
      for (int64_t v = 0; v < vectors; ++v, out += kLanes) {
        const int64_t left = in_.width - start - v * kLanes;
        (left >= kLanes ? F32::load(from + v * kLanes)
                        : F32::load_first(from + v * kLanes, static_cast<int>(left))).store(out);
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

// --- one tile of query rows -----------------------------------------------------------------------------------------

// Row factors of the cosine: unit = (q * pre) * scale. Two steps, so that norms above 1e37 have a normal reciprocal.
struct RowScale {
  float pre, scale;
  bool at_floor;
};

template <class T>
RowScale row_scale(const T* row, int64_t width, bool cosine) {
  if (!cosine) return {1.0f, 1.0f, false};
  const double norm = __builtin_sqrt(SquaredNorm<T>::of(row, width));
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

// Rows [first, first + rows) of a partition in float32; what pads the rows to a multiple of kRows is zero.
template <class T>
void load_rows(const PartitionRows& from, int64_t partition, int64_t first, int64_t rows, int64_t width, bool cosine,
               RowScale* scales, float* to, int64_t stride) {
  const T* base = static_cast<const T*>(from.data) + partition * from.partition_stride;
  for (int64_t r = 0; r < rows; ++r) {
    const T* row = base + from.offset(first + r);
    scales[r] = row_scale(row, width, cosine);
    load_row(row, width, scales[r], to + r * stride);
  }
  for (int64_t r = rows; r < round_up(rows, kRows); ++r)
    for (int64_t d = 0; d < stride; ++d) to[r * stride + d] = 0.0f;
}

// out [rows, M] = in [rows, D] . items^T
template <class T>
void against_items(PackedBank<T>& bank, int64_t width, const float* in, int64_t in_stride, int64_t rows, float* out,
                   int64_t out_stride) {
  const Panels& items = bank.items();
  for (int64_t panel = 0; panel < items.count; ++panel)
    for (int64_t d = 0; d == 0 || d < width; d += kDepth) {
      const int64_t depth = smaller(kDepth, width - d);
      multiply(in + d, in_stride, bank.columns(panel, d, depth), items.size(panel), depth, d > 0,
               out + items.start(panel), out_stride, rows);
    }
}

// out [rows, one panel of D] = weights [rows, M] . items
template <class T>
void over_items(PackedBank<T>& bank, int64_t count, int64_t panel, const float* weights, int64_t weight_stride,
                int64_t rows, float* out, int64_t out_stride) {
  for (int64_t j = 0; j < count; j += kDepth) {
    const int64_t depth = smaller(kDepth, count - j);
    multiply(weights + j, weight_stride, bank.rows(panel, j, depth), bank.values().size(panel), depth, j > 0, out,
             out_stride, rows);
  }
}

// The softmax of one row, not divided by its sum: e_j = exp(x_j - max), p_j = e_j / sum. The largest e_j is exactly 1.
struct RowSoftmax {
  float sum;    // NaN if the row has a NaN
  float cut;    // a weight is kept if e_j > cut
  float shift;  // and is then e_j - shift

  bool is_nan() const { return !(sum == sum); }
  bool is_dead() const { return !is_nan() && !(1.0f > cut); }
};

// products -> logits x (in place) and e. Both are padded to whole vectors; the padding gets x = 0, e = 0.
inline RowSoftmax softmax_row(const BankAttentionInputs& in, const float* scale, float* x, float* e) {
  const int64_t padded = round_up(in.items, kLanes);
  for (int64_t j = in.items; j < padded; ++j) x[j] = -__builtin_inff();
  F32 largest = F32::set1(-__builtin_inff());
  for (int64_t j = 0; j < padded; j += kLanes) {
    const F32 logit = F32::load(x + j) * F32::load(scale + j);
    logit.store(x + j);
    largest = max(logit, largest);
  }
  const F32 top = F32::set1(reduce_max(largest));
  F32 total = F32::zero();
  for (int64_t j = 0; j < padded; j += kLanes) {
    const F32 weight = exp(F32::load(x + j) - top);
    weight.store(e + j);
    total = total + weight;
  }
  RowSoftmax row{reduce_add(total), -1.0f, 0.0f};
  for (int64_t j = in.items; j < padded; ++j) x[j] = 0.0f;
  if (in.shrink == Shrink::none) return row;
  // In float64, so that equal weights and t = 1 / M meet the threshold exactly and the band covers the rest.
  row.cut = static_cast<float>(in.threshold * (1.0 + kTieBand) * static_cast<double>(row.sum));
  if (in.shrink == Shrink::soft) row.shift = static_cast<float>(in.threshold * static_cast<double>(row.sum));
  return row;
}

// e -> kept weights, not divided; returns the factor that makes them v.
inline float shrink_row(const BankAttentionInputs& in, RowSoftmax row, float* e) {
  const F32 cut = F32::set1(row.cut), shift = F32::set1(row.shift);
  F32 total = F32::zero();
  for (int64_t j = 0; j < in.items; j += kLanes) {
    const F32 weight = F32::load(e + j);
    const F32 kept = select(weight > cut, weight - shift, F32::zero());
    kept.store(e + j);
    total = total + kept;
  }
  if (row.is_nan()) return row.sum;
  if (!in.renormalize) return 1.0f / row.sum;
  const float sum = reduce_add(total), floor = kSumFloor * row.sum;
  return 1.0f / (sum > floor ? sum : floor);
}

// Floats of scratch for a tile: its rows, its weights, a panel of results.
struct TileShape {
  int64_t row_stride, weight_stride, panel_stride = kVectors * kLanes;

  explicit TileShape(const BankAttentionInputs& in)
      : row_stride(odd_lines(round_up(in.width, kLanes))), weight_stride(odd_lines(round_up(in.items, kLanes))) {}
};

inline Scratch floats(int64_t count) { return Scratch(sizeof(float) * static_cast<size_t>(count)); }

template <class T>
void store_scaled(const float* from, int64_t count, float scale, T* to) {
  const F32 by = F32::set1(scale);
  int64_t d = 0;
  for (; d + kLanes <= count; d += kLanes) store(F32::load(from + d) * by, to + d);
  if (d < count) store_first(F32::load(from + d) * by, to + d, static_cast<int>(count - d));
}

int64_t tiles_of(const BankAttentionInputs& in) { return (in.rows + kTile - 1) / kTile; }

template <class T>
void forward(const BankAttention& args, int64_t begin, int64_t end) {
  const BankAttentionInputs& in = args.in;
  const TileShape shape(in);
  PackedBank<T> bank(in);
  const Scratch query_memory = floats(kTile * shape.row_stride), weight_memory = floats(kTile * shape.weight_stride);
  const Scratch panel_memory = floats(kTile * shape.panel_stride);
  float* query = query_memory.as<float>();
  float* weights = weight_memory.as<float>();
  float* sums = panel_memory.as<float>();
  RowScale scales[kTile];
  float factor[kTile];
  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t partition = tile / tiles_of(in), first = tile % tiles_of(in) * kTile;
    const int64_t rows = smaller(kTile, in.rows - first);
    bank.select(partition);
    load_rows<T>(in.query, partition, first, rows, in.width, in.cosine, scales, query, shape.row_stride);
    against_items(bank, in.width, query, shape.row_stride, rows, weights, shape.weight_stride);
    for (int64_t r = 0; r < rows; ++r) {
      float* row = weights + r * shape.weight_stride;
      factor[r] = shrink_row(in, softmax_row(in, bank.scale(), row, row), row);
    }
    T* read = static_cast<T*>(args.read.data) + partition * args.read.partition_stride;
    const Panels& values = bank.values();
    for (int64_t panel = 0; panel < values.count; ++panel) {
      over_items(bank, in.items, panel, weights, shape.weight_stride, rows, sums, shape.panel_stride);
      const int64_t start = values.start(panel), count = smaller(values.size(panel) * kLanes, in.width - start);
      for (int64_t r = 0; r < rows; ++r)
        store_scaled(sums + r * shape.panel_stride, count, factor[r], read + args.read.offset(first + r) + start);
    }
  }
}

// --- statistics -----------------------------------------------------------------------------------------------------

// -sum p log p = log(sum) - (sum e (x - max)) / sum, where log e_j = x_j - max.
inline double entropy_of(const BankAttentionInputs& in, RowSoftmax row, const float* x, const float* e) {
  F32 largest = F32::set1(-__builtin_inff());
  const int64_t whole = in.items / kLanes * kLanes;
  for (int64_t j = 0; j < whole; j += kLanes) largest = max(F32::load(x + j), largest);
  float top = reduce_max(largest);
  for (int64_t j = whole; j < in.items; ++j) top = x[j] > top ? x[j] : top;
  F32 total = F32::zero();
  for (int64_t j = 0; j < in.items; j += kLanes) {
    const F32 weight = F32::load(e + j);
    total = total + select(weight > F32::zero(), weight * (F32::load(x + j) - F32::set1(top)), F32::zero());
  }
  return __builtin_log(static_cast<double>(row.sum)) - static_cast<double>(reduce_add(total)) / row.sum;
}

template <class T>
void tile_stats(const BankAttentionInputs& in, int64_t begin, int64_t end, double* entropy, int64_t* dead) {
  const TileShape shape(in);
  PackedBank<T> bank(in);
  const Scratch query_memory = floats(kTile * shape.row_stride);
  const Scratch logit_memory = floats(kTile * shape.weight_stride), weight_memory = floats(shape.weight_stride);
  float* query = query_memory.as<float>();
  float* logits = logit_memory.as<float>();
  float* weights = weight_memory.as<float>();
  RowScale scales[kTile];
  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t partition = tile / tiles_of(in), first = tile % tiles_of(in) * kTile;
    const int64_t rows = smaller(kTile, in.rows - first);
    bank.select(partition);
    load_rows<T>(in.query, partition, first, rows, in.width, in.cosine, scales, query, shape.row_stride);
    against_items(bank, in.width, query, shape.row_stride, rows, logits, shape.weight_stride);
    entropy[tile] = 0.0;
    dead[tile] = 0;
    for (int64_t r = 0; r < rows; ++r) {
      float* x = logits + r * shape.weight_stride;
      const RowSoftmax row = softmax_row(in, bank.scale(), x, weights);
      entropy[tile] += entropy_of(in, row, x, weights);
      dead[tile] += row.is_dead();
    }
  }
}

// --- backward -------------------------------------------------------------------------------------------------------

// For one row, from x, e and dv: v over e, and dx_j scale_j (the coefficient of item j in dq, and of q in dm_j) over
// dv. Adds dx_j x_j to `along`, the part of dm_j along m_j; returns its sum over j, the part of dq along q.
inline float differentiate_row(const BankAttentionInputs& in, const float* scale, const float* x, float* e, float* dv,
                               RowSoftmax row, float* along) {
  const F32 cut = F32::set1(row.cut), shift = F32::set1(row.shift), zero = F32::zero();
  F32 kept_sum = zero, kept_dv = zero, mask_sum = zero, mask_dv = zero;
  for (int64_t j = 0; j < in.items; j += kLanes) {
    const F32 weight = F32::load(e + j), gradient = F32::load(dv + j);
    const M32 above = weight > cut;
    const F32 kept = select(above, weight - shift, zero), masked = select(above, weight, zero);
    kept_sum = kept_sum + kept;
    kept_dv = fma(kept, gradient, kept_dv);
    mask_sum = mask_sum + masked;
    mask_dv = fma(masked, gradient, mask_dv);
  }
  const float inverse = 1.0f / row.sum;
  const float sum = reduce_add(kept_sum), floor = kSumFloor * row.sum;
  // v = kept * factor; d kept_j = k_j (dv_j - mean) * factor * row.sum, in units of p.
  float factor = inverse, mean = 0.0f;
  if (in.renormalize) {
    factor = 1.0f / (sum > floor ? sum : floor);
    if (sum > floor) mean = reduce_add(kept_dv) * factor;
  }
  if (row.is_nan()) factor = row.sum;
  const float stretch = factor * row.sum;  // dw / (dv - mean): 1 without renormalisation
  const float average = (reduce_add(mask_dv) - mean * reduce_add(mask_sum)) * inverse;  // sum k p dw / stretch
  F32 along_query = zero;
  for (int64_t j = 0; j < in.items; j += kLanes) {
    const F32 weight = F32::load(e + j), logit = F32::load(x + j);
    const M32 above = weight > cut;
    const F32 dw = select(above, F32::load(dv + j) - F32::set1(mean), zero) - F32::set1(average);
    const F32 dx = weight * F32::set1(inverse * stretch) * dw;
    (select(above, weight - shift, zero) * F32::set1(factor)).store(e + j);
    (dx * F32::load(scale + j)).store(dv + j);
    const F32 both = dx * logit;
    (F32::load(along + j) + both).store(along + j);
    along_query = along_query + both;
  }
  return reduce_add(along_query);
}

template <class T>
class BackwardTask {
 public:
  explicit BackwardTask(const BankAttentionBackward& args)
      : args_(args),
        in_(args.in),
        shape_(args.in),
        bank_(args.in),
        memory_(floats(2 * kTile * shape_.row_stride + 3 * kTile * shape_.weight_stride + kTile * shape_.panel_stride)),
        bank_memory_(floats(bank_.items().padded() * shape_.row_stride + bank_.items().padded())) {
    query_ = memory_.as<float>();
    grad_ = query_ + kTile * shape_.row_stride;
    logits_ = grad_ + kTile * shape_.row_stride;
    weights_ = logits_ + kTile * shape_.weight_stride;
    grad_weights_ = weights_ + kTile * shape_.weight_stride;
    sums_ = grad_weights_ + kTile * shape_.weight_stride;
    grad_bank_ = bank_memory_.as<float>();
    along_ = grad_bank_ + bank_.items().padded() * shape_.row_stride;
  }

  // The gradient of rows [first, stop) of a partition, and what they add to the gradient of its bank.
  template <class U>
  void run(int64_t partition, int64_t first, int64_t stop, U* grad_bank) {
    bank_.select(partition);
    const int64_t size = bank_.items().padded() * shape_.row_stride + bank_.items().padded();
    for (int64_t i = 0; i < size; ++i) grad_bank_[i] = 0.0f;
    for (; first < stop; first += kTile) tile(partition, first, smaller(kTile, stop - first));
    for (int64_t j = 0; j < in_.items; ++j) store_item(j, grad_bank + j * in_.width);
  }

 private:
  void tile(int64_t partition, int64_t first, int64_t rows) {
    load_rows<T>(in_.query, partition, first, rows, in_.width, in_.cosine, scales_, query_, shape_.row_stride);
    load_rows<T>(args_.grad, partition, first, rows, in_.width, false, unused_, grad_, shape_.row_stride);
    weigh(rows);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t at = r * shape_.weight_stride;
      const RowSoftmax row = softmax_row(in_, bank_.scale(), logits_ + at, weights_ + at);
      along_query_[r] = differentiate_row(in_, bank_.scale(), logits_ + at, weights_ + at, grad_weights_ + at, row, along_);
    }
    store_grad_query(partition, first, rows);
    if (bank_.has_floor_items()) drop_floor_items(rows);
    add_to_bank(rows);
  }

  // Q . items^T and G . items^T; each slice of the bank serves both.
  void weigh(int64_t rows) {
    const Panels& items = bank_.items();
    for (int64_t panel = 0; panel < items.count; ++panel)
      for (int64_t d = 0; d == 0 || d < in_.width; d += kDepth) {
        const int64_t depth = smaller(kDepth, in_.width - d), start = items.start(panel);
        const float* slice = bank_.columns(panel, d, depth);
        multiply(query_ + d, shape_.row_stride, slice, items.size(panel), depth, d > 0, logits_ + start,
                 shape_.weight_stride, rows);
        multiply(grad_ + d, shape_.row_stride, slice, items.size(panel), depth, d > 0, grad_weights_ + start,
                 shape_.weight_stride, rows);
      }
  }

  // dot: dq = sum_j dx_j scale_j m_j. cosine: that, less its part along q, over the norm of q.
  void store_grad_query(int64_t partition, int64_t first, int64_t rows) {
    T* out = static_cast<T*>(args_.grad_query.data) + partition * args_.grad_query.partition_stride;
    const Panels& values = bank_.values();
    for (int64_t panel = 0; panel < values.count; ++panel) {
      over_items(bank_, in_.items, panel, grad_weights_, shape_.weight_stride, rows, sums_, shape_.panel_stride);
      const int64_t start = values.start(panel), count = smaller(values.size(panel) * kLanes, in_.width - start);
      for (int64_t r = 0; r < rows; ++r) {
        float* row = sums_ + r * shape_.panel_stride;
        if (in_.cosine) remove_along(query_ + r * shape_.row_stride + start, along_query_[r], scales_[r], count, row);
        store_scaled(row, count, 1.0f, out + args_.grad_query.offset(first + r) + start);
      }
    }
  }

  static void remove_along(const float* unit, float along, RowScale by, int64_t count, float* row) {
    // 0 times what is there, where the norm is at the floor: no gradient, but a NaN stays.
    const F32 part = F32::set1(-along), scale = F32::set1(by.at_floor ? 0.0f : by.scale), pre = F32::set1(by.pre);
    for (int64_t d = 0; d < count; d += kLanes)
      (fma(part, F32::load(unit + d), F32::load(row + d)) * scale * pre).store(row + d);
  }

  // An item whose norm is at the floor gets no gradient through its cosine.
  void drop_floor_items(int64_t rows) {
    for (int64_t j = 0; j < in_.items; ++j) {
      if (bank_.direction()[j] != 0.0f) continue;
      for (int64_t r = 0; r < rows; ++r) grad_weights_[r * shape_.weight_stride + j] = 0.0f;
    }
  }

  // grad_bank += V^T . G + dX^T . Q
  void add_to_bank(int64_t rows) {
    const Panels& values = bank_.values();
    for (int64_t panel = 0; panel < values.count; ++panel) {
      const int64_t start = values.start(panel), vectors = values.size(panel);
      add_transposed(weights_, shape_.weight_stride, grad_ + start, shape_.row_stride, vectors, rows,
                     grad_bank_ + start, shape_.row_stride, in_.items);
      add_transposed(grad_weights_, shape_.weight_stride, query_ + start, shape_.row_stride, vectors, rows,
                     grad_bank_ + start, shape_.row_stride, in_.items);
    }
  }

  // The cosine's gradient has no part along the item: less unit_j along_j / norm_j.
  template <class U>
  void store_item(int64_t j, U* out) {
    const T* item = bank_.item(j);
    const float* sum = grad_bank_ + j * shape_.row_stride;
    const float direction = in_.cosine ? bank_.direction()[j] : 0.0f;
    const F32 part = F32::set1(-along_[j] * direction), by = F32::set1(direction);
    for (int64_t d = 0; d < in_.width; d += kLanes) {
      const int count = static_cast<int>(smaller(kLanes, in_.width - d));
      const F32 unit = F32::load_first(item + d, count) * by;
      const F32 value = F32::load(sum + d);
      store_first(in_.cosine ? fma(part, unit, value) : value, out + d, count);
    }
  }

  const BankAttentionBackward& args_;
  const BankAttentionInputs& in_;
  const TileShape shape_;
  PackedBank<T> bank_;
  const Scratch memory_, bank_memory_;
  float *query_, *grad_, *logits_, *weights_, *grad_weights_, *sums_, *grad_bank_, *along_;
  RowScale scales_[kTile], unused_[kTile];
  float along_query_[kTile];
};

// Chunks of a partition's rows; see kChunks.
int64_t chunks_of(const BankAttentionInputs& in) {
  const int64_t wanted = (kChunks + in.partitions - 1) / in.partitions;
  const int64_t affordable = kPartialFloats / (in.partitions * in.items * (in.width < 1 ? 1 : in.width));
  const int64_t chunks = smaller(smaller(wanted, affordable), tiles_of(in) / 2);
  return chunks < 1 ? 1 : chunks;
}

template <class T>
void backward(const BankAttentionBackward& args, const ThreadLoop& loop) {
  const BankAttentionInputs& in = args.in;
  const int64_t chunks = chunks_of(in), size = in.items * in.width;
  const Scratch partial_memory = floats(chunks == 1 ? 0 : in.partitions * chunks * size);
  float* partial = partial_memory.as<float>();
  T* grad_bank = static_cast<T*>(args.grad_bank);
  loop(in.partitions * chunks, 1, [&](int64_t begin, int64_t end) {
    BackwardTask<T> task(args);
    for (int64_t index = begin; index < end; ++index) {
      const int64_t partition = index / chunks, chunk = index % chunks;
      const int64_t first = chunk * tiles_of(in) / chunks * kTile;
      const int64_t stop = smaller((chunk + 1) * tiles_of(in) / chunks * kTile, in.rows);
      if (chunks == 1) {
        task.run(partition, first, stop, grad_bank + partition * size);
      } else {
        task.run(partition, first, stop, partial + index * size);
      }
    }
  });
  if (chunks == 1) return;
  loop(in.partitions * in.items, 8, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const float* first = partial + (item / in.items * chunks * in.items + item % in.items) * in.width;
      for (int64_t d = 0; d < in.width; ++d) {
        float sum = first[d];
        for (int64_t chunk = 1; chunk < chunks; ++chunk) sum += first[chunk * size + d];
        scalar_to(sum, grad_bank + item * in.width + d);
      }
    }
  });
}

}  // namespace

void bank_attention(const BankAttention& args, const ThreadLoop& loop) {
  loop(args.in.partitions * tiles_of(args.in), 1, [&](int64_t begin, int64_t end) {
    MEMAD_FAST_BY_DTYPE(args.in.dtype, scalar, forward<scalar>(args, begin, end);)
  });
}

void bank_attention_backward(const BankAttentionBackward& args, const ThreadLoop& loop) {
  if (args.in.partitions == 0) return;
  MEMAD_FAST_BY_DTYPE(args.in.dtype, scalar, backward<scalar>(args, loop);)
}

void bank_attention_stats(const BankAttentionStats& args, const ThreadLoop& loop) {
  const BankAttentionInputs& in = args.in;
  const int64_t tiles = tiles_of(in);
  const Scratch entropy_memory(sizeof(double) * static_cast<size_t>(in.partitions * tiles));
  const Scratch dead_memory(sizeof(int64_t) * static_cast<size_t>(in.partitions * tiles));
  double* entropy = entropy_memory.as<double>();
  int64_t* dead = dead_memory.as<int64_t>();
  loop(in.partitions * tiles, 1, [&](int64_t begin, int64_t end) {
    MEMAD_FAST_BY_DTYPE(in.dtype, scalar, tile_stats<scalar>(in, begin, end, entropy, dead);)
  });
  for (int64_t partition = 0; partition < in.partitions; ++partition) {
    double entropy_sum = 0.0;
    int64_t dead_rows = 0;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      entropy_sum += entropy[partition * tiles + tile];
      dead_rows += dead[partition * tiles + tile];
    }
    // 0 / 0 = NaN where there are no rows.
    args.entropy[partition] = static_cast<float>(entropy_sum / static_cast<double>(in.rows));
    args.dead_share[partition] = static_cast<float>(static_cast<double>(dead_rows) / static_cast<double>(in.rows));
  }
}

}  // namespace MEMAD_FAST_ISA
}  // namespace memad_fast
