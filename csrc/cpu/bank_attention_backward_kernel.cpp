// One level of bank_attention's backward (see bank_attention.h). Compiled once per instruction set.
//
// The tile of bank_attention_tile.h with its softmax computed again. Beside Q . bank^T it takes G . bank^T,
// dQ = dX . bank, and for the bank V^T . G + dX^T . Q.
#include "cpu/bank_attention_tile.h"

namespace memad_fast {
namespace MEMAD_FAST_ISA {
namespace {

// The rows of a partition are cut into chunks, so that few partitions still feed many threads. Each chunk has a partial
// gradient of the bank; they are added in order. The cut depends on shapes alone, never on threads.
constexpr int64_t kChunks = 32;                     // partitions x chunks aimed at
constexpr int64_t kPartialFloats = int64_t{8} << 20;  // 32 MiB of partial gradients in all

// c [rows][vectors] += a^T . b for a [depth][rows] and b [depth][vectors]; rows are rounded up to kRows.
void add_transposed(const LeftRows& a, const LeftRows& b, int64_t first, int64_t vectors, int64_t depth, float* c,
                    int64_t c_stride, int64_t rows) {
  multiply_dense(ByDepth{a.row(0), a.stride()}, b.row(0) + first, b.stride(), vectors, depth, true, c, c_stride, rows);
}

// For one row, from s, e and dv: v over e, and dx_j scale_j (the coefficient of item j in dq, and of q in dm_j) over
// dv. Adds dx_j x_j to `along`, the part of dm_j along m_j; returns its sum over j, the part of dq along q.
inline float differentiate_row(const BankAttentionInputs& in, const float* scale, const float* s, float* e, float* dv,
                               RowSoftmax row, float* along) {
  const F32 cut = F32::set1(row.cut), shift = F32::set1(row.shift), zero = F32::zero();
  F32 kept_sum = zero, kept_dv = zero, mask_sum = zero, mask_dv = zero;
  for (int64_t j = 0; j < in.items; j += kLanes) {
    const F32 weight = F32::load(e + j), gradient = F32::load(dv + j);
    const M32 above = weight > cut;
    const F32 kept = select(above, weight - shift, zero), masked = select(above, weight, zero);
    kept_sum = kept_sum + kept;
    kept_dv = fma(kept, gradient, kept_dv);
    mask_sum = mask_sum + masked;
    mask_dv = fma(masked, gradient, mask_dv);
  }
  const float inverse = 1.0f / row.sum;
  const float sum = reduce_add(kept_sum), floor = kSumFloor * row.sum;
  // v = kept * factor; d kept_j = k_j (dv_j - mean) * factor * row.sum, in units of p.
  float factor = inverse, mean = 0.0f;
  if (in.renormalize) {
    factor = 1.0f / (sum > floor ? sum : floor);
    if (sum > floor) mean = reduce_add(kept_dv) * factor;
  }
  if (row.is_nan()) factor = row.sum;
  const float stretch = factor * row.sum;  // dw / (dv - mean): 1 without renormalisation
  const float average = (reduce_add(mask_dv) - mean * reduce_add(mask_sum)) * inverse;  // sum k p dw / stretch
  F32 along_query = zero;
  for (int64_t j = 0; j < in.items; j += kLanes) {
    const F32 weight = F32::load(e + j), factor_j = F32::load(scale + j);
    const M32 above = weight > cut;
    const F32 dw = select(above, F32::load(dv + j) - F32::set1(mean), zero) - F32::set1(average);
    const F32 dx = weight * F32::set1(inverse * stretch) * dw;
    (select(above, weight - shift, zero) * F32::set1(factor)).store(e + j);
    (dx * factor_j).store(dv + j);
    const F32 both = dx * (F32::load(s + j) * factor_j);
    (F32::load(along + j) + both).store(along + j);
    along_query = along_query + both;
  }
  return reduce_add(along_query);
}

template <class T>
class BackwardTask {
 public:
  explicit BackwardTask(const BankAttentionBackward& args)
      : args_(args),
        in_(args.in),
        bank_(args.in),
        query_(args.in.width),
        grad_(args.in.width),
        products_(args.in.items),
        weights_(args.in.items),
        grad_weights_(args.in.items),
        sums_memory_(floats(kTile * kSumsStride)),
        bank_memory_(floats(bank_.items().padded() * (query_.stride() + 1))),
        grad_bank_(bank_memory_.as<float>()),
        along_(grad_bank_ + bank_.items().padded() * query_.stride()) {}

