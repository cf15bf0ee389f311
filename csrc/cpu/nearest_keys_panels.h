// Packing of keys into panels, and the error bound of a float32 score. Only for kernel files. The letters and the proof
// are those of README_nearest_keys.md.
#pragma once

#include "core/scratch.h"
#include "core/simd.h"
#include "cpu/nearest_keys.h"
#include "cpu/nearest_keys_exact.h"

namespace memad_fast {
namespace MEMAD_FAST_ISA {
namespace {

constexpr double kUnit32 = 0x1p-24;   // rounding error of a float32 operation, relative
constexpr double kUnit64 = 0x1p-53;   // of a float64 one
constexpr double kTiny = 0x1p-126;    // absolute error of a float32 operation that underflows, even with flush to zero
constexpr double kLargestNorm = 0x1p60;  // squares and products of norms up to it stay finite in float32
constexpr float kInfinity = __builtin_inff();

// Rows that make the centre, spread over the keys: the mean of few is as good a shift as the mean of all.
constexpr int64_t kCentreRows = 256;

inline bool is_finite(double x) { return x - x == 0.0; }

inline float next_up(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  if (bits == INT32_MIN) bits = 0;
  bits += bits >= 0 ? 1 : -1;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

// For finite x within the range of float32.
inline float round_up(double x) {
  const float nearest = static_cast<float>(x);
  return static_cast<double>(nearest) < x ? next_up(nearest) : nearest;
}
inline float round_down(double x) { return -round_up(-x); }

// gamma_n = n u / (1 - n u), the relative error of n roundings; infinity where the formula ends.
inline double rounding(double n, double unit) {
  const double nu = n * unit;
  return nu < 0.5 ? nu / (1.0 - nu) : static_cast<double>(kInfinity);
}

// Errors that hold for all rows of one search.
struct ErrorTerms {
  double relative;   // alpha: of the product of the norms
  double exact;      // gamma64: of the float64 stage
  double element;    // eta: of a row's norm, from elements that underflow
  double absolute;   // tau: of a score

  explicit ErrorTerms(int64_t dim) {
    const double n = static_cast<double>(dim);
    relative = 1.01 * rounding(n + 8.0, kUnit32);
    exact = rounding(n / 8.0 + 16.0, kUnit64);
    element = __builtin_sqrt(n) * 4.0 * kTiny;
    absolute = (4.0 * n + 64.0) * kTiny;
  }
};

// The row as the screen sees it: shifted (keys of every metric, queries of l2), scaled to unit length for cosine.
template <class T>
void stage_shifted(const T* row, const float* centre, int64_t dim, float* out) {
  int64_t i = 0;
  for (; i + F32::lanes <= dim; i += F32::lanes) (F32::load(row + i) - F32::load(centre + i)).store(out + i);
  for (; i < dim; ++i) out[i] = scalar_from(row[i]) - centre[i];
}

// row * scale - centre, rounded once (to within float64). `centre` may be null.
template <class T>
void stage_scaled(const T* row, double scale, const float* centre, int64_t dim, float* out) {
  for (int64_t i = 0; i < dim; ++i) {
    const double shift = centre ? static_cast<double>(centre[i]) : 0.0;
    out[i] = static_cast<float>(static_cast<double>(scalar_from(row[i])) * scale - shift);
  }
}

inline double unit_scale(double square) { return square > 0.0 ? 1.0 / __builtin_sqrt(square) : 0.0; }

struct KeyBound {
  float base, slope, slack;
};
constexpr KeyBound kNeverReturned{kInfinity, 0.0f, 0.0f};
constexpr KeyBound kAlwaysExact{-kInfinity, 0.0f, kInfinity};

// Stages one key and bounds its score. A key that the screen cannot hold is staged as zeros.
template <class T>
KeyBound stage_key(
    const T* row, const float* centre, double centre_norm, int64_t dim, Metric metric, const ErrorTerms& error,
    float* out) {
  double square = 0.0;  // |k - centre|^2
  if (metric == Metric::cosine) {
    const double key_square = inner_product(row, row, dim);
    if (is_finite(key_square)) {
      stage_scaled(row, unit_scale(key_square), centre, dim, out);
      square = inner_product(out, out, dim);
    } else {
      square = key_square;
    }
  } else {
    square = squared_distance(row, centre, dim);
    if (is_finite(square)) stage_shifted(row, centre, dim, out);
  }
  const double norm = __builtin_sqrt(square) * (1.0 + 4.0 * kUnit32) + error.element;
  const bool screened = norm < kLargestNorm && is_finite(error.relative);
  if (!screened) {
    for (int64_t i = 0; i < dim; ++i) out[i] = 0.0f;
    return is_finite(square) ? kAlwaysExact : kNeverReturned;
  }
  double height = 0.0, slope = error.relative * norm + error.element, slack = error.absolute + norm * error.element;
  if (metric == Metric::l2) {
    height = 0.5 * square;
    slack += (8.0 * kUnit32 + 16.0 * error.exact) * height;
  } else if (metric == Metric::ip) {
    slope += 4.0 * error.exact * (centre_norm + norm);
  } else {
    slack += 16.0 * error.exact;
  }
  return {round_down(height - slack), round_up(slope), round_up(slack)};
}

// rows[16][dim] -> panel[dim][16].
inline void interleave(const float* rows, int64_t dim, float* panel) {
  typedef float Four __attribute__((vector_size(16)));
  int64_t i = 0;
  for (; i + 4 <= dim; i += 4) {
    for (int64_t group = 0; group < kPanelKeys; group += 4) {
      Four a, b, c, d;
      const float* first = rows + group * dim + i;
      std::memcpy(&a, first, sizeof(a));
      std::memcpy(&b, first + dim, sizeof(b));
      std::memcpy(&c, first + 2 * dim, sizeof(c));
      std::memcpy(&d, first + 3 * dim, sizeof(d));
      const Four ab_low = __builtin_shufflevector(a, b, 0, 4, 1, 5), ab_high = __builtin_shufflevector(a, b, 2, 6, 3, 7);
      const Four cd_low = __builtin_shufflevector(c, d, 0, 4, 1, 5), cd_high = __builtin_shufflevector(c, d, 2, 6, 3, 7);
      const Four column[4] = {
          __builtin_shufflevector(ab_low, cd_low, 0, 1, 4, 5), __builtin_shufflevector(ab_low, cd_low, 2, 3, 6, 7),
          __builtin_shufflevector(ab_high, cd_high, 0, 1, 4, 5), __builtin_shufflevector(ab_high, cd_high, 2, 3, 6, 7)};
      for (int j = 0; j < 4; ++j) std::memcpy(panel + (i + j) * kPanelKeys + group, &column[j], sizeof(Four));
    }
  }
  for (; i < dim; ++i)
    for (int64_t j = 0; j < kPanelKeys; ++j) panel[i * kPanelKeys + j] = rows[j * dim + i];
}

// Packs panel `index` of the keys: its 16 rows and their bounds, at the start of what `panel` points to.
template <class T>
void pack_panel(
    const Rows& keys, int64_t index, const float* centre, double centre_norm, Metric metric, const ErrorTerms& error,
    float* staged, const PackedView<float>& panel) {
  for (int64_t j = 0; j < kPanelKeys; ++j) {
    const int64_t key = index * kPanelKeys + j;
    float* out = staged + j * keys.cols;
    KeyBound bound = kNeverReturned;
    if (key < keys.rows) {
      bound = stage_key(keys.row<T>(key), centre, centre_norm, keys.cols, metric, error, out);
    } else {
      for (int64_t i = 0; i < keys.cols; ++i) out[i] = 0.0f;
    }
    panel.base[j] = bound.base;
    panel.slope[j] = bound.slope;
    panel.slack[j] = bound.slack;
  }
  interleave(staged, keys.cols, panel.panels);
}

inline PackedView<float> panel_at(const PackedView<float>& view, int64_t index, int64_t dim) {
  const int64_t first = index * kPanelKeys;
  return {view.centre, view.panels + first * dim, view.base + first, view.slope + first, view.slack + first};
}

// Mean of a spread of finite rows (scaled to unit length for cosine); zeros where there is none.
template <class T>
void mean_key(const Rows& keys, Metric metric, float* centre) {
  const int64_t dim = keys.cols;
  const Scratch memory(sizeof(double) * static_cast<size_t>(dim));
  double* sum = memory.as<double>();
  for (int64_t i = 0; i < dim; ++i) sum[i] = 0.0;
  const int64_t count = keys.rows < kCentreRows ? keys.rows : kCentreRows;
  int64_t used = 0;
  for (int64_t s = 0; s < count; ++s) {
    const T* row = keys.row<T>(s * (keys.rows / count));
    const double square = inner_product(row, row, dim);
    if (!is_finite(square)) continue;
    ++used;
    const double scale = metric == Metric::cosine ? unit_scale(square) : 1.0;
    for (int64_t i = 0; i < dim; ++i) sum[i] += scale * static_cast<double>(scalar_from(row[i]));
  }
  for (int64_t i = 0; i < dim; ++i) centre[i] = used ? static_cast<float>(sum[i] / static_cast<double>(used)) : 0.0f;
}

inline double norm_of(const float* row, int64_t dim) { return __builtin_sqrt(inner_product(row, row, dim)); }

}  // namespace
}  // namespace MEMAD_FAST_ISA
}  // namespace memad_fast
