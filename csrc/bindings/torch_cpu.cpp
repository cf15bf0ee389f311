// torch.ops.memad_fast.* for CPU tensors, over the LibTorch stable ABI (target 2.10: one binary serves every
// later torch). Schemas, fake kernels and autograd are in Python (memad_fast/ops); checks with ValueError and
// TypeError are made there too. The checks here are the second line, for direct calls of torch.ops.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "bindings/partition_view.h"
#include "bindings/tensor_rows.h"
#include "core/huge_pages.h"
#include "core/parallel.h"
#include "core/types.h"
#include "cpu/bank_attention.h"
#include "cpu/fifo_write_.h"
#include "cpu/gumbel_topk.h"
#include "cpu/histogram_correction.h"
#include "cpu/nearest_keys.h"
#include "cpu/ssim.h"
#include "cpu/stcm_lookup.h"

namespace {

using memad_fast::Dtype;
using memad_fast::PartitionView;
using memad_fast::dtype_of;
using memad_fast::last_contiguous;
using memad_fast::Rows;
using memad_fast::rows_of;
using memad_fast::ThreadLoop;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

ThreadLoop torch_loop() {
  const auto run = [](int64_t begin, int64_t end, int64_t grain, ThreadLoop::Body body, const void* context) {
    torch::stable::parallel_for(begin, end, grain, [body, context](int64_t from, int64_t to) { body(from, to, context); });
  };
  return {run, static_cast<int>(torch::stable::get_num_threads())};
}

// --- gumbel_topk ------------------------------------------------------------------------------------------

memad_fast::Combine combine_of(const std::string& name) {
  constexpr const char* names[] = {"sum", "mean", "softmax", "renormalized", "straight_through"};
  for (int code = 0; code < 5; ++code)
    if (name == names[code]) return static_cast<memad_fast::Combine>(code);
  STD_TORCH_CHECK(false, "combine: expected sum, mean, softmax, renormalized or straight_through, got ", name);
}

int64_t seed_of(const std::optional<Tensor>& seed) {
  if (!seed) return 0;
  STD_TORCH_CHECK(seed->scalar_type() == ScalarType::Long && seed->dim() == 0, "seed: expected a 0-dimensional int64 tensor");
  return *seed->const_data_ptr<int64_t>();
}

std::tuple<Tensor, Tensor, Tensor> gumbel_topk(
    const Tensor& query, const Tensor& memory, int64_t k, double temperature, const std::optional<Tensor>& seed,
    const std::string& combine) {
  const Tensor queries = last_contiguous(query), items = last_contiguous(memory);
  const Rows query_rows = rows_of(queries, "query"), memory_rows = rows_of(items, "memory");
  STD_TORCH_CHECK(query_rows.cols == memory_rows.cols && query_rows.dtype == memory_rows.dtype,
                  "memory: expected the width and dtype of query");
  STD_TORCH_CHECK(k >= 1 && k <= memory_rows.rows, "k: expected 1 to ", memory_rows.rows, ", got ", k);
  STD_TORCH_CHECK(temperature > 0.0, "temperature: expected a positive number, got ", temperature);
  Tensor read = torch::stable::new_empty(queries, {query_rows.rows, query_rows.cols});
  Tensor indices = torch::stable::new_empty(queries, {query_rows.rows, k}, ScalarType::Long);
  Tensor scores = torch::stable::new_empty(queries, {query_rows.rows, k}, ScalarType::Float);
  memad_fast::gumbel_topk(
      {query_rows, memory_rows, k, temperature, seed.has_value(), seed_of(seed), combine_of(combine),
       read.mutable_data_ptr(), indices.mutable_data_ptr<int64_t>(), scores.mutable_data_ptr<float>()},
      torch_loop());
  return {read, indices, scores};
}

std::tuple<Tensor, Tensor> gumbel_topk_backward(
    const Tensor& grad_read, const Tensor& grad_scores, const Tensor& query, const Tensor& memory, double temperature,
    const std::optional<Tensor>& seed, const std::string& combine, const Tensor& indices, const Tensor& scores) {
  const Tensor queries = last_contiguous(query), items = last_contiguous(memory);
  const Tensor grads = last_contiguous(grad_read), score_grads = torch::stable::contiguous(grad_scores);
  const Rows query_rows = rows_of(queries, "query"), memory_rows = rows_of(items, "memory");
  Tensor grad_query = torch::stable::new_empty(queries, {query_rows.rows, query_rows.cols});
  Tensor grad_memory = torch::stable::new_empty(items, {memory_rows.rows, memory_rows.cols});
  const Tensor chosen = torch::stable::contiguous(indices), chosen_scores = torch::stable::contiguous(scores);
  memad_fast::gumbel_topk_backward(
      {query_rows, memory_rows, rows_of(grads, "grad_read"), score_grads.const_data_ptr<float>(),
       chosen.const_data_ptr<int64_t>(), chosen_scores.const_data_ptr<float>(), chosen.size(1), temperature,
       seed.has_value(), seed_of(seed), combine_of(combine), grad_query.mutable_data_ptr(),
       grad_memory.mutable_data_ptr()},
      torch_loop());
  return {grad_query, grad_memory};
}

// --- bank_attention ---------------------------------------------------------------------------------------

// Kernels take one struct for what they read and what they write; they do not write through these.
PartitionView reading(const Tensor& tensor) {
  return {const_cast<void*>(tensor.const_data_ptr()), tensor.dim(), tensor.sizes().data(), tensor.strides().data()};
}
PartitionView writing(const Tensor& tensor) {
  return {tensor.mutable_data_ptr(), tensor.dim(), tensor.sizes().data(), tensor.strides().data()};
}

// A fresh tensor laid out like `query`, whose last dimension is contiguous; contiguous where empty_like moves that.
// The fake kernel (_empty_rows_like in memad_fast/ops/bank_attention.py) does the same.
Tensor empty_rows_like(const Tensor& original, const Tensor& query) {
  const bool in_place = original.get() == query.get();
  Tensor result = torch::stable::empty_like(query);
  if (in_place && query.size(-1) > 1 && result.stride(-1) != 1) {
    const std::vector<int64_t> sizes(query.sizes().begin(), query.sizes().end());
    result = torch::stable::new_empty(query, sizes);
  }
  memad_fast::prefer_huge_pages(result.mutable_data_ptr(),
                                static_cast<size_t>(result.numel()) * static_cast<size_t>(result.element_size()));
  return result;
}

memad_fast::Shrink shrink_of(const std::string& name) {
  if (name == "soft") return memad_fast::Shrink::soft;
  if (name == "hard") return memad_fast::Shrink::hard;
  STD_TORCH_CHECK(name == "none", "shrink: expected soft, hard or none, got ", name);
  return memad_fast::Shrink::none;
}

memad_fast::BankAttentionInputs bank_attention_inputs(
    const Tensor& query, const PartitionView& view, const Tensor& bank, double threshold, const std::string& shrink,
    bool renormalize, const std::string& similarity, double temperature) {
  STD_TORCH_CHECK(query.dim() >= 3, "query: expected at least 3 dimensions [..., P, C, D], got ", query.dim());
  STD_TORCH_CHECK(bank.dim() == 3, "bank: expected 3 dimensions [P, M, D], got ", bank.dim());
  STD_TORCH_CHECK(bank.scalar_type() == query.scalar_type(), "bank: expected the dtype of query");
  STD_TORCH_CHECK(bank.size(0) == query.size(-3), "bank: expected ", query.size(-3), " partitions, got ", bank.size(0));
  STD_TORCH_CHECK(bank.size(2) == query.size(-1), "bank: expected ", query.size(-1), " values an item, got ", bank.size(2));
  STD_TORCH_CHECK(bank.size(1) >= 1, "bank: expected at least 1 item in each partition, got 0");
  STD_TORCH_CHECK(similarity == "cosine" || similarity == "dot", "similarity: expected cosine or dot, got ", similarity);
  STD_TORCH_CHECK(threshold >= 0.0 && std::isfinite(threshold), "threshold: expected a finite value of at least 0, got ", threshold);
  STD_TORCH_CHECK(temperature > 0.0 && std::isfinite(temperature), "temperature: expected a finite value above 0, got ", temperature);
  return {dtype_of(query, "query"), bank.size(0), view.count(), bank.size(1), bank.size(2), view.rows(), bank.const_data_ptr(),
          bank.stride(0), bank.stride(1), threshold, shrink_of(shrink), renormalize, similarity == "cosine", temperature};
}

Tensor bank_attention(const Tensor& query, const Tensor& bank, double threshold, const std::string& shrink,
                      bool renormalize, const std::string& similarity, double temperature) {
  STD_TORCH_CHECK(query.dim() >= 3, "query: expected at least 3 dimensions [..., P, C, D], got ", query.dim());
  const Tensor rows = last_contiguous(query), items = last_contiguous(bank);
  Tensor read = empty_rows_like(query, rows);
  const PartitionView query_view = reading(rows), read_view = writing(read);
  memad_fast::bank_attention(
      {bank_attention_inputs(rows, query_view, items, threshold, shrink, renormalize, similarity, temperature),
       read_view.rows()},
      torch_loop());
  return read;
}

std::tuple<Tensor, Tensor> bank_attention_backward(
    const Tensor& grad, const Tensor& query, const Tensor& bank, double threshold, const std::string& shrink,
    bool renormalize, const std::string& similarity, double temperature) {
  STD_TORCH_CHECK(query.dim() >= 3, "query: expected at least 3 dimensions [..., P, C, D], got ", query.dim());
  STD_TORCH_CHECK(grad.scalar_type() == query.scalar_type(), "grad: expected the dtype of query");
  STD_TORCH_CHECK(grad.dim() == query.dim(), "grad: expected the shape of query");
  for (int64_t d = 0; d < query.dim(); ++d) STD_TORCH_CHECK(grad.size(d) == query.size(d), "grad: expected the shape of query");
  const Tensor rows = last_contiguous(query), items = last_contiguous(bank), gradient = last_contiguous(grad);
  Tensor grad_query = empty_rows_like(query, rows);
  Tensor grad_bank = torch::stable::new_empty(items, {items.size(0), items.size(1), items.size(2)});
  const PartitionView query_view = reading(rows), grad_view = reading(gradient), out_view = writing(grad_query);
  memad_fast::bank_attention_backward(
      {bank_attention_inputs(rows, query_view, items, threshold, shrink, renormalize, similarity, temperature),
       grad_view.rows(), out_view.rows(), grad_bank.mutable_data_ptr()},
      torch_loop());
  return {grad_query, grad_bank};
}

std::tuple<Tensor, Tensor> bank_attention_stats(
    const Tensor& query, const Tensor& bank, double threshold, const std::string& shrink, const std::string& similarity,
    double temperature) {
  STD_TORCH_CHECK(query.dim() >= 3, "query: expected at least 3 dimensions [..., P, C, D], got ", query.dim());
  const Tensor rows = last_contiguous(query), items = last_contiguous(bank);
  Tensor dead_share = torch::stable::new_empty(items, {items.size(0)}, ScalarType::Float);
  Tensor entropy = torch::stable::new_empty(items, {items.size(0)}, ScalarType::Float);
  const PartitionView query_view = reading(rows);
  memad_fast::bank_attention_stats(
      {bank_attention_inputs(rows, query_view, items, threshold, shrink, false, similarity, temperature),
       dead_share.mutable_data_ptr<float>(), entropy.mutable_data_ptr<float>()},
      torch_loop());
  return {dead_share, entropy};
}

// --- histogram_correction ---------------------------------------------------------------------------------

int64_t pixels_of(const Tensor& error) {
  int64_t pixels = 1;
  for (int64_t d = 1; d < error.dim(); ++d) pixels *= error.size(d);
  return pixels;
}

int64_t smallest_count(double fraction, int64_t pixels) {
  STD_TORCH_CHECK(fraction >= 0.0 && fraction <= 1.0, "fraction: expected 0 to 1, got ", fraction);
  return static_cast<int64_t>(std::floor(fraction * static_cast<double>(pixels)));
}

std::tuple<Tensor, Tensor, Tensor> histogram_correction(const Tensor& error, double fraction) {
  STD_TORCH_CHECK(error.dim() >= 1, "error: expected at least 1 dimension [B, ...], got 0");
  const Tensor images = torch::stable::contiguous(error);
  const int64_t batch = images.size(0), pixels = pixels_of(images);
  Tensor corrected = torch::stable::empty_like(images);
  Tensor mu = torch::stable::new_empty(images, {batch}, ScalarType::Float);
  Tensor score = torch::stable::new_empty(images, {batch}, ScalarType::Float);
  memad_fast::histogram_correction(
      {images.const_data_ptr(), dtype_of(images, "error"), batch, pixels, pixels, smallest_count(fraction, pixels),
       corrected.mutable_data_ptr(), mu.mutable_data_ptr<float>(), score.mutable_data_ptr<float>()},
      torch_loop());
  return {corrected, mu, score};
}

Tensor histogram_correction_backward(
    const Tensor& grad_corrected, const Tensor& grad_mu, const Tensor& grad_score, const Tensor& error,
    const Tensor& mu, double fraction) {
  const Tensor images = torch::stable::contiguous(error), grad = torch::stable::contiguous(grad_corrected);
  const Tensor grad_means = torch::stable::contiguous(grad_mu), grad_sums = torch::stable::contiguous(grad_score);
  const int64_t batch = images.size(0), pixels = pixels_of(images);
  Tensor grad_error = torch::stable::empty_like(images);
  memad_fast::histogram_correction_backward(
      {grad.const_data_ptr(), grad_means.const_data_ptr<float>(), grad_sums.const_data_ptr<float>(),
       images.const_data_ptr(), mu.const_data_ptr<float>(), dtype_of(images, "error"), batch, pixels, pixels,
       smallest_count(fraction, pixels), grad_error.mutable_data_ptr()},
      torch_loop());
  return grad_error;
}

// --- nearest_keys, prepare_keys -----------------------------------------------------------------------------

using memad_fast::Metric;

Metric metric_of(const std::string& name) {
  if (name == "l2") return Metric::l2;
  if (name == "cosine") return Metric::cosine;
  STD_TORCH_CHECK(name == "ip", "metric: expected l2, cosine or ip, got ", name);
  return Metric::ip;
}

void check_same_columns(const Tensor& query, const Tensor& keys) {
  STD_TORCH_CHECK(query.scalar_type() == keys.scalar_type(), "keys: expected the dtype of query");
  STD_TORCH_CHECK(
      query.dim() == 2 && keys.dim() == 2 && query.size(1) == keys.size(1), "keys: expected [M, D] with the D of query");
}

// Views of the inputs and of new outputs, which must outlive the call.
struct Search {
  Tensor query, keys;
  std::optional<Tensor> packed;
  Tensor distances, indices;
  memad_fast::NearestKeys args;

