// csrc/cuda/dynamic_shared.cuh for the model of CUDA (see cuda_runtime.h beside this folder).
#pragma once

#include <cuda_runtime.h>

namespace memad_fast::cuda {

inline char* dynamic_shared() { return cuda_model::current->block->dynamic_begin; }

}  // namespace memad_fast::cuda
