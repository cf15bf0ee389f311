// csrc/cuda/ptx.cuh for the model of CUDA (see cuda_runtime.h beside this folder): the same functions, after the PTX
// manual's pages on each instruction.
#pragma once

#include <cuda_runtime.h>

namespace memad_fast::cuda {

inline void mma_s8_16x8x32(int32_t (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Words {
    uint32_t a[4], b[2];
  };
  const auto all = cuda_model::gather(~0u, Words{{a[0], a[1], a[2], a[3]}, {b0, b1}}, "mma");
  const auto byte = [](uint32_t word, int at) { return static_cast<int32_t>(static_cast<int8_t>(word >> 8 * at)); };
  const int row = cuda_model::lane() / 4, column = cuda_model::lane() % 4 * 2;
  for (int i = 0; i < 4; ++i)
    for (int k = 0; k < 32; ++k) {
      const Words& of_row = all.of[row * 4 + k % 16 / 4];
      const Words& of_column = all.of[(column + i % 2) * 4 + k % 16 / 4];
      const int32_t product = byte(of_row.a[k / 16 * 2 + i / 2], k % 4) * byte(of_column.b[k / 16], k % 4);
      sum[i] = static_cast<int32_t>(static_cast<uint32_t>(sum[i]) + static_cast<uint32_t>(product));
    }
}

inline void ldmatrix_x4(uint32_t (&out)[4], const void* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16) cuda_model::fail("ldmatrix: a row is not aligned to 16 bytes");
  const auto all = cuda_model::gather(~0u, static_cast<const char*>(row), "ldmatrix");
  for (int matrix = 0; matrix < 4; ++matrix)
    std::memcpy(
        &out[matrix], all.of[matrix * 8 + cuda_model::lane() / 4] + cuda_model::lane() % 4 * 4, sizeof(uint32_t));
}

inline void cp_async_16(void* shared, const void* global) { cuda_model::start_copy(shared, global, 16); }
inline void cp_async_commit() { cuda_model::end_group_of_copies(); }

template <int Pending>
void cp_async_wait() {
  cuda_model::finish_copies(Pending);
}

}  // namespace memad_fast::cuda