  Search(const Tensor& query_in, const Tensor& keys_in, const std::optional<Tensor>& packed_in, int64_t k, Metric metric)
      : query(last_contiguous(query_in)), keys(last_contiguous(keys_in)),
        distances(torch::stable::new_empty(query_in, {query_in.size(0), k}, ScalarType::Float)),
        indices(torch::stable::new_empty(query_in, {query_in.size(0), k}, ScalarType::Long)) {
    check_same_columns(query, keys);
    STD_TORCH_CHECK(k >= 1 && k <= keys.size(0), "k: expected 1 to ", keys.size(0), ", got ", k);
    if (packed_in) {
      STD_TORCH_CHECK(packed_in->scalar_type() == ScalarType::Byte, "packed: expected a uint8 tensor");
      packed = torch::stable::contiguous(*packed_in);
    }
    args = {rows_of(query, "query"), rows_of(keys, "keys"), keys.size(0),
            packed ? static_cast<const uint8_t*>(packed->const_data_ptr()) : nullptr, packed ? packed->numel() : 0,
            k, metric, distances.mutable_data_ptr<float>(), indices.mutable_data_ptr<int64_t>()};
  }
};

std::tuple<Tensor, Tensor> nearest_keys(
    const Tensor& query, const Tensor& keys, const std::optional<Tensor>& packed, int64_t k, std::string metric) {
  const Search search(query, keys, packed, k, metric_of(metric));
  memad_fast::nearest_keys(search.args, torch_loop());
  return {search.distances, search.indices};
}

std::tuple<Tensor, Tensor> nearest_keys_stats(
    const Tensor& query, const Tensor& keys, const std::optional<Tensor>& packed, int64_t k, std::string metric) {
  Search search(query, keys, packed, k, metric_of(metric));
  const Tensor survivors = torch::stable::new_empty(query, {query.size(0)}, ScalarType::Long);
  const Tensor full_path = torch::stable::new_empty(query, {query.size(0)}, ScalarType::Bool);
  search.args.survivors = survivors.mutable_data_ptr<int64_t>();
  search.args.full_path = full_path.mutable_data_ptr<bool>();
  memad_fast::nearest_keys(search.args, torch_loop());
  return {survivors, full_path};
}

// One gradient of nearest_keys, like `target`.
Tensor search_gradient(
    void (*gradient)(const memad_fast::NearestKeysBackward&, const ThreadLoop&), const Tensor& target,
    const Tensor& grad_distances, const Tensor& query, const Tensor& keys, const Tensor& indices, Metric metric) {
  const Tensor q = last_contiguous(query), k = last_contiguous(keys);
  const Tensor grad = torch::stable::contiguous(grad_distances), found = torch::stable::contiguous(indices);
  check_same_columns(q, k);
  STD_TORCH_CHECK(found.dim() == 2 && found.size(0) == q.size(0) && grad.numel() == found.numel(),
                  "indices: expected [N, k] like grad_distances");
  Tensor out = torch::stable::new_empty(target, {target.size(0), target.size(1)});
  gradient(
      {grad.const_data_ptr<float>(), rows_of(q, "query"), rows_of(k, "keys"), found.const_data_ptr<int64_t>(),
       found.size(1), metric, out.mutable_data_ptr()},
      torch_loop());
  return out;
}

Tensor nearest_keys_backward_query(
    const Tensor& grad_distances, const Tensor& query, const Tensor& keys, const Tensor& indices, std::string metric) {
  return search_gradient(
      memad_fast::nearest_keys_backward_query, query, grad_distances, query, keys, indices, metric_of(metric));
}

Tensor nearest_keys_backward_keys(
    const Tensor& grad_distances, const Tensor& query, const Tensor& keys, const Tensor& indices, std::string metric) {
  return search_gradient(
      memad_fast::nearest_keys_backward_keys, keys, grad_distances, query, keys, indices, metric_of(metric));
}

// Finds the nearest of keys [first, last) and of those that `ranks` and `indices` hold; leaves the best there.
void nearest_keys_merge_(
    const Tensor& ranks, const Tensor& indices, const Tensor& query, const Tensor& keys, const std::optional<Tensor>& packed,
    int64_t first, int64_t last, int64_t offset, std::string metric) {
  const Tensor q = last_contiguous(query), rows = last_contiguous(keys);
  check_same_columns(q, rows);
  STD_TORCH_CHECK(ranks.scalar_type() == ScalarType::Double && ranks.is_contiguous() && ranks.dim() == 2 &&
                      ranks.size(0) == q.size(0) && ranks.size(1) >= 1,
                  "ranks: expected contiguous float64 [N, k] with the N of query");
  STD_TORCH_CHECK(indices.scalar_type() == ScalarType::Long && indices.is_contiguous() && indices.dim() == 2 &&
                      indices.size(0) == ranks.size(0) && indices.size(1) == ranks.size(1),
                  "indices: expected contiguous int64 [N, k] like ranks");
  STD_TORCH_CHECK(0 <= first && first <= last && last <= rows.size(0), "last: expected first to ", rows.size(0), ", got ", last);
  std::optional<Tensor> codes;
  if (packed) codes = torch::stable::contiguous(*packed);
  memad_fast::NearestKeys args{
      rows_of(q, "query"), rows_of(rows, "keys"), last,
      codes ? static_cast<const uint8_t*>(codes->const_data_ptr()) : nullptr, codes ? codes->numel() : 0,
      ranks.size(1), metric_of(metric), nullptr, indices.mutable_data_ptr<int64_t>()};
  args.skipped = first;
  args.ranks = ranks.mutable_data_ptr<double>();
  args.offset = offset;
  memad_fast::nearest_keys(args, torch_loop());
}

Tensor prepare_keys_with_room(const Tensor& keys, int64_t capacity, std::string metric) {
  const Tensor rows = last_contiguous(keys);
  const Rows view = rows_of(rows, "keys");
  STD_TORCH_CHECK(capacity >= view.rows, "capacity: expected at least ", view.rows, " like keys, got ", capacity);
  Tensor packed = torch::stable::new_empty(keys, {memad_fast::PackedLayout(capacity, view.cols).bytes}, ScalarType::Byte);
  memad_fast::prepare_keys(
      {view, capacity, metric_of(metric), static_cast<uint8_t*>(packed.mutable_data_ptr())}, torch_loop());
  return packed;
}

Tensor prepare_keys(const Tensor& keys, std::string metric) {
  return prepare_keys_with_room(keys, keys.size(0), std::move(metric));
}

void prepare_keys_rows_(const Tensor& packed, const Tensor& keys, const Tensor& rows, std::string metric) {
  STD_TORCH_CHECK(packed.scalar_type() == ScalarType::Byte && packed.is_contiguous(),
                  "packed: expected a contiguous uint8 tensor");
  const Tensor original = last_contiguous(keys), which = torch::stable::contiguous(rows);
  memad_fast::prepare_keys_rows(
      {rows_of(original, "keys"), metric_of(metric), static_cast<uint8_t*>(packed.mutable_data_ptr()), packed.numel(),
       which.const_data_ptr<int64_t>(), which.numel()});
}

// --- stcm_lookup, fifo_write_ -------------------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor> stcm_lookup(
    const Tensor& query, const Tensor& keys, const Tensor& values, const std::optional<Tensor>& packed,
    const std::optional<Tensor>& filled) {
  Search search(query, keys, packed, 1, Metric::l2);
  const Tensor rows = last_contiguous(values);
  const Rows view = rows_of(rows, "values");
  STD_TORCH_CHECK(view.rows == keys.size(0), "values: expected ", keys.size(0), " rows like keys, got ", view.rows);
  if (filled) {
    STD_TORCH_CHECK(filled->scalar_type() == ScalarType::Long && filled->numel() == 1,
                    "filled: expected one int64 element");
    search.args.searched = std::clamp<int64_t>(*filled->const_data_ptr<int64_t>(), 0, keys.size(0));
  }
  Tensor read = torch::stable::new_empty(values, {query.size(0), view.cols});
  memad_fast::stcm_lookup({search.args, view, read.mutable_data_ptr()}, torch_loop());
  return {read, torch::stable::reshape(search.distances, {query.size(0)}),
          torch::stable::reshape(search.indices, {query.size(0)})};
}

