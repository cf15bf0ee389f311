// histogram_correction on a CUDA device (see histogram_correction.h): the value of a rank without a sort.
//
//   aim      the ranks of a sample of fixed places give a bracket low <= t <= high for the count-th smallest value t
//   narrow   one pass counts what lies below the bracket, and in 2,048 bins what lies inside it; the bin that holds the
//            rank is the next bracket. Two or three passes end at one float: t, how many values lie below it, their sum
//   correct  mu = (sum of values < t + remaining * t) / count; the result is written and summed
//
// Counting proves a bracket right; where the sample misled, the next bracket is everything. So the result is exact
// whatever the sample said. Two ways to get there:
//
//   held     the image lies in the shared memory of a block or a cluster of up to 8: it is read once, all passes
//            run there. 8 bytes of device memory for a pixel of float32, the floor.
//
//              cluster   +--------+--------+--------+--------+    each block: 64 KiB of pixels, bins, sums;
//              of image  | pixels | pixels | pixels | pixels |    bins of all blocks are added up
//                        +--------+--------+--------+--------+    through distributed shared memory
//
//   swept    larger images: a pass over all pixels (`sweep`) counts and keeps what lies inside the bracket, some
//            hundredths of the image, in the image's own place in the output; a cluster for each image narrows among
//            the kept; another pass corrects. 12 bytes for a pixel of float32 and 5 kernels.
//
// Sums are float64 and have one order, which depends on the size of an image but not on their number; counts are
// integers, so that the order of the atomic additions to bins does not matter.
#include "cuda/histogram_correction.h"

#include <cuda_runtime.h>

#include <type_traits>

#include "cuda/dynamic_shared.cuh"
#include "cuda/elements.cuh"
#include "cuda/ptx.cuh"

namespace memad_fast::cuda {
namespace {

constexpr uint32_t kThreads = 256;
constexpr uint32_t kWarps = kThreads / 32;
constexpr int kBinBits = 11;  // two passes for a bracket of 2^22 floats; 8 KiB
constexpr uint32_t kBins = 1 << kBinBits, kOwnBins = kBins / kThreads;
constexpr uint32_t kMaxCluster = 8;  // what every device with clusters can do
// Of an image, held by one block, unless it is too large for 8 of them: three such blocks share a multiprocessor of
// sm_90, so that some read or write while others count.
constexpr int64_t kSliceBytes = 64 << 10;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
constexpr int kBlocksThatHold = 1;  // of 100 KiB of shared memory
#else
constexpr int kBlocksThatHold = 3;
#endif
constexpr int kAhead = 4;  // units of 16 bytes of device memory that a thread reads before it looks at the first
constexpr uint32_t kAll = 0xFFFFFFFFu;

// --- values -------------------------------------------------------------------------------------------------------

// 16 bytes of pixels.
template <class T>
struct Unit {
  static constexpr int kPixels = 16 / sizeof(T);
  union {
    uint4 raw;
    T pixels[kPixels];
  };
  __device__ explicit Unit(uint4 raw) : raw(raw) {}
};

template <class T, class Visit>
__device__ void each_of(uint4 raw, const Visit& visit) {
  const Unit<T> unit(raw);
#pragma unroll
  for (int i = 0; i < Unit<T>::kPixels; ++i) visit(to_float(unit.pixels[i]));
}

// Whether every image begins at a multiple of 16 bytes. By the size of an image, not by its place: so is the order of
// sums.
template <class T>
__device__ bool in_units(const HistogramCorrection& args) {
  return args.pixels % Unit<T>::kPixels == 0;
}

// visit(unit, index of its first pixel) for whole units of n pixels that begin at a multiple of 16 bytes, and
// visit_last(index) for the pixels after them; the block's threads share them out. The units of a few turns are read
// before the first is looked at.
template <int kAhead, class T, class Visit, class VisitLast>
__device__ void each_unit(const T* pixels, uint32_t n, const Visit& visit, const VisitLast& visit_last) {
  constexpr uint32_t kPixels = Unit<T>::kPixels;
  const uint32_t units = n / kPixels;
  for (uint32_t first = threadIdx.x; first < units; first += kAhead * kThreads) {
    uint4 ahead[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i)
      if (first + i * kThreads < units) ahead[i] = reinterpret_cast<const uint4*>(pixels)[first + i * kThreads];
#pragma unroll
    for (int i = 0; i < kAhead; ++i)
      if (first + i * kThreads < units) visit(ahead[i], (first + i * kThreads) * kPixels);
  }
  if (threadIdx.x < n - units * kPixels) visit_last(units * kPixels + threadIdx.x);
}

// visit(pixel, index) for n pixels anywhere.
template <class T, class Visit>
__device__ void each_pixel(const T* pixels, uint32_t n, const Visit& visit) {
  constexpr uint32_t kTurns = 2 * kAhead;
  for (uint32_t first = threadIdx.x; first < n; first += kTurns * kThreads) {
    T ahead[kTurns];
#pragma unroll
    for (uint32_t i = 0; i < kTurns; ++i)
      if (first + i * kThreads < n) ahead[i] = pixels[first + i * kThreads];
#pragma unroll
    for (uint32_t i = 0; i < kTurns; ++i)
      if (first + i * kThreads < n) visit(ahead[i], first + i * kThreads);
  }
}

// Unsigned order of the key is the numeric order of the floats; x is not -0.
__device__ uint32_t key_of(float x) {
  const uint32_t bits = __float_as_uint(x);
  return bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000u);
}

__device__ float value_of(uint32_t key) {
  return __uint_as_float(key ^ ((key & 0x80000000u) ? 0x80000000u : 0xFFFFFFFFu));
}

constexpr uint32_t kLowestKey = 0x007FFFFFu;   // of -infinity
constexpr uint32_t kHighestKey = 0xFF800000u;  // of +infinity

constexpr uint32_t kNan = 0x7FC00000u;  // bits

struct Bracket {
  uint32_t low, high;  // keys, low <= high
};

__device__ constexpr Bracket everything() { return {kLowestKey, kHighestKey}; }

// count * value, where nothing of an infinite value is nothing.
__device__ double times(uint32_t count, float value) {
  return count == 0 ? 0.0 : static_cast<double>(count) * static_cast<double>(value);
}

// --- teams of threads ---------------------------------------------------------------------------------------------

// The blocks that work on one image: a cluster, or one block.
struct Team {
  uint32_t size, rank;

