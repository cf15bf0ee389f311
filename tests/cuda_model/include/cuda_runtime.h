// A model of CUDA on one CPU thread: put this folder before the others on the include path, compile a .cu file of
// csrc/cuda as C++, and its launches run here, slowly. In the place of <cuda_runtime.h> and "cuda/ptx.cuh".
//
//   thread of a block    a fiber with a stack of its own; it runs until it waits for others, then another one runs
//   warp                 32 fibers that meet in gather(): shuffles, votes and products of matrices are made of it
//   block                runs to its end before the next one; shared memory is filled with 0xFF (NaN, -1) before
//   cluster              its blocks run together, each with its shared memory
//   device memory        the host's
//   cp.async             copies when the thread waits for the copy, not before
//
// What it shows: wrong indices and arithmetic; a barrier or a wait that is missing (fibers can run forwards, backwards
// or in an order drawn from a seed: run a kernel in several, the results must be the same); threads that wait for each
// other forever, shared memory that is written past its end, launches that a device of the stated kind refuses.
// What it cannot show: speed, registers, bank conflicts; races between two waits of the same thread, between blocks, or
// on the order of memory; how much static shared memory a kernel has (ptxas -v tells); what nvcc contracts (a * b + c
// rounds twice here); accesses past the end of device memory, unless a page follows that cannot be read (build.py's
// at_end_of_page).
//
// Not supported: <<<>>> (use cudaLaunchKernelEx), `extern __shared__` (use "cuda/dynamic_shared.cuh"), inline assembly
// (use "cuda/ptx.cuh"), blocks that wait for blocks outside of their cluster. It is strict where a device is lenient: a
// lane that is named in a mask and has left is an error. C functions that CUDA computes with other last bits (expf,
// logf, ...) are the host's.
#pragma once

#include <dlfcn.h>
#include <link.h>
#include <math.h>
#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cfenv>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

// --- the words of the language -----------------------------------------------------------------------------------

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
// Thread-local variables of a library lie in one place that can be found, poisoned and exchanged.
#define __shared__ thread_local
#ifndef __CUDA_ARCH__
#define __CUDA_ARCH__ 900
#endif

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
#define CUDA_MODEL_VECTORS(name, type)                                                                        \
  struct alignas(2 * sizeof(type)) name##2 { type x, y; };                                                    \
  struct name##3 { type x, y, z; };                                                                           \
  struct alignas(sizeof(type) < 8 ? 4 * sizeof(type) : 16) name##4 { type x, y, z, w; };                      \
  inline name##2 make_##name##2(type x, type y) { return {x, y}; }                                            \
  inline name##3 make_##name##3(type x, type y, type z) { return {x, y, z}; }                                 \
  inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
CUDA_MODEL_VECTORS(char, signed char)
CUDA_MODEL_VECTORS(uchar, unsigned char)
CUDA_MODEL_VECTORS(short, short)
CUDA_MODEL_VECTORS(ushort, unsigned short)
CUDA_MODEL_VECTORS(int, int)
CUDA_MODEL_VECTORS(uint, unsigned)
CUDA_MODEL_VECTORS(longlong, long long)
CUDA_MODEL_VECTORS(ulonglong, unsigned long long)
CUDA_MODEL_VECTORS(float, float)
CUDA_MODEL_VECTORS(double, double)
#undef CUDA_MODEL_VECTORS

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
constexpr int warpSize = 32;

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorMisalignedAddress = 716,
  cudaErrorLaunchFailure = 719,
};
using cudaStream_t = struct CudaModelStream*;

// --- the machine -------------------------------------------------------------------------------------------------

namespace cuda_model {

constexpr int kLanes = 32;
constexpr size_t kStackBytes = 256 << 10, kPage = 4096;
constexpr size_t kGuardBytes = 256;  // beside dynamic shared memory, to see that nobody wrote there
constexpr int kPoison = 0xFF;

// The device that is played; tests may change it.
struct Device {
  int major = __CUDA_ARCH__ / 100, minor = __CUDA_ARCH__ / 10 % 10;
  int multiprocessors = 4;
  int shared_bytes = __CUDA_ARCH__ >= 1200 ? 99 << 10 : __CUDA_ARCH__ >= 900 ? 227 << 10 : 163 << 10;  // of a block
};
inline Device device;

enum class Order { forward, backward, random };
inline Order order = Order::forward;
inline std::mt19937_64 generator;

[[noreturn]] inline void fail(const std::string& what) { throw std::runtime_error(what); }

struct Block;

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};

// One thread of a block.
struct Fiber {
  uint3 index;
  Block* block = nullptr;
  int number = 0;  // in its block
  bool exited = false;
  const void* waits_for = nullptr;  // a place that stands for the event; nullptr: can run
  const char* waits_in = "";
  jmp_buf here;
  ucontext_t start;
  bool started = false;
  char* stack = nullptr;
  std::vector<std::vector<Copy>> copies;  // groups of cp.async, oldest first; the last one is still open
  unsigned cluster_phase = 0;

