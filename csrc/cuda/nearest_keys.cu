// Searches of nearest_keys (see nearest_keys.h): the plan of one, its workspace, its launches.
//
// Queries are searched in chunks, as few as the workspace allows: encode, screen and finish of each follow one another
// on the stream. A chunk is whole waves of blocks, or what is left after them, split over the keys so that its blocks
// fill the multiprocessors evenly. Nothing is read back: the plan depends on shapes and the device alone.
#include "cuda/nearest_keys.h"

#include "cuda/nearest_keys_finish.cuh"

namespace memad_fast::cuda {
namespace {

constexpr int64_t kFixedWorkspace = int64_t{64} << 20, kWorkspacePerResult = 64;
constexpr int64_t kAlignment = 256;
constexpr int64_t kMostListedTogether = 512;  // entries that the lists of a query and split may have
constexpr int64_t kNumberBytes = 32;          // of a query, beside its codes
// What a split costs beside its tiles of keys, in tiles: its lists start anew, its first tiles add many keys.
constexpr int64_t kSplitCost = 4;
constexpr int64_t kMostWaves = 8;  // of blocks, that splits are weighed for
constexpr int64_t kMostSplitKeys = int64_t{1} << 30;  // their places are 32-bit

struct Device {
  int multiprocessors, shared_bytes;  // what a block may have
};

cudaError_t current_device(Device* device) {
  int index = 0;
  cudaError_t error = cudaGetDevice(&index);
  const auto read = [&](int* value, cudaDeviceAttr attribute) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(value, attribute, index);
  };
  read(&device->multiprocessors, cudaDevAttrMultiProcessorCount);
  read(&device->shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  return error;
}

// Of the k best of every warp of the last stages; a single one stays in registers.
int64_t bytes_of_found(int64_t k, int64_t blocks) {
  return k > 1 ? blocks * kFinishWarps * k * static_cast<int64_t>(sizeof(Found)) : 0;
}

// A stretch of the workspace.
int64_t take(int64_t& offset, int64_t bytes) {
  const int64_t at = offset;
  offset = ceil_div(offset + bytes, kAlignment) * kAlignment;
  return at;
}

int64_t round_to(int64_t count, int64_t unit) { return ceil_div(count, unit) * unit; }

// One chunk of a search: how many of the queries that are left, how its keys are split, where its workspace lies.
struct Chunk {
  bool screened;
  int64_t rows, dims;
  ScreenShape shape{};
  int capacity = 0;
  int64_t splits = 0, split_keys = 0;
  ListedShape listed{};
  int full_blocks;
  // Offsets in the workspace.
  int64_t codes, numbers, shift, path, entries, counts, thresholds, found, bytes;

  Chunk(const NearestKeys& args, const Device& device, int64_t rows_left)
      : screened(args.k <= kMostScreenedK && args.keys.cols > 0 && args.keys.cols <= kMostCodedDims), rows(rows_left),
        dims(PackedLayout(args.keys.rows, args.keys.cols).dims) {
    if (screened) {
      shape = screen_shape(dims, device.shared_bytes);
      split(args, device);
      listed = listed_shape(rows, args.k, splits * shape.columns, device.multiprocessors);
    }
    full_blocks = cuda::full_blocks(rows, device.multiprocessors);
    lay_out(args.k);
  }

  // Of the lists of one query and split.
  int64_t bytes_of_split(int64_t entries) const {
    return shape.columns * (entries * static_cast<int64_t>(sizeof(Entry)) + 8);
  }

