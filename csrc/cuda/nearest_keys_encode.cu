// Rows to codes: prepare_keys, prepare_keys_rows_ and the queries of a search (see nearest_keys.h).
//
//   score = h - q'.k'     k' = scale codes + r     the five numbers of a key bound what r and rounding can change
//
// One warp a row, four elements a lane and step: a row is read twice (three or four times for cosine), the later times
// from the cache. Bytes: a float32 row once from memory, a quarter of it written; about 20 instructions an element.
// H200, 65,536 x 512: 134 MB read + 34 written at 4.3 TB/s: 0.04 ms.
#include "cuda/nearest_keys_encode.cuh"

namespace memad_fast::cuda {
namespace {

constexpr int kEncodeThreads = 256, kEncodeWarps = kEncodeThreads / 32;
constexpr int64_t kManyWarps = 8192;     // more than any device runs at once
constexpr int64_t kCentreRows = 256;     // the mean of few rows is as good a shift as the mean of all
constexpr double kUnusable = -1.0;       // in the place of the scale of a row that is not finite

// The row of this warp, when warps take one each.
__device__ int64_t first_row() { return blockIdx.x * int64_t{kEncodeWarps} + threadIdx.x / 32; }

// --- the centre ----------------------------------------------------------------------------------------------------

// Rows of the mean: `count` of them, `step` apart.
struct Spread {
  int64_t count, step;
  explicit Spread(int64_t rows) : count(smaller(rows, kCentreRows)), step(rows / count) {}
};

// What each row of the mean is multiplied by.
__global__ void __launch_bounds__(kEncodeThreads, 4)
    scale_of_spread(Rows keys, Spread spread, Metric metric, double* scales) {
  const int64_t s = first_row();
  if (s >= spread.count) return;
  const double square = square_of({keys, s * spread.step});
  if (threadIdx.x % 32 == 0)
    scales[s] = !is_finite(square) ? kUnusable : metric == Metric::cosine ? unit_scale(square) : 1.0;
}

// A block: 32 dimensions, each summed by 8 threads.
__global__ void __launch_bounds__(kEncodeThreads, 4)
    mean_key(Rows keys, Spread spread, const double* scales, int64_t dims, float* centre) {
  __shared__ double sums[kEncodeWarps][32];
  __shared__ int counts[kEncodeWarps];
  const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
  const int64_t i = blockIdx.x * int64_t{32} + lane;
  double sum = 0.0;
  int used = 0;
  for (int64_t s = warp; s < spread.count; s += kEncodeWarps) {
    if (scales[s] == kUnusable) continue;
    sum += scales[s] * static_cast<double>(Row(keys, s * spread.step).one(i));
    ++used;
  }
  sums[warp][lane] = sum;
  if (lane == 0) counts[warp] = used;
  __syncthreads();
  if (warp != 0 || i >= dims) return;
  for (int w = 1; w < kEncodeWarps; ++w) {
    sum += sums[w][lane];
    used += counts[w];
  }
  centre[i] = used ? __double2float_rn(sum / used) : 0.0f;
}

// --- rows of a warp ------------------------------------------------------------------------------------------------

// A warp takes `each` consecutive rows one after the other, all its lanes a row. What is found of row j stays in lane
// j: then the lanes turn it into numbers at once, in float64, which would otherwise cost as much as the elements.
constexpr int64_t kMostRowsOfWarp = 32;

struct RowsOfWarp {
  int64_t first, count;