  Fiber() {
    void* memory = mmap(
        nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, kPage, PROT_NONE) != 0) fail("no memory for a stack");
    stack = static_cast<char*>(memory);
  }
  ~Fiber() { munmap(stack, kStackBytes); }
  Fiber(const Fiber&) = delete;
};

// What the lanes of a warp that have arrived at gather() hold ready.
struct Warp {
  struct Arrival {
    const char* what = nullptr;  // nullptr: has not arrived
    unsigned mask = 0;
    const void* value = nullptr;
    void* all = nullptr;
    size_t bytes = 0;
  };
  Arrival lanes[kLanes];
};

struct Barrier {
  int arrived = 0;
};

struct Block {
  uint3 index;
  unsigned rank = 0;  // in its cluster
  int alive = 0;
  int votes = 0;
  std::vector<Fiber*> fibers;
  std::vector<Warp> warps;
  Barrier barriers[16];
  std::vector<char> statics;           // of static shared memory, while another block runs
  std::unique_ptr<char[]> dynamic;     // with guards on both sides and room for alignment
  char* dynamic_begin = nullptr;
};

struct Grid {
  unsigned cluster = 1;
  size_t dynamic_bytes = 0;
  std::function<void()> kernel;
  std::vector<std::unique_ptr<Block>> blocks;  // of the cluster that runs
  unsigned cluster_phase = 0;
  int cluster_arrived = 0;
  std::string error;
};
inline Grid grid;
inline Fiber* current = nullptr;
inline Block* loaded = nullptr;  // whose static shared memory lies in the thread-local variables
inline jmp_buf scheduler;
inline ucontext_t scheduler_context;
inline std::vector<std::unique_ptr<Fiber>> pool;
inline std::string message;
inline std::map<const void*, int> dynamic_limits;  // what cudaFuncSetAttribute granted to kernels

// Where the library that this is compiled into has its thread-local variables: all are static shared memory but one.
struct Extent {
  const void* library;
  char* begin;
  size_t bytes;
};
inline thread_local volatile char touched;
inline Extent static_shared() {
  static const Extent extent = [] {
    touched = 0;  // the variables get their place at the first use
    Dl_info info;
    if (!dladdr(&message, &info)) fail("the library is not found");
    Extent found{info.dli_fbase, nullptr, 0};
    dl_iterate_phdr(
        [](dl_phdr_info* object, size_t, void* data) {
          auto& to = *static_cast<Extent*>(data);
          if (reinterpret_cast<const void*>(object->dlpi_addr) != to.library) return 0;
          for (int i = 0; i < object->dlpi_phnum; ++i)
            if (object->dlpi_phdr[i].p_type == PT_TLS)
              to = {to.library, static_cast<char*>(object->dlpi_tls_data), object->dlpi_phdr[i].p_memsz};
          return 1;
        },
        &found);
    if (!found.begin) fail("the library's thread-local variables are not found");
    return found;
  }();
  return extent;
}

// --- fibers: to run one, to wait ---

inline void stop_grid(const char* why) {
  const uint3 t = threadIdx, b = blockIdx;
  char where[160];
  std::snprintf(where, sizeof(where), "thread (%u, %u, %u) of block (%u, %u, %u): ", t.x, t.y, t.z, b.x, b.y, b.z);
  grid.error = where + std::string(why);
}

inline void run_fiber() {
  for (;;) {
    try {
      grid.kernel();
    } catch (const std::exception& error) {
      stop_grid(error.what());
    }
    current->exited = true;
    if (_setjmp(current->here) == 0) _longjmp(scheduler, 1);
  }
}