  void split(const NearestKeys& args, const Device& device) {
    const int64_t slots = int64_t{shape.blocks} * device.multiprocessors, wave = slots * kTileQueries;
    const int64_t bytes_of_row = dims + kNumberBytes;
    const int64_t budget = kFixedWorkspace + kWorkspacePerResult * args.query.rows * args.k -
                           bytes_of_found(args.k, kFinishBlocks * device.multiprocessors);
    // Room for a tile beside what is kept: of one list a share of those that lie near the k nearest.
    const int64_t least_capacity = room_for_tile(args.k) + (args.k > 1 ? 32 + 2 * args.k : 64);
    const int64_t least_splits = ceil_div(args.keys.rows, kMostSplitKeys);

    // As many whole waves of blocks as the workspace allows; what is left after them makes a chunk of its own.
    const int64_t most_rows = smaller(rows, budget / (bytes_of_row + least_splits * bytes_of_split(least_capacity)));
    const int64_t unit = most_rows >= wave ? wave : kTileQueries;
    if (rows > most_rows || rows > wave) rows = smaller(rows, larger(unit, most_rows / unit * unit));
    const int64_t for_lists = budget - round_to(rows, kTileQueries) * bytes_of_row;
    const int64_t listed_rows = round_to(rows, kWarpQueries);

    // The number of splits whose waves take the least time.
    const int64_t query_tiles = ceil_div(rows, kTileQueries), key_tiles = ceil_div(args.keys.rows, shape.tile_keys());
    const int64_t affordable = for_lists / (listed_rows * bytes_of_split(least_capacity));
    const int64_t most_splits = larger(least_splits, smaller(affordable, key_tiles));
    int64_t least_time = INT64_MAX;
    for (int64_t extra = 0; extra < kMostWaves; ++extra) {
      const int64_t waves = ceil_div(query_tiles * least_splits, slots) + extra;
      const int64_t candidate = larger(least_splits, smaller(waves * slots / query_tiles, most_splits));
      const int64_t time =
          ceil_div(query_tiles * candidate, slots) * (ceil_div(key_tiles, candidate) + kSplitCost);
      if (time < least_time) {
        least_time = time;
        splits = candidate;
      }
    }
    split_keys = ceil_div(key_tiles, splits) * shape.tile_keys();
    splits = ceil_div(args.keys.rows, split_keys);

    // Lists as long as a 16th of the keys may need, if they fit.
    const int64_t fitting = for_lists / (listed_rows * splits * bytes_of_split(0)) - 1;
    const int64_t wanted = args.k > 1 ? kMostListed : smaller(args.keys.rows / 16, kMostListedTogether / shape.columns);
    capacity = static_cast<int>(larger(least_capacity, smaller(wanted, fitting)));
  }

  void lay_out(int64_t k) {
    int64_t at = 0;
    const int64_t coded = screened ? round_to(rows, kTileQueries) : 0;
    const int64_t lists = screened ? round_to(rows, kWarpQueries) * splits * shape.columns : 0;
    codes = take(at, coded * dims);
    numbers = take(at, coded * 16);
    shift = take(at, coded * 8);
    path = take(at, coded);
    entries = take(at, lists * capacity * static_cast<int64_t>(sizeof(Entry)));
    counts = take(at, lists * 4);
    thresholds = take(at, lists * 4);
    found = take(at, bytes_of_found(k, larger(listed.blocks, full_blocks)));
    bytes = larger(at, kAlignment);
  }

