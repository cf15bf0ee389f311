// Holds nearest_keys, as C++ calls it, against all distances in float64, at every instruction set that this processor
// can run: prepared keys and unprepared, one task and many. Names the instruction sets.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <vector>

#include "core/isa.h"
#include "cpu/nearest_keys.h"

namespace {

using namespace memad_fast;

// Pieces one after the other: what may run in parallel must not depend on doing so.
void run_pieces(int64_t begin, int64_t end, int64_t grain, ThreadLoop::Body body, const void* context) {
  for (int64_t at = begin; at < end; at += grain) body(at, std::min(at + grain, end), context);
}

class Random {
 public:
  float uniform() {  // in [-1, 1)
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return static_cast<float>(static_cast<int32_t>(state_ >> 32)) * 0x1p-31f;
  }

 private:
  uint64_t state_ = 1;
};

// x, cut to what `dtype` holds.
float cut(float x, Dtype dtype) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  if (dtype == Dtype::bf16) bits &= 0xffff0000u;
  if (dtype == Dtype::f16) bits = std::fabs(x) < 0x1p-14f ? 0 : bits & 0xffffe000u;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

uint16_t half_bits(float x, Dtype dtype) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  if (dtype == Dtype::bf16 || bits == 0) return static_cast<uint16_t>(bits >> 16);
  return static_cast<uint16_t>((bits >> 16 & 0x8000u) | (((bits & 0x7fffffffu) - (112u << 23)) >> 13));
}

struct Matrix {
  int64_t rows, cols;
  Dtype dtype;
  std::vector<float> values;
  std::vector<uint16_t> halves;

  Matrix(int64_t rows, int64_t cols, Dtype dtype)
      : rows(rows), cols(cols), dtype(dtype), values(static_cast<size_t>(rows * cols)) {}
  float* row(int64_t i) { return values.data() + i * cols; }
  Rows view() {
    if (dtype == Dtype::f32) return {values.data(), dtype, rows, cols, cols};
    halves.clear();
    for (const float x : values) halves.push_back(half_bits(x, dtype));
    return {halves.data(), dtype, rows, cols, cols};
  }
};

// Around an offset; every 11th key is that 7 before it, every other query is a key.
void fill(Matrix& query, Matrix& keys, float offset) {
  Random random;
  for (float& x : keys.values) x = cut(offset + random.uniform(), keys.dtype);
  for (float& x : query.values) x = cut(offset + random.uniform(), query.dtype);
  const size_t bytes = sizeof(float) * static_cast<size_t>(keys.cols);
  for (int64_t j = 11; j < keys.rows; j += 11) std::memcpy(keys.row(j), keys.row(j - 7), bytes);
  for (int64_t q = 0; q < query.rows; q += 2) std::memcpy(query.row(q), keys.row(q * 5 % keys.rows), bytes);
  if (keys.rows > 20 && keys.dtype == Dtype::f32) keys.row(13)[0] = std::numeric_limits<float>::infinity();
}

double distance(const float* q, const float* k, int64_t dim, Metric metric) {
  double product = 0.0, square_q = 0.0, square_k = 0.0, difference = 0.0;
  for (int64_t i = 0; i < dim; ++i) {
    const double a = q[i], b = k[i];
    product += a * b;
    square_q += a * a;
    square_k += b * b;
    difference += (a - b) * (a - b);
  }
  if (metric == Metric::l2) return difference;
  if (metric == Metric::ip) return product;
  return 1.0 - product / std::sqrt(square_q * square_k);
}

struct Shape {
  int64_t queries, keys, dim, k;
};

struct Result {
  std::vector<float> distances;
  std::vector<int64_t> indices;

  explicit Result(int64_t slots)
      : distances(static_cast<size_t>(slots), -1.0f), indices(static_cast<size_t>(slots), -2) {}
  bool operator==(const Result& other) const {
    return indices == other.indices &&
           std::memcmp(distances.data(), other.distances.data(), sizeof(float) * distances.size()) == 0;
  }
};