inline void resume(Fiber& fiber) {
  if (loaded != fiber.block) {
    const Extent shared = static_shared();
    if (loaded) std::memcpy(loaded->statics.data(), shared.begin, shared.bytes);
    loaded = fiber.block;
    std::memcpy(shared.begin, loaded->statics.data(), shared.bytes);
  }
  current = &fiber;
  threadIdx = fiber.index;
  blockIdx = fiber.block->index;
  if (_setjmp(scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.here, 1);
  fiber.started = true;
  getcontext(&fiber.start);
  fiber.start.uc_stack.ss_sp = fiber.stack + kPage;
  fiber.start.uc_stack.ss_size = kStackBytes - kPage;
  fiber.start.uc_link = nullptr;
  makecontext(&fiber.start, run_fiber, 0);
  setcontext(&fiber.start);
}

inline void wait(const void* event, const char* what) {
  current->waits_for = event;
  current->waits_in = what;
  if (_setjmp(current->here) == 0) _longjmp(scheduler, 1);
}

inline void release(const void* event) {
  for (const auto& block : grid.blocks)
    for (Fiber* fiber : block->fibers)
      if (fiber->waits_for == event) fiber->waits_for = nullptr;
}

// While it lives, an access to memory that is not there ends the grid, not the process.
class FaultHandler {
 public:
  FaultHandler() {
    const stack_t stack{stack_, 0, sizeof(stack_)};
    sigaltstack(&stack, &stack_before_);
    struct sigaction action {};
    action.sa_sigaction = [](int, siginfo_t* info, void*) {
      if (!current) _exit(139);
      char why[80];
      std::snprintf(why, sizeof(why), "an access to memory that is not there: %p", info->si_addr);
      stop_grid(why);
      _longjmp(scheduler, 1);
    };
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    sigaction(SIGSEGV, &action, &before_);
  }
  ~FaultHandler() {
    sigaction(SIGSEGV, &before_, nullptr);
    sigaltstack(&stack_before_, nullptr);
  }
  FaultHandler(const FaultHandler&) = delete;

 private:
  inline static char stack_[64 << 10];
  stack_t stack_before_;
  struct sigaction before_;
};

// --- where fibers meet ---

inline void arrive(Barrier& barrier, int expected, const char* what) {
  if (++barrier.arrived < expected) return wait(&barrier, what);
  if (barrier.arrived > expected) fail("more threads arrive at a barrier than it is for");
  barrier.arrived = 0;
  release(&barrier);
}

inline void sync_block() { arrive(current->block->barriers[0], current->block->alive, "__syncthreads"); }

// bar.sync id, count
inline void sync_named(int id, int count) {
  if (id < 1 || id > 15 || count % kLanes || count < kLanes) fail("a barrier of a wrong number or count");
  arrive(current->block->barriers[id], count, "bar.sync");
}

inline int threads_of_cluster() {
  int alive = 0;
  for (const auto& block : grid.blocks) alive += block->alive;
  return alive;
}

inline void finish_cluster_phase() {
  if (grid.cluster_arrived == 0 || grid.cluster_arrived < threads_of_cluster()) return;
  grid.cluster_arrived = 0;
  ++grid.cluster_phase;
  release(&grid.cluster_phase);
}

inline void arrive_at_cluster() {
  current->cluster_phase = grid.cluster_phase;
  ++grid.cluster_arrived;
  finish_cluster_phase();
}

inline void wait_for_cluster() {
  if (current->cluster_phase == grid.cluster_phase) wait(&grid.cluster_phase, "the barrier of the cluster");
}

inline void leave(Fiber& fiber) {
  Block& block = *fiber.block;
  --block.alive;
  if (Barrier& barrier = block.barriers[0]; barrier.arrived > 0 && barrier.arrived == block.alive) {
    barrier.arrived = 0;
    release(&barrier);
  }
  finish_cluster_phase();
}

// The values that all lanes of the mask bring, for each of them. Other lanes' are poison.
template <class T>
struct Gathered {
  T of[kLanes];
};

template <class T>
Gathered<T> gather(unsigned mask, const T& value, const char* what) {
  static_assert(std::is_trivially_copyable_v<T>);
  Block& block = *current->block;
  Warp& warp = block.warps[current->number / kLanes];
  const int first = current->number / kLanes * kLanes, self = current->number - first;
  if (!(mask >> self & 1)) fail(std::string(what) + ": the mask does not name the lane that calls");
  Gathered<T> all;
  std::memset(static_cast<void*>(&all), kPoison, sizeof(all));
  warp.lanes[self] = {what, mask, &value, &all, sizeof(T)};
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!(mask >> lane & 1)) continue;
    if (first + lane >= static_cast<int>(block.fibers.size()) || block.fibers[first + lane]->exited)
      fail(std::string(what) + ": the mask names a lane that is not there any more");
    const Warp::Arrival& other = warp.lanes[lane];
    const bool here =
        other.what && std::strcmp(other.what, what) == 0 && other.mask == mask && other.bytes == sizeof(T);
    if (!here) {  // yet; the last one to arrive finds all of them and hands out the values
      wait(&warp.lanes[self], what);
      return all;
    }
  }
  for (int to = 0; to < kLanes; ++to)
    for (int from = 0; from < kLanes; ++from)
      if ((mask >> to & 1) && (mask >> from & 1))
        std::memcpy(
            static_cast<char*>(warp.lanes[to].all) + from * sizeof(T), warp.lanes[from].value, sizeof(T));
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!(mask >> lane & 1)) continue;
    warp.lanes[lane] = {};
    block.fibers[first + lane]->waits_for = nullptr;
  }
  return all;
}

inline int lane() { return current->number % kLanes; }

// --- copies in the background ---

inline void start_copy(void* to, const void* from, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(to) % bytes || reinterpret_cast<uintptr_t>(from) % bytes)
    fail("cp.async: an address is not aligned to " + std::to_string(bytes) + " bytes");
  if (current->copies.empty()) current->copies.emplace_back();
  current->copies.back().push_back({to, from, bytes});
}

