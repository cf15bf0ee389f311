// Rows as the screens of nearest_keys see them: shifted by the centre, with what bounds the rounding of a score. Only for
// kernel files. The letters and the proof are those of README_nearest_keys.md.
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

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline bool is_finite(double x) { return x - x == 0.0; }

// A float32 at or above a finite x within its range, two units at most: without a branch that no processor predicts.
inline float round_up(double x) { return static_cast<float>(x + __builtin_fabs(x) * 0x1p-23 + 0x1p-149); }
inline float round_down(double x) { return -round_up(-x); }

// gamma_n = n u / (1 - n u), the relative error of n roundings; infinity where it is no longer below a third, so that
// 1 + 2 gamma is above 1 / (1 - gamma).
inline double rounding(double n, double unit) {
  const double nu = n * unit;
  return nu < 0.25 ? nu / (1.0 - nu) : static_cast<double>(kInfinity);
}

// Errors that hold for all rows of one search.
struct ErrorTerms {
  double relative;   // alpha: of the product of the norms, in float32
  double exact;      // gamma64: of the float64 stage
  double square;     // sigma: of a squared norm, in float32, relative
  double element;    // eta: of a row, from elements that underflow
  double underflow;  // of a norm, from squares that underflow
  double absolute;   // tau: of a score

  explicit ErrorTerms(int64_t dim) {
    const double n = static_cast<double>(dim);
    relative = 1.01 * rounding(n + 8.0, kUnit32);
    exact = rounding(n / 8.0 + 16.0, kUnit64);
    square = 1.01 * rounding(n / 16.0 + 16.0, kUnit32);
    element = __builtin_sqrt(n) * 4.0 * kTiny;
    underflow = __builtin_sqrt(n * kTiny) * 2.0;
    absolute = (4.0 * n + 64.0) * kTiny;
  }
};

// Staged rows are padded with zeros to a multiple of kExactStep.
inline int64_t staged_dim(int64_t dim) { return ceil_div(dim, kExactStep) * kExactStep; }

// row - centre, rounded to float32 (keys of l2 and ip, queries of l2).
template <class T>
void stage_shifted(const T* row, const float* centre, int64_t dim, float* out) {
  int64_t i = 0;
  for (; i + F32::lanes <= dim; i += F32::lanes) (F32::load(row + i) - F32::load(centre + i)).store(out + i);
  for (; i < dim; ++i) out[i] = scalar_from(row[i]) - centre[i];
  for (; i < staged_dim(dim); ++i) out[i] = 0.0f;
}

// row * scale - centre, rounded once (to within float64). `centre` may be null.
template <class T>
void stage_scaled(const T* row, double scale, const float* centre, int64_t dim, float* out) {
  for (int64_t i = 0; i < dim; ++i) {
    const double shift = centre ? static_cast<double>(centre[i]) : 0.0;
    out[i] = static_cast<float>(static_cast<double>(scalar_from(row[i])) * scale - shift);
  }
  for (int64_t i = dim; i < staged_dim(dim); ++i) out[i] = 0.0f;
}

inline double unit_scale(double square) { return square > 0.0 ? 1.0 / __builtin_sqrt(square) : 0.0; }
inline double norm_of(const float* row, int64_t dim) { return __builtin_sqrt(inner_product(row, row, dim)); }

// Sum of squares in float32, in one order on every instruction set: 16 accumulators, then halves onto halves.
class SquareSum {
 public:
  SquareSum() {
    for (F32& part : part_) part = F32::zero();
  }
  // Elements [offset, offset + lanes) of kExactStep.
  void add(int64_t offset, F32 x) {
    F32& part = part_[offset / F32::lanes];
    part = part + x * x;
  }
  double total() const {
    F32 sum[kParts];
    for (int i = 0; i < kParts; ++i) sum[i] = part_[i];
    for (int half = kParts / 2; half > 0; half /= 2)
      for (int i = 0; i < half; ++i) sum[i] = sum[i] + sum[i + half];
    return static_cast<double>(reduce_add(sum[0]));
  }

 private:
  static constexpr int kParts = kExactStep / F32::lanes;
  F32 part_[kParts];
};

// |row|^2 of a staged row, within error.square of it.
inline double square_of(const float* staged, int64_t dim) {
  SquareSum sum;
  for (int64_t i = 0; i < dim; i += kExactStep)
    for (int64_t j = 0; j < kExactStep; j += F32::lanes) sum.add(j, F32::load(staged + i + j));
  return sum.total();
}

// An upper end of the norm.
inline double norm_above(double square, const ErrorTerms& error) {
  return __builtin_sqrt(square) * (1.0 + error.square) + error.underflow;
}

enum class Screened { yes, never_returned, always_exact };

struct StagedKey {
  Screened screened;
  double norm;    // upper end
  double height;  // h of the score
  double slack;   // error that depends neither on the query nor on the way of multiplying
  double slope;   // the same per unit of the query's norm
};