  // The gradient of rows [first, stop) of a partition, and what they add to the gradient of its bank.
  template <class U>
  void run(int64_t partition, int64_t first, int64_t stop, U* grad_bank) {
    bank_.select(partition);
    const int64_t size = bank_.items().padded() * (query_.stride() + 1);
    for (int64_t i = 0; i < size; ++i) grad_bank_[i] = 0.0f;
    for (; first < stop; first += kTile) tile(partition, first, smaller(kTile, stop - first));
    for (int64_t j = 0; j < in_.items; ++j) store_item(j, grad_bank + j * in_.width);
  }

 private:
  void tile(int64_t partition, int64_t first, int64_t rows) {
    load_rows(RowPointers<const T>(in_.query, partition, first, rows), rows, in_.width, in_.cosine, scales_, query_);
    load_rows(RowPointers<const T>(args_.grad, partition, first, rows), rows, in_.width, false, unused_, grad_);
    weigh(rows);
    for (int64_t r = 0; r < rows; ++r) {
      const RowSoftmax row = softmax_row(in_, bank_.scale(), products_.row(r), weights_.row(r));
      along_query_[r] =
          differentiate_row(in_, bank_.scale(), products_.row(r), weights_.row(r), grad_weights_.row(r), row, along_);
    }
    store_grad_query(partition, first, rows);
    if (bank_.has_floor_items()) drop_floor_items(rows);
    add_to_bank(rows);
  }

  // Q . items^T and G . items^T; each slice of the bank serves both.
  void weigh(int64_t rows) {
    const Panels& items = bank_.items();
    each_block(items, kVectors, [&](const Block& block) {
      const int64_t start = items.start(block.panel) + block.first * kLanes;
      for (int64_t d = 0; d == 0 || d < in_.width; d += kDepth) {
        const int64_t depth = smaller(kDepth, in_.width - d);
        const float* slice = bank_.columns(block, d, depth);
        query_.multiply(slice, items.stride, block.vectors, d, depth, products_.row(0) + start, products_.stride(),
                        rows);
        grad_.multiply(slice, items.stride, block.vectors, d, depth, grad_weights_.row(0) + start,
                       grad_weights_.stride(), rows);
      }
    });
  }

  // dot: dq = sum_j dx_j scale_j m_j. cosine: that, less its part along q, over the norm of q.
  void store_grad_query(int64_t partition, int64_t first, int64_t rows) {
    const RowPointers<T> out(args_.grad_query, partition, first, rows);
    // 0 times what is there, where the norm is at the floor: no gradient, but a NaN stays.
    float factor[kTile];
    for (int64_t r = 0; r < rows; ++r) factor[r] = scales_[r].at_floor ? 0.0f : scales_[r].scale;
    over_items(bank_, grad_weights_, rows, sums_memory_.as<float>(), [&](float* sums, int64_t start, int64_t count) {
      if (in_.cosine)
        for (int64_t r = 0; r < rows; ++r)
          remove_along(query_.row(r) + start, along_query_[r], scales_[r].pre, count, sums + r * kSumsStride);
      store_rows(sums, start, count, factor, rows, out);
    });
  }

  static void remove_along(const float* unit, float along, float pre, int64_t count, float* row) {
    const F32 part = F32::set1(-along), by = F32::set1(pre);
    for (int64_t d = 0; d < count; d += kLanes)
      (fma(part, F32::load(unit + d), F32::load(row + d)) * by).store(row + d);
  }

  // An item whose norm is at the floor gets no gradient through its cosine.
  void drop_floor_items(int64_t rows) {
    for (int64_t j = 0; j < in_.items; ++j) {
      if (bank_.direction()[j] != 0.0f) continue;
      for (int64_t r = 0; r < rows; ++r) grad_weights_.row(r)[j] = 0.0f;
    }
  }

