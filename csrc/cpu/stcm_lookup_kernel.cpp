// One level of the gradient of stcm_lookup (see stcm_lookup.h). Compiled once per instruction set.
#include "core/scratch.h"
#include "core/simd.h"
#include "cpu/stcm_lookup.h"

namespace memad_fast {
namespace MEMAD_FAST_ISA {
namespace {

template <class T>
void value_gradients(
    const StcmLookupBackwardValues& args, const int64_t* start, const int64_t* slots, int64_t begin, int64_t end) {
  const int64_t width = args.grad_read.cols;
  const Scratch memory(sizeof(double) * static_cast<size_t>(width));
  double* sum = memory.as<double>();
  for (int64_t m = begin; m < end; ++m) {
    std::memset(sum, 0, sizeof(double) * static_cast<size_t>(width));
    for (int64_t i = start[m]; i < start[m + 1]; ++i) {
      const T* grad = args.grad_read.row<T>(slots[i]);
      for (int64_t j = 0; j < width; ++j) sum[j] += static_cast<double>(scalar_from(grad[j]));
    }
    T* out = static_cast<T*>(args.grad_values) + m * width;
    for (int64_t j = 0; j < width; ++j) scalar_to(static_cast<float>(sum[j]), out + j);
  }
}

}  // namespace

void stcm_lookup_backward_values(
    const StcmLookupBackwardValues& args, const int64_t* start, const int64_t* slots, const ThreadLoop& loop) {
  loop(args.rows, 16, [&](int64_t begin, int64_t end) {
    MEMAD_FAST_BY_DTYPE(args.grad_read.dtype, scalar, value_gradients<scalar>(args, start, slots, begin, end);)
  });
}

}  // namespace MEMAD_FAST_ISA
}  // namespace memad_fast
