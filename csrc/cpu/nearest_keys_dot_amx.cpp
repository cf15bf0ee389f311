// The dot kernel of nearest_keys (see nearest_keys_dot.h) for AMX: 32 queries x 32 keys in four tiles of sums.
//
//   tiles 0-3   sums of 16 queries x 16 keys        tiles 4, 5   16 queries x 64 dimensions, rows of `stride` bytes
//                                                   tiles 6, 7   16 steps x 16 keys, rows of 256 bytes
//
// Sixteen steps (64 dimensions) a product. The last product of a row reads up to 15 steps behind the keys' dimensions: there the
// queries hold zeros. One query is a tile of one row.
//
// Each call configures the tiles and releases them: other libraries use tiles on the same threads, with shapes of their own,
// and tiles in use make every switch of threads save 8 KiB and keep the core from its deeper sleep. The price, some tens of
// cycles, is little beside the products: 2 cycles a dimension.
#include <immintrin.h>

#include "cpu/nearest_keys_dot.h"

namespace memad_fast {
namespace amx {
namespace {

constexpr int64_t kTileSteps = 16;
constexpr int64_t kTileKeys = 16;

struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16];
};
static_assert(sizeof(TileShapes) == 64);

// Constants, not variables: compilers may think that _tile_loadconfig reads only the first bytes, and leave the rest unwritten.
constexpr TileShapes kTile{.rows = {16, 16, 16, 16, 16, 16, 16, 16}};
constexpr TileShapes kSingle{.rows = {1, 1, 1, 1, 1, 1, 16, 16}};

void multiply_32(const DotGroup& group) {
  _tile_loadconfig(&kTile);
  for (int64_t key = 0; key < kGroupKeys; key += 2 * kTileKeys) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t step = 0; step < group.steps; step += kTileSteps) {
      const uint8_t* queries = group.queries + step * kStepDims;
      const int8_t* keys = group.keys + step * kStepBytes + key * kStepDims;
      _tile_loadd(4, queries, group.stride);
      _tile_loadd(5, queries + 16 * group.stride, group.stride);
      _tile_loadd(6, keys, kStepBytes);
      _tile_loadd(7, keys + kTileKeys * kStepDims, kStepBytes);
      _tile_dpbssd(0, 4, 6);
      _tile_dpbssd(1, 4, 7);
      _tile_dpbssd(2, 5, 6);
      _tile_dpbssd(3, 5, 7);
    }
    constexpr int64_t row_bytes = kGroupKeys * static_cast<int64_t>(sizeof(int32_t));
    int32_t* products = group.products + key;
    _tile_stored(0, products, row_bytes);
    _tile_stored(1, products + kTileKeys, row_bytes);
    _tile_stored(2, products + 16 * kGroupKeys, row_bytes);
    _tile_stored(3, products + 16 * kGroupKeys + kTileKeys, row_bytes);
  }
  _tile_release();
}

void multiply_1(const DotGroup& group) {
  _tile_loadconfig(&kSingle);
  for (int64_t key = 0; key < kGroupKeys; key += 2 * kTileKeys) {
    _tile_zero(0);
    _tile_zero(1);
    for (int64_t step = 0; step < group.steps; step += kTileSteps) {
      const int8_t* keys = group.keys + step * kStepBytes + key * kStepDims;
      _tile_loadd(4, group.queries + step * kStepDims, group.stride);
      _tile_loadd(6, keys, kStepBytes);
      _tile_loadd(7, keys + kTileKeys * kStepDims, kStepBytes);
      _tile_dpbssd(0, 4, 6);
      _tile_dpbssd(1, 4, 7);
    }
    _tile_stored(0, group.products + key, 64);
    _tile_stored(1, group.products + key + kTileKeys, 64);
  }
  _tile_release();
}

}  // namespace

const DotKernel dot_kernel = {32, 127, 0, multiply_32, multiply_1};

}  // namespace amx
}  // namespace memad_fast
