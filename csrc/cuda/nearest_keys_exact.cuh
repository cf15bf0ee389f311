// Float64 values of pairs of rows, in the CPU's one order of summation (csrc/cpu/nearest_keys_exact.h): 16
// accumulators, term i to accumulator i mod 16, then halves onto halves, products and sums rounded apart. So ties are
// the CPU's too.
//
// Four lanes (a quad) share a pair: lane l has accumulators 4 l to 4 l + 3 and reads 16 bytes of every 64.
#pragma once

#include "cuda/nearest_keys_rows.cuh"

namespace memad_fast::cuda {

struct Found {
  double rank;    // smaller is better,
  int64_t index;  // then the lower index
};

__device__ inline bool better(const Found& a, const Found& b) {
  return a.rank < b.rank || (a.rank == b.rank && a.index < b.index);
}

constexpr int64_t kNoKey = -1;
__device__ inline Found nothing() { return {static_cast<double>(kInfinity), kNoKey}; }

struct Quad {
  int part = static_cast<int>(threadIdx.x % 4);
  unsigned lanes = 0xfu << (threadIdx.x % 32 / 4 * 4);

  // sum[j] is the accumulator 4 part + j. The same total in all four lanes.
  __device__ double total(const double (&sum)[4]) const {
    double half[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      half[j] = __dadd_rn(sum[j], __shfl_xor_sync(lanes, sum[j], 2));
      half[j] = __dadd_rn(half[j], __shfl_xor_sync(lanes, half[j], 1));
    }
    return __dadd_rn(__dadd_rn(half[0], half[2]), __dadd_rn(half[1], half[3]));
  }
};

struct Difference {
  static __device__ double term(float x, float y) {
    const double d = __dsub_rn(static_cast<double>(x), static_cast<double>(y));
    return __dmul_rn(d, d);
  }
};
struct Product {
  static __device__ double term(float x, float y) { return __dmul_rn(static_cast<double>(x), static_cast<double>(y)); }
};

template <class Term>
__device__ __forceinline__ void add(double (&sum)[4], const float4& a, const float4& b) {
  sum[0] = __dadd_rn(sum[0], Term::term(a.x, b.x));
  sum[1] = __dadd_rn(sum[1], Term::term(a.y, b.y));
  sum[2] = __dadd_rn(sum[2], Term::term(a.z, b.z));
  sum[3] = __dadd_rn(sum[3], Term::term(a.w, b.w));
}

// Without a branch between them the loads of several steps are under way together.
template <class Term, class Four>
__device__ __forceinline__ void add_fours(double (&sum)[4], const Four* x, const Four* y, int64_t count, int part) {
#pragma unroll 4
  for (int64_t i = part; i < count; i += 4) add<Term>(sum, widen(x[i]), widen(y[i]));
}

// Not inlined: its many callers would make the kernels too large for the instruction cache, and rows by value stay in
// registers.
template <class Term>
__device__ __attribute__((noinline)) double exact_sum(Quad quad, Row x, Row y) {
  double sum[4] = {};
  const int64_t whole = x.aligned && y.aligned ? x.width / 4 : 0;
  if (x.dtype == Dtype::f32) add_fours<Term>(sum, x.fours<float4>(), y.fours<float4>(), whole, quad.part);
  else if (x.dtype == Dtype::f16) add_fours<Term>(sum, x.fours<Halves>(), y.fours<Halves>(), whole, quad.part);
  else add_fours<Term>(sum, x.fours<Bfloats>(), y.fours<Bfloats>(), whole, quad.part);
#pragma unroll 1
  for (int64_t i = 4 * (whole + ((quad.part - whole) & 3)); i < x.width; i += 16) add<Term>(sum, x.four(i), y.four(i));
  return quad.total(sum);
}

// What sorts a pair; not finite for a key that is never returned. `query_square`: of cosine, |query|^2.
__device__ inline double exact_rank(
    const Quad& quad, const Row& query, double query_square, const Row& key, Metric metric) {
  if (metric == Metric::l2) return exact_sum<Difference>(quad, query, key);
  const double product = exact_sum<Product>(quad, query, key);
  if (metric == Metric::ip) return -product;
  const double key_square = exact_sum<Product>(quad, key, key);
  if (!is_finite(key_square)) return key_square;
  const double squares = __dmul_rn(query_square, key_square);
  const double cosine = squares == 0.0 ? 0.0 : __ddiv_rn(product, __dsqrt_rn(squares));
  const double value = __dsub_rn(1.0, cosine);
  return value < 0.0 ? 0.0 : value > 2.0 ? 2.0 : value;
}

}  // namespace memad_fast::cuda
