// Thresholded attention over partitioned memory banks on the CPU (PMB, eq. 2-5; MemAE's read too).
//
// For each partition, and each of its query rows q against its M items m_j:
//   x_j = similarity(q, m_j) / temperature      p = softmax(x)
//   w_j = soft: max(p_j - t, 0)   hard: p_j if p_j > t else 0   none: p_j
//   v   = renormalize: w / max(sum w, 1e-12), else w
//   read = sum_j v_j m_j
// Backward, for a gradient g of the read (sums over the items of the row, k_j = 1 where w_j is above the threshold):
//   dv_j = g . m_j                             dw = renormalize: (dv - sum dv v) / sum w, else dv
//   dx_j = p_j (k_j dw_j - sum k p dw)
//   dq   = sum_j dx_j dx_j/dq                  dm_j = sum over rows of v_j g + dx_j dx_j/dm_j
// The weights live in tiles of scratch memory; the backward computes them again.
#pragma once

#include <cstdint>

#include "core/parallel.h"
#include "core/types.h"

namespace memad_fast {

// The rows of one partition of a [..., P, C, D] tensor: D contiguous, every other dimension with a stride of its own.
struct PartitionRows {
  void* data;
  int64_t partition_stride;  // in elements, as all strides here
  int dims;                  // the leading dimensions and C, outermost first, merged where strides allow
  const int64_t* sizes;
  const int64_t* strides;

  // Where row `index` of a partition starts, counted from the partition's start.
  int64_t offset(int64_t index) const {
    int64_t offset = 0;
    for (int d = dims - 1; d >= 0; --d) {
      const int64_t rest = index / sizes[d];
      offset += (index - rest * sizes[d]) * strides[d];
      index = rest;
    }
    return offset;
  }
};

enum class Shrink : int { soft = 0, hard = 1, none = 2 };

// What forward, backward and statistics have in common.
struct BankAttentionInputs {
  Dtype dtype;  // of every tensor but the statistics
  int64_t partitions;
  int64_t rows;   // query rows of a partition
  int64_t items;  // M >= 1
  int64_t width;  // D
  PartitionRows query;
  const void* bank;  // [partitions, items, width], width contiguous
  int64_t bank_partition_stride;
  int64_t bank_item_stride;
  double threshold;
  Shrink shrink;
  bool renormalize;
  bool cosine;  // else dot product
  double temperature;
};

struct BankAttention {
  BankAttentionInputs in;
  PartitionRows read;
};

struct BankAttentionBackward {
  BankAttentionInputs in;
  PartitionRows grad;        // of the read
  PartitionRows grad_query;
  void* grad_bank;           // [partitions, items, width], contiguous
};

struct BankAttentionStats {
  BankAttentionInputs in;
  float* dead_share;  // [partitions]
  float* entropy;     // [partitions]
};

void bank_attention(const BankAttention& args, const ThreadLoop& loop);
void bank_attention_backward(const BankAttentionBackward& args, const ThreadLoop& loop);
void bank_attention_stats(const BankAttentionStats& args, const ThreadLoop& loop);

}  // namespace memad_fast
