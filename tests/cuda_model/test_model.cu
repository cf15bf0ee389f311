// Kernels with and without planted mistakes, to see what the model of CUDA shows (test_model.py).
#include <cuda_runtime.h>

#include "cuda/dynamic_shared.cuh"
#include "cuda/ptx.cuh"

namespace {

using namespace memad_fast::cuda;

template <class... Parameters, class... Arguments>
int run(int64_t blocks, int64_t threads, void (*kernel)(Parameters...), Arguments... arguments) {
  cudaLaunchConfig_t launch{};
  launch.gridDim = dim3(static_cast<unsigned>(blocks));
  launch.blockDim = dim3(static_cast<unsigned>(threads));
  return cudaLaunchKernelEx(&launch, kernel, arguments...);
}

// Every block turns its threads' numbers around through shared memory.
template <bool kBarrier>
__global__ void turn_around(int* out) {
  __shared__ int values[64];
  values[threadIdx.x] = static_cast<int>(threadIdx.x);
  if (kBarrier) __syncthreads();
  out[blockIdx.x * blockDim.x + threadIdx.x] = values[blockDim.x - 1 - threadIdx.x];
}

// Numbers of all threads of a block, summed; a barrier is missing between reading a step's values and the next step.
template <bool kBarrier>
__global__ void shift(int* out, int64_t steps) {
  __shared__ int values[64];
  int value = static_cast<int>(threadIdx.x);
  for (int64_t step = 0; step < steps; ++step) {
    values[threadIdx.x] = value;
    __syncthreads();
    value = values[(threadIdx.x + 1) % blockDim.x];
    if (kBarrier) __syncthreads();
  }
  out[threadIdx.x] = value;
}

template <bool kWait>
__global__ void copy_in_background(const int4* from, int4* to) {
  __shared__ int4 first[32], second[32];
  cp_async_16(&first[threadIdx.x], from + threadIdx.x);
  cp_async_commit();
  cp_async_16(&second[threadIdx.x], from + 32 + threadIdx.x);
  cp_async_commit();
  cp_async_wait<1>();
  __syncthreads();
  to[threadIdx.x] = first[31 - threadIdx.x];
  if (kWait) cp_async_wait<0>();
  __syncthreads();
  to[32 + threadIdx.x] = second[31 - threadIdx.x];
}

__global__ void half_a_barrier() {
  if (threadIdx.x < 32) __syncwarp();
  if (threadIdx.x < 16) __syncwarp();  // lanes 16 to 31 leave
}

__global__ void two_barriers() {
  // One warp waits for the block, the other one for its own lanes, of which half wait for the block too.
  if (threadIdx.x < 48) __syncthreads();
  else __syncwarp(0xFFFF0001u << 0);
}

__global__ void of_lanes(const int* in, int* out) {
  const int lane = static_cast<int>(threadIdx.x % 32), value = in[threadIdx.x];
  int* row = out + threadIdx.x * 12;
  row[0] = __shfl_sync(~0u, value, (lane * 7 + 3) % 32);
  row[1] = __shfl_up_sync(~0u, value, 3);
  row[2] = __shfl_down_sync(~0u, value, 5);
  row[3] = __shfl_xor_sync(~0u, value, 8);
  row[4] = static_cast<int>(__ballot_sync(~0u, value > 0));
  row[5] = __any_sync(~0u, value > 90) * 2 + __all_sync(~0u, value > -200);
  row[6] = __reduce_add_sync(~0u, value);
  row[7] = __reduce_min_sync(~0u, value);
  row[8] = static_cast<int>(__match_any_sync(~0u, value % 3));
  row[9] = lane % 2 ? __shfl_xor_sync(0xAAAAAAAAu, value, 2) : __shfl_xor_sync(0x55555555u, value, 4);
  row[10] = __shfl_sync(~0u, value, 1, 8);
  row[11] = __syncthreads_count(value > 0);
}

__global__ void product(const int8_t* a, const int8_t* b, int* c) {  // [16, 32] [8, 32]^T
  __shared__ __align__(16) int8_t shared[16][32];
  for (int i = 0; i < 16; ++i) shared[threadIdx.x / 2][threadIdx.x % 2 * 16 + i] = a[threadIdx.x * 16 + i];
  __syncwarp();
  const int lane = static_cast<int>(threadIdx.x), g = lane / 4, i = lane % 4;
  uint32_t fragment[4], columns[2];
  ldmatrix_x4(fragment, &shared[lane % 16][lane / 16 * 16]);
  for (int half = 0; half < 2; ++half) memcpy(&columns[half], b + g * 32 + half * 16 + i * 4, 4);
  int32_t sum[4] = {1, 1, 1, 1};
  mma_s8_16x8x32(sum, fragment, columns[0], columns[1]);
  for (int at = 0; at < 4; ++at) c[(g + at / 2 * 8) * 8 + i * 2 + at % 2] = sum[at];
}

// Each block of a cluster writes its number into both of its shared memories; its neighbour reads them.
template <bool kBarrier>
__global__ void of_neighbour(int* out) {
  __shared__ int own[32];
  int* dynamic = reinterpret_cast<int*>(dynamic_shared());
  own[threadIdx.x] = static_cast<int>(blockIdx.x * 100 + threadIdx.x);
  dynamic[threadIdx.x] = -own[threadIdx.x];
  if (kBarrier) {
    __cluster_barrier_arrive();
    __cluster_barrier_wait();
  }
  const unsigned next = (__clusterRelativeBlockRank() + 1) % __clusterSizeInBlocks();
  const auto* theirs = static_cast<const int*>(__cluster_map_shared_rank(own, next));
  const auto* theirs_too = static_cast<const int*>(__cluster_map_shared_rank(dynamic, next));
  out[blockIdx.x * blockDim.x + threadIdx.x] = theirs[31 - threadIdx.x] - theirs_too[31 - threadIdx.x];
  __cluster_barrier_arrive();
  __cluster_barrier_wait();
}

__global__ void write_past_the_end(int64_t bytes) { dynamic_shared()[bytes] = 0; }

__global__ void copy_past_the_end(const float* from, float* to, int64_t n) {
  if (static_cast<int64_t>(threadIdx.x) < n) to[threadIdx.x] = from[threadIdx.x];
}

__global__ void poisoned(float* out) {
  __shared__ float fresh;
  if (threadIdx.x == 0) out[blockIdx.x] = fresh;
  __syncthreads();
  fresh = 1;
}

int with_dynamic(void (*kernel)(int64_t), int64_t bytes, int64_t argument) {
  if (const int error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)))
    return error;
  cudaLaunchConfig_t launch{};
  launch.dynamicSmemBytes = static_cast<size_t>(bytes);
  return cudaLaunchKernelEx(&launch, kernel, argument);
}

}  // namespace