  __device__ static Team of_cluster() {
#if __CUDA_ARCH__ >= 900
    return {__clusterSizeInBlocks(), __clusterRelativeBlockRank()};
#else
    return alone();
#endif
  }
  __device__ static Team alone() { return {1, 0}; }

  // Threads of the team that have arrived and that wait: a barrier in two halves.
  __device__ void arrive() const {
#if __CUDA_ARCH__ >= 900
    if (size > 1) return __cluster_barrier_arrive();
#endif
  }
  __device__ void wait() const {
#if __CUDA_ARCH__ >= 900
    if (size > 1) return __cluster_barrier_wait();
#endif
    __syncthreads();
  }
  __device__ void sync() const {
    arrive();
    wait();
  }

  // The same variable in the shared memory of a block of the team.
  template <class T>
  __device__ const T& of(const T& own, uint32_t block) const {
#if __CUDA_ARCH__ >= 900
    if (size > 1) return *static_cast<const T*>(__cluster_map_shared_rank(&own, block));
#endif
    return own;
  }
};

constexpr int kMostSums = 5;

struct Shared {
  alignas(16) uint32_t bins[kBins];
  double sums_of_warp[kWarps][kMostSums], sums_of_block[kMostSums];
  uint32_t bins_of_warp[kWarps];
  uint32_t bin, below_bin;  // which one holds the rank, and how many values lie in those before it
};

// Replaces every thread's numbers by their sums over the team, added in one order. Between two calls lies a barrier of
// the team.
template <int kSums>
__device__ void add_up(double (&sums)[kSums], Shared& shared, const Team& team) {
  static_assert(kSums <= kMostSums);
#pragma unroll
  for (double& sum : sums) {
#pragma unroll
    for (int other = 16; other > 0; other /= 2) sum += __shfl_xor_sync(kAll, sum, other);
  }
  if (threadIdx.x % 32 == 0)
    for (int i = 0; i < kSums; ++i) shared.sums_of_warp[threadIdx.x / 32][i] = sums[i];
  __syncthreads();
  if (threadIdx.x < kSums) {
    double sum = 0.0;
    for (uint32_t warp = 0; warp < kWarps; ++warp) sum += shared.sums_of_warp[warp][threadIdx.x];
    shared.sums_of_block[threadIdx.x] = sum;
  }
  team.sync();
#pragma unroll
  for (int i = 0; i < kSums; ++i) {
    sums[i] = 0.0;
    for (uint32_t block = 0; block < team.size; ++block) sums[i] += team.of(shared.sums_of_block[i], block);
  }
}

__device__ double added_up(double own, Shared& shared, const Team& team) {
  double sums[] = {own};
  add_up(sums, shared, team);
  return sums[0];
}

// --- narrow -------------------------------------------------------------------------------------------------------

struct Selection {
  float threshold;   // the value of the rank
  uint32_t below;    // how many values are smaller
  double sum_below;  // their sum; NaN if one of all values is NaN
};

// The value of rank `rank` (0 is the smallest) of the team's values, of which values.each(visit) visits a thread's. The
// bracket may be wrong. For all threads of the team.
template <class Values>
__device__ Selection narrow(const Values& values, uint32_t rank, Bracket bracket, Shared& shared, const Team& team) {
  const uint32_t thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  for (;;) {
    for (uint32_t i = thread; i < kBins / 4; i += kThreads)
      reinterpret_cast<uint4*>(shared.bins)[i] = uint4{0, 0, 0, 0};
    __syncthreads();
    const float low = value_of(bracket.low);
    const uint32_t width = bracket.high - bracket.low;
    const int shift = max(0, 32 - __clz(static_cast<int>(width)) - kBinBits);
    uint32_t below = 0;
    double sum_below = 0.0;
    // No branches: this is where the time goes.
    values.each([&](float value) {
      const float x = value + 0.0f;  // -0 becomes +0
      const uint32_t place = key_of(x) - bracket.low;
      if (place <= width) atomicAdd(&shared.bins[place >> shift], 1u);
      const bool is_below = !(x >= low);  // a NaN too
      below += is_below;
      sum_below += is_below ? x : 0.0f;
    });
    double sums[] = {static_cast<double>(below), sum_below};
    add_up(sums, shared, team);
    const auto all_below = static_cast<uint32_t>(sums[0]);

    // This thread's bins in the whole team, and how many values lie in the bins before them.
    uint32_t own[kOwnBins] = {}, own_sum = 0;
#pragma unroll 2
    for (uint32_t block = 0; block < team.size; ++block)
#pragma unroll
      for (uint32_t i = 0; i < kOwnBins; i += 4) {
        const uint4 of_block = team.of(reinterpret_cast<const uint4*>(shared.bins)[(thread * kOwnBins + i) / 4], block);
        own[i] += of_block.x;
        own[i + 1] += of_block.y;
        own[i + 2] += of_block.z;
        own[i + 3] += of_block.w;
      }
#pragma unroll
    for (const uint32_t count : own) own_sum += count;
    uint32_t up_to_own = own_sum;
    for (uint32_t before = 1; before < 32; before *= 2) {
      const uint32_t other = __shfl_up_sync(kAll, up_to_own, before);
      if (lane >= before) up_to_own += other;
    }
    if (lane == 31) shared.bins_of_warp[warp] = up_to_own;
    team.sync();  // also: nobody reads another block's bins and sums any more
    uint32_t below_own = up_to_own - own_sum, inside = 0;
#pragma unroll
    for (uint32_t w = 0; w < kWarps; ++w) {
      if (w < warp) below_own += shared.bins_of_warp[w];
      inside += shared.bins_of_warp[w];
    }

    if (rank < all_below || rank - all_below >= inside) {  // misled
      // Where everything was allowed, only a NaN can be missing.
      if (bracket.low == kLowestKey && bracket.high == kHighestKey) return {0.0f, 0, sums[1]};
      bracket = everything();
      continue;
    }
    const uint32_t place = rank - all_below;
#pragma unroll
    for (uint32_t i = 0; i < kOwnBins; below_own += own[i++])
      if (place >= below_own && place - below_own < own[i]) {
        shared.bin = thread * kOwnBins + i;
        shared.below_bin = below_own;
      }
    __syncthreads();
    const uint32_t bin = shared.bin;
    if (shift == 0) {  // a bin is one float: what lies below it is known
      double sum = 0.0;
#pragma unroll
      for (uint32_t i = 0; i < kOwnBins; ++i) {
        const uint32_t at = thread * kOwnBins + i;
        if (at < bin) sum += times(own[i], value_of(bracket.low + at));
      }
      sum = added_up(sum, shared, Team::alone());
      return {value_of(bracket.low + bin), all_below + shared.below_bin, sums[1] + sum};
    }
    const uint32_t first = bracket.low + (bin << shift), last = first + (1u << shift) - 1;
    bracket = {first, min(last, bracket.high)};
  }
}

__device__ uint32_t rank_of(uint32_t count) { return count > 0 ? count - 1 : 0; }

__device__ float mean_of_smallest(const Selection& found, uint32_t count) {
  if (isnan(found.sum_below)) return __uint_as_float(kNan);
  if (count == 0) return 0.0f;
  const double rest = times(count - found.below, found.threshold);
  return static_cast<float>((found.sum_below + rest) / static_cast<double>(count));
}

// Pixels in shared memory that begin at a multiple of 16 bytes and that the block's threads share out.
template <class T>
struct Pixels {
  const T* pixels;
  uint32_t n;