Result brute_force(Matrix& query, Matrix& keys, int64_t k, Metric metric) {
  Result result(query.rows * k);
  for (int64_t q = 0; q < query.rows; ++q) {
    struct Found {
      double rank;
      int64_t index;
    };
    std::vector<Found> found;
    for (int64_t j = 0; j < keys.rows; ++j) {
      const double value = distance(query.row(q), keys.row(j), keys.cols, metric);
      if (std::isfinite(value)) found.push_back({metric == Metric::ip ? -value : value, j});
    }
    std::sort(found.begin(), found.end(), [](const Found& a, const Found& b) {
      return a.rank != b.rank ? a.rank < b.rank : a.index < b.index;
    });
    for (int64_t i = 0; i < k; ++i) {
      const bool exists = i < static_cast<int64_t>(found.size());
      const double value = exists ? (metric == Metric::ip ? -found[i].rank : found[i].rank) : std::nan("");
      result.distances[q * k + i] = static_cast<float>(value);
      result.indices[q * k + i] = exists ? found[i].index : -1;
    }
  }
  return result;
}

// On every instruction set and schedule: the expected result, and the same bits.
void check(const Shape& shape, Dtype dtype, Metric metric, float offset) {
  Matrix query(shape.queries, shape.dim, dtype), keys(shape.keys, shape.dim, dtype);
  fill(query, keys, offset);
  const Result expected = brute_force(query, keys, shape.k, metric);
  const PackedLayout layout(shape.keys, shape.dim);
  const auto packed_size = static_cast<size_t>((layout.bytes + 63) / 64 * 64);
  auto* packed = static_cast<uint8_t*>(std::aligned_alloc(64, packed_size));

  const auto fail = [&](Isa isa, const char* what, int64_t slot, const Result& got) {
    std::fprintf(
        stderr,
        "%s: %s: %ld queries, %ld keys, dim %ld, k %ld, dtype %d, metric %d, offset %g: slot %ld: expected %ld (%.9g), "
        "got %ld (%.9g)\n",
        isa_name(isa), what, static_cast<long>(shape.queries), static_cast<long>(shape.keys),
        static_cast<long>(shape.dim), static_cast<long>(shape.k), static_cast<int>(dtype), static_cast<int>(metric),
        static_cast<double>(offset), static_cast<long>(slot), static_cast<long>(expected.indices[slot]),
        static_cast<double>(expected.distances[slot]), static_cast<long>(got.indices[slot]),
        static_cast<double>(got.distances[slot]));
    std::exit(1);
  };

  Result first(0);
  const auto check_result = [&](Isa isa, int threads, bool prepared) {
    const ThreadLoop loop{run_pieces, threads};
    if (prepared) {
      std::memset(packed, 0x55, packed_size);
      prepare_keys({keys.view(), keys.view().rows, metric, packed}, loop);
    }
    Result got(shape.queries * shape.k);
    nearest_keys(
        {query.view(), keys.view(), shape.keys, prepared ? packed : nullptr, layout.bytes, shape.k, metric,
         got.distances.data(), got.indices.data()},
        loop);
    for (int64_t slot = 0; slot < shape.queries * shape.k; ++slot) {
      if (got.indices[slot] != expected.indices[slot]) fail(isa, "index", slot, got);
      const double a = got.distances[slot], b = expected.distances[slot];
      const bool same = std::isnan(b) ? std::isnan(a) : std::fabs(a - b) <= 2e-7 * std::fabs(b) + 1e-12;
      if (!same) fail(isa, "distance", slot, got);
    }
    if (first.indices.empty()) first = got;
    if (!(got == first)) fail(isa, "other bits than before", 0, got);
  };
  for (const Isa isa : supported_isas()) {
    set_isa(isa_name(isa));
    for (const int threads : {1, 3})
      for (const bool prepared : {false, true}) check_result(isa, threads, prepared);
  }
  std::free(packed);
}

}  // namespace

int main() {
  const Shape shapes[] = {{1, 1, 3, 1},     {1, 300, 7, 1},    {4, 200, 64, 3},  {5, 130, 33, 1},
                          {3, 10, 16, 12}, {40, 300, 100, 2}, {130, 200, 48, 1}, {20, 150, 260, 5}};
  for (const Shape& shape : shapes)
    for (const Metric metric : {Metric::l2, Metric::cosine, Metric::ip}) {
      check(shape, Dtype::f32, metric, 0.0f);
      check(shape, Dtype::f32, metric, 100.0f);
      check(shape, Dtype::f16, metric, 0.0f);
      check(shape, Dtype::bf16, metric, 0.0f);
    }
  for (const Isa isa : supported_isas()) std::puts(isa_name(isa));
}