  QueryCodes query_codes(uint8_t* workspace) const {
    auto* of_rows = reinterpret_cast<float*>(workspace + numbers);
    const int64_t n = round_to(rows, kTileQueries);
    return {reinterpret_cast<int8_t*>(workspace + codes), of_rows, of_rows + n, of_rows + 2 * n, of_rows + 3 * n,
            reinterpret_cast<double*>(workspace + shift), reinterpret_cast<Path*>(workspace + path)};
  }
  Lists lists(uint8_t* workspace) const {
    return {reinterpret_cast<Entry*>(workspace + entries), reinterpret_cast<int32_t*>(workspace + counts),
            reinterpret_cast<float*>(workspace + thresholds), capacity, shape.columns, splits, split_keys};
  }
};

cudaError_t search_chunk(
    const NearestKeys& args, const Chunk& chunk, int64_t first, uint8_t* workspace, cudaStream_t stream) {
  const PackedLayout layout(args.keys.rows, args.keys.cols);
  const ErrorTerms error = error_terms(args.keys.cols);
  auto* found = reinterpret_cast<Found*>(workspace + chunk.found);
  if (!chunk.screened)
    return finish_full({args, first, chunk.rows, error, {}, {}, found}, chunk.full_blocks, stream);

  const QueryCodes queries = chunk.query_codes(workspace);
  const Lists lists = chunk.lists(workspace);
  const int64_t padded = round_to(chunk.rows, kTileQueries);
  const auto* centre = reinterpret_cast<const float*>(args.packed + layout.centre());
  cudaError_t failed = encode_queries(
      {args.query, first, chunk.rows, padded, centre, layout.dims, args.metric, error, queries}, stream);
  if (failed != cudaSuccess) return failed;
  failed = screen(
      {queries, chunk.rows, padded, layout.dims, args.packed, args.keys.rows, layout.keys, args.filled,
       static_cast<int>(args.k), lists, chunk.shape.resident},
      chunk.shape, stream);
  if (failed != cudaSuccess) return failed;
  const Finish rest{args, first, chunk.rows, error, queries, lists, found};
  failed = finish_listed(rest, chunk.listed, stream);
  if (failed != cudaSuccess) return failed;
  return finish_full(rest, chunk.full_blocks, stream);
}

// --- values of the nearest keys ------------------------------------------------------------------------------------

constexpr int kGatherThreads = 256, kGatherWarps = kGatherThreads / 32;
constexpr int64_t kGatherBlocks = 4096;  // rows beyond it are taken by striding the grid

// A warp a row.
template <class T>
__global__ void __launch_bounds__(kGatherThreads)
    gather_rows(Rows values, const int64_t* indices, int64_t count, T nan, T* read) {
  for (int64_t n = blockIdx.x * int64_t{kGatherWarps} + threadIdx.x / 32; n < count;
       n += gridDim.x * int64_t{kGatherWarps}) {
    const int64_t index = indices[n];
    const T* from = static_cast<const T*>(values.data) + index * values.row_stride;
    for (int64_t i = threadIdx.x % 32; i < values.cols; i += 32) read[n * values.cols + i] = index < 0 ? nan : from[i];
  }
}

}  // namespace

int nearest_keys_workspace(const NearestKeys& args, int64_t* bytes) {
  Device device{};
  if (const cudaError_t error = current_device(&device); error != cudaSuccess) return error;
  *bytes = 0;
  for (int64_t left = args.query.rows; left > 0;) {
    const Chunk chunk(args, device, left);
    *bytes = larger(*bytes, chunk.bytes);
    left -= chunk.rows;
  }
  return cudaSuccess;
}

int nearest_keys(const NearestKeys& args, uint8_t* workspace, void* stream) {
  Device device{};
  if (const cudaError_t error = current_device(&device); error != cudaSuccess) return error;
  for (int64_t first = 0; first < args.query.rows;) {
    const Chunk chunk(args, device, args.query.rows - first);
    if (const cudaError_t error = search_chunk(args, chunk, first, workspace, static_cast<cudaStream_t>(stream));
        error != cudaSuccess)
      return error;
    first += chunk.rows;
  }
  return cudaSuccess;
}

int gather_values(const Rows& values, const int64_t* indices, int64_t count, void* read, void* stream) {
  if (count == 0 || values.cols == 0) return cudaSuccess;
  cudaLaunchConfig_t launch{};
  launch.gridDim = dim3(static_cast<unsigned>(smaller(ceil_div(count, kGatherWarps), kGatherBlocks)));
  launch.blockDim = dim3(kGatherThreads);
  launch.stream = static_cast<cudaStream_t>(stream);
  if (values.dtype == Dtype::f32)
    return cudaLaunchKernelEx(
        &launch, gather_rows<uint32_t>, values, indices, count, 0x7fc00000u, static_cast<uint32_t*>(read));
  const uint16_t nan = values.dtype == Dtype::f16 ? 0x7e00 : 0x7fc0;
  return cudaLaunchKernelEx(&launch, gather_rows<uint16_t>, values, indices, count, nan, static_cast<uint16_t*>(read));
}

}  // namespace memad_fast::cuda
