// fifo_write_ on a CUDA device. Bytes: every new row is read once and written once; there is no arithmetic.
//
//   grid.x : new rows (the newest min(count, size); older ones would be overwritten in the same call)
//   block  : one row of keys, then the same row of values, 16 bytes a thread where alignment allows; element by element
//            where elements are apart
//
// The cursor moves in a second launch on the same stream: every block of the first must have read the old one.
#include "cuda/fifo_write_.h"

#include <cuda_runtime.h>

namespace memad_fast::cuda {
namespace {

constexpr int kThreads = 128;       // 2 KiB a step: a 512-float row in one step of a block
constexpr int64_t kMaxBlocks = 65536;  // rows beyond it are taken by striding the grid

template <class Unit>
__device__ void copy_units(char* to, int64_t to_stride, const char* from, int64_t from_stride, int64_t count) {
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x)
    *reinterpret_cast<Unit*>(to + i * to_stride) = *reinterpret_cast<const Unit*>(from + i * from_stride);
}

template <class Unit>
__device__ void copy_bytes(char* to, const char* from, int64_t bytes) {
  constexpr int64_t unit = sizeof(Unit);
  copy_units<Unit>(to, unit, from, unit, bytes / unit);
}

__device__ void copy_row(const RingCopy& copy, int64_t slot, int64_t row) {
  char* to = copy.ring + slot * copy.ring_stride;
  const char* from = copy.rows + row * copy.rows_stride;
  const int64_t bytes = copy.width * copy.element_size;
  if (copy.ring_element_stride == copy.element_size && copy.rows_element_stride == copy.element_size) {
    const uintptr_t alignment =
        reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from) | static_cast<uintptr_t>(bytes);
    if (alignment % 16 == 0)
      copy_bytes<uint4>(to, from, bytes);
    else if (alignment % 4 == 0)
      copy_bytes<uint32_t>(to, from, bytes);
    else
      copy_bytes<uint16_t>(to, from, bytes);
  } else if (copy.element_size == 2) {
    copy_units<uint16_t>(to, copy.ring_element_stride, from, copy.rows_element_stride, copy.width);
  } else if (copy.element_size == 4) {
    copy_units<uint32_t>(to, copy.ring_element_stride, from, copy.rows_element_stride, copy.width);
  } else {
    copy_units<uint64_t>(to, copy.ring_element_stride, from, copy.rows_element_stride, copy.width);
  }
}

// In [0, size), as torch's remainder.
__device__ int64_t modulo(int64_t value, int64_t size) { return (value % size + size) % size; }

__global__ void __launch_bounds__(kThreads)
    write_rows(RingCopy keys, RingCopy values, const int64_t* cursor, int64_t size, int64_t count) {
  const int64_t start = modulo(*cursor, size), first = count > size ? count - size : 0;
  for (int64_t row = first + blockIdx.x; row < count; row += gridDim.x) {
    const int64_t slot = (start + row) % size;
    copy_row(keys, slot, row);
    copy_row(values, slot, row);
  }
}

__global__ void advance(int64_t* cursor, int64_t size, int64_t count) {
  *cursor = (modulo(*cursor, size) + count) % size;
}

}  // namespace

int fifo_write(
    const RingCopy& keys, const RingCopy& values, int64_t* cursor, int64_t size, int64_t count, void* stream) {
  const int64_t kept = count < size ? count : size;
  cudaLaunchConfig_t launch{};
  launch.blockDim = dim3(kThreads);
  launch.stream = static_cast<cudaStream_t>(stream);
  if (kept > 0) {
    launch.gridDim = dim3(static_cast<unsigned>(kept < kMaxBlocks ? kept : kMaxBlocks));
    if (const cudaError_t error = cudaLaunchKernelEx(&launch, write_rows, keys, values, cursor, size, count);
        error != cudaSuccess)
      return error;
  }
  launch.gridDim = launch.blockDim = dim3(1);
  return cudaLaunchKernelEx(&launch, advance, cursor, size, count);
}

}  // namespace memad_fast::cuda
