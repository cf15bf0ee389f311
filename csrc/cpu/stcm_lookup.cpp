#include "cpu/stcm_lookup.h"

#include <cstring>

#include "core/isa.h"
#include "cpu/slot_lists.h"

namespace memad_fast {

MEMAD_FAST_DECLARE_KERNEL(void stcm_lookup_backward_values(
    const StcmLookupBackwardValues& args, const int64_t* start, const int64_t* slots, const ThreadLoop& loop))

namespace {

template <class T>
T quiet_nan();
template <>
float quiet_nan() { return __builtin_nanf(""); }
template <>
f16 quiet_nan() { return {0x7e00}; }
template <>
bf16 quiet_nan() { return {0x7fc0}; }

template <class T>
void gather(const StcmLookup& args, int64_t begin, int64_t end) {
  const int64_t width = args.values.cols;
  for (int64_t n = begin; n < end; ++n) {
    T* out = static_cast<T*>(args.read) + n * width;
    const int64_t index = args.search.indices[n];
    if (index >= 0) {
      std::memcpy(out, args.values.row<T>(index), sizeof(T) * static_cast<size_t>(width));
    } else {
      for (int64_t i = 0; i < width; ++i) out[i] = quiet_nan<T>();
    }
  }
}

}  // namespace

void stcm_lookup(const StcmLookup& args, const ThreadLoop& loop) {
  nearest_keys(args.search, loop);
  loop(args.search.query.rows, 64, [&](int64_t begin, int64_t end) {
    MEMAD_FAST_BY_DTYPE(args.values.dtype, scalar, gather<scalar>(args, begin, end);)
  });
}

void stcm_lookup_backward_values(const StcmLookupBackwardValues& args, const ThreadLoop& loop) {
  const SlotLists lists(args.indices, args.grad_read.rows, args.rows);
  MEMAD_FAST_DISPATCH(stcm_lookup_backward_values, args, lists.start.data(), lists.slots.data(), loop)
}

}  // namespace memad_fast