Tensor stcm_lookup_backward_values(const Tensor& grad_read, const Tensor& values, const Tensor& indices) {
  const Tensor grad = last_contiguous(grad_read), found = torch::stable::contiguous(indices);
  const Rows view = rows_of(grad, "grad_read");
  STD_TORCH_CHECK(values.dim() == 2 && values.size(1) == view.cols && values.scalar_type() == grad.scalar_type() &&
                      found.numel() == view.rows,
                  "grad_read: expected [N, V] with the V and dtype of values and the N of indices");
  Tensor out = torch::stable::new_empty(values, {values.size(0), values.size(1)});
  memad_fast::stcm_lookup_backward_values(
      {view, found.const_data_ptr<int64_t>(), values.size(0), out.mutable_data_ptr()}, torch_loop());
  return out;
}

memad_fast::Ring ring_of(const Tensor& slots, const Tensor& new_rows, const char* name) {
  STD_TORCH_CHECK(slots.dim() == 2 && new_rows.dim() == 2 && slots.size(1) == new_rows.size(1) &&
                      slots.scalar_type() == new_rows.scalar_type(),
                  "new_", name, ": expected [n, width] with the width and dtype of ", name);
  const auto size = static_cast<int64_t>(slots.element_size());
  return {static_cast<char*>(slots.mutable_data_ptr()), slots.stride(0) * size, slots.stride(1) * size,
          static_cast<const char*>(new_rows.const_data_ptr()), slots.size(1), size};
}