  template <class Visit>
  __device__ void each(const Visit& visit) const {
    each_unit<kAhead>(
        pixels, n, [&](uint4 unit, uint32_t) { each_of<T>(unit, visit); },
        [&](uint32_t i) { visit(to_float(pixels[i])); });
  }
};

// --- aim ----------------------------------------------------------------------------------------------------------

template <int kSize>
struct Sample {
  float values[kSize];  // this thread's

  template <class Visit>
  __device__ void each(const Visit& visit) const {
#pragma unroll
    for (float value : values) visit(value);
  }
};

// A bracket that holds the count-th smallest value unless the sample is unlike the image: from the sample's own values
// four standard deviations of a random sample's rank below and above: it misleads for one random image in 16,000. By
// one block, kPerThread places a thread.
template <int kPerThread, class T>
__device__ Bracket aim(const T* image, uint32_t n, uint32_t count, Shared& shared) {
  constexpr uint32_t kSize = kPerThread * kThreads;
  if (n <= kSize) return everything();
  // One place in each stretch of equal length, wandering (multiples of the golden ratio), so that no period of the
  // image keeps step with it.
  const uint64_t stretch = n / kSize;
  Sample<kPerThread> sample;
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const uint32_t at = threadIdx.x + i * kThreads;
    const uint64_t wander = at * 2654435769u;
    sample.values[i] = to_float(image[at * stretch + ((wander * stretch) >> 32)]);
  }
  const double share = (static_cast<double>(rank_of(count)) + 0.5) / static_cast<double>(n);
  const double place = share * static_cast<double>(kSize);
  const double margin = 4.0 * sqrt(place * (1.0 - share)) + 2.0;
  Bracket bracket = everything();
#pragma unroll 1
  for (int end = 0; end < 2; ++end) {
    const double rank = end == 0 ? place - margin : place + margin;
    if (rank < 0.0 || rank >= static_cast<double>(kSize)) continue;
    const Selection found = narrow(sample, static_cast<uint32_t>(rank), everything(), shared, Team::alone());
    if (isnan(found.sum_below)) return everything();  // whatever the bracket, the image's sum will be NaN too
    if (end == 0) bracket.low = key_of(found.threshold);
    else bracket.high = key_of(found.threshold);
  }
  return bracket;
}