inline void end_group_of_copies() {
  if (current->copies.empty()) current->copies.emplace_back();
  current->copies.emplace_back();
}

inline void finish_copies(size_t pending) {  // all but the latest `pending` groups that have ended
  auto& groups = current->copies;
  while (groups.size() > pending + 1) {
    for (const Copy& copy : groups.front()) std::memcpy(copy.to, copy.from, copy.bytes);
    groups.erase(groups.begin());
  }
}

// --- shared memory of blocks ---

inline void* map_shared(const void* address, unsigned rank) {
  const auto* place = static_cast<const char*>(address);
  if (rank >= grid.blocks.size()) fail("the cluster has no such block");
  Block& other = *grid.blocks[rank];
  const Extent shared = static_shared();
  if (&other != current->block && other.alive == 0) fail("the shared memory of a block that has left");
  if (place >= shared.begin && place < shared.begin + shared.bytes)
    return &other == current->block ? const_cast<char*>(place) : other.statics.data() + (place - shared.begin);
  const char* own = current->block->dynamic_begin;
  if (place >= own && place <= own + grid.dynamic_bytes) return other.dynamic_begin + (place - own);
  fail("map_shared_rank: not an address of the block's shared memory");
}

inline void check_guards(const Block& block) {
  for (size_t i = 0; i < kGuardBytes; ++i)
    if (static_cast<unsigned char>(block.dynamic_begin[-1 - static_cast<ptrdiff_t>(i)]) != 0xA5 ||
        static_cast<unsigned char>(block.dynamic_begin[grid.dynamic_bytes + i]) != 0xA5)
      fail("something was written outside of the dynamic shared memory");
}

// --- a grid ---

template <class T>
void put_in_order(std::vector<T>& items) {
  if (order == Order::backward) std::reverse(items.begin(), items.end());
  if (order == Order::random) std::shuffle(items.begin(), items.end(), generator);
}

inline std::unique_ptr<Block> make_block(uint3 index, unsigned rank, size_t first_fiber) {
  auto block = std::make_unique<Block>();
  block->index = index;
  block->rank = rank;
  const dim3 size = blockDim;
  block->alive = static_cast<int>(size.x * size.y * size.z);
  block->warps.resize((block->alive + kLanes - 1) / kLanes);
  block->statics.assign(static_shared().bytes, static_cast<char>(kPoison));
  const size_t bytes = grid.dynamic_bytes + 2 * kGuardBytes + 1024;
  block->dynamic = std::make_unique<char[]>(bytes);
  std::memset(block->dynamic.get(), 0xA5, bytes);
  const auto begin = (reinterpret_cast<uintptr_t>(block->dynamic.get()) + kGuardBytes + 1023) / 1024 * 1024;
  block->dynamic_begin = reinterpret_cast<char*>(begin);
  std::memset(block->dynamic_begin, kPoison, grid.dynamic_bytes);
  while (pool.size() < first_fiber + block->alive) pool.push_back(std::make_unique<Fiber>());
  for (int number = 0; number < block->alive; ++number) {
    Fiber& fiber = *pool[first_fiber + number];
    const unsigned n = number;
    fiber.index = {n % size.x, n / size.x % size.y, n / (size.x * size.y)};
    fiber.block = block.get();
    fiber.number = number;
    fiber.exited = false;
    fiber.waits_for = nullptr;
    fiber.copies.clear();
    block->fibers.push_back(&fiber);
  }
  return block;
}

// Lets every thread of a block run that can; false if none could.
inline bool run_threads(Block& block) {
  bool progress = false;
  std::vector<Fiber*> fibers = block.fibers;
  put_in_order(fibers);
  for (Fiber* fiber : fibers) {
    if (fiber->exited || fiber->waits_for) continue;
    progress = true;
    resume(*fiber);
    if (!grid.error.empty()) fail(grid.error);
    if (fiber->exited) leave(*fiber);
  }
  return progress;
}

[[noreturn]] inline void fail_waiting() {
  std::map<std::string, int> waiting;
  for (const auto& block : grid.blocks)
    for (const Fiber* fiber : block->fibers) ++waiting[fiber->exited ? "(the end)" : fiber->waits_in];
  std::string text = "threads wait for each other forever:";
  for (const auto& [what, count] : waiting) text += " " + std::to_string(count) + " in " + what + ";";
  fail(text);
}

// All blocks of the cluster, to their end. A block runs as far as it can, for to change it is dear; in random order
// sometimes not quite as far.
inline void run_cluster() {
  std::vector<Block*> blocks;
  for (const auto& block : grid.blocks) blocks.push_back(block.get());
  while (threads_of_cluster() > 0) {
    bool progress = false;
    put_in_order(blocks);
    for (Block* block : blocks) {
      while (run_threads(*block)) {
        progress = true;
        if (order == Order::random && generator() % 8 == 0) break;
      }
      check_guards(*block);
    }
    if (!progress) fail_waiting();
  }
}

