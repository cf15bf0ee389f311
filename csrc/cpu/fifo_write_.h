// Ring write (MemSTC-Net, eq. 7): row i of the new rows goes to slot (cursor + i) mod slots; of more new rows
// than slots the newest stay. A copy of bytes, so one form serves every dtype.
#pragma once

#include <cstdint>

#include "core/parallel.h"

namespace memad_fast {

// One of the two rings. Strides and sizes in bytes.
struct Ring {
  char* slots;
  int64_t row_stride;
  int64_t element_stride;
  const char* new_rows;  // contiguous
  int64_t width;         // elements of a row
  int64_t element_size;
};

struct FifoWrite {
  Ring keys, values;
  int64_t slots;     // 1 or more
  int64_t new_rows;
  int64_t* cursor;
};

void fifo_write_(const FifoWrite& args, const ThreadLoop& loop);

}  // namespace memad_fast
