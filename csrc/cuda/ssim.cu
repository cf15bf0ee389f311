// ssim on a CUDA device (see ssim.h for the formula, README_ssim.md for bytes and operations).
//
// A block computes one tile of windows (forward) or of pixels (backward) on its own, from the images alone, in shared
// memory; numbers are for 11 taps, a thread computes 8 outputs in a row, or 4 to 10 in a column:
//
//   forward    74 x 42 pixels of x, y --across--> 74 x 32 of four --down--> 64 x 32 windows -> map, or sum of 1 - SSIM
//
//   backward   70 x 52 pixels of x, y --across--> 70 x 42 of four --down--> 60 x 42 windows -> their four derivatives
//                                                                           (in the place of the pixels)
//              48 x 32 gradients <--down-- 58 x 32 of four (in the place of the first) <--across--'
//
// The filter is symmetric, so the same filter carries derivatives back from windows to pixels; nothing is exchanged
// between tiles, nothing image-sized is stored. Tiles depend on the window alone: so do roundings, whatever the batch.
//
// A tile subtracts its pixel of smallest magnitude (0 where signs differ) before squaring: |x - centre| <= |x| for
// every pixel, so that it can only help.
#include "cuda/ssim.h"

#include <cuda_runtime.h>

#include <cmath>
#include <type_traits>

#include "cuda/dynamic_shared.cuh"
#include "cuda/ssim_wide.cuh"
#include "cuda/ssim_windows.cuh"

namespace memad_fast::cuda {
namespace {

constexpr int kUsualTaps = 11;  // unrolled; other windows take the same code with counted loops
constexpr int kMostTaps = 33;   // whose tiles fit the shared memory of every device (99 KiB)
constexpr int kAcross = 8;      // outputs of one thread in a row
constexpr int kDown = 8;        // in a column of forward
constexpr uint32_t kNan = 0x7FC00000u;  // bits

struct Taps {
  float at[kMostTaps];
};

// --- tiles ----------------------------------------------------------------------------------------------------------

__host__ __device__ constexpr int rounded_up(int n, int to) { return (n + to - 1) / to * to; }

// Floats from one row to the next: an odd number of 16 bytes, so that the same 16 bytes of 8 rows lie in all banks.
__host__ __device__ constexpr int pitch_of(int cols) { return ((cols + 3) / 4 | 1) * 4; }

// Windows of one block, and where its arrays lie.
struct Tile {
  int taps, rows, cols;

  __host__ __device__ constexpr int runs() const { return (cols + kAcross - 1) / kAcross; }  // of a row
  __host__ __device__ constexpr int pixel_rows() const { return rows + taps - 1; }
  __host__ __device__ constexpr int pixel_cols() const { return cols + taps - 1; }
  // With room for what whole runs read; nothing is made of it.
  __host__ __device__ constexpr int pixel_pitch() const { return pitch_of(runs() * kAcross + taps - 1); }
  __host__ __device__ constexpr int pixel_floats() const { return pixel_rows() * pixel_pitch(); }  // of x, of y
  __host__ __device__ constexpr int across_pitch() const { return pitch_of(runs() * kAcross); }
  __host__ __device__ constexpr int across_floats() const { return pixel_rows() * across_pitch(); }  // of a quantity
  __host__ __device__ constexpr int floats() const { return 2 * pixel_floats() + kQuantities * across_floats(); }
};

// The usual window's are constants for the compiler.
template <int kTaps>
__host__ __device__ constexpr Tile forward_tile(int taps) {
  return kTaps > 0 ? Tile{kTaps, 64, 32} : Tile{taps, 32, 32};
}

// Pixels of one block, and the windows that see them.
template <int kTaps>
struct BackwardTile {
  // Outputs of one thread in a column: of the windows, whose rows it divides; of the way back, likewise the pixels'.
  // For 11 taps there are then as many threads with work as there are threads.
  static constexpr int kDown = kTaps == kUsualTaps ? 10 : 8, kUp = kTaps == kUsualTaps ? 6 : 4;
  int rows, cols;  // of pixels
  Tile windows;