// --- correct ------------------------------------------------------------------------------------------------------

// A corrected pixel, added to the sum. NaN stays NaN.
template <class T>
__device__ T corrected_pixel(T error, float mu, double& sum) {
  const float difference = to_float(error) - mu;
  const T result = from_float<T>(difference < 0.0f ? 0.0f : difference);
  sum += to_float(result);
  return result;
}

// Corrects n pixels that begin at multiples of 16 bytes; returns the sum of what this thread wrote.
template <class T>
__device__ double correct_units(const T* error, uint32_t n, float mu, T* corrected) {
  double sum = 0.0;
  each_unit<kAhead>(
      error, n,
      [&](uint4 raw, uint32_t first) {
        Unit<T> unit(raw);
#pragma unroll
        for (int i = 0; i < Unit<T>::kPixels; ++i) unit.pixels[i] = corrected_pixel(unit.pixels[i], mu, sum);
        *reinterpret_cast<uint4*>(corrected + first) = unit.raw;
      },
      [&](uint32_t i) { corrected[i] = corrected_pixel(error[i], mu, sum); });
  return sum;
}

// --- held: an image in the shared memory of a cluster ---------------------------------------------------------------

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksThatHold) held(HistogramCorrection args, uint32_t slice) {
  __shared__ Shared shared;
  const Team team = Team::of_cluster();
  const int64_t image = blockIdx.x / team.size;
  const T* whole = static_cast<const T*>(args.error) + image * args.pixels;
  const uint32_t begin = min(team.rank * slice, args.pixels), n = min(slice, args.pixels - begin);
  const T* error = whole + begin;
  T* corrected = static_cast<T*>(args.corrected) + image * args.pixels + begin;

  T* pixels = reinterpret_cast<T*>(dynamic_shared());
  const uint32_t unit_pixels = in_units<T>(args) ? n : 0;  // a slice, too, is whole units then
  for (uint32_t i = threadIdx.x * Unit<T>::kPixels; i < unit_pixels; i += kThreads * Unit<T>::kPixels)
    cp_async_16(pixels + i, error + i);
  if (unit_pixels == 0) each_pixel(error, n, [&](T pixel, uint32_t i) { pixels[i] = pixel; });
  cp_async_commit();
  const Bracket bracket = aim<4>(whole, args.pixels, args.count, shared);
  cp_async_wait<0>();
  __syncthreads();

  const Selection found = narrow(Pixels<T>{pixels, n}, rank_of(args.count), bracket, shared, team);
  const float mu = mean_of_smallest(found, args.count);
  double sum;
  if (in_units<T>(args)) {
    sum = correct_units(pixels, n, mu, corrected);
  } else {  // first where it lies, so that the sum has the same order
    sum = correct_units(pixels, n, mu, pixels);
    __syncthreads();
    each_pixel(pixels, n, [&](T pixel, uint32_t i) { corrected[i] = pixel; });
  }
  const double score = added_up(sum, shared, team);
  if (team.rank == 0 && threadIdx.x == 0) {
    args.mu[image] = mu;
    args.score[image] = static_cast<float>(score);
  }
  team.sync();  // before a block leaves whose sum others read
}