void fifo_write_(
    const Tensor& keys, const Tensor& values, const Tensor& cursor, const Tensor& new_keys, const Tensor& new_values) {
  const Tensor key_rows = torch::stable::contiguous(new_keys), value_rows = torch::stable::contiguous(new_values);
  const auto key_ring = ring_of(keys, key_rows, "keys"), value_ring = ring_of(values, value_rows, "values");
  STD_TORCH_CHECK(keys.size(0) >= 1 && keys.size(0) == values.size(0), "values: expected as many rows as keys, 1 or more");
  STD_TORCH_CHECK(key_rows.size(0) == value_rows.size(0), "new_values: expected as many rows as new_keys");
  STD_TORCH_CHECK(cursor.scalar_type() == ScalarType::Long && cursor.numel() == 1, "cursor: expected one int64 element");
  memad_fast::fifo_write_(
      {key_ring, value_ring, keys.size(0), key_rows.size(0), cursor.mutable_data_ptr<int64_t>()},
      torch_loop());
}

// --- ssim -------------------------------------------------------------------------------------------------

memad_fast::Planes planes_of(const Tensor& images) {
  return {images.const_data_ptr(), images.stride(0), images.stride(1), images.stride(2)};
}

// x and y must be last_contiguous and outlive the result.
memad_fast::SsimInput ssim_input(
    const Tensor& x, const Tensor& y, int64_t window_size, double sigma, double data_range, bool reflect) {
  STD_TORCH_CHECK(x.dim() == 4, "x: expected 4 dimensions [B, C, H, W], got ", x.dim());
  STD_TORCH_CHECK(y.dim() == 4, "y: expected 4 dimensions [B, C, H, W], got ", y.dim());
  for (int64_t d = 0; d < 4; ++d)
    STD_TORCH_CHECK(x.size(d) == y.size(d), "y: expected ", x.size(d), " like x in dimension ", d, ", got ", y.size(d));
  STD_TORCH_CHECK(x.scalar_type() == y.scalar_type(), "y: expected the dtype of x");
  STD_TORCH_CHECK(window_size >= 1 && window_size % 2 == 1, "window_size: expected an odd number, got ", window_size);
  STD_TORCH_CHECK(sigma > 0 && data_range > 0, "sigma, data_range: expected > 0, got ", sigma, ", ", data_range);
  const int64_t least = reflect ? window_size / 2 + 1 : window_size;
  STD_TORCH_CHECK(
      x.size(2) >= least && x.size(3) >= least, "window_size: expected images of at least ", least, " x ", least, ", got ",
      x.size(2), " x ", x.size(3));
  return {planes_of(x), planes_of(y), dtype_of(x, "x"), x.size(0), x.size(1), x.size(2), x.size(3),
          window_size, sigma, data_range, reflect};
}

