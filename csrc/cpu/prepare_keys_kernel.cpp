// One level of prepare_keys (see nearest_keys.h). Compiled once per instruction set; writes the same bytes on each.
#include "cpu/nearest_keys_panels.h"

namespace memad_fast {
namespace MEMAD_FAST_ISA {
namespace {

template <class T>
void pack_all(const PrepareKeys& args, const PackedView<float>& view, const ThreadLoop& loop) {
  const int64_t dim = args.keys.cols;
  for (int64_t i = dim; i < padded_centre(dim); ++i) view.centre[i] = 0.0f;
  mean_key<T>(args.keys, args.metric, view.centre);
  const double centre_norm = norm_of(view.centre, dim);
  const ErrorTerms error(dim);
  loop(padded_rows(args.keys.rows) / kPanelKeys, 1, [&](int64_t begin, int64_t end) {
    const Scratch staged(sizeof(float) * static_cast<size_t>(kPanelKeys * dim));
    for (int64_t p = begin; p < end; ++p)
      pack_panel<T>(
          args.keys, p, view.centre, centre_norm, args.metric, error, staged.as<float>(), panel_at(view, p, dim));
  });
}

template <class T>
void pack_rows(const PrepareKeysRows& args, const PackedView<float>& view) {
  const int64_t dim = args.keys.cols;
  const double centre_norm = norm_of(view.centre, dim);
  const ErrorTerms error(dim);
  const Scratch memory(sizeof(float) * static_cast<size_t>(dim));
  float* staged = memory.as<float>();
  for (int64_t r = 0; r < args.count; ++r) {
    const int64_t key = args.rows[r];
    const KeyBound bound =
        stage_key(args.keys.row<T>(key), view.centre, centre_norm, dim, args.metric, error, staged);
    float* column = view.panels + key / kPanelKeys * kPanelKeys * dim + key % kPanelKeys;
    for (int64_t i = 0; i < dim; ++i) column[i * kPanelKeys] = staged[i];
    view.base[key] = bound.base;
    view.slope[key] = bound.slope;
    view.slack[key] = bound.slack;
  }
}

}  // namespace

void prepare_keys(const PrepareKeys& args, const ThreadLoop& loop) {
  const auto view = packed_view<float>(args.packed, args.keys.rows, args.keys.cols);
  MEMAD_FAST_BY_DTYPE(args.keys.dtype, scalar, pack_all<scalar>(args, view, loop);)
}

void prepare_keys_rows(const PrepareKeysRows& args) {
  const auto view = packed_view<float>(args.packed, args.keys.rows, args.keys.cols);
  MEMAD_FAST_BY_DTYPE(args.keys.dtype, scalar, pack_rows<scalar>(args, view);)
}

}  // namespace MEMAD_FAST_ISA
}  // namespace memad_fast