// --- swept: an image in device memory -------------------------------------------------------------------------------

constexpr int64_t kRegion = 4096;     // pixels that one warp sweeps
constexpr uint32_t kRowsAhead = 16;  // of what was kept that a lane reads before it looks at the first
constexpr int64_t kChunk = 16384;    // pixels that one block corrects

// What a warp counted, and how many rows of 32 values it kept, at the region's place in the output: lane by lane, from
// the first row on; NaN fills up.
struct Region {
  double sum_below;  // NaN if one of the values is NaN
  uint32_t below, at_low, inside, at_high;  // at_high: none if the ends of the bracket are the same
  uint32_t rows;
};

struct Workspace {
  Bracket* brackets;  // [images]
  Region* regions;    // [images, regions of an image]
  double* sums;       // [images, chunks of an image]
};

__host__ __device__ int64_t pieces(int64_t n, int64_t size) { return (n + size - 1) / size; }

template <class T>
__global__ void __launch_bounds__(kThreads) aim_at_images(HistogramCorrection args, Workspace workspace) {
  __shared__ Shared shared;
  const int64_t image = blockIdx.x;
  const T* error = static_cast<const T*>(args.error) + image * args.pixels;
  const Bracket bracket = aim<32>(error, args.pixels, args.count, shared);
  if (threadIdx.x == 0) workspace.brackets[image] = bracket;
}