  __device__ RowsOfWarp(int64_t rows, int64_t each)
      : first(first_row() * each), count(larger(0, smaller(each, rows - first))) {}
  __device__ bool is_own(int64_t j) const { return threadIdx.x % 32 == j; }
};

// --- keys ----------------------------------------------------------------------------------------------------------

struct EncodeKeys {
  Rows keys;
  Metric metric;
  ErrorTerms error;
  uint8_t* packed;
  int64_t padded, dims;
  const int64_t* rows;  // null: all, and the padding
  int64_t count, each;  // rows, and rows of a warp
};

struct KeyNumbers {
  float base, scale, residual, norm, slack;
};

__device__ KeyNumbers key_numbers(const Measured& row, const EncodeKeys& args, double centre_norm) {
  const ErrorTerms& error = args.error;
  const auto square = static_cast<double>(row.square);
  const double norm = norm_above(square, error);
  if (!row.finite) return {kInfinity, 0.0f, 0.0f, 0.0f, 0.0f};  // never returned
  if (!(norm < kLargestNorm && is_finite(error.square)))
    return {-kInfinity, 0.0f, 0.0f, 0.0f, kInfinity};  // always left to the exact stage
  double height = 0.0, slack = error.absolute + norm * error.element, slope = error.element;
  if (args.metric == Metric::l2) {
    height = 0.5 * square;
    slack += (32.0 * kUnit32 + 2.0 * error.square + 16.0 * error.exact) * height;
  } else if (args.metric == Metric::ip) {
    slope += 4.0 * error.exact * (centre_norm + norm);
  } else {
    slack += 16.0 * error.exact;
  }
  // 32 u: the rounding of the two rows, and of the few float32 operations that make the score of the product.
  const double residual = residual_above(row, norm, error) + slope + 32.0 * kUnit32 * norm;
  return {round_down(height - slack), row.scale, round_up(residual * (1.0 + 32.0 * kUnit32)),
          round_up((norm + residual) * (1.0 + 32.0 * kUnit32)), round_up(slack)};
}

__global__ void __launch_bounds__(kEncodeThreads, 4) encode_keys(const __grid_constant__ EncodeKeys args) {
  auto* numbers = reinterpret_cast<float*>(args.packed + args.padded * args.dims);
  const float* centre = numbers + 5 * args.padded;
  const double centre_norm = args.metric == Metric::ip ? centre_norm_of(centre, args.dims) : 0.0;
  const bool scaled = args.metric == Metric::cosine;
  const RowsOfWarp mine(args.count, args.each);
  int64_t own_key = -1;
  Measured own{};  // not finite: of the padding too
  for (int64_t j = 0; j < mine.count; ++j) {
    const int64_t key = args.rows ? args.rows[mine.first + j] : mine.first + j;
    if (args.rows && (key < 0 || key >= args.keys.rows)) continue;
    if (mine.is_own(j)) own_key = key;
    auto* codes = reinterpret_cast<int8_t*>(args.packed) + key * args.dims;
    if (key >= args.keys.rows) {
      no_codes(args.dims, codes);
      continue;
    }
    const Row row(args.keys, key);
    const Measured measured =
        quantise({row, centre, scaled ? unit_scale(square_of(row)) : 1.0, scaled}, args.dims, codes);
    if (mine.is_own(j)) own = measured;
  }
  if (own_key < 0) return;
  const KeyNumbers of_key = key_numbers(own, args, centre_norm);
  numbers[own_key] = of_key.base;
  numbers[args.padded + own_key] = of_key.scale;
  numbers[2 * args.padded + own_key] = of_key.residual;
  numbers[3 * args.padded + own_key] = of_key.norm;
  numbers[4 * args.padded + own_key] = of_key.slack;
}

// --- queries -------------------------------------------------------------------------------------------------------

// The dot product of a staged row with the centre, in float64.
__device__ double with_centre(const Staging& staging, const float* centre, int64_t dims) {
  double sum = 0.0;
  for (int64_t i = 4 * (threadIdx.x % 32); i < dims; i += 128) {
    const float4 x = staging.four(i), c = *reinterpret_cast<const float4*>(centre + i);
    sum += static_cast<double>(x.x) * c.x + static_cast<double>(x.y) * c.y;
    sum += static_cast<double>(x.z) * c.z + static_cast<double>(x.w) * c.w;
  }
  return warp_sum(sum);
}

// Writes what bounds the scores of query q. `with`: its product with the centre, of cosine.
__device__ void write_query_numbers(
    const Measured& row, double with, const EncodeQueries& args, double centre_norm, int64_t q) {
  const ErrorTerms& error = args.error;
  const auto square = static_cast<double>(row.square);
  const double norm = norm_above(square, error);
  const bool screened = row.finite && norm < kLargestNorm && is_finite(error.square);
  const float alpha = screened ? round_up(norm) : 0.0f;
  double shift = 0.0;
  if (args.metric == Metric::l2) {
    shift = -0.5 * square * (1.0 - 16.0 * kUnit32 - 2.0 * error.square - 8.0 * error.exact) + norm * error.element +
            error.absolute;
  } else if (args.metric == Metric::cosine) {
    shift = with + 8.0 * kUnit32 * norm * centre_norm + (norm + centre_norm) * error.element + error.absolute - 1.0;
  }
  // 64 t and 2^-20: what the float32 operations that make an upper end of it lose (upper_end of the screen).
  const double own = 4.0 * error.exact * static_cast<double>(alpha) * static_cast<double>(alpha) + error.absolute +
                     64.0 * kTiny;
  args.out.scale[q] = screened ? row.scale : 0.0f;
  args.out.norm[q] = alpha;
  args.out.residual[q] = screened ? round_up(residual_above(row, norm, error)) : 0.0f;
  args.out.own[q] = round_up(own * (1.0 + 0x1p-20));
  args.out.shift[q] = shift;
  args.out.path[q] = screened ? Path::screened : row.finite ? Path::full : Path::none;
}

__global__ void __launch_bounds__(kEncodeThreads, 4)
    encode_query_rows(const __grid_constant__ EncodeQueries args, int64_t each) {
  const bool scaled = args.metric == Metric::cosine;
  const double centre_norm = scaled ? centre_norm_of(args.centre, args.dims) : 0.0;
  const float* centre = args.metric == Metric::l2 ? args.centre : nullptr;
  const RowsOfWarp mine(args.padded, each);
  Measured own{};  // not finite: of the padding too
  double own_with = 0.0;
  for (int64_t j = 0; j < mine.count; ++j) {
    const int64_t q = mine.first + j;
    int8_t* codes = args.out.codes + q * args.dims;
    if (q >= args.count) {
      no_codes(args.dims, codes);
      continue;
    }
    const Row row(args.query, args.first + q);
    const Staging staging{row, centre, scaled ? unit_scale(square_of(row)) : 1.0, scaled};
    const Measured measured = quantise(staging, args.dims, codes);
    const double with = scaled ? with_centre(staging, args.centre, args.dims) : 0.0;
    if (mine.is_own(j)) {
      own = measured;
      own_with = with;
    }
  }
  if (threadIdx.x % 32 < mine.count)
    write_query_numbers(own, own_with, args, centre_norm, mine.first + threadIdx.x % 32);
}

// --- launches ------------------------------------------------------------------------------------------------------

cudaLaunchConfig_t warps_of(int64_t warps, cudaStream_t stream) {
  cudaLaunchConfig_t launch{};
  launch.gridDim = dim3(static_cast<unsigned>(ceil_div(warps, kEncodeWarps)));
  launch.blockDim = dim3(kEncodeThreads);
  launch.stream = stream;
  return launch;
}

// Few rows: a warp each. Many: as many a warp as keep its lanes busy at the end.
int64_t rows_of_warp(int64_t rows) { return larger(1, smaller(rows / kManyWarps, kMostRowsOfWarp)); }

cudaError_t encode(
    const Rows& keys, Metric metric, uint8_t* packed, const int64_t* rows, int64_t count, cudaStream_t stream) {
  const PackedLayout layout(keys.rows, keys.cols);
  const int64_t each = rows_of_warp(count);
  const cudaLaunchConfig_t launch = warps_of(ceil_div(count, each), stream);
  const EncodeKeys args{keys, metric, error_terms(keys.cols), packed, layout.keys, layout.dims, rows, count, each};
  return cudaLaunchKernelEx(&launch, encode_keys, args);
}

}  // namespace

cudaError_t encode_queries(const EncodeQueries& args, cudaStream_t stream) {
  const int64_t each = rows_of_warp(args.padded);
  const cudaLaunchConfig_t launch = warps_of(ceil_div(args.padded, each), stream);
  return cudaLaunchKernelEx(&launch, encode_query_rows, args, each);
}

int prepare_keys(const Rows& keys, Metric metric, uint8_t* packed, void* stream) {
  const PackedLayout layout(keys.rows, keys.cols);
  const Spread spread(keys.rows);
  const auto on = static_cast<cudaStream_t>(stream);
  // The scales of 256 rows lie where the 5 x 128 numbers or more will be, which are written last.
  auto* scales = reinterpret_cast<double*>(packed + layout.numbers());
  static_assert(kCentreRows * sizeof(double) <= 5 * 128 * sizeof(float));
  cudaLaunchConfig_t launch = warps_of(kCentreRows, on);
  if (const cudaError_t error = cudaLaunchKernelEx(&launch, scale_of_spread, keys, spread, metric, scales);
      error != cudaSuccess)
    return error;
  launch.gridDim = dim3(static_cast<unsigned>(ceil_div(layout.dims, 32)));
  auto* centre = reinterpret_cast<float*>(packed + layout.centre());
  const double* read_scales = scales;
  if (const cudaError_t error = cudaLaunchKernelEx(&launch, mean_key, keys, spread, read_scales, layout.dims, centre);
      error != cudaSuccess)
    return error;
  return encode(keys, metric, packed, nullptr, layout.keys, on);
}

int prepare_keys_rows(
    const Rows& keys, Metric metric, uint8_t* packed, const int64_t* rows, int64_t count, void* stream) {
  if (count == 0) return cudaSuccess;
  return encode(keys, metric, packed, rows, count, static_cast<cudaStream_t>(stream));
}

}  // namespace memad_fast::cuda