extern "C" {

int turn_around_(int* out, int64_t blocks, int64_t threads, int64_t barrier) {
  return run(blocks, threads, barrier ? turn_around<true> : turn_around<false>, out);
}
int shift_(int* out, int64_t steps, int64_t barrier) { return run(1, 64, barrier ? shift<true> : shift<false>, out, steps); }
int copy_(const int4* from, int4* to, int64_t wait) {
  return run(1, 32, wait ? copy_in_background<true> : copy_in_background<false>, from, to);
}
int half_a_barrier_() { return run(1, 32, half_a_barrier); }
int two_barriers_() { return run(1, 64, two_barriers); }
int of_lanes_(const int* in, int* out) { return run(1, 64, of_lanes, in, out); }
int product_(const int8_t* a, const int8_t* b, int* c) { return run(1, 32, product, a, b, c); }
int of_neighbour_(int* out, int64_t blocks, int64_t cluster, int64_t barrier) {
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  cudaLaunchConfig_t launch{};
  launch.gridDim = dim3(static_cast<unsigned>(blocks));
  launch.blockDim = dim3(32);
  launch.dynamicSmemBytes = 32 * sizeof(int);
  launch.attrs = &attribute;
  launch.numAttrs = 1;
  return cudaLaunchKernelEx(&launch, barrier ? of_neighbour<true> : of_neighbour<false>, out);
}
int write_at_(int64_t bytes, int64_t at) { return with_dynamic(write_past_the_end, bytes, at); }
int copy_n_(const float* from, float* to, int64_t n) { return run(1, 64, copy_past_the_end, from, to, n); }
int poisoned_(float* out, int64_t blocks) { return run(blocks, 32, poisoned, out); }
float rounded_(float a, float b, int64_t up) { return up ? __fadd_ru(a, b) : __fadd_rd(a, b); }

}