template <class T>
__global__ void __launch_bounds__(kThreads, 4) sweep(HistogramCorrection args, Workspace workspace) {
  const int64_t regions = pieces(args.pixels, kRegion);
  const int64_t region = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (region >= args.images * regions) return;
  const int lane = threadIdx.x % 32;
  const int64_t image = region / regions, begin = region % regions * kRegion;
  const int64_t n = min(kRegion, args.pixels - begin);
  const T* error = static_cast<const T*>(args.error) + image * args.pixels + begin;
  T* kept = static_cast<T*>(args.corrected) + image * args.pixels + begin;
  const Bracket bracket = workspace.brackets[image];
  const float low = value_of(bracket.low), high = value_of(bracket.high);
  const float other_end = high > low ? high : __uint_as_float(kNan);

  uint32_t below = 0, at_low = 0, rows = 0, at_high = 0;
  double sum_below = 0.0;
  const auto visit = [&](T pixel) {
    const float x = to_float(pixel);
    const bool is_below = !(x >= low);
    below += is_below;
    sum_below += is_below ? x : 0.0f;
    at_low += x == low;
    at_high += x == other_end;
    if (x > low && x < high) kept[rows++ * 32 + lane] = pixel;  // no further than the pixels of this lane
  };
  constexpr int kUnitPixels = Unit<T>::kPixels, kStep = 32 * kUnitPixels * kAhead;
  static_assert(kRegion % kStep == 0);
  if (n == kRegion && in_units<T>(args)) {
    for (int64_t step = 0; step < kRegion; step += kStep) {
      uint4 ahead[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i)
        ahead[i] = *reinterpret_cast<const uint4*>(error + step + (i * 32 + lane) * kUnitPixels);
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const Unit<T> unit(ahead[i]);
#pragma unroll
        for (int j = 0; j < kUnitPixels; ++j) visit(unit.pixels[j]);
      }
    }
  } else {
    for (int64_t i = lane; i < n; i += 32) visit(error[i]);
  }

  const uint32_t inside = rows, most = __reduce_max_sync(kAll, rows);
  for (; rows < most; ++rows)
    if (rows * 32 + lane < n) kept[rows * 32 + lane] = from_float<T>(__uint_as_float(kNan));
  for (int other = 16; other > 0; other /= 2) sum_below += __shfl_xor_sync(kAll, sum_below, other);
  const Region counted{sum_below, __reduce_add_sync(kAll, below), __reduce_add_sync(kAll, at_low),
                       __reduce_add_sync(kAll, inside), __reduce_add_sync(kAll, at_high), most};
  if (lane == 0) workspace.regions[region] = counted;
}

// Pixels anywhere that the block's threads share out.
template <class T>
struct Anywhere {
  const T* pixels;
  uint32_t n;

  template <class Visit>
  __device__ void each(const Visit& visit) const {
    each_pixel(pixels, n, [&](T pixel, uint32_t) { visit(to_float(pixel)); });
  }
};

// What `sweep` kept of an image; its regions go round the team's warps.
template <class T>
struct Kept {
  const T* kept;
  const Region* regions;
  uint32_t pixels;
  Team team;

