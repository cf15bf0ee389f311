#include "cpu/nearest_keys.h"

#include <cstring>
#include <stdexcept>
#include <string>

#include "core/isa.h"
#include "cpu/slot_lists.h"

namespace memad_fast {

MEMAD_FAST_DECLARE_KERNEL(void nearest_keys(const NearestKeys& args, const DotKernel& dot, const ThreadLoop& loop))
MEMAD_FAST_DECLARE_KERNEL(void prepare_keys(const PrepareKeys& args, const ThreadLoop& loop))
MEMAD_FAST_DECLARE_KERNEL(void prepare_keys_rows(const PrepareKeysRows& args))
MEMAD_FAST_DECLARE_KERNEL(void nearest_keys_backward_query(const NearestKeysBackward& args, const ThreadLoop& loop))
MEMAD_FAST_DECLARE_KERNEL(void nearest_keys_backward_keys(
    const NearestKeysBackward& args, const int64_t* start, const int64_t* slots, const ThreadLoop& loop))

namespace {

constexpr char kMagic[8] = {'m', 'e', 'm', 'a', 'd', 'n', 'k', '2'};

std::string shape(int64_t rows, int64_t dim) { return "[" + std::to_string(rows) + ", " + std::to_string(dim) + "]"; }

void check_packed(const uint8_t* packed, int64_t size, const Rows& keys, Metric metric) {
  PackedHeader header{};
  if (size >= static_cast<int64_t>(sizeof(header))) std::memcpy(&header, packed, sizeof(header));
  if (std::memcmp(header.magic, kMagic, sizeof(kMagic)) != 0)
    throw std::invalid_argument("packed: expected the packed form of prepare_keys of this version, got other bytes");
  if (header.dim != keys.cols || header.rows != keys.rows || size != PackedLayout(header.rows, header.dim).bytes)
    throw std::invalid_argument("packed: expected the packed form of keys " + shape(keys.rows, keys.cols) + ", got that of " +
                                shape(header.rows, header.dim) + " in " + std::to_string(size) + " bytes");
  if (header.metric != static_cast<int64_t>(metric))
    throw std::invalid_argument("packed: expected keys that were prepared for this metric");
}

}  // namespace

void nearest_keys(const NearestKeys& args, const ThreadLoop& loop) {
  if (args.packed) check_packed(args.packed, args.packed_size, args.keys, args.metric);
  MEMAD_FAST_DISPATCH(nearest_keys, args, active_dot_kernel(), loop)
}

void prepare_keys(const PrepareKeys& args, const ThreadLoop& loop) {
  PackedHeader header{};
  std::memcpy(header.magic, kMagic, sizeof(kMagic));
  header.rows = args.capacity;
  header.dim = args.keys.cols;
  header.metric = static_cast<int64_t>(args.metric);
  std::memcpy(args.packed, &header, sizeof(header));
  MEMAD_FAST_DISPATCH(prepare_keys, args, loop)
}

void prepare_keys_rows(const PrepareKeysRows& args) {
  check_packed(args.packed, args.packed_size, args.keys, args.metric);
  for (int64_t i = 0; i < args.count; ++i)
    if (args.rows[i] < 0 || args.rows[i] >= args.keys.rows)
      throw std::invalid_argument("rows: expected 0 to " + std::to_string(args.keys.rows - 1) + ", got " +
                                  std::to_string(args.rows[i]));
  MEMAD_FAST_DISPATCH(prepare_keys_rows, args)
}

void nearest_keys_backward_query(const NearestKeysBackward& args, const ThreadLoop& loop) {
  MEMAD_FAST_DISPATCH(nearest_keys_backward_query, args, loop)
}

void nearest_keys_backward_keys(const NearestKeysBackward& args, const ThreadLoop& loop) {
  const SlotLists lists(args.indices, args.query.rows * args.k, args.keys.rows);
  MEMAD_FAST_DISPATCH(nearest_keys_backward_keys, args, lists.start.data(), lists.slots.data(), loop)
}

}  // namespace memad_fast