  __host__ __device__ static constexpr BackwardTile of(int taps) {
    if (kTaps == kUsualTaps) return {48, 32, {kTaps, 60, 42}};
    const int size = taps <= 11 ? 32 : taps <= 21 ? 16 : 8;
    return {size, size, {taps, rounded_up(size + taps - 1, kDown), size + taps - 1}};
  }
  __host__ __device__ constexpr int derivative_pitch() const { return pitch_of(windows.cols); }
  __host__ __device__ constexpr int derivative_floats() const { return windows.rows * derivative_pitch(); }
  __host__ __device__ constexpr int back_pitch() const { return pitch_of(cols); }
  __host__ __device__ constexpr int back_floats() const { return windows.rows * back_pitch(); }
  // Derivatives take the place of the pixels, or more.
  __host__ __device__ constexpr int before_across() const {
    return max_of(2 * windows.pixel_floats(), kQuantities * derivative_floats());
  }
  __host__ __device__ constexpr int floats() const {
    return before_across() + kQuantities * max_of(windows.across_floats(), back_floats());
  }
  __host__ __device__ static constexpr int max_of(int a, int b) { return a > b ? a : b; }
};

// Which tile of which plane a block computes, and at which row and column it begins.
struct TilePlace {
  int64_t plane;
  int row, col;

  __device__ TilePlace(int rows, int cols, int tile_rows, int tile_cols) {
    const int64_t down = (rows + tile_rows - 1) / tile_rows, across = (cols + tile_cols - 1) / tile_cols;
    const int64_t tile = blockIdx.x;
    plane = tile / (down * across);
    row = static_cast<int>(tile / across % down) * tile_rows;
    col = static_cast<int>(tile % across) * tile_cols;
  }
  __device__ TilePlace before(int distance) const {
    TilePlace place = *this;
    place.row -= distance;
    place.col -= distance;
    return place;
  }
};

// --- the filter -----------------------------------------------------------------------------------------------------

// sums[r] = sum over k of weights[k] * in(r + k).
template <int kTaps, int kRun, class In>
__device__ __forceinline__ void filter(const Taps& weights, int taps, const In& in, float (&sums)[kRun]) {
#pragma unroll
  for (int r = 0; r < kRun; ++r) sums[r] = 0.0f;
  if constexpr (kTaps > 0) {
#pragma unroll
    for (int j = 0; j < kTaps + kRun - 1; ++j) {
      const float value = in(j);
#pragma unroll
      for (int r = 0; r < kRun; ++r)
        if (j >= r && j - r < kTaps) sums[r] += weights.at[j - r] * value;
    }
  } else {
    for (int k = 0; k < taps; ++k)
#pragma unroll
      for (int r = 0; r < kRun; ++r) sums[r] += weights.at[k] * in(r + k);
  }
}

// The values of a row in shared memory that one thread's outputs see: read at once where their number is known.
template <int kTaps>
struct Reach {
  static constexpr int kValues = rounded_up(kTaps + kAcross - 1, 4);
  float values[kValues];

  __device__ explicit Reach(const float* row) {
#pragma unroll
    for (int i = 0; i < kValues; i += 4) {
      const float4 four = *reinterpret_cast<const float4*>(row + i);
      values[i] = four.x;
      values[i + 1] = four.y;
      values[i + 2] = four.z;
      values[i + 3] = four.w;
    }
  }
  __device__ float operator()(int i) const { return values[i]; }
};

template <>
struct Reach<0> {
  const float* row;

