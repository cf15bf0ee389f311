// One level of prepare_keys (see nearest_keys.h). Compiled once per vector width; writes the same bytes on each.
#include "cpu/nearest_keys_codes.h"

namespace memad_fast {
namespace MEMAD_FAST_ISA {
namespace {

template <class T>
void pack_all(const PrepareKeys& args, const ThreadLoop& loop) {
  const int64_t dim = args.keys.cols;
  const PackedLayout layout(args.capacity, dim);
  float* centre = packed_centre(args.packed, layout);
  const KeyCodes all = packed_codes(args.packed, layout);
  for (int64_t i = dim; i < staged_dim(dim); ++i) centre[i] = 0.0f;
  mean_key<T>(args.keys, args.metric, centre);
  const double centre_norm = norm_of(centre, dim);
  const ErrorTerms error(dim);
  std::memset(args.packed + layout.bytes - kGroupOverrun, 0, kGroupOverrun);
  loop(layout.padded / kGroupKeys, 1, [&](int64_t begin, int64_t end) {
    const Scratch scratch(static_cast<size_t>(pack_scratch_bytes(dim)));
    for (int64_t group = begin; group < end; ++group)
      pack_group<T>(
          args.keys, group * kGroupKeys, centre, centre_norm, args.metric, error, scratch.as<void>(),
          all.from(group * kGroupKeys, layout.steps));
  });
}

template <class T>
void pack_rows(const PrepareKeysRows& args) {
  const int64_t dim = args.keys.cols;
  const PackedLayout layout(args.keys.rows, dim);
  const float* centre = packed_centre(args.packed, layout);
  const KeyCodes all = packed_codes(args.packed, layout);
  const double centre_norm = norm_of(centre, dim);
  const ErrorTerms error(dim);
  const Scratch memory(static_cast<size_t>(pack_scratch_bytes(dim)));
  float* staged = memory.as<float>();
  uint8_t* codes = reinterpret_cast<uint8_t*>(staged + staged_dim(dim));
  for (int64_t r = 0; r < args.count; ++r) {
    const int64_t key = args.rows[r], j = key % kGroupKeys;
    const KeyCodes group = all.from(key - j, layout.steps);
    encode_key(args.keys.row<T>(key), centre, centre_norm, dim, args.metric, error, staged, codes, group, j);
    for (int64_t step = 0; step < layout.steps; ++step)
      std::memcpy(group.codes + step * kStepBytes + j * kStepDims, codes + step * kStepDims, kStepDims);
  }
}

}  // namespace

void prepare_keys(const PrepareKeys& args, const ThreadLoop& loop) {
  MEMAD_FAST_BY_DTYPE(args.keys.dtype, scalar, pack_all<scalar>(args, loop);)
}

void prepare_keys_rows(const PrepareKeysRows& args) {
  MEMAD_FAST_BY_DTYPE(args.keys.dtype, scalar, pack_rows<scalar>(args);)
}

}  // namespace MEMAD_FAST_ISA
}  // namespace memad_fast
