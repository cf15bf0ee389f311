// Read of the structure-texture memory (MemSTC-Net, eq. 6): nearest key by nearest_keys.h, then a copy of its
// value. The values of a query that found nothing are NaN.
#pragma once

#include "cpu/nearest_keys.h"

namespace memad_fast {

struct StcmLookup {
  NearestKeys search;  // k = 1
  Rows values;         // [M, V]
  void* read;          // [N, V], contiguous, of the values' dtype
};

void stcm_lookup(const StcmLookup& args, const ThreadLoop& loop);

// grad_values[m] = sum of grad_read[n] over the queries n that read m, in float64, in the order of the queries.
struct StcmLookupBackwardValues {
  Rows grad_read;          // [N, V]
  const int64_t* indices;  // [N]
  int64_t rows;            // M
  void* grad_values;       // [M, V], contiguous, of the dtype of grad_read
};

void stcm_lookup_backward_values(const StcmLookupBackwardValues& args, const ThreadLoop& loop);

}  // namespace memad_fast