  // grad_bank += V^T . G + dX^T . Q
  void add_to_bank(int64_t rows) {
    const Panels& values = bank_.values();
    const int64_t stride = query_.stride();
    each_block(values, kVectors, [&](const Block& block) {
      const int64_t start = values.start(block.panel) + block.first * kLanes;
      add_transposed(weights_, grad_, start, block.vectors, rows, grad_bank_ + start, stride, in_.items);
      add_transposed(grad_weights_, query_, start, block.vectors, rows, grad_bank_ + start, stride, in_.items);
    });
  }

  // The cosine's gradient has no part along the item: less unit_j along_j / norm_j.
  template <class U>
  void store_item(int64_t j, U* out) {
    const T* item = bank_.item(j);
    const float* sum = grad_bank_ + j * query_.stride();
    const float direction = in_.cosine ? bank_.direction()[j] : 0.0f;
    const F32 part = F32::set1(-along_[j] * direction), by = F32::set1(direction);
    for (int64_t d = 0; d < in_.width; d += kLanes) {
      const int count = static_cast<int>(smaller(kLanes, in_.width - d));
      const F32 unit = F32::load_first(item + d, count) * by;
      const F32 value = F32::load(sum + d);
      store_first(in_.cosine ? fma(part, unit, value) : value, out + d, count);
    }
  }

  const BankAttentionBackward& args_;
  const BankAttentionInputs& in_;
  PackedBank<T> bank_;
  LeftRows query_, grad_, products_, weights_, grad_weights_;
  const Scratch sums_memory_, bank_memory_;
  float *const grad_bank_, *const along_;
  RowScale scales_[kTile], unused_[kTile];
  float along_query_[kTile];
};

// Chunks of a partition's rows; see kChunks.
int64_t chunks_of(const BankAttentionInputs& in) {
  const int64_t wanted = (kChunks + in.partitions - 1) / in.partitions;
  const int64_t affordable = kPartialFloats / (in.partitions * in.items * (in.width < 1 ? 1 : in.width));
  const int64_t chunks = smaller(smaller(wanted, affordable), tiles_of(in) / 2);
  return chunks < 1 ? 1 : chunks;
}

template <class T>
void backward(const BankAttentionBackward& args, const ThreadLoop& loop) {
  const BankAttentionInputs& in = args.in;
  const int64_t chunks = chunks_of(in), size = in.items * in.width;
  const Scratch partial_memory = floats(chunks == 1 ? 0 : in.partitions * chunks * size);
  float* partial = partial_memory.as<float>();
  T* grad_bank = static_cast<T*>(args.grad_bank);
  loop(in.partitions * chunks, 1, [&](int64_t begin, int64_t end) {
    BackwardTask<T> task(args);
    for (int64_t index = begin; index < end; ++index) {
      const int64_t partition = index / chunks, chunk = index % chunks;
      const int64_t first = chunk * tiles_of(in) / chunks * kTile;
      const int64_t stop = smaller((chunk + 1) * tiles_of(in) / chunks * kTile, in.rows);
      if (chunks == 1) {
        task.run(partition, first, stop, grad_bank + partition * size);
      } else {
        task.run(partition, first, stop, partial + index * size);
      }
    }
  });
  if (chunks == 1) return;
  loop(in.partitions * in.items, 8, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const float* first = partial + (item / in.items * chunks * in.items + item % in.items) * in.width;
      for (int64_t d = 0; d < in.width; ++d) {
        float sum = first[d];
        for (int64_t chunk = 1; chunk < chunks; ++chunk) sum += first[chunk * size + d];
        scalar_to(sum, grad_bank + item * in.width + d);
      }
    }
  });
}

}  // namespace

void bank_attention_backward(const BankAttentionBackward& args, const ThreadLoop& loop) {
  if (args.in.partitions == 0) return;
  MEMAD_FAST_BY_DTYPE(args.in.dtype, scalar, backward<scalar>(args, loop);)
}

}  // namespace MEMAD_FAST_ISA
}  // namespace memad_fast