  __device__ explicit Reach(const float* row) : row(row) {}
  __device__ float operator()(int i) const { return row[i]; }
};

__device__ __forceinline__ void store_run(const float (&sums)[kAcross], float* out) {
  static_assert(kAcross == 8);
  reinterpret_cast<float4*>(out)[0] = make_float4(sums[0], sums[1], sums[2], sums[3]);
  reinterpret_cast<float4*>(out)[1] = make_float4(sums[4], sums[5], sums[6], sums[7]);
}

// --- windows of a tile ----------------------------------------------------------------------------------------------

// Of the pixels that a thread has seen; fminf and fmaxf pass over NaN.
struct Range {
  float low = __builtin_huge_valf(), high = -__builtin_huge_valf();
  __device__ void see(float a, float b) {
    low = fminf(low, fminf(a, b));
    high = fmaxf(high, fmaxf(a, b));
  }
};

// Reads the pixels of a tile that lies inside the image; its first one is at (row, col). A warp reads a row.
template <class T>
__device__ Range read_inside(const Tile& tile, const Pair<T>& images, int row, int col, float* x, float* y) {
  constexpr int kAhead = 4;  // rows that a thread reads before it looks at the first
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, rows = tile.pixel_rows(), pitch = tile.pixel_pitch();
  const int64_t x_step = kWarps * images.x_stride, y_step = kWarps * images.y_stride;
  Range range;
  for (int j = lane; j < tile.pixel_cols(); j += 32) {
    const T* from_x = images.x + (row + warp) * images.x_stride + (col + j);
    const T* from_y = images.y + (row + warp) * images.y_stride + (col + j);
    for (int i = warp; i < rows; i += kAhead * kWarps) {
      float a[kAhead], b[kAhead];
#pragma unroll
      for (int n = 0; n < kAhead; ++n, from_x += x_step, from_y += y_step) {
        const bool more = i + n * kWarps < rows;
        a[n] = more ? to_float(*from_x) : __uint_as_float(kNan);
        b[n] = more ? to_float(*from_y) : __uint_as_float(kNan);
      }
#pragma unroll
      for (int n = 0; n < kAhead; ++n) {
        range.see(a[n], b[n]);
        if (i + n * kWarps < rows) {
          x[(i + n * kWarps) * pitch + j] = a[n];
          y[(i + n * kWarps) * pitch + j] = b[n];
        }
      }
    }
  }
  return range;
}

// Likewise where some pixels lie beyond the image: there is its reflection, or NaN, for windows that do not exist.
template <class T>
__device__ Range read_at_border(
    const Windows& in, const Tile& tile, const Pair<T>& images, int row, int col, float* x, float* y) {
  Range range;
  for (int j = threadIdx.x % 32; j < tile.pixel_cols(); j += 32) {
    const int from_col = in.pad > 0 ? reflected(col + j, in.width) : col + j;
    for (int i = threadIdx.x / 32; i < tile.pixel_rows(); i += kWarps) {
      const int from_row = in.pad > 0 ? reflected(row + i, in.height) : row + i;
      const bool exists = from_row >= 0 && from_row < in.height && from_col >= 0 && from_col < in.width;
      const float a = exists ? images.x_at(from_row, from_col) : __uint_as_float(kNan);
      const float b = exists ? images.y_at(from_row, from_col) : __uint_as_float(kNan);
      range.see(a, b);
      x[i * tile.pixel_pitch() + j] = a;
      y[i * tile.pixel_pitch() + j] = b;
    }
  }
  return range;
}

// Reads the pixels from (row, col) on; returns the tile's centre.
template <class T>
__device__ float load_pixels(
    const Windows& in, const Tile& tile, const Pair<T>& images, int row, int col, float* x, float* y) {
  __shared__ float lows[kWarps], highs[kWarps];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const bool inside =
      row >= 0 && col >= 0 && row + tile.pixel_rows() <= in.height && col + tile.pixel_cols() <= in.width;
  auto [low, high] =
      inside ? read_inside(tile, images, row, col, x, y) : read_at_border(in, tile, images, row, col, x, y);
#pragma unroll
  for (int other = 16; other > 0; other /= 2) {
    low = fminf(low, __shfl_xor_sync(0xFFFFFFFFu, low, other));
    high = fmaxf(high, __shfl_xor_sync(0xFFFFFFFFu, high, other));
  }
  if (lane == 0) {
    lows[warp] = low;
    highs[warp] = high;
  }
  __syncthreads();
  for (int w = 0; w < kWarps; ++w) {
    low = fminf(low, lows[w]);
    high = fmaxf(high, highs[w]);
  }
  return low > 0.0f ? low : high < 0.0f ? high : 0.0f;  // infinite only where every window is NaN anyway
}

// across[q] of all pixel rows of the tile.
template <int kTaps>
__device__ void filter_pixels(
    const Taps& weights, const Tile& tile, const float* x, const float* y, float centre, float* across) {
  const int rows = tile.pixel_rows(), size = tile.across_floats();
  for (int task = threadIdx.x; task < rows * tile.runs(); task += kThreads) {
    const int row = task % rows, first = task / rows * kAcross, at = row * tile.pixel_pitch() + first;
    const Reach<kTaps> a(x + at), b(y + at);
    float* out = across + row * tile.across_pitch() + first;
    const auto u = [&](int i) { return (a(i) - centre) + (b(i) - centre); };
    const auto v = [&](int i) { return a(i) - b(i); };
    float sums[kAcross];
    filter<kTaps>(weights, tile.taps, u, sums);
    store_run(sums, out);
    filter<kTaps>(weights, tile.taps, v, sums);
    store_run(sums, out + size);
    filter<kTaps>(weights, tile.taps, [&](int i) { const float value = u(i); return value * value; }, sums);
    store_run(sums, out + 2 * size);
    filter<kTaps>(weights, tile.taps, [&](int i) { const float value = v(i); return value * value; }, sums);
    store_run(sums, out + 3 * size);
  }
}

// visit(row, col in the tile, similarity) for all windows of the tile that begins at window (row, col), even for those
// that do not exist. `pixels` may be overwritten by then. Returns the centre.
template <class T, int kTaps, int kDown, class Visit>
__device__ float each_window(
    const Windows& in, const Taps& weights, const Tile& tile, const TilePlace& at, float* pixels, float* across,
    const Visit& visit) {
  float *x = pixels, *y = pixels + tile.pixel_floats();
  const Pair<T> images(in, at.plane);
  const float centre = load_pixels(in, tile, images, at.row - in.pad, at.col - in.pad, x, y);
  filter_pixels<kTaps>(weights, tile, x, y, centre, across);
  __syncthreads();
  for (int task = threadIdx.x; task < tile.cols * (tile.rows / kDown); task += kThreads) {
    const int col = task % tile.cols, first = task / tile.cols * kDown;
    float sums[kQuantities][kDown];
#pragma unroll
    for (int q = 0; q < kQuantities; ++q) {
      const float* column = across + q * tile.across_floats() + first * tile.across_pitch() + col;
      filter<kTaps>(weights, tile.taps, [&](int i) { return column[i * tile.across_pitch()]; }, sums[q]);
    }
#pragma unroll
    for (int r = 0; r < kDown; ++r)
      visit(first + r, col, Similarity(in, {sums[0][r], sums[1][r], sums[2][r], sums[3][r]}, 2.0f * centre));
  }
  return centre;
}

// --- kernels --------------------------------------------------------------------------------------------------------

// Of a multiprocessor of sm_90, by its 228 KiB of shared memory, for 11 taps: forward, backward.
constexpr int kBlocks = 3, kBlocksBack = 2;

template <class T, int kTaps>
__global__ void __launch_bounds__(kThreads, kBlocks) map_of_tiles(
    const __grid_constant__ Windows in, const __grid_constant__ Taps weights, T* map) {
  const Tile tile = forward_tile<kTaps>(in.taps);
  const TilePlace at(in.rows, in.cols, tile.rows, tile.cols);
  float* pixels = reinterpret_cast<float*>(dynamic_shared());
  map += at.plane * in.rows * in.cols;
  each_window<T, kTaps, kDown>(
      in, weights, tile, at, pixels, pixels + 2 * tile.pixel_floats(), [&](int i, int j, const Similarity& window) {
        const int row = at.row + i, col = at.col + j;
        if (row < in.rows && col < in.cols)
          map[static_cast<int64_t>(row) * in.cols + col] = from_float<T>(1.0f - window.dissimilarity());
      });
}

// partial[block] = the sum of 1 - SSIM over the windows of a tile.
template <class T, int kTaps>
__global__ void __launch_bounds__(kThreads, kBlocks) loss_of_tiles(
    const __grid_constant__ Windows in, const __grid_constant__ Taps weights, double* partial) {
  const Tile tile = forward_tile<kTaps>(in.taps);
  const TilePlace at(in.rows, in.cols, tile.rows, tile.cols);
  float* pixels = reinterpret_cast<float*>(dynamic_shared());
  double sum = 0.0;
  each_window<T, kTaps, kDown>(
      in, weights, tile, at, pixels, pixels + 2 * tile.pixel_floats(), [&](int i, int j, const Similarity& window) {
        if (at.row + i < in.rows && at.col + j < in.cols) sum += static_cast<double>(window.dissimilarity());
      });
  sum = block_sum(sum);
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

template <class T, int kTaps>
__global__ void __launch_bounds__(kThreads, kBlocksBack) gradients_of_tiles(
    const __grid_constant__ Windows in, const __grid_constant__ Taps weights,
    const __grid_constant__ GradOfWindows grad, T* grad_x, T* grad_y) {
  using Backward = BackwardTile<kTaps>;
  const Backward tile = Backward::of(in.taps);
  const TilePlace at(in.height, in.width, tile.rows, tile.cols);
  const TilePlace windows_at = at.before(tile.windows.taps - 1 - in.pad);  // the first window that sees a pixel
  const bool inner = windows_at.row > 0 && windows_at.row + tile.windows.rows < in.rows && windows_at.col > 0 &&
                     windows_at.col + tile.windows.cols < in.cols;  // no window is at a border
  float* derivatives = reinterpret_cast<float*>(dynamic_shared());
  float* across = derivatives + tile.before_across();

  const GradOfPlane<T> grad_of(in, grad, at.plane);
  const int pitch = tile.derivative_pitch(), size = tile.derivative_floats();
  const float centre = each_window<T, kTaps, Backward::kDown>(
      in, weights, tile.windows, windows_at, derivatives, across, [&](int i, int j, const Similarity& window) {
        int row = windows_at.row + i, col = windows_at.col + j;
        float of[kQuantities] = {};
        if (inner) {
          window.derivatives(grad_of.inner(row, col), of);
        } else {
          // Of a window beyond a reflected border: those of its mirror image, which sees the same pixels.
          if (in.pad > 0) row = reflected(row, in.rows), col = reflected(col, in.cols);
          if (row >= 0 && row < in.rows && col >= 0 && col < in.cols) window.derivatives(grad_of.at(in, row, col), of);
        }
#pragma unroll
        for (int q = 0; q < kQuantities; ++q) derivatives[q * size + i * pitch + j] = of[q];
      });
  __syncthreads();

  // Back across, for the rows of windows that the tile's pixels are seen by.
  const int rows = tile.rows + tile.windows.taps - 1, back_pitch = tile.back_pitch(), back_size = tile.back_floats();
  for (int task = threadIdx.x; task < rows * (tile.cols / kAcross); task += kThreads) {
    const int row = task % rows, first = task / rows * kAcross;
#pragma unroll
    for (int q = 0; q < kQuantities; ++q) {
      const Reach<kTaps> values(derivatives + q * size + row * pitch + first);
      float sums[kAcross];
      filter<kTaps>(weights, tile.windows.taps, values, sums);
      store_run(sums, across + q * back_size + row * back_pitch + first);
    }
  }
  __syncthreads();

  const Pair<T> images(in, at.plane);
  constexpr int kUp = Backward::kUp;
  for (int task = threadIdx.x; task < tile.cols * (tile.rows / kUp); task += kThreads) {
    const int j = task % tile.cols, first = task / tile.cols * kUp, col = at.col + j;
    if (col >= in.width || at.row + first >= in.height) continue;
    float sums[kQuantities][kUp];
#pragma unroll
    for (int q = 0; q < kQuantities; ++q) {
      const float* column = across + q * back_size + first * back_pitch + j;
      filter<kTaps>(weights, tile.windows.taps, [&](int i) { return column[i * back_pitch]; }, sums[q]);
    }
#pragma unroll
    for (int r = 0; r < kUp; ++r) {
      const int row = at.row + first + r;
      if (row >= in.height) break;
      const float x = images.x_at(row, col), y = images.y_at(row, col), u = (x - centre) + (y - centre);
      store_gradients(
          in, at.plane, row, col, sums[0][r] + u * sums[2][r], sums[1][r] + (x - y) * sums[3][r], grad_x, grad_y);
    }
  }
}

// --- launches -------------------------------------------------------------------------------------------------------

// The normalised Gaussian in one dimension. The middle tap takes up the rounding of the others: a sum other than 1
// would show as variance in flat areas.
Taps gaussian(int64_t taps, double sigma) {
  Taps weights{};
  const int64_t radius = taps / 2;
  const auto tap = [&](int64_t i) {
    const double distance = static_cast<double>(i - radius) / sigma;
    return std::exp(-0.5 * distance * distance);
  };
  double sum = 0.0, others = 0.0;
  for (int64_t i = 0; i < taps; ++i) sum += tap(i);
  for (int64_t i = 0; i < taps; ++i) {
    weights.at[i] = static_cast<float>(tap(i) / sum);
    if (i != radius) others += static_cast<double>(weights.at[i]);
  }
  weights.at[radius] = static_cast<float>(1.0 - others);
  return weights;
}

Windows windows_of(const SsimInput& args) {
  const double c1 = 0.01 * args.data_range, c2 = 0.03 * args.data_range;
  return {args.x, args.y, args.channels, static_cast<int>(args.height), static_cast<int>(args.width),
          static_cast<int>(args.window_rows()), static_cast<int>(args.window_cols()),
          static_cast<int>(args.window_size), args.reflect ? static_cast<int>(args.window_size / 2) : 0,
          static_cast<float>(c1 * c1), static_cast<float>(c2 * c2)};
}

int64_t window_count(const SsimInput& args) { return args.planes() * args.window_rows() * args.window_cols(); }

int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }

int64_t tile_count(int64_t planes, int64_t rows, int64_t cols, int64_t tile_rows, int64_t tile_cols) {
  return planes * ceil_div(rows, tile_rows) * ceil_div(cols, tile_cols);
}

bool is_wide(const SsimInput& args) { return args.window_size > kMostTaps; }

template <class... Parameters>
cudaError_t launch(
    void (*kernel)(Parameters...), int64_t blocks, int threads, int shared_floats, cudaStream_t stream,
    std::type_identity_t<Parameters>... arguments) {
  const int shared_bytes = shared_floats * static_cast<int>(sizeof(float));
  if (shared_bytes > 0)
    if (const cudaError_t error =
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
        error != cudaSuccess)
      return error;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

// Where a wide window's call keeps things: its weights, then what the call needs.
struct WideWorkspace {
  double* exact;
  float* weights;
  void* rest;

  WideWorkspace(const SsimInput& args, void* memory)
      : exact(static_cast<double*>(memory)), weights(reinterpret_cast<float*>(exact + args.window_size)),
        rest(static_cast<char*>(memory) + bytes(args)) {}
  static size_t bytes(const SsimInput& args) {
    return (static_cast<size_t>(args.window_size) * (sizeof(double) + sizeof(float)) + 15) / 16 * 16;
  }
  cudaError_t weigh(const SsimInput& args, cudaStream_t stream) const {
    return launch(cuda::weigh, 1, 1, 0, stream, static_cast<int>(args.window_size), args.sigma, exact, weights);
  }
};

// Blocks of the forward pass: each has a sum of the loss.
int64_t forward_blocks(const SsimInput& args) {
  if (is_wide(args)) return ceil_div(window_count(args), kThreads);
  const Tile tile = args.window_size == kUsualTaps ? forward_tile<kUsualTaps>(0) : forward_tile<0>(0);
  return tile_count(args.planes(), args.window_rows(), args.window_cols(), tile.rows, tile.cols);
}

template <class T>
cudaError_t run_map(const SsimInput& args, T* map, void* memory, cudaStream_t stream) {
  const Windows in = windows_of(args);
  const int64_t blocks = forward_blocks(args);
  if (is_wide(args)) {
    const WideWorkspace workspace(args, memory);
    const cudaError_t error = workspace.weigh(args, stream);
    if (error != cudaSuccess) return error;
    return launch(wide_map<T>, blocks, kThreads, 0, stream, in, workspace.weights, args.planes(), map);
  }
  const Taps weights = gaussian(args.window_size, args.sigma);
  if (in.taps == kUsualTaps)
    return launch(
        map_of_tiles<T, kUsualTaps>, blocks, kThreads, forward_tile<kUsualTaps>(in.taps).floats(), stream, in, weights,
        map);
  return launch(map_of_tiles<T, 0>, blocks, kThreads, forward_tile<0>(in.taps).floats(), stream, in, weights, map);
}

template <class T>
cudaError_t run_sums(const SsimInput& args, void* memory, cudaStream_t stream) {
  const Windows in = windows_of(args);
  const int64_t blocks = forward_blocks(args);
  if (is_wide(args)) {
    const WideWorkspace workspace(args, memory);
    const cudaError_t error = workspace.weigh(args, stream);
    if (error != cudaSuccess) return error;
    return launch(
        wide_loss<T>, blocks, kThreads, 0, stream, in, workspace.weights, args.planes(),
        static_cast<double*>(workspace.rest));
  }
  const Taps weights = gaussian(args.window_size, args.sigma);
  auto* partial = static_cast<double*>(memory);
  if (in.taps == kUsualTaps)
    return launch(
        loss_of_tiles<T, kUsualTaps>, blocks, kThreads, forward_tile<kUsualTaps>(in.taps).floats(), stream, in, weights,
        partial);
  return launch(loss_of_tiles<T, 0>, blocks, kThreads, forward_tile<0>(in.taps).floats(), stream, in, weights, partial);
}

// Derivatives of a wide window take 16 bytes: of as many images at a time as fit this, of one at least.
constexpr int64_t kDerivativeBytes = 256 << 20;

int64_t planes_at_once(const SsimInput& args) {
  const int64_t of_plane = args.window_rows() * args.window_cols() * static_cast<int64_t>(sizeof(float4));
  const int64_t fitting = kDerivativeBytes / of_plane;
  return fitting < 1 ? 1 : fitting < args.planes() ? fitting : args.planes();
}

template <class T, int kTaps>
cudaError_t run_gradients(const SsimBackward& args, const Windows& in, const GradOfWindows& grad, cudaStream_t stream) {
  const BackwardTile<kTaps> tile = BackwardTile<kTaps>::of(in.taps);
  const int64_t blocks = tile_count(args.input.planes(), in.height, in.width, tile.rows, tile.cols);
  return launch(
      gradients_of_tiles<T, kTaps>, blocks, kThreads, tile.floats(), stream, in, gaussian(in.taps, args.input.sigma),
      grad, static_cast<T*>(args.grad_x), static_cast<T*>(args.grad_y));
}

template <class T>
cudaError_t run_backward(const SsimBackward& args, void* memory, cudaStream_t stream) {
  const SsimInput& input = args.input;
  const Windows in = windows_of(input);
  const GradOfWindows grad{args.grad_map, args.grad_map_col_stride, args.grad_loss,
                           static_cast<float>(-1.0 / static_cast<double>(window_count(input)))};
  if (!is_wide(input))
    return in.taps == kUsualTaps ? run_gradients<T, kUsualTaps>(args, in, grad, stream)
                                 : run_gradients<T, 0>(args, in, grad, stream);
  const WideWorkspace workspace(input, memory);
  auto* derivatives = static_cast<float4*>(workspace.rest);
  cudaError_t error = workspace.weigh(input, stream);
  const int64_t at_once = planes_at_once(input);
  for (int64_t first = 0; error == cudaSuccess && first < input.planes(); first += at_once) {
    const int64_t planes = at_once < input.planes() - first ? at_once : input.planes() - first;
    error = launch(
        wide_derivatives<T>, ceil_div(planes * in.rows * in.cols, kThreads), kThreads, 0, stream, in, workspace.weights,
        grad, first, planes, derivatives);
    if (error == cudaSuccess)
      error = launch(
          wide_gradients<T>, ceil_div(planes * in.height * in.width, kThreads), kThreads, 0, stream, in,
          workspace.weights, first, planes, derivatives, static_cast<T*>(args.grad_x), static_cast<T*>(args.grad_y));
  }
  return error;
}

}  // namespace

size_t ssim_map_workspace(const SsimInput& args) { return is_wide(args) ? WideWorkspace::bytes(args) : 0; }

int ssim_map(const SsimInput& args, void* map, void* workspace, void* stream) {
  if (window_count(args) == 0) return cudaSuccess;
  const auto on = static_cast<cudaStream_t>(stream);
  MEMAD_FAST_BY_DTYPE(args.dtype, T, { return run_map<T>(args, static_cast<T*>(map), workspace, on); })
  return cudaErrorInvalidValue;
}

size_t ssim_loss_workspace(const SsimInput& args) {
  return ssim_map_workspace(args) + static_cast<size_t>(forward_blocks(args)) * sizeof(double);
}

int ssim_loss(const SsimInput& args, float* loss, void* workspace, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  const int64_t count = window_count(args);
  cudaError_t error = cudaSuccess;
  if (count > 0) MEMAD_FAST_BY_DTYPE(args.dtype, T, { error = run_sums<T>(args, workspace, on); })
  if (error != cudaSuccess) return error;
  const auto* partial = reinterpret_cast<const double*>(static_cast<char*>(workspace) + ssim_map_workspace(args));
  return launch(mean_of_sums, 1, kThreads, 0, on, partial, forward_blocks(args), static_cast<double>(count), loss);
}

size_t ssim_backward_workspace(const SsimBackward& args) {
  const SsimInput& input = args.input;
  if (!is_wide(input) || window_count(input) == 0) return 0;
  return WideWorkspace::bytes(input) + static_cast<size_t>(planes_at_once(input) * input.window_rows() *
                                                           input.window_cols()) * sizeof(float4);
}

int ssim_backward(const SsimBackward& args, void* workspace, void* stream) {
  if (window_count(args.input) == 0) return cudaSuccess;
  const auto on = static_cast<cudaStream_t>(stream);
  MEMAD_FAST_BY_DTYPE(args.input.dtype, T, { return run_backward<T>(args, workspace, on); })
  return cudaErrorInvalidValue;
}

}  // namespace memad_fast::cuda
