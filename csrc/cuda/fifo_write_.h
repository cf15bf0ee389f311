// Ring write of a FIFO memory on a CUDA device (MemSTC-Net, eq. 7). No torch here: plain pointers and a stream.
#pragma once

#include <cstdint>

namespace memad_fast::cuda {

// One matrix of the memory and the rows to write into it, as bytes: the kernel copies, it never computes. Strides and
// sizes in bytes.
struct RingCopy {
  char* ring;                   // [size] rows
  int64_t ring_stride;          // from row to row
  int64_t ring_element_stride;
  const char* rows;             // [count] rows
  int64_t rows_stride;
  int64_t rows_element_stride;
  int64_t width;                // elements of a row
  int64_t element_size;         // 2, 4 or 8
};

// Writes the newest min(count, size) rows at cursor, cursor + 1, ... modulo size, then advances *cursor by count modulo
// size; any value of it counts modulo size. The cursor is read on the device, so the call can be captured in a CUDA graph
// and replayed.
// Returns a cudaError_t as int.
int fifo_write(
    const RingCopy& keys, const RingCopy& values, int64_t* cursor, int64_t size, int64_t count, void* stream);

}  // namespace memad_fast::cuda