inline void run_grid() {
  std::vector<uint64_t> clusters(static_cast<uint64_t>(gridDim.x) * gridDim.y * gridDim.z / grid.cluster);
  std::iota(clusters.begin(), clusters.end(), 0);
  put_in_order(clusters);
  const size_t threads = static_cast<size_t>(blockDim.x) * blockDim.y * blockDim.z;
  for (const uint64_t cluster : clusters) {
    loaded = nullptr;
    grid.cluster_arrived = 0;
    grid.blocks.clear();
    for (unsigned rank = 0; rank < grid.cluster; ++rank) {
      const uint64_t n = cluster * grid.cluster + rank;  // clusters lie along x, which they divide
      const uint3 index{static_cast<unsigned>(n % gridDim.x), static_cast<unsigned>(n / gridDim.x % gridDim.y),
                        static_cast<unsigned>(n / gridDim.x / gridDim.y)};
      grid.blocks.push_back(make_block(index, rank, rank * threads));
    }
    run_cluster();
  }
}

inline cudaError_t refuse(cudaError_t error, const std::string& why) {
  message = why;
  return error;
}

}  // namespace cuda_model

// --- the runtime's functions ---------------------------------------------------------------------------------------

enum cudaLaunchAttributeID {
  cudaLaunchAttributeClusterDimension = 4,
  cudaLaunchAttributeProgrammaticStreamSerialization = 6,
};
union cudaLaunchAttributeValue {
  char pad[64];
  struct {
    unsigned x, y, z;
  } clusterDim;
  int programmaticStreamSerializationAllowed;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};

namespace cuda_model {

// What a device says of a launch before it runs; "" if nothing speaks against it.
inline std::string refusal(const cudaLaunchConfig_t& config, unsigned cluster, const void* kernel) {
  const dim3 g = config.gridDim, b = config.blockDim;
  if (g.x == 0 || g.y == 0 || g.z == 0) return "an empty grid";
  if (g.x > 0x7FFFFFFF || g.y > 65535 || g.z > 65535) return "a grid that is too large";
  const uint64_t threads = static_cast<uint64_t>(b.x) * b.y * b.z;
  if (threads == 0 || threads > 1024 || b.z > 64) return "a block of " + std::to_string(threads) + " threads";
  if (cluster > 1 && device.major < 9) return "clusters need compute capability 9.0";
  if (cluster > 8 || g.x % cluster) return "clusters of " + std::to_string(cluster) + " blocks";
  if (config.dynamicSmemBytes > static_cast<size_t>(device.shared_bytes))
    return std::to_string(config.dynamicSmemBytes) + " bytes of shared memory";
  const int limit = dynamic_limits.count(kernel) ? dynamic_limits[kernel] : 48 << 10;
  if (config.dynamicSmemBytes > static_cast<size_t>(limit)) return "more dynamic shared memory than the kernel may use";
  return "";
}

inline cudaError_t last_error = cudaSuccess;

inline cudaError_t result(cudaError_t error, const std::string& why = "") {
  if (error == cudaSuccess) return error;
  message = why;
  return last_error = error;
}

template <class... Parameters, class... Arguments>
cudaError_t launch(const cudaLaunchConfig_t& config, void (*kernel)(Parameters...), Arguments&&... arguments) {
  unsigned cluster = 1;
  for (unsigned i = 0; i < config.numAttrs; ++i)
    if (config.attrs[i].id == cudaLaunchAttributeClusterDimension) {
      const auto& size = config.attrs[i].val.clusterDim;
      if (size.y != 1 || size.z != 1) return result(cudaErrorInvalidValue, "the model has clusters along x only");
      cluster = size.x;
    }
  if (const std::string why = refusal(config, cluster, reinterpret_cast<const void*>(kernel)); !why.empty())
    return result(cudaErrorInvalidConfiguration, why);
  const std::tuple<Parameters...> values(std::forward<Arguments>(arguments)...);
  gridDim = config.gridDim;
  blockDim = config.blockDim;
  grid.cluster = cluster;
  grid.dynamic_bytes = config.dynamicSmemBytes;
  grid.kernel = [&] { std::apply(kernel, values); };
  grid.error.clear();
  try {
    const FaultHandler handler;
    run_grid();
  } catch (const std::exception& error) {
    pool.clear();  // fibers in the middle of a kernel
    return result(cudaErrorLaunchFailure, error.what());
  }
  return cudaSuccess;
}

}  // namespace cuda_model

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(
    const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... arguments) {
  return cuda_model::launch(*config, kernel, std::forward<Arguments>(arguments)...);
}

inline cudaError_t cudaGetLastError() { return std::exchange(cuda_model::last_error, cudaSuccess); }
inline cudaError_t cudaPeekAtLastError() { return cuda_model::last_error; }
inline const char* cudaGetErrorString(cudaError_t) { return cuda_model::message.c_str(); }

enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributePreferredSharedMemoryCarveout = 9,
};
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value > cuda_model::device.shared_bytes)
    return cuda_model::result(cudaErrorInvalidValue, std::to_string(value) + " bytes of dynamic shared memory");
  cuda_model::dynamic_limits[reinterpret_cast<const void*>(kernel)] = value;
  return cudaSuccess;
}

enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const auto& device = cuda_model::device;
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = device.multiprocessors; return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor: *value = device.major; return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor: *value = device.minor; return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = device.shared_bytes; return cudaSuccess;
  }
  return cuda_model::result(cudaErrorInvalidValue, "a device attribute that the model does not have");
}
inline cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
  std::memset(memory, value, bytes);
  return cudaSuccess;
}

// --- device functions ----------------------------------------------------------------------------------------------

inline void __syncthreads() { cuda_model::sync_block(); }
inline int __syncthreads_count(int vote) {
  int& votes = cuda_model::current->block->votes;
  votes = 0;
  __syncthreads();
  votes += vote != 0;
  __syncthreads();
  const int count = votes;
  __syncthreads();
  return count;
}
inline int __syncthreads_or(int vote) { return __syncthreads_count(vote) > 0; }
inline int __syncthreads_and(int vote) { return __syncthreads_count(!vote) == 0; }

inline void __syncwarp(unsigned mask = ~0u) { cuda_model::gather(mask, char{}, "__syncwarp"); }

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const auto all = cuda_model::gather(mask, value, "__shfl_sync");
  const int from = (cuda_model::lane() & ~(width - 1)) | (source & (width - 1));
  if (!(mask >> from & 1)) cuda_model::fail("__shfl_sync: reads a lane that the mask does not name");
  return all.of[from];
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int other, int width = 32) {
  const auto all = cuda_model::gather(mask, value, "__shfl_xor_sync");
  const int self = cuda_model::lane(), from = self ^ other;
  if (from / width > self / width) return value;
  if (!(mask >> from & 1)) cuda_model::fail("__shfl_xor_sync: reads a lane that the mask does not name");
  return all.of[from];
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const auto all = cuda_model::gather(mask, value, "__shfl_up_sync");
  const int self = cuda_model::lane(), from = self - static_cast<int>(delta);
  if (from < (self & ~(width - 1))) return value;
  if (!(mask >> from & 1)) cuda_model::fail("__shfl_up_sync: reads a lane that the mask does not name");
  return all.of[from];
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const auto all = cuda_model::gather(mask, value, "__shfl_down_sync");
  const int self = cuda_model::lane(), from = self + static_cast<int>(delta);
  if (from > (self | (width - 1))) return value;
  if (!(mask >> from & 1)) cuda_model::fail("__shfl_down_sync: reads a lane that the mask does not name");
  return all.of[from];
}

inline unsigned __ballot_sync(unsigned mask, int vote) {
  const auto all = cuda_model::gather(mask, static_cast<int>(vote != 0), "__ballot_sync");
  unsigned ballot = 0;
  for (int lane = 0; lane < 32; ++lane)
    if ((mask >> lane & 1) && all.of[lane]) ballot |= 1u << lane;
  return ballot;
}
inline int __any_sync(unsigned mask, int vote) { return __ballot_sync(mask, vote) != 0; }
inline int __all_sync(unsigned mask, int vote) { return __ballot_sync(mask, vote) == mask; }
template <class T>
unsigned __match_any_sync(unsigned mask, T value) {
  const auto all = cuda_model::gather(mask, value, "__match_any_sync");
  unsigned equal = 0;
  for (int lane = 0; lane < 32; ++lane)
    if ((mask >> lane & 1) && all.of[lane] == value) equal |= 1u << lane;
  return equal;
}

