// Rows as int8 codes with a scale of their own, and the bound of an integer score. Only for kernel files.
//
//   k' = scale * codes + r      codes = round(k' / scale), scale = max |k'| / 127
//   |q'.k' - scale_q scale_k codes_q.codes_k| <= |q'| |r_k| + |r_q| |k' - r_k|
#pragma once

#include "cpu/nearest_keys_dot.h"
#include "cpu/nearest_keys_rows.h"

namespace memad_fast {
namespace MEMAD_FAST_ISA {
namespace {

constexpr float kSmallestCoded = 0x1p-60f;  // rows below it are all residual: their scale could underflow
constexpr int kKeyLevels = 127;

struct Codes {
  float scale;
  double residual;  // |r|^2, in float32
  int32_t sum;      // of the codes
};

// Codes of a staged row, each plus `offset`, to out[0, dim rounded up to 16). `levels` is the largest code.
inline Codes quantise(const float* staged, int64_t dim, int levels, int offset, uint8_t* out) {
  F32 most = F32::zero();
  for (int64_t i = 0; i < staged_dim(dim); i += F32::lanes) most = max(abs(F32::load(staged + i)), most);
  const float largest = reduce_max(most);
  const bool coded = largest >= kSmallestCoded;
  const float scale = coded ? largest / static_cast<float>(levels) : 0.0f;
  const F32 step = F32::set1(scale), inverse = F32::set1(coded ? static_cast<float>(levels) / largest : 0.0f);
  const I32 start = I32::set1(offset);
  SquareSum residual;
  I32 sum = I32::set1(0);
  for (int64_t i = 0; i < staged_dim(dim); i += kExactStep)
    for (int64_t j = 0; j < kExactStep; j += F32::lanes) {
      const F32 x = F32::load(staged + i + j);
      const I32 code = to_i32(x * inverse);
      residual.add(j, x - step * to_f32(code));
      sum = sum + code;
      store_bytes(code + start, out + i + j);
    }
  int32_t sums[I32::lanes], total = 0;
  sum.store(sums);
  for (const int32_t part : sums) total += part;
  return {scale, residual.total(), total};
}

// An upper end of the norm of what the codes leave out of a row of this norm.
inline double residual_above(const Codes& codes, double norm, const ErrorTerms& error) {
  return norm_above(codes.residual, error) + 4.0 * kUnit32 * norm;
}

// The keys' side of a score, an element a key (see nearest_keys.h), and the codes of whole groups.
struct KeyCodes {
  float* base;
  float* scale;
  float* residual;
  float* norm;
  float* slack;
  int32_t* sum;
  int8_t* codes;

  KeyCodes from(int64_t first_key, int64_t steps) const {
    return {base + first_key,  scale + first_key, residual + first_key, norm + first_key,
            slack + first_key, sum + first_key,   codes + first_key * steps * kStepDims};
  }
};

inline float* packed_centre(uint8_t* packed, const PackedLayout& layout) {
  return reinterpret_cast<float*>(packed + layout.centre);
}

// The six arrays of `keys` numbers one after the other, as the packed form has them.
inline KeyCodes key_codes(float* numbers, int64_t keys, int8_t* codes) {
  return {numbers,
          numbers + keys,
          numbers + 2 * keys,
          numbers + 3 * keys,
          numbers + 4 * keys,
          reinterpret_cast<int32_t*>(numbers + 5 * keys),
          codes};
}

inline KeyCodes packed_codes(uint8_t* packed, const PackedLayout& layout) {
  return key_codes(
      reinterpret_cast<float*>(packed + layout.numbers), layout.padded,
      reinterpret_cast<int8_t*>(packed + layout.codes));
}

inline int64_t code_steps(int64_t dim) { return ceil_div(dim, kStepDims); }

// Writes the bound of key j of a group. `staged` and `codes` are room for one row.
template <class T>
void encode_key(
    const T* row, const float* centre, double centre_norm, int64_t dim, Metric metric, const ErrorTerms& error,
    float* staged, uint8_t* codes, const KeyCodes& group, int64_t j) {
  const StagedKey key = stage_key(row, centre, centre_norm, dim, metric, error, staged);
  const Codes coded = quantise(staged, dim, kKeyLevels, 0, codes);
  if (key.screened == Screened::yes) {
    // 32 u: the rounding of the two rows, and of the few float32 operations that make the score of the product.
    const double residual = residual_above(coded, key.norm, error) + key.slope + 32.0 * kUnit32 * key.norm;
    group.base[j] = round_down(key.height - key.slack);
    group.residual[j] = round_up(residual * (1.0 + 32.0 * kUnit32));
    group.norm[j] = round_up((key.norm + residual) * (1.0 + 32.0 * kUnit32));
    group.slack[j] = round_up(key.slack);
  } else {
    const bool exact = key.screened == Screened::always_exact;
    group.base[j] = exact ? -kInfinity : kInfinity;
    group.residual[j] = group.norm[j] = 0.0f;
    group.slack[j] = exact ? kInfinity : 0.0f;
  }
  group.scale[j] = coded.scale;
  group.sum[j] = coded.sum;
}

inline void no_key(const KeyCodes& group, int64_t j) {
  group.base[j] = kInfinity;
  group.scale[j] = group.residual[j] = group.norm[j] = group.slack[j] = 0.0f;
  group.sum[j] = 0;
}

// Room for the rows of pack_group.
inline int64_t pack_scratch_bytes(int64_t dim) {
  return staged_dim(dim) * static_cast<int64_t>(sizeof(float)) + 16 * staged_dim(dim);
}

// Packs keys [first, first + 64) of the keys to the start of what `group` points to.
template <class T>
void pack_group(
    const Rows& keys, int64_t first, const float* centre, double centre_norm, Metric metric, const ErrorTerms& error,
    void* scratch, const KeyCodes& group) {
  const int64_t dim = keys.cols, stride = staged_dim(dim);
  float* staged = static_cast<float*>(scratch);
  uint8_t* rows = reinterpret_cast<uint8_t*>(staged + stride);
  for (int64_t quarter = 0; quarter < kGroupKeys; quarter += 16) {
    for (int64_t j = 0; j < 16; ++j) {
      const int64_t key = first + quarter + j;
      if (key < keys.rows) {
        encode_key(
            keys.row<T>(key), centre, centre_norm, dim, metric, error, staged, rows + j * stride, group, quarter + j);
      } else {
        no_key(group, quarter + j);
        std::memset(rows + j * stride, 0, static_cast<size_t>(stride));
      }
    }
    interleave_words(rows, stride, code_steps(dim), group.codes + quarter * kStepDims, kStepBytes);
  }
}

}  // namespace
}  // namespace MEMAD_FAST_ISA
}  // namespace memad_fast
