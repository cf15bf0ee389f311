// One level of the gradients of nearest_keys (see nearest_keys.h). Compiled once per instruction set.
//
//   l2       d = |q - k|^2        dd/dq = 2 (q - k)               dd/dk = -2 (q - k)
//   cosine   d = 1 - c            dd/dq = c q / |q|^2 - k / |q||k|   and with q and k exchanged
//   ip       d = q.k              dd/dq = k                       dd/dk = q
//
// Each is a x + b y for the row x that is differentiated and the other row y. Sums are made in float64, in the order of
// the slots.
#include "core/scratch.h"
#include "cpu/nearest_keys.h"
#include "cpu/nearest_keys_exact.h"

namespace memad_fast {
namespace MEMAD_FAST_ISA {
namespace {

struct Coefficients {
  double own, other;
};

template <class T>
Coefficients coefficients(const T* own, const T* other, int64_t dim, Metric metric) {
  if (metric == Metric::l2) return {2.0, -2.0};
  if (metric == Metric::ip) return {0.0, 1.0};
  const double own_square = inner_product(own, own, dim), other_square = inner_product(other, other, dim);
  const double squares = own_square * other_square;
  if (squares == 0.0) return {0.0, 0.0};
  const double product = inner_product(own, other, dim), inverse = 1.0 / __builtin_sqrt(squares);
  return {product * inverse / own_square, -inverse};
}

template <class T>
void accumulate(const T* own, const T* other, int64_t dim, double grad, Metric metric, double* sum) {
  const Coefficients c = coefficients(own, other, dim, metric);
  const double a = grad * c.own, b = grad * c.other;
  for (int64_t i = 0; i < dim; ++i)
    sum[i] += a * static_cast<double>(scalar_from(own[i])) + b * static_cast<double>(scalar_from(other[i]));
}

template <class T>
void write(const double* sum, int64_t dim, T* out) {
  for (int64_t i = 0; i < dim; ++i) scalar_to(static_cast<float>(sum[i]), out + i);
}

template <class T>
void query_gradients(const NearestKeysBackward& args, int64_t begin, int64_t end) {
  const int64_t dim = args.query.cols;
  const Scratch memory(sizeof(double) * static_cast<size_t>(dim));
  double* sum = memory.as<double>();
  for (int64_t n = begin; n < end; ++n) {
    std::memset(sum, 0, sizeof(double) * static_cast<size_t>(dim));
    for (int64_t slot = n * args.k; slot < (n + 1) * args.k; ++slot) {
      const int64_t key = args.indices[slot];
      if (key < 0 || key >= args.keys.rows) continue;
      const auto grad = static_cast<double>(args.grad[slot]);
      accumulate(args.query.row<T>(n), args.keys.row<T>(key), dim, grad, args.metric, sum);
    }
    write(sum, dim, static_cast<T*>(args.out) + n * dim);
  }
}

template <class T>
void key_gradients(
    const NearestKeysBackward& args, const int64_t* start, const int64_t* slots, int64_t begin, int64_t end) {
  const int64_t dim = args.keys.cols;
  const Scratch memory(sizeof(double) * static_cast<size_t>(dim));
  double* sum = memory.as<double>();
  for (int64_t key = begin; key < end; ++key) {
    std::memset(sum, 0, sizeof(double) * static_cast<size_t>(dim));
    for (int64_t i = start[key]; i < start[key + 1]; ++i) {
      const auto grad = static_cast<double>(args.grad[slots[i]]);
      accumulate(args.keys.row<T>(key), args.query.row<T>(slots[i] / args.k), dim, grad, args.metric, sum);
    }
    write(sum, dim, static_cast<T*>(args.out) + key * dim);
  }
}

}  // namespace

void nearest_keys_backward_query(const NearestKeysBackward& args, const ThreadLoop& loop) {
  loop(args.query.rows, 16, [&](int64_t begin, int64_t end) {
    MEMAD_FAST_BY_DTYPE(args.query.dtype, scalar, query_gradients<scalar>(args, begin, end);)
  });
}

void nearest_keys_backward_keys(
    const NearestKeysBackward& args, const int64_t* start, const int64_t* slots, const ThreadLoop& loop) {
  loop(args.keys.rows, 16, [&](int64_t begin, int64_t end) {
    MEMAD_FAST_BY_DTYPE(args.keys.dtype, scalar, key_gradients<scalar>(args, start, slots, begin, end);)
  });
}

}  // namespace MEMAD_FAST_ISA
}  // namespace memad_fast
