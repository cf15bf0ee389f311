// Float64 sums over two rows in one order on every instruction set: 16 accumulators, term i to accumulator i mod 16,
// then halves onto halves. The rows are extended by zeros to a multiple of 16, which changes no sum.
// Only for kernel files.
#pragma once

#include "core/simd.h"

namespace memad_fast {
namespace MEMAD_FAST_ISA {
namespace {

constexpr int kExactStep = 16;

class ExactSum {
 public:
  ExactSum() {
    for (F64& part : part_) part = F64::zero();
  }
  // term(x, y) for kExactStep pairs.
  template <class T, class U, class Term>
  void add(const T* x, const U* y, const Term& term) {
    for (int b = 0; b < kExactStep / F32::lanes; ++b) {
      const F32 vx = F32::load(x + b * F32::lanes), vy = F32::load(y + b * F32::lanes);
      part_[2 * b] = part_[2 * b] + term(low_f64(vx), low_f64(vy));
      part_[2 * b + 1] = part_[2 * b + 1] + term(high_f64(vx), high_f64(vy));
    }
  }
  double total() const {
    double s[kExactStep];
    for (int i = 0; i < kParts; ++i) part_[i].store(s + i * F64::lanes);
    for (int half = kExactStep / 2; half > 0; half /= 2)
      for (int i = 0; i < half; ++i) s[i] += s[i + half];
    return s[0];
  }

 private:
  static constexpr int kParts = kExactStep / F64::lanes;
  F64 part_[kParts];
};

template <class T, class U, class Term>
double exact_sum(const T* x, const U* y, int64_t dim, const Term& term) {
  ExactSum sum;
  int64_t i = 0;
  for (; i + kExactStep <= dim; i += kExactStep) sum.add(x + i, y + i, term);
  if (i < dim) {
    float rest_x[kExactStep] = {}, rest_y[kExactStep] = {};
    for (int64_t j = i; j < dim; ++j) {
      rest_x[j - i] = scalar_from(x[j]);
      rest_y[j - i] = scalar_from(y[j]);
    }
    sum.add(rest_x, rest_y, term);
  }
  return sum.total();
}

template <class T, class U>
double squared_distance(const T* x, const U* y, int64_t dim) {
  return exact_sum(x, y, dim, [](F64 a, F64 b) {
    const F64 d = a - b;
    return d * d;
  });
}

template <class T, class U>
double inner_product(const T* x, const U* y, int64_t dim) {
  return exact_sum(x, y, dim, [](F64 a, F64 b) { return a * b; });
}

inline double cosine(double product, double query_square, double key_square) {
  const double squares = query_square * key_square;
  return squares == 0.0 ? 0.0 : product / __builtin_sqrt(squares);
}

}  // namespace
}  // namespace MEMAD_FAST_ISA
}  // namespace memad_fast
