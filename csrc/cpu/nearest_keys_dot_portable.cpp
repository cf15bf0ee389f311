// The dot kernel of nearest_keys (see nearest_keys_dot.h) in plain C++, for any processor.
#include "cpu/nearest_keys_dot.h"

namespace memad_fast {
namespace portable {
namespace {

constexpr int64_t kBlock = 16;  // keys whose sums stay in registers

void multiply(const DotGroup& group) {
  for (int64_t first = 0; first < kGroupKeys; first += kBlock) {
    int32_t sum[kBlock] = {};
    for (int64_t step = 0; step < group.steps; ++step) {
      const int8_t* keys = group.keys + step * kStepBytes + first * kStepDims;
      const auto* query = reinterpret_cast<const int8_t*>(group.queries + step * kStepDims);
      for (int64_t j = 0; j < kBlock; ++j)
        for (int64_t i = 0; i < kStepDims; ++i) sum[j] += static_cast<int16_t>(query[i] * keys[j * kStepDims + i]);
    }
    for (int64_t j = 0; j < kBlock; ++j) group.products[first + j] = sum[j];
  }
}

}  // namespace

const DotKernel dot_kernel = {1, 127, 0, multiply, multiply};

}  // namespace portable
}  // namespace memad_fast