// Stages one key. One that no screen can hold (not finite, or a huge norm) is staged as zeros.
template <class T>
StagedKey stage_key(
    const T* row, const float* centre, double centre_norm, int64_t dim, Metric metric, const ErrorTerms& error,
    float* out) {
  double row_square = 0.0;
  if (metric == Metric::cosine) row_square = inner_product(row, row, dim);
  if (!is_finite(row_square)) {
    for (int64_t i = 0; i < staged_dim(dim); ++i) out[i] = 0.0f;
    return {Screened::never_returned, 0.0, 0.0, 0.0, 0.0};
  }
  if (metric == Metric::cosine) {
    stage_scaled(row, unit_scale(row_square), centre, dim, out);
  } else {
    stage_shifted(row, centre, dim, out);
  }
  const double square = square_of(out, dim), norm = norm_above(square, error);
  if (!(norm < kLargestNorm && is_finite(error.square))) {
    const bool finite = is_finite(inner_product(row, row, dim));
    for (int64_t i = 0; i < staged_dim(dim); ++i) out[i] = 0.0f;
    return {finite ? Screened::always_exact : Screened::never_returned, 0.0, 0.0, 0.0, 0.0};
  }
  StagedKey key{Screened::yes, norm, 0.0, error.absolute + norm * error.element, error.element};
  if (metric == Metric::l2) {
    key.height = 0.5 * square;
    key.slack += (32.0 * kUnit32 + 2.0 * error.square + 16.0 * error.exact) * key.height;
  } else if (metric == Metric::ip) {
    key.slope += 4.0 * error.exact * (centre_norm + norm);
  } else {
    key.slack += 16.0 * error.exact;
  }
  return key;
}

struct StagedQuery {
  bool finite;        // else it has no neighbours
  bool screened;      // else only the exact stage can hold it
  double square;      // |q|^2; only for cosine
  double norm;        // upper end of the staged norm
  double shift;       // weight * rank + shift: an upper end of the score of a key of that exact rank; not for ip
};

// Stages one query.
template <class T>
StagedQuery stage_query(
    const T* row, const float* centre, double centre_norm, int64_t dim, Metric metric, const ErrorTerms& error,
    float* out) {
  StagedQuery query{};
  if (metric == Metric::l2) {
    stage_shifted(row, centre, dim, out);
  } else if (metric == Metric::ip) {
    stage_scaled(row, 1.0, nullptr, dim, out);
  } else {
    query.square = inner_product(row, row, dim);
    if (!is_finite(query.square)) return query;
    stage_scaled(row, unit_scale(query.square), nullptr, dim, out);
  }
  const double square = square_of(out, dim);
  query.norm = norm_above(square, error);
  query.screened = query.norm < kLargestNorm && is_finite(error.square);
  query.finite = query.screened || is_finite(inner_product(row, row, dim));
  if (!query.screened) return query;
  if (metric == Metric::l2) {
    query.shift = -0.5 * square * (1.0 - 16.0 * kUnit32 - 2.0 * error.square - 8.0 * error.exact) +
                  query.norm * error.element + error.absolute;
  } else if (metric == Metric::cosine) {
    query.shift = inner_product(out, centre, dim) + 8.0 * kUnit32 * query.norm * centre_norm +
                  (query.norm + centre_norm) * error.element + error.absolute - 1.0;
  }
  return query;
}

// Word w of row j to out + w * out_stride + 4 j, for 16 rows: words are floats, or four codes. Strides are in bytes.
inline void interleave_words(const void* rows, int64_t stride, int64_t words, void* out, int64_t out_stride) {
  typedef uint32_t Four __attribute__((vector_size(16)));
  const auto* from = static_cast<const uint8_t*>(rows);
  auto* to = static_cast<uint8_t*>(out);
  int64_t w = 0;
  for (; w + 4 <= words; w += 4) {
    for (int64_t j = 0; j < 16; j += 4) {
      Four a, b, c, d;
      const uint8_t* first = from + j * stride + 4 * w;
      std::memcpy(&a, first, sizeof(a));
      std::memcpy(&b, first + stride, sizeof(b));
      std::memcpy(&c, first + 2 * stride, sizeof(c));
      std::memcpy(&d, first + 3 * stride, sizeof(d));
      const Four ab_low = __builtin_shufflevector(a, b, 0, 4, 1, 5), ab_high = __builtin_shufflevector(a, b, 2, 6, 3, 7);
      const Four cd_low = __builtin_shufflevector(c, d, 0, 4, 1, 5), cd_high = __builtin_shufflevector(c, d, 2, 6, 3, 7);
      const Four column[4] = {
          __builtin_shufflevector(ab_low, cd_low, 0, 1, 4, 5), __builtin_shufflevector(ab_low, cd_low, 2, 3, 6, 7),
          __builtin_shufflevector(ab_high, cd_high, 0, 1, 4, 5), __builtin_shufflevector(ab_high, cd_high, 2, 3, 6, 7)};
      for (int i = 0; i < 4; ++i) std::memcpy(to + (w + i) * out_stride + 4 * j, &column[i], sizeof(Four));
    }
  }
  for (; w < words; ++w)
    for (int64_t j = 0; j < 16; ++j) std::memcpy(to + w * out_stride + 4 * j, from + j * stride + 4 * w, 4);
}

// Mean of a spread of finite rows (scaled to unit length for cosine); zeros where there is none.
template <class T>
void mean_key(const Rows& keys, Metric metric, float* centre) {
  const int64_t dim = keys.cols;
  const Scratch memory(sizeof(double) * static_cast<size_t>(dim));
  double* sum = memory.as<double>();
  for (int64_t i = 0; i < dim; ++i) sum[i] = 0.0;
  const int64_t count = smaller(keys.rows, kCentreRows);
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

}  // namespace
}  // namespace MEMAD_FAST_ISA
}  // namespace memad_fast
