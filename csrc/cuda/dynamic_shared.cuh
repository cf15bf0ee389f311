// The dynamic shared memory of a block. A function of its own, because it is declared in a way that only nvcc takes; a
// model of CUDA on a CPU can put its own in its place.
#pragma once

namespace memad_fast::cuda {

// Aligned to 128 bytes; as many bytes as the launch asked for.
__device__ __forceinline__ char* dynamic_shared() {
  extern __shared__ __align__(128) char memory[];
  return memory;
}

}  // namespace memad_fast::cuda
