// One level of bank_attention's forward and statistics (see bank_attention.h). Compiled once per instruction set.
// bank_attention_tile.h draws the tiling.
#include "cpu/bank_attention_tile.h"

namespace memad_fast {
namespace MEMAD_FAST_ISA {
namespace {

// e -> kept weights, not divided; returns the factor that makes them v.
inline float shrink_row(const BankAttentionInputs& in, RowSoftmax row, float* e) {
  const F32 cut = F32::set1(row.cut), shift = F32::set1(row.shift);
  F32 total = F32::zero();
  for (int64_t j = 0; j < in.items; j += kLanes) {
    const F32 weight = F32::load(e + j);
    const F32 kept = select(weight > cut, weight - shift, F32::zero());
    kept.store(e + j);
    total = total + kept;
  }
  if (row.is_nan()) return row.sum;
  if (!in.renormalize) return 1.0f / row.sum;
  const float sum = reduce_add(total), floor = kSumFloor * row.sum;
  return 1.0f / (sum > floor ? sum : floor);
}

template <class T>
void forward(const BankAttention& args, int64_t begin, int64_t end) {
  const BankAttentionInputs& in = args.in;
  PackedBank<T> bank(in);
  LeftRows query(in.width), weights(in.items);
  const Scratch sums_memory = floats(kTile * kSumsStride);
  float* sums = sums_memory.as<float>();
  RowScale scales[kTile];
  float factor[kTile];
  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t partition = tile / tiles_of(in), first = tile % tiles_of(in) * kTile;
    const int64_t rows = smaller(kTile, in.rows - first);
    bank.select(partition);
    load_rows(RowPointers<const T>(in.query, partition, first, rows), rows, in.width, in.cosine, scales, query);
    query.prepare(rows, bank.items());
    against_items(bank, in.width, query, rows, weights);
    for (int64_t r = 0; r < rows; ++r) {
      float* row = weights.row(r);
      factor[r] = shrink_row(in, softmax_row(in, bank.scale(), row, row), row);
    }
    weights.prepare(rows, bank.values());
    const RowPointers<T> read(args.read, partition, first, rows);
    over_items(bank, weights, rows, sums, [&](float* sums, int64_t start, int64_t count) {
      store_rows(sums, start, count, factor, rows, read);
    });
  }
}

// What a row's weights say before they are shrunk. -sum p log p = log(sum) - (sum e (x - top)) / sum, as
// log e_j = x_j - top.
struct RowFacts {
  double entropy;
  bool is_dead;
};

inline RowFacts facts_of(const BankAttentionInputs& in, RowSoftmax row, const float* scale, const float* s,
                         const float* e) {
  const F32 top = F32::set1(row.top);
  F32 total = F32::zero(), largest = F32::zero();
  for (int64_t j = 0; j < in.items; j += kLanes) {
    const F32 weight = F32::load(e + j), logit = F32::load(s + j) * F32::load(scale + j);
    total = total + select(weight > F32::zero(), weight * (logit - top), F32::zero());
    largest = max(weight, largest);
  }
  return {__builtin_log(static_cast<double>(row.sum)) - static_cast<double>(reduce_add(total)) / row.sum,
          !row.is_nan() && !(reduce_max(largest) > row.cut)};
}

template <class T>
void tile_stats(const BankAttentionInputs& in, int64_t begin, int64_t end, double* entropy, int64_t* dead) {
  PackedBank<T> bank(in);
  LeftRows query(in.width), products(in.items);
  const Scratch weight_memory = floats(bank.items().padded());
  float* weights = weight_memory.as<float>();
  RowScale scales[kTile];
  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t partition = tile / tiles_of(in), first = tile % tiles_of(in) * kTile;
    const int64_t rows = smaller(kTile, in.rows - first);
    bank.select(partition);
    load_rows(RowPointers<const T>(in.query, partition, first, rows), rows, in.width, in.cosine, scales, query);
    query.prepare(rows, bank.items());
    against_items(bank, in.width, query, rows, products);
    entropy[tile] = 0.0;
    dead[tile] = 0;
    for (int64_t r = 0; r < rows; ++r) {
      const RowSoftmax row = softmax_row(in, bank.scale(), products.row(r), weights);
      const RowFacts facts = facts_of(in, row, bank.scale(), products.row(r), weights);
      entropy[tile] += facts.entropy;
      dead[tile] += facts.is_dead;
    }
  }
}

}  // namespace

void bank_attention(const BankAttention& args, const ThreadLoop& loop) {
  loop(args.in.partitions * tiles_of(args.in), 1, [&](int64_t begin, int64_t end) {
    MEMAD_FAST_BY_DTYPE(args.in.dtype, scalar, forward<scalar>(args, begin, end);)
  });
}

void bank_attention_stats(const BankAttentionStats& args, const ThreadLoop& loop) {
  const BankAttentionInputs& in = args.in;
  const int64_t tiles = tiles_of(in);
  const Scratch entropy_memory(sizeof(double) * static_cast<size_t>(in.partitions * tiles));
  const Scratch dead_memory(sizeof(int64_t) * static_cast<size_t>(in.partitions * tiles));
  double* entropy = entropy_memory.as<double>();
  int64_t* dead = dead_memory.as<int64_t>();
  loop(in.partitions * tiles, 1, [&](int64_t begin, int64_t end) {
    MEMAD_FAST_BY_DTYPE(in.dtype, scalar, tile_stats<scalar>(in, begin, end, entropy, dead);)
  });
  for (int64_t partition = 0; partition < in.partitions; ++partition) {
    double entropy_sum = 0.0;
    int64_t dead_rows = 0;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      entropy_sum += entropy[partition * tiles + tile];
      dead_rows += dead[partition * tiles + tile];
    }
    // 0 / 0 = NaN where there are no rows.
    args.entropy[partition] = static_cast<float>(entropy_sum / static_cast<double>(in.rows));
    args.dead_share[partition] = static_cast<float>(static_cast<double>(dead_rows) / static_cast<double>(in.rows));
  }
}

}  // namespace MEMAD_FAST_ISA
}  // namespace memad_fast