  template <class Visit>
  __device__ void each(const Visit& visit) const {
    const uint32_t lane = threadIdx.x % 32, of_image = pieces(pixels, kRegion), warps = team.size * kWarps;
    // 32 regions at a time, one for a lane to look up; then all their rows, some of them at once.
    for (uint32_t first = team.rank * kWarps + threadIdx.x / 32; first < of_image; first += 32 * warps) {
      const uint32_t own = first + lane * warps, rows = own < of_image ? regions[own].rows : 0;
      uint32_t up_to = rows;
      for (uint32_t before = 1; before < 32; before *= 2) {
        const uint32_t other = __shfl_up_sync(kAll, up_to, before);
        if (lane >= before) up_to += other;
      }
      const uint32_t all_rows = __shfl_sync(kAll, up_to, 31);
      for (uint32_t row = 0; row < all_rows; row += kRowsAhead) {
        T ahead[kRowsAhead];
        bool there[kRowsAhead];
#pragma unroll
        for (uint32_t i = 0; i < kRowsAhead; ++i) {
          const uint32_t holder = __popc(__ballot_sync(kAll, up_to <= row + i)) % 32;
          const uint32_t before = __shfl_sync(kAll, up_to - rows, holder);
          const int64_t at = (first + holder * warps) * kRegion + (row + i - before) * 32 + lane;
          there[i] = row + i < all_rows && at < pixels;
          if (there[i]) ahead[i] = kept[at];
        }
#pragma unroll
        for (uint32_t i = 0; i < kRowsAhead; ++i)
          if (const float x = to_float(ahead[i]); there[i] && !isnan(x)) visit(x);
      }
    }
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads, 1) settle(HistogramCorrection args, Workspace workspace) {
  __shared__ Shared shared;
  const Team team = Team::of_cluster();
  const int64_t image = blockIdx.x / team.size;
  const int64_t regions = pieces(args.pixels, kRegion);
  const T* error = static_cast<const T*>(args.error) + image * args.pixels;
  const Kept<T> kept{static_cast<const T*>(args.corrected) + image * args.pixels, workspace.regions + image * regions,
                     args.pixels, team};
  double sums[] = {0.0, 0.0, 0.0, 0.0, 0.0};
  for (uint32_t i = team.rank * kThreads + threadIdx.x; i < regions; i += team.size * kThreads) {
    const Region& region = kept.regions[i];
    sums[0] += region.sum_below;
    sums[1] += region.below;
    sums[2] += region.at_low;
    sums[3] += region.inside;
    sums[4] += region.at_high;
  }
  add_up(sums, shared, team);
  team.sync();  // nobody reads another block's sums any more

  const Bracket bracket = workspace.brackets[image];
  const uint32_t rank = rank_of(args.count);
  const double sum_below = sums[0];
  const auto below = static_cast<uint32_t>(sums[1]), up_to_low = below + static_cast<uint32_t>(sums[2]);
  const auto up_to_inside = up_to_low + static_cast<uint32_t>(sums[3]), all = up_to_inside + static_cast<uint32_t>(sums[4]);
  const double sum_at_low = times(up_to_low - below, value_of(bracket.low));
  Selection found{0.0f, 0, sum_below};
  if (isnan(sum_below)) {
  } else if (rank < below || rank >= all) {  // the sample misled
    const uint32_t slice = pieces(args.pixels, team.size), begin = min(team.rank * slice, args.pixels);
    found = narrow(Anywhere<T>{error + begin, min(slice, args.pixels - begin)}, rank, everything(), shared, team);
  } else if (rank < up_to_low) {
    found = {value_of(bracket.low), below, sum_below};
  } else if (rank < up_to_inside) {
    found = narrow(kept, rank - up_to_low, bracket, shared, team);
    found.below += up_to_low;
    found.sum_below += sum_below + sum_at_low;
  } else {
    double sum = 0.0;
    kept.each([&](float x) { sum += x; });
    found = {value_of(bracket.high), up_to_inside, sum_below + sum_at_low + added_up(sum, shared, team)};
  }
  if (team.rank == 0 && threadIdx.x == 0) args.mu[image] = mean_of_smallest(found, args.count);
  team.sync();  // before a block leaves whose counts others read
}

// The last pixels first: they are the ones that the L2 cache still has from `sweep`.
template <class T>
__global__ void __launch_bounds__(kThreads, 4) correct_images(HistogramCorrection args, Workspace workspace) {
  __shared__ Shared shared;
  const int64_t chunks = pieces(args.pixels, kChunk), chunk = static_cast<int64_t>(gridDim.x - 1 - blockIdx.x);
  const int64_t image = chunk / chunks, begin = chunk % chunks * kChunk;
  const T* error = static_cast<const T*>(args.error) + image * args.pixels + begin;
  T* corrected = static_cast<T*>(args.corrected) + image * args.pixels + begin;
  const uint32_t n = min(kChunk, args.pixels - begin);
  const float mu = args.mu[image];
  double sum = 0.0;
  if (in_units<T>(args))
    sum = correct_units(error, n, mu, corrected);
  else
    each_pixel(error, n, [&](T pixel, uint32_t i) { corrected[i] = corrected_pixel(pixel, mu, sum); });
  const double total = added_up(sum, shared, Team::alone());
  if (threadIdx.x == 0) workspace.sums[chunk] = total;
}

__global__ void __launch_bounds__(kThreads) add_scores(HistogramCorrection args, Workspace workspace) {
  __shared__ Shared shared;
  const int64_t image = blockIdx.x, chunks = pieces(args.pixels, kChunk);
  double sum = 0.0;
  for (int64_t i = threadIdx.x; i < chunks; i += kThreads) sum += workspace.sums[image * chunks + i];
  const double score = added_up(sum, shared, Team::alone());
  if (threadIdx.x == 0) args.score[image] = static_cast<float>(score);
}

// --- launches -----------------------------------------------------------------------------------------------------

size_t element_size(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

// How an image is held: 0 blocks if it is not.
struct Plan {
  uint32_t blocks = 0;
  uint32_t slice = 0;  // pixels of a block
  uint32_t largest_cluster = 1;
};

int attribute(cudaDeviceAttr which) {
  int device = 0, value = 0;
  if (cudaGetDevice(&device) != cudaSuccess || cudaDeviceGetAttribute(&value, which, device) != cudaSuccess) return 0;
  return value;
}

// By the size of an image and the device only: so are the results.
Plan plan_for(const HistogramCorrection& args) {
  Plan plan;
  plan.largest_cluster = attribute(cudaDevAttrComputeCapabilityMajor) >= 9 ? kMaxCluster : 1;
  const auto size = static_cast<int64_t>(element_size(args.dtype));
  const int64_t room = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) - static_cast<int64_t>(sizeof(Shared)) - 1024;
  uint32_t blocks = 1;
  while (blocks < plan.largest_cluster && args.pixels * size > blocks * kSliceBytes) blocks *= 2;
  // Slices begin at multiples of 16 bytes.
  const int64_t slice = pieces(pieces(args.pixels, blocks), 8) * 8;
  if (slice * size > room) return plan;
  plan.blocks = blocks;
  plan.slice = static_cast<uint32_t>(slice);
  return plan;
}

template <class... Parameters>
cudaError_t launch(
    void (*kernel)(Parameters...), int64_t teams, uint32_t blocks, size_t shared_bytes, cudaStream_t stream,
    std::type_identity_t<Parameters>... arguments) {
  if (shared_bytes > 0)
    if (const cudaError_t error = cudaFuncSetAttribute(
            kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
        error != cudaSuccess)
      return error;
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {blocks, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(teams * blocks));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = blocks > 1 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

size_t rounded_up(size_t bytes) { return (bytes + 15) / 16 * 16; }

template <class T>
cudaError_t run(const HistogramCorrection& args, const Plan& plan, void* memory, cudaStream_t stream) {
  if (plan.blocks > 0)
    return launch(
        held<T>, args.images, plan.blocks, static_cast<size_t>(plan.slice) * sizeof(T), stream, args, plan.slice);

  const int64_t regions = args.images * pieces(args.pixels, kRegion), chunks = args.images * pieces(args.pixels, kChunk);
  char* next = static_cast<char*>(memory);
  const Workspace workspace{
      reinterpret_cast<Bracket*>(next),
      reinterpret_cast<Region*>(next += rounded_up(static_cast<size_t>(args.images) * sizeof(Bracket))),
      reinterpret_cast<double*>(next += rounded_up(static_cast<size_t>(regions) * sizeof(Region)))};
  cudaError_t error = launch(aim_at_images<T>, args.images, 1, 0, stream, args, workspace);
  if (error == cudaSuccess) error = launch(sweep<T>, pieces(regions, kWarps), 1, 0, stream, args, workspace);
  if (error == cudaSuccess) error = launch(settle<T>, args.images, plan.largest_cluster, 0, stream, args, workspace);
  if (error == cudaSuccess) error = launch(correct_images<T>, chunks, 1, 0, stream, args, workspace);
  if (error == cudaSuccess) error = launch(add_scores, args.images, 1, 0, stream, args, workspace);
  return error;
}

}  // namespace

size_t histogram_correction_workspace(const HistogramCorrection& args) {
  if (plan_for(args).blocks > 0) return 0;
  const auto images = static_cast<size_t>(args.images);
  const auto regions = static_cast<size_t>(pieces(args.pixels, kRegion));
  const auto chunks = static_cast<size_t>(pieces(args.pixels, kChunk));
  return rounded_up(images * sizeof(Bracket)) + rounded_up(images * regions * sizeof(Region)) +
         rounded_up(images * chunks * sizeof(double));
}

int histogram_correction(const HistogramCorrection& args, void* workspace, void* stream) {
  if (args.images == 0) return cudaSuccess;
  if (reinterpret_cast<uintptr_t>(args.error) % 16 != 0) return cudaErrorMisalignedAddress;
  const auto on = static_cast<cudaStream_t>(stream);
  const Plan plan = plan_for(args);
  MEMAD_FAST_BY_DTYPE(args.dtype, T, { return run<T>(args, plan, workspace, on); })
  return cudaErrorInvalidValue;
}

}  // namespace memad_fast::cuda
