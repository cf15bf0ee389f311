// The tile instructions of AMX in software, after the pages of Intel's manual on each of them, for a kernel that is
// compiled with this header before it. What would be a fault of the processor is an exception here.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

namespace amx_model {

constexpr int kTiles = 8, kMaxRows = 16, kMaxRowBytes = 64;  // palette 1

struct Tile {
  int rows = 0, row_bytes = 0;
  uint8_t data[kMaxRows][kMaxRowBytes] = {};
};

struct State {
  bool configured = false;
  Tile tiles[kTiles];
};
inline State state;

[[noreturn]] inline void fault(const std::string& what) { throw std::logic_error("AMX: " + what); }

inline Tile& tile(int index) {
  if (!state.configured) fault("no configuration is loaded");
  if (index < 0 || index >= kTiles) fault("there is no tile " + std::to_string(index));
  if (state.tiles[index].rows == 0) fault("tile " + std::to_string(index) + " is not configured");
  return state.tiles[index];
}

// Every instruction that writes a tile clears what lies beyond its shape.
inline void clear_beyond(Tile& t, int rows, int row_bytes) {
  for (int r = 0; r < kMaxRows; ++r)
    for (int b = 0; b < kMaxRowBytes; ++b)
      if (r >= rows || b >= row_bytes) t.data[r][b] = 0;
}

inline void release() { state = State{}; }

inline void load_config(const void* memory) {
  uint8_t bytes[64];
  std::memcpy(bytes, memory, sizeof(bytes));
  if (bytes[0] == 0) return release();
  if (bytes[0] != 1) fault("palette " + std::to_string(bytes[0]));
  for (int i = 2; i < 16; ++i)
    if (bytes[i]) fault("reserved bytes are set");
  State loaded;
  loaded.configured = true;
  for (int i = 0; i < 16; ++i) {
    const int row_bytes = bytes[16 + 2 * i] | bytes[17 + 2 * i] << 8, rows = bytes[48 + i];
    if (i >= kTiles) {
      if (row_bytes || rows) fault("a shape for tile " + std::to_string(i));
      continue;
    }
    if (row_bytes > kMaxRowBytes || rows > kMaxRows) fault("the shape of tile " + std::to_string(i) + " is too large");
    if ((row_bytes == 0) != (rows == 0)) fault("half a shape for tile " + std::to_string(i));
    loaded.tiles[i].rows = rows;
    loaded.tiles[i].row_bytes = row_bytes;
  }
  state = loaded;
}

inline void zero(int index) { clear_beyond(tile(index), 0, 0); }

inline void load(int index, const void* base, int64_t stride) {
  Tile& t = tile(index);
  for (int r = 0; r < t.rows; ++r)
    std::memcpy(t.data[r], static_cast<const char*>(base) + r * stride, static_cast<size_t>(t.row_bytes));
  clear_beyond(t, t.rows, t.row_bytes);
}

inline void store(int index, void* base, int64_t stride) {
  const Tile& t = tile(index);
  for (int r = 0; r < t.rows; ++r)
    std::memcpy(static_cast<char*>(base) + r * stride, t.data[r], static_cast<size_t>(t.row_bytes));
}

// c += a b in words of four signed bytes.
inline void dot_signed_bytes(int c_index, int a_index, int b_index) {
  Tile &c = tile(c_index), &a = tile(a_index), &b = tile(b_index);
  if (c_index == a_index || c_index == b_index || a_index == b_index) fault("operands of one tile");
  if (a.rows != c.rows) fault("a and c differ in rows");
  if (b.row_bytes != c.row_bytes) fault("b and c differ in columns");
  if (a.row_bytes != 4 * b.rows) fault("a's columns are not b's rows");
  if (a.row_bytes % 4 || b.row_bytes % 4) fault("columns are not whole words");
  for (int m = 0; m < c.rows; ++m)
    for (int k = 0; k < a.row_bytes / 4; ++k)
      for (int n = 0; n < c.row_bytes / 4; ++n) {
        uint32_t sum;  // it wraps
        std::memcpy(&sum, &c.data[m][4 * n], sizeof(sum));
        for (int i = 0; i < 4; ++i)
          sum += static_cast<uint32_t>(
              static_cast<int8_t>(a.data[m][4 * k + i]) * static_cast<int8_t>(b.data[k][4 * n + i]));
        std::memcpy(&c.data[m][4 * n], &sum, sizeof(sum));
      }
  clear_beyond(c, c.rows, c.row_bytes);
}

}  // namespace amx_model

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbssd
#define _tile_loadconfig(memory) ::amx_model::load_config(memory)
#define _tile_release() ::amx_model::release()
#define _tile_zero(tile) ::amx_model::zero(tile)
#define _tile_loadd(tile, base, stride) ::amx_model::load(tile, base, stride)
#define _tile_stored(tile, base, stride) ::amx_model::store(tile, base, stride)
#define _tile_dpbssd(c, a, b) ::amx_model::dot_signed_bytes(c, a, b)
