#include "cpu/fifo_write_.h"

#include <algorithm>
#include <cstring>

namespace memad_fast {
namespace {

void write_row(const Ring& ring, int64_t slot, int64_t row) {
  char* out = ring.slots + slot * ring.row_stride;
  const char* from = ring.new_rows + row * ring.width * ring.element_size;
  if (ring.element_stride == ring.element_size) {
    std::memcpy(out, from, static_cast<size_t>(ring.width * ring.element_size));
    return;
  }
  for (int64_t i = 0; i < ring.width; ++i)
    std::memcpy(out + i * ring.element_stride, from + i * ring.element_size, static_cast<size_t>(ring.element_size));
}

}  // namespace

void fifo_write_(const FifoWrite& args) {
  const int64_t start = (*args.cursor % args.slots + args.slots) % args.slots;
  for (int64_t row = std::max<int64_t>(0, args.new_rows - args.slots); row < args.new_rows; ++row) {
    const int64_t slot = (start + row) % args.slots;
    write_row(args.keys, slot, row);
    write_row(args.values, slot, row);
  }
  *args.cursor = (start + args.new_rows) % args.slots;
}

}  // namespace memad_fast
