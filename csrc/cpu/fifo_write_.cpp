#include "cpu/fifo_write_.h"

#include <algorithm>
#include <cstring>

namespace memad_fast {
namespace {

// A thread's share is at least this many bytes of a ring: less is copied sooner than shared.
constexpr int64_t kGrainBytes = int64_t{64} << 10;

// Rows [row, row + count) of the new rows into the slots from `slot` on, none of which wraps.
void write_run(const Ring& ring, int64_t slot, int64_t row, int64_t count) {
  const int64_t row_bytes = ring.width * ring.element_size;
  char* out = ring.slots + slot * ring.row_stride;
  const char* from = ring.new_rows + row * row_bytes;
  const bool row_contiguous = ring.element_stride == ring.element_size || ring.width == 1;
  if (row_contiguous && ring.row_stride == row_bytes) {
    std::memcpy(out, from, static_cast<size_t>(count * row_bytes));
    return;
  }
  for (int64_t r = 0; r < count; ++r, out += ring.row_stride, from += row_bytes) {
    if (row_contiguous) {
      std::memcpy(out, from, static_cast<size_t>(row_bytes));
      continue;
    }
    for (int64_t i = 0; i < ring.width; ++i)
      std::memcpy(out + i * ring.element_stride, from + i * ring.element_size, static_cast<size_t>(ring.element_size));
  }
}

}  // namespace

void fifo_write_(const FifoWrite& args, const ThreadLoop& loop) {
  const int64_t start = (*args.cursor % args.slots + args.slots) % args.slots;
  const int64_t first = std::max<int64_t>(0, args.new_rows - args.slots);
  const int64_t pair_bytes = args.keys.width * args.keys.element_size + args.values.width * args.values.element_size;
  // Rows `first` and later have slots of their own, so threads never meet.
  loop(args.new_rows - first, kGrainBytes / std::max<int64_t>(pair_bytes, 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = first + begin; row < first + end;) {
      const int64_t slot = (start + row) % args.slots;
      const int64_t count = std::min(first + end - row, args.slots - slot);
      write_run(args.keys, slot, row, count);
      write_run(args.values, slot, row, count);
      row += count;
    }
  });
  *args.cursor = (start + args.new_rows) % args.slots;
}

}  // namespace memad_fast
