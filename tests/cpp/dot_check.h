// Holds one dot kernel of nearest_keys against plain integer sums, in memory that ends at a fence.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "cpu/nearest_keys_dot.h"

namespace memad_fast {

// Memory behind which every access is a fault. As many bytes as asked for, rounded up to 64 and aligned to them.
class Fenced {
 public:
  explicit Fenced(int64_t bytes) {
    const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t rounded = (static_cast<size_t>(bytes) + 63) / 64 * 64;
    const size_t used = (rounded + page - 1) / page * page;
    size_ = used + page;
    void* start = mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (start == MAP_FAILED || mprotect(static_cast<char*>(start) + used, page, PROT_NONE) != 0) std::abort();
    start_ = static_cast<char*>(start);
    data_ = start_ + used - rounded;
  }
  ~Fenced() { munmap(start_, size_); }
  Fenced(const Fenced&) = delete;
  Fenced& operator=(const Fenced&) = delete;

  template <class T>
  T* as() const { return reinterpret_cast<T*>(data_); }

 private:
  size_t size_;
  char *start_, *data_;
};

class Random {
 public:
  uint32_t next() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return static_cast<uint32_t>(state_ >> 32);
  }
  int within(int levels) { return static_cast<int>(next() % static_cast<uint32_t>(2 * levels + 1)) - levels; }

 private:
  uint64_t state_ = 1;
};

enum class Codes { random, extremes, highest, opposite };
constexpr const char* kCodesNames[] = {"random codes", "random extremes", "all highest", "highest with lowest"};

inline int code(Codes codes, int levels, bool of_query, Random& random) {
  switch (codes) {
    case Codes::random:
      return random.within(levels);
    case Codes::extremes:
      return random.next() >> 31 ? levels : -levels;
    case Codes::opposite:
      return of_query ? -levels : levels;
    case Codes::highest:
      break;
  }
  return levels;
}

inline void check_products(
    const char* name, const DotKernel& kernel, bool tile, int64_t dim, int64_t padding, Codes codes, Random& random) {
  const int64_t queries = tile ? kernel.queries : 1, steps = (dim + kStepDims - 1) / kStepDims;
  const int64_t stride = (dim + kQueryAlignment - 1) / kQueryAlignment * kQueryAlignment + padding;
  std::vector<int8_t> query(static_cast<size_t>(queries * dim)), key(static_cast<size_t>(kGroupKeys * dim));
  for (int8_t& x : query) x = static_cast<int8_t>(code(codes, kernel.levels, true, random));
  for (int8_t& x : key) x = static_cast<int8_t>(code(codes, 127, false, random));

  const Fenced query_memory(queries * stride), group_memory(steps * kStepBytes + kGroupOverrun);
  const Fenced sum_memory(kGroupKeys * 4), product_memory(queries * kGroupKeys * 4);
  auto* rows = query_memory.as<uint8_t>();
  for (int64_t i = 0; i < queries * stride; ++i) rows[i] = static_cast<uint8_t>(kernel.offset);
  for (int64_t q = 0; q < queries; ++q)
    for (int64_t i = 0; i < dim; ++i) rows[q * stride + i] = static_cast<uint8_t>(query[q * dim + i] + kernel.offset);
  // Behind the steps may lie anything.
  auto* group = group_memory.as<int8_t>();
  for (int64_t i = 0; i < steps * kStepBytes + kGroupOverrun; ++i)
    group[i] = i < steps * kStepBytes ? int8_t{0} : static_cast<int8_t>(random.next() >> 24);
  auto* sums = sum_memory.as<int32_t>();
  for (int64_t j = 0; j < kGroupKeys; ++j) {
    sums[j] = 0;
    for (int64_t i = 0; i < dim; ++i) {
      group[i / kStepDims * kStepBytes + j * kStepDims + i % kStepDims] = key[j * dim + i];
      sums[j] += key[j * dim + i];
    }
  }
  auto* products = product_memory.as<int32_t>();
  for (int64_t i = 0; i < queries * kGroupKeys; ++i) products[i] = -1;

  (tile ? kernel.tile : kernel.single)({rows, stride, group, sums, steps, products});

  for (int64_t q = 0; q < queries; ++q)
    for (int64_t j = 0; j < kGroupKeys; ++j) {
      int32_t expected = 0;  // 127 * 127 * kMaxDotDim fits
      for (int64_t i = 0; i < dim; ++i) expected += query[q * dim + i] * key[j * dim + i];
      if (products[q * kGroupKeys + j] == expected) continue;
      std::fprintf(
          stderr, "%s %s, dim %ld, stride %ld, %s: query %ld, key %ld: expected %d, got %d\n", name,
          tile ? "tile" : "single", static_cast<long>(dim), static_cast<long>(stride),
          kCodesNames[static_cast<int>(codes)], static_cast<long>(q), static_cast<long>(j), expected,
          products[q * kGroupKeys + j]);
      std::exit(1);
    }
}

// Ends the program where a product is wrong.
inline void check_dot_kernel(const char* name, const DotKernel& kernel) {
  Random random;
  for (const bool tile : {true, false}) {
    for (int64_t dim = 0; dim <= 300; ++dim)
      for (const Codes codes : {Codes::random, Codes::extremes})
        check_products(name, kernel, tile, dim, dim % 3 * kQueryAlignment, codes, random);
    for (const int64_t dim : {int64_t{1025}, kMaxDotDim})
      for (const Codes codes : {Codes::extremes, Codes::highest, Codes::opposite})
        check_products(name, kernel, tile, dim, 0, codes, random);
  }
}

}  // namespace memad_fast
