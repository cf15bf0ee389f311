// Top-k memory read with Gumbel noise on the CPU (SimSID; memad_fast/ops/gumbel_topk.py has the contract).
//
//   score_ij = query_i . memory_j + g(seed, i, j)     indices_i = the k columns with the largest scores
//   read_i   = sum over them of weight * memory_j     weights by Combine
//
// No [queries, items] matrix is stored: the forward's scores live in strips of 256 columns, and the backward recomputes
// them in blocks of rows.
#pragma once

#include <cstdint>

#include "core/parallel.h"
#include "core/types.h"

namespace memad_fast {

enum class Combine : int {
  sum = 0,
  mean = 1,
  softmax = 2,           // weights of the softmax over all items of score / temperature
  renormalized = 3,      // the same over the chosen items
  straight_through = 4,  // forward as renormalized; backward of the dense softmax read
};

struct GumbelTopk {
  Rows query;   // [N, D]
  Rows memory;  // [M, D], dtype of query
  int64_t k;
  double temperature;
  bool noise;
  int64_t seed;
  Combine combine;
  void* read;        // [N, D], contiguous, of query's dtype
  int64_t* indices;  // [N, k]
  float* scores;     // [N, k]
};

struct GumbelTopkBackward {
  Rows query;
  Rows memory;
  Rows grad_read;            // [N, D], dtype of query
  const float* grad_scores;  // [N, k], contiguous
  const int64_t* indices;    // [N, k], as the forward gave them
  const float* scores;       // [N, k]
  int64_t k;
  double temperature;
  bool noise;
  int64_t seed;
  Combine combine;
  void* grad_query;   // [N, D], contiguous, of query's dtype
  void* grad_memory;  // [M, D]
};

// Which (row, slot) pairs chose each memory row, in the order of the batch: pairs[starts[j]] to pairs[starts[j + 1]]
// are row * k + slot for memory row j.
struct Choices {
  const int64_t* starts;
  const int64_t* pairs;
};

void gumbel_topk(const GumbelTopk& args, const ThreadLoop& loop);
void gumbel_topk_backward(const GumbelTopkBackward& args, const ThreadLoop& loop);

// The four words of Philox4x32-10 at the instruction set in force, for checking it against published vectors.
void philox4x32(const uint32_t* counter, int64_t key, uint32_t* words);

// The noise that each random word becomes, and the bounds that stand in for it, for checking them one by one.
void gumbel_noise(const uint32_t* words, int64_t count, float* low, float* noise, float* high);

}  // namespace memad_fast
