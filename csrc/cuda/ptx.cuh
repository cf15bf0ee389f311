// The PTX instructions that CUDA C++ has no function for, one function each. Only device code includes this file; a
// model of CUDA on a CPU can put its own in its place. Fragment layouts are those of the PTX manual:
//
//   thread t of a warp, g = t / 4, i = t % 4; of mma.m16n8k32 for int8:
//     a[0] row g,     bytes 4i..4i+3     a[2] row g,     bytes 16 + 4i..     (row-major, 16 x 32)
//     a[1] row g + 8, bytes 4i..4i+3     a[3] row g + 8, bytes 16 + 4i..
//     b0   column g,  bytes 4i..4i+3     b1   column g,  bytes 16 + 4i..     (column-major, 32 x 8)
//     sum[0], sum[1] row g, columns 2i, 2i + 1;   sum[2], sum[3] row g + 8, the same columns
//
//   ldmatrix_x4 loads four 8 x 8 matrices of 2 bytes: threads 8m..8m+7 give the addresses of the 8 rows (16 bytes each,
//   16-byte aligned, in shared memory) of matrix m; thread t gets bytes 4i..4i+3 of row g of matrix m in out[m].
#pragma once

#include <cstdint>

namespace memad_fast::cuda {

// sum += a b, 16 x 8 sums of 32 products of signed bytes, exactly (wraps beyond int32).
__device__ __forceinline__ void mma_s8_16x8x32(int32_t (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(sum[0]), "+r"(sum[1]), "+r"(sum[2]), "+r"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void ldmatrix_x4(uint32_t (&out)[4], const void* row) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(address)
               : "memory");
}

// Copies 16 bytes (both addresses 16-byte aligned) from device memory to shared memory, in the background.
__device__ __forceinline__ void cp_async_16(void* shared, const void* global) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(global) : "memory");
}

// Ends this thread's group of copies.
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `Pending` of this thread's latest groups are still under way.
template <int Pending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

}  // namespace memad_fast::cuda