namespace cuda_model {
template <class T, class Combine>
T reduce(unsigned mask, T value, const char* what, Combine combine) {
  static_assert(sizeof(T) == 4 && std::is_integral_v<T>);
  if (device.major < 8) fail(std::string(what) + " needs compute capability 8.0");
  const auto all = gather(mask, value, what);
  T result = all.of[std::countr_zero(mask)];
  for (int lane = std::countr_zero(mask) + 1; lane < kLanes; ++lane)
    if (mask >> lane & 1) result = combine(result, all.of[lane]);
  return result;
}
}  // namespace cuda_model
#define CUDA_MODEL_REDUCE(name, type, expression) \
  inline type name(unsigned mask, type value) {   \
    return cuda_model::reduce(mask, value, #name, [](type a, type b) -> type { return expression; }); \
  }
CUDA_MODEL_REDUCE(__reduce_add_sync, unsigned, a + b)
CUDA_MODEL_REDUCE(__reduce_add_sync, int, static_cast<int>(static_cast<unsigned>(a) + static_cast<unsigned>(b)))
CUDA_MODEL_REDUCE(__reduce_min_sync, unsigned, a < b ? a : b)
CUDA_MODEL_REDUCE(__reduce_min_sync, int, a < b ? a : b)
CUDA_MODEL_REDUCE(__reduce_max_sync, unsigned, a > b ? a : b)
CUDA_MODEL_REDUCE(__reduce_max_sync, int, a > b ? a : b)
CUDA_MODEL_REDUCE(__reduce_and_sync, unsigned, a & b)
CUDA_MODEL_REDUCE(__reduce_or_sync, unsigned, a | b)
CUDA_MODEL_REDUCE(__reduce_xor_sync, unsigned, a ^ b)
#undef CUDA_MODEL_REDUCE

inline unsigned __cluster_size() { return cuda_model::grid.cluster; }
inline dim3 __clusterDim() { return {cuda_model::grid.cluster, 1, 1}; }
inline unsigned __clusterSizeInBlocks() { return cuda_model::grid.cluster; }
inline unsigned __clusterRelativeBlockRank() { return cuda_model::current->block->rank; }
inline void __cluster_barrier_arrive() { cuda_model::arrive_at_cluster(); }
inline void __cluster_barrier_wait() { cuda_model::wait_for_cluster(); }
inline void* __cluster_map_shared_rank(const void* address, unsigned rank) {
  return cuda_model::map_shared(address, rank);
}

inline void __threadfence() {}
inline void __threadfence_block() {}

// No two threads run at once, and none is interrupted.
template <class T>
T atomicAdd(T* place, std::type_identity_t<T> value) {
  return std::exchange(*place, static_cast<T>(*place + value));
}
template <class T>
T atomicSub(T* place, std::type_identity_t<T> value) {
  return std::exchange(*place, static_cast<T>(*place - value));
}
template <class T>
T atomicMin(T* place, std::type_identity_t<T> value) {
  return std::exchange(*place, std::min(*place, value));
}
template <class T>
T atomicMax(T* place, std::type_identity_t<T> value) {
  return std::exchange(*place, std::max(*place, value));
}
template <class T>
T atomicAnd(T* place, std::type_identity_t<T> value) {
  return std::exchange(*place, *place & value);
}
template <class T>
T atomicOr(T* place, std::type_identity_t<T> value) {
  return std::exchange(*place, *place | value);
}
template <class T>
T atomicExch(T* place, std::type_identity_t<T> value) {
  return std::exchange(*place, value);
}
template <class T>
T atomicCAS(T* place, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
  return *place == expected ? std::exchange(*place, value) : *place;
}

template <class T>
T __ldg(const T* place) { return *place; }
template <class T>
T __ldcs(const T* place) { return *place; }
template <class T>
T __ldcg(const T* place) { return *place; }
template <class T>
T __ldlu(const T* place) { return *place; }
template <class T>
void __stcs(T* place, std::type_identity_t<T> value) { *place = value; }
template <class T>
void __stcg(T* place, std::type_identity_t<T> value) { *place = value; }
template <class T>
void __stwt(T* place, std::type_identity_t<T> value) { *place = value; }

using std::max;
using std::min;

inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline long long __double_as_longlong(double x) { return std::bit_cast<long long>(x); }
inline double __longlong_as_double(long long x) { return std::bit_cast<double>(x); }

inline int __popc(unsigned x) { return std::popcount(x); }
inline int __popcll(unsigned long long x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline int __clzll(long long x) { return std::countl_zero(static_cast<unsigned long long>(x)); }
inline int __ffs(int x) { return x ? std::countr_zero(static_cast<unsigned>(x)) + 1 : 0; }
inline int __ffsll(long long x) { return x ? std::countr_zero(static_cast<unsigned long long>(x)) + 1 : 0; }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32); }
inline int __dp4a(int a, int b, int sum) {
  for (int i = 0; i < 32; i += 8) sum += static_cast<int8_t>(a >> i) * static_cast<int8_t>(b >> i);
  return sum;
}

