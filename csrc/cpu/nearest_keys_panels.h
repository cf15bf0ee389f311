// Rows as float32 panels, for the queries that codes cannot decide, and the bound of a float32 score. Only for kernel files.
//
//   panel   16 keys, dimension by dimension: [dim][16]. One vector load brings one dimension of 16 (8, 4) keys.
//   base    h - slack, rounded down: lower end of the score for a query of norm 0.
//           +infinity: never returned (a non-finite key, padding). -infinity: always left to the exact stage.
//   slope   error per unit of the query's norm, rounded up
//   slack   error that does not depend on the query, rounded up
#pragma once

#include "cpu/nearest_keys_rows.h"

namespace memad_fast {
namespace MEMAD_FAST_ISA {
namespace {

constexpr int64_t kPanelKeys = 16;

struct Panels {
  float* panels;
  float* base;
  float* slope;
  float* slack;

  Panels from(int64_t first_key, int64_t dim) const {
    return {panels + first_key * dim, base + first_key, slope + first_key, slack + first_key};
  }
};

// Packs keys [first, first + 16) to the start of what `panel` points to. `staged` is room for 16 staged rows.
template <class T>
void pack_panel(
    const Rows& keys, int64_t first, const float* centre, double centre_norm, Metric metric, const ErrorTerms& error,
    float* staged, const Panels& panel) {
  const int64_t dim = keys.cols, stride = staged_dim(dim);
  for (int64_t j = 0; j < kPanelKeys; ++j) {
    float* out = staged + j * stride;
    StagedKey key{Screened::never_returned, 0.0, 0.0, 0.0, 0.0};
    if (first + j < keys.rows) {
      key = stage_key(keys.row<T>(first + j), centre, centre_norm, dim, metric, error, out);
    } else {
      for (int64_t i = 0; i < dim; ++i) out[i] = 0.0f;
    }
    if (key.screened == Screened::yes && is_finite(error.relative)) {
      panel.base[j] = round_down(key.height - key.slack);
      panel.slope[j] = round_up(error.relative * key.norm + key.slope);
      panel.slack[j] = round_up(key.slack);
    } else {
      const bool exact = key.screened != Screened::never_returned;
      panel.base[j] = exact ? -kInfinity : kInfinity;
      panel.slope[j] = 0.0f;
      panel.slack[j] = exact ? kInfinity : 0.0f;
    }
  }
  constexpr int64_t word = sizeof(float);
  interleave_words(staged, word * stride, dim, panel.panels, word * kPanelKeys);
}

}  // namespace
}  // namespace MEMAD_FAST_ISA
}  // namespace memad_fast