Tensor ssim_map(
    const Tensor& x_any, const Tensor& y_any, int64_t window_size, double sigma, double data_range, bool reflect) {
  const Tensor x = last_contiguous(x_any), y = last_contiguous(y_any);
  const memad_fast::SsimInput input = ssim_input(x, y, window_size, sigma, data_range, reflect);
  Tensor map = torch::stable::new_empty(x, {input.batch, input.channels, input.window_rows(), input.window_cols()});
  memad_fast::ssim_map({input, map.mutable_data_ptr()}, torch_loop());
  return map;
}

Tensor ssim_loss(
    const Tensor& x_any, const Tensor& y_any, int64_t window_size, double sigma, double data_range, bool reflect) {
  const Tensor x = last_contiguous(x_any), y = last_contiguous(y_any);
  const memad_fast::SsimInput input = ssim_input(x, y, window_size, sigma, data_range, reflect);
  Tensor loss = torch::stable::new_empty(x, {}, ScalarType::Float);
  memad_fast::ssim_loss({input, loss.mutable_data_ptr<float>()}, torch_loop());
  return loss;
}

std::tuple<Tensor, Tensor> ssim_gradients(
    const void* grad_map, const float* grad_loss, const Tensor& x, const memad_fast::SsimInput& input) {
  Tensor grad_x = torch::stable::new_empty(x, {input.batch, input.channels, input.height, input.width});
  Tensor grad_y = torch::stable::empty_like(grad_x);
  memad_fast::ssim_backward(
      {input, grad_map, grad_loss, grad_x.mutable_data_ptr(), grad_y.mutable_data_ptr()}, torch_loop());
  return {grad_x, grad_y};
}