namespace cuda_model {
// An operation in another rounding mode; volatile, so that it happens in that mode.
template <class T, class Operation>
T rounded(int mode, Operation operation, T a, T b = 0, T c = 0) {
  volatile T x = a, y = b, z = c;
  const int before = std::fegetround();
  std::fesetround(mode);
  volatile T result = operation(x, y, z);
  std::fesetround(before);
  return result;
}
}  // namespace cuda_model
// __fadd_rd and so on; CUDA names the fused functions __fmaf_rd for float, __fma_rd for double.
#define CUDA_MODEL_ROUNDED(prefix, fused, type, suffix, mode)                                                 \
  inline type prefix##add_##suffix(type a, type b) {                                                          \
    return cuda_model::rounded(mode, [](type x, type y, type) { return x + y; }, a, b);                       \
  }                                                                                                           \
  inline type prefix##sub_##suffix(type a, type b) {                                                          \
    return cuda_model::rounded(mode, [](type x, type y, type) { return x - y; }, a, b);                       \
  }                                                                                                           \
  inline type prefix##mul_##suffix(type a, type b) {                                                          \
    return cuda_model::rounded(mode, [](type x, type y, type) { return x * y; }, a, b);                       \
  }                                                                                                           \
  inline type prefix##div_##suffix(type a, type b) {                                                          \
    return cuda_model::rounded(mode, [](type x, type y, type) { return x / y; }, a, b);                       \
  }                                                                                                           \
  inline type prefix##sqrt_##suffix(type a) {                                                                 \
    return cuda_model::rounded(mode, [](type x, type, type) { return std::sqrt(x); }, a);                     \
  }                                                                                                           \
  inline type fused##_##suffix(type a, type b, type c) {                                                      \
    return cuda_model::rounded(mode, [](type x, type y, type z) { return std::fma(x, y, z); }, a, b, c);      \
  }
#define CUDA_MODEL_ROUNDED_TO_NEAREST(prefix, fused, type)                          \
  inline type prefix##add_rn(type a, type b) { return a + b; }                      \
  inline type prefix##sub_rn(type a, type b) { return a - b; }                      \
  inline type prefix##mul_rn(type a, type b) { return a * b; }                      \
  inline type prefix##div_rn(type a, type b) { return a / b; }                      \
  inline type prefix##sqrt_rn(type a) { return std::sqrt(a); }                      \
  inline type fused##_rn(type a, type b, type c) { return std::fma(a, b, c); }
CUDA_MODEL_ROUNDED_TO_NEAREST(__f, __fmaf, float)
CUDA_MODEL_ROUNDED_TO_NEAREST(__d, __fma, double)
CUDA_MODEL_ROUNDED(__f, __fmaf, float, rd, FE_DOWNWARD)
CUDA_MODEL_ROUNDED(__f, __fmaf, float, ru, FE_UPWARD)
CUDA_MODEL_ROUNDED(__f, __fmaf, float, rz, FE_TOWARDZERO)
CUDA_MODEL_ROUNDED(__d, __fma, double, rd, FE_DOWNWARD)
CUDA_MODEL_ROUNDED(__d, __fma, double, ru, FE_UPWARD)
CUDA_MODEL_ROUNDED(__d, __fma, double, rz, FE_TOWARDZERO)
#undef CUDA_MODEL_ROUNDED
#undef CUDA_MODEL_ROUNDED_TO_NEAREST

inline float __double2float_rn(double x) { return static_cast<float>(x); }
inline float __double2float_rd(double x) {
  const float nearest = static_cast<float>(x);
  return nearest > x ? std::nextafter(nearest, -INFINITY) : nearest;
}
inline float __double2float_ru(double x) { return -__double2float_rd(-x); }
inline float __double2float_rz(double x) { return x < 0 ? __double2float_ru(x) : __double2float_rd(x); }
inline float __int2float_rn(int x) { return static_cast<float>(x); }
inline float __uint2float_rn(unsigned x) { return static_cast<float>(x); }
inline double __ll2double_rn(long long x) { return static_cast<double>(x); }
inline double __ull2double_rn(unsigned long long x) { return static_cast<double>(x); }

namespace cuda_model {
// To the nearest integer of a type, ties to even; beyond the type to its ends, NaN to 0, as a device does it.
template <class Integer, class Real>
Integer nearest_integer(Real x) {
  constexpr auto low = std::numeric_limits<Integer>::min(), high = std::numeric_limits<Integer>::max();
  if (std::isnan(x)) return 0;
  x = std::nearbyint(x);
  if (x <= static_cast<Real>(low)) return low;
  return x >= static_cast<Real>(high) ? high : static_cast<Integer>(x);
}
}  // namespace cuda_model
inline int __float2int_rn(float x) { return cuda_model::nearest_integer<int>(x); }
inline int __double2int_rn(double x) { return cuda_model::nearest_integer<int>(x); }
inline long long __float2ll_rn(float x) { return cuda_model::nearest_integer<long long>(x); }
inline long long __double2ll_rn(double x) { return cuda_model::nearest_integer<long long>(x); }

// --- for the programs that test -------------------------------------------------------------------------------------

extern "C" {
// 0 forward, 1 backward, 2 random by the seed: the order in which threads, blocks and clusters run.
__attribute__((weak)) void cuda_model_set_order(int order, uint64_t seed) {
  cuda_model::order = static_cast<cuda_model::Order>(order);
  cuda_model::generator.seed(seed);
}
// What went wrong in the last launch that failed.
__attribute__((weak)) const char* cuda_model_message() { return cuda_model::message.c_str(); }
__attribute__((weak)) void cuda_model_set_device(int capability, int multiprocessors, int shared_bytes) {
  cuda_model::device = {capability / 10, capability % 10, multiprocessors, shared_bytes};
}
}