std::tuple<Tensor, Tensor> ssim_map_backward(
    const Tensor& grad_any, const Tensor& x_any, const Tensor& y_any, int64_t window_size, double sigma,
    double data_range, bool reflect) {
  const Tensor x = last_contiguous(x_any), y = last_contiguous(y_any), grad = torch::stable::contiguous(grad_any);
  const memad_fast::SsimInput input = ssim_input(x, y, window_size, sigma, data_range, reflect);
  STD_TORCH_CHECK(
      grad.dim() == 4 && grad.size(0) == input.batch && grad.size(1) == input.channels &&
          grad.size(2) == input.window_rows() && grad.size(3) == input.window_cols() &&
          grad.scalar_type() == x.scalar_type(),
      "grad: expected the shape and the dtype of the map");
  return ssim_gradients(grad.const_data_ptr(), nullptr, x, input);
}

std::tuple<Tensor, Tensor> ssim_loss_backward(
    const Tensor& grad, const Tensor& x_any, const Tensor& y_any, int64_t window_size, double sigma, double data_range,
    bool reflect) {
  const Tensor x = last_contiguous(x_any), y = last_contiguous(y_any);
  const memad_fast::SsimInput input = ssim_input(x, y, window_size, sigma, data_range, reflect);
  STD_TORCH_CHECK(grad.dim() == 0, "grad: expected 0 dimensions, got ", grad.dim());
  return ssim_gradients(nullptr, grad.const_data_ptr<float>(), x, input);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(memad_fast, CPU, m) {
  m.impl("bank_attention", TORCH_BOX(&bank_attention));
  m.impl("bank_attention_backward", TORCH_BOX(&bank_attention_backward));
  m.impl("bank_attention_stats", TORCH_BOX(&bank_attention_stats));
  m.impl("gumbel_topk", TORCH_BOX(&gumbel_topk));
  m.impl("gumbel_topk_backward", TORCH_BOX(&gumbel_topk_backward));
  m.impl("histogram_correction", TORCH_BOX(&histogram_correction));
  m.impl("histogram_correction_backward", TORCH_BOX(&histogram_correction_backward));
  m.impl("nearest_keys", TORCH_BOX(&nearest_keys));
  m.impl("nearest_keys_stats", TORCH_BOX(&nearest_keys_stats));
  m.impl("nearest_keys_backward_query", TORCH_BOX(&nearest_keys_backward_query));
  m.impl("nearest_keys_backward_keys", TORCH_BOX(&nearest_keys_backward_keys));
  m.impl("nearest_keys_merge_", TORCH_BOX(&nearest_keys_merge_));
  m.impl("prepare_keys", TORCH_BOX(&prepare_keys));
  m.impl("prepare_keys_with_room", TORCH_BOX(&prepare_keys_with_room));
  m.impl("prepare_keys_rows_", TORCH_BOX(&prepare_keys_rows_));
  m.impl("stcm_lookup", TORCH_BOX(&stcm_lookup));
  m.impl("stcm_lookup_backward_values", TORCH_BOX(&stcm_lookup_backward_values));
  m.impl("fifo_write_", TORCH_BOX(&fifo_write_));
  m.impl("ssim_loss", TORCH_BOX(&ssim_loss));
  m.impl("ssim_loss_backward", TORCH_BOX(&ssim_loss_backward));
  m.impl("ssim_map", TORCH_BOX(&ssim_map));
  m.impl("ssim_map_backward", TORCH_BOX(&ssim_map_backward));
}
