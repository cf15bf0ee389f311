// torch.ops.memad_fast.* for CUDA tensors, over the LibTorch stable ABI (target 2.10). Each op runs on the tensor's
// device and on that device's current stream. A library of its own, so that a CPU-only torch meets no CUDA symbol.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cmath>
#include <cstdint>
#include <optional>
#include <string>
#include <tuple>

#include "bindings/tensor_rows.h"
#include "core/types.h"
#include "cuda/fifo_write_.h"
#include "cuda/histogram_correction.h"
#include "cuda/nearest_keys.h"
#include "cuda/ssim.h"

// Declared by torch only under USE_CUDA; defined in libtorch_cuda, which the build links.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace {

using memad_fast::Dtype;
using memad_fast::dtype_of;
using memad_fast::last_contiguous;
using memad_fast::Rows;
using memad_fast::rows_of;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::accelerator::DeviceGuard;

void* current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return stream;
}

void check_launch(int error, const char* op) {
  STD_TORCH_CHECK(error == 0, op, ": the CUDA launch failed with error ", error);
}

void check_device(const Tensor& tensor, const Tensor& query, const char* name) {
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == query.get_device_index(), name,
                  ": expected a tensor on CUDA device ", query.get_device_index());
}

// --- fifo_write_ ------------------------------------------------------------------------------------------------

memad_fast::cuda::RingCopy ring_copy(Tensor& ring, const Tensor& rows, const char* name) {
  STD_TORCH_CHECK(ring.dim() == 2 && rows.dim() == 2, name, ": expected 2 dimensions");
  STD_TORCH_CHECK(
      rows.size(1) == ring.size(1) && rows.scalar_type() == ring.scalar_type() && rows.get_device_index() == ring.get_device_index(),
      name, ": new rows must have the width, dtype and device of the memory");
  const auto bytes = static_cast<int64_t>(ring.element_size());
  return {static_cast<char*>(ring.mutable_data_ptr()), ring.stride(0) * bytes, ring.stride(1) * bytes,
          static_cast<const char*>(rows.const_data_ptr()), rows.stride(0) * bytes, rows.stride(1) * bytes,
          ring.size(1), bytes};
}

void fifo_write_(Tensor keys, Tensor values, Tensor cursor, const Tensor& new_keys, const Tensor& new_values) {
  STD_TORCH_CHECK(cursor.scalar_type() == ScalarType::Long && cursor.numel() == 1, "cursor: expected one int64");
  STD_TORCH_CHECK(cursor.is_cuda(), "cursor: expected a tensor on the memory's device");
  STD_TORCH_CHECK(keys.size(0) > 0, "keys: expected at least one slot");
  STD_TORCH_CHECK(values.size(0) == keys.size(0), "values: expected ", keys.size(0), " rows, got ", values.size(0));
  STD_TORCH_CHECK(
      new_values.size(0) == new_keys.size(0), "new_values: expected ", new_keys.size(0), " rows, got ",
      new_values.size(0));
  const DeviceGuard guard(keys.get_device_index());
  const int error = memad_fast::cuda::fifo_write(
      ring_copy(keys, new_keys, "keys"), ring_copy(values, new_values, "values"),
      cursor.mutable_data_ptr<int64_t>(), keys.size(0), new_keys.size(0), current_stream(keys));
  check_launch(error, "fifo_write_");
}

// --- nearest_keys, prepare_keys, stcm_lookup ----------------------------------------------------------------------

using memad_fast::cuda::Metric;
using memad_fast::cuda::PackedLayout;

Metric metric_of(const std::string& name) {
  if (name == "l2") return Metric::l2;
  if (name == "cosine") return Metric::cosine;
  STD_TORCH_CHECK(name == "ip", "metric: expected l2, cosine or ip, got ", name);
  return Metric::ip;
}

uint8_t* packed_bytes(const Tensor& packed, const Rows& keys) {
  const int64_t expected = PackedLayout(keys.rows, keys.cols).bytes();
  STD_TORCH_CHECK(packed.scalar_type() == ScalarType::Byte && packed.is_contiguous() && packed.numel() == expected,
                  "packed: expected the packed form of keys [", keys.rows, ", ", keys.cols, "], ", expected,
                  " contiguous bytes, got ", packed.numel());
  auto* bytes = static_cast<uint8_t*>(packed.mutable_data_ptr());
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(bytes) % 16 == 0, "packed: expected an address that is a multiple of 16");
  return bytes;
}

Tensor packed_keys(const Tensor& like, const Rows& keys, Metric metric, void* stream) {
  Tensor packed =
      torch::stable::new_empty(like, {PackedLayout(keys.rows, keys.cols).bytes()}, ScalarType::Byte);
  check_launch(
      memad_fast::cuda::prepare_keys(keys, metric, static_cast<uint8_t*>(packed.mutable_data_ptr()), stream),
      "prepare_keys");
  return packed;
}

// Views of the inputs and of new outputs, which must outlive the call. Its device must be the current one.
struct Search {
  Tensor query, keys, packed;
  Tensor distances, indices;
  void* stream;
  memad_fast::cuda::NearestKeys args;

  Search(
      const Tensor& query_in, const Tensor& keys_in, const std::optional<Tensor>& packed_in, int64_t k, Metric metric)
      : query(last_contiguous(query_in)), keys(last_contiguous(keys_in)),
        distances(torch::stable::new_empty(query_in, {query_in.size(0), k}, ScalarType::Float)),
        indices(torch::stable::new_empty(query_in, {query_in.size(0), k}, ScalarType::Long)),
        stream(current_stream(query_in)) {
    STD_TORCH_CHECK(query.scalar_type() == keys.scalar_type(), "keys: expected the dtype of query");
    STD_TORCH_CHECK(query.dim() == 2 && keys.dim() == 2 && query.size(1) == keys.size(1),
                    "keys: expected [M, D] with the D of query");
    check_device(keys, query, "keys");
    const Rows rows = rows_of(keys, "keys");
    STD_TORCH_CHECK(k >= 1 && k <= rows.rows, "k: expected 1 to ", rows.rows, ", got ", k);
    if (packed_in) check_device(*packed_in, query, "packed");
    packed = packed_in ? *packed_in : packed_keys(keys, rows, metric, stream);
    args = {rows_of(query, "query"), rows, nullptr, packed_bytes(packed, rows), k, metric,
            distances.mutable_data_ptr<float>(), indices.mutable_data_ptr<int64_t>()};
  }

  void run(const char* op) const {
    int64_t bytes = 0;
    check_launch(memad_fast::cuda::nearest_keys_workspace(args, &bytes), op);
    const Tensor workspace = torch::stable::new_empty(query, {bytes}, ScalarType::Byte);
    check_launch(
        memad_fast::cuda::nearest_keys(args, static_cast<uint8_t*>(workspace.mutable_data_ptr()), stream), op);
  }
};

std::tuple<Tensor, Tensor> nearest_keys(
    const Tensor& query, const Tensor& keys, const std::optional<Tensor>& packed, int64_t k, std::string metric) {
  const DeviceGuard guard(query.get_device_index());
  const Search search(query, keys, packed, k, metric_of(metric));
  search.run("nearest_keys");
  return {search.distances, search.indices};
}

std::tuple<Tensor, Tensor> nearest_keys_stats(
    const Tensor& query, const Tensor& keys, const std::optional<Tensor>& packed, int64_t k, std::string metric) {
  const DeviceGuard guard(query.get_device_index());
  Search search(query, keys, packed, k, metric_of(metric));
  const Tensor survivors = torch::stable::new_empty(query, {query.size(0)}, ScalarType::Long);
  const Tensor full_path = torch::stable::new_empty(query, {query.size(0)}, ScalarType::Bool);
  search.args.survivors = survivors.mutable_data_ptr<int64_t>();
  search.args.full_path = full_path.mutable_data_ptr<bool>();
  search.run("nearest_keys_stats");
  return {survivors, full_path};
}

Tensor prepare_keys(const Tensor& keys, std::string metric) {
  const DeviceGuard guard(keys.get_device_index());
  const Tensor rows = last_contiguous(keys);
  return packed_keys(rows, rows_of(rows, "keys"), metric_of(metric), current_stream(keys));
}

void prepare_keys_rows_(const Tensor& packed, const Tensor& keys, const Tensor& rows, std::string metric) {
  const DeviceGuard guard(keys.get_device_index());
  check_device(packed, keys, "packed");
  check_device(rows, keys, "rows");
  STD_TORCH_CHECK(rows.scalar_type() == ScalarType::Long, "rows: expected an int64 tensor");
  const Tensor original = last_contiguous(keys), which = torch::stable::contiguous(rows);
  const Rows view = rows_of(original, "keys");
  check_launch(
      memad_fast::cuda::prepare_keys_rows(
          view, metric_of(metric), packed_bytes(packed, view), which.const_data_ptr<int64_t>(), which.numel(),
          current_stream(keys)),
      "prepare_keys_rows_");
}

std::tuple<Tensor, Tensor, Tensor> stcm_lookup(
    const Tensor& query, const Tensor& keys, const Tensor& values, const std::optional<Tensor>& packed,
    const std::optional<Tensor>& filled) {
  const DeviceGuard guard(query.get_device_index());
  Search search(query, keys, packed, 1, Metric::l2);
  const Tensor rows = last_contiguous(values);
  const Rows view = rows_of(rows, "values");
  check_device(values, query, "values");
  STD_TORCH_CHECK(view.rows == keys.size(0), "values: expected ", keys.size(0), " rows like keys, got ", view.rows);
  if (filled) {
    STD_TORCH_CHECK(filled->scalar_type() == ScalarType::Long && filled->numel() == 1,
                    "filled: expected one int64 element");
    check_device(*filled, query, "filled");
    search.args.filled = filled->const_data_ptr<int64_t>();
  }
  search.run("stcm_lookup");
  Tensor read = torch::stable::new_empty(values, {query.size(0), view.cols});
  check_launch(
      memad_fast::cuda::gather_values(
          view, search.args.indices, query.size(0), read.mutable_data_ptr(), search.stream),
      "stcm_lookup");
  return {read, torch::stable::reshape(search.distances, {query.size(0)}),
          torch::stable::reshape(search.indices, {query.size(0)})};
}

// --- histogram_correction ---------------------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor> histogram_correction(const Tensor& error, double fraction) {
  STD_TORCH_CHECK(error.dim() >= 1, "error: expected at least 1 dimension [B, ...], got 0");
  STD_TORCH_CHECK(fraction >= 0.0 && fraction <= 1.0, "fraction: expected 0 to 1, got ", fraction);
  const torch::stable::accelerator::DeviceGuard guard(error.get_device_index());
  Tensor images = torch::stable::contiguous(error);
  if (reinterpret_cast<uintptr_t>(images.const_data_ptr()) % 16 != 0) images = torch::stable::clone(images);
  int64_t pixels = 1;
  for (int64_t d = 1; d < images.dim(); ++d) pixels *= images.size(d);
  STD_TORCH_CHECK(pixels < 4'000'000'000, "error: expected less than 4e9 values an image, got ", pixels);
  Tensor corrected = torch::stable::empty_like(images);
  Tensor mu = torch::stable::new_empty(images, {images.size(0)}, ScalarType::Float);
  Tensor score = torch::stable::new_empty(images, {images.size(0)}, ScalarType::Float);
  const memad_fast::cuda::HistogramCorrection args{
      images.const_data_ptr(), dtype_of(images, "error"), images.size(0), static_cast<uint32_t>(pixels),
      static_cast<uint32_t>(std::floor(fraction * static_cast<double>(pixels))), corrected.mutable_data_ptr(),
      mu.mutable_data_ptr<float>(), score.mutable_data_ptr<float>()};
  const auto bytes = static_cast<int64_t>(memad_fast::cuda::histogram_correction_workspace(args));
  Tensor workspace = torch::stable::new_empty(images, {bytes}, ScalarType::Byte);
  const int failure = memad_fast::cuda::histogram_correction(args, workspace.mutable_data_ptr(), current_stream(images));
  STD_TORCH_CHECK(failure == 0, "histogram_correction: the CUDA launch failed with error ", failure);
  return {corrected, mu, score};
}

// --- ssim -------------------------------------------------------------------------------------------------

using memad_fast::cuda::SsimInput;

memad_fast::cuda::SsimPlanes planes_of(const Tensor& images) {
  return {images.const_data_ptr(), images.stride(0), images.stride(1), images.stride(2)};
}

// x and y must be last_contiguous and outlive the result.
SsimInput ssim_input(
    const Tensor& x, const Tensor& y, int64_t window_size, double sigma, double data_range, bool reflect) {
  STD_TORCH_CHECK(x.dim() == 4, "x: expected 4 dimensions [B, C, H, W], got ", x.dim());
  STD_TORCH_CHECK(y.dim() == 4, "y: expected 4 dimensions [B, C, H, W], got ", y.dim());
  for (int64_t d = 0; d < 4; ++d)
    STD_TORCH_CHECK(x.size(d) == y.size(d), "y: expected ", x.size(d), " like x in dimension ", d, ", got ", y.size(d));
  STD_TORCH_CHECK(y.scalar_type() == x.scalar_type(), "y: expected the dtype of x");
  check_device(y, x, "y");
  STD_TORCH_CHECK(window_size >= 1 && window_size % 2 == 1, "window_size: expected an odd number, got ", window_size);
  STD_TORCH_CHECK(sigma > 0 && data_range > 0, "sigma, data_range: expected > 0, got ", sigma, ", ", data_range);
  const int64_t least = reflect ? window_size / 2 + 1 : window_size, most = int64_t{1} << 30;
  STD_TORCH_CHECK(
      x.size(2) >= least && x.size(3) >= least, "window_size: expected images of at least ", least, " x ", least,
      ", got ", x.size(2), " x ", x.size(3));
  STD_TORCH_CHECK(x.size(2) < most && x.size(3) < most, "x: expected less than 2^30 rows and columns");
  return {planes_of(x), planes_of(y), dtype_of(x, "x"), x.size(0), x.size(1), x.size(2), x.size(3),
          window_size, sigma, data_range, reflect};
}

Tensor workspace_of(const Tensor& like, size_t bytes) {
  return torch::stable::new_empty(like, {static_cast<int64_t>(bytes)}, ScalarType::Byte);
}

Tensor ssim_map(
    const Tensor& x_any, const Tensor& y_any, int64_t window_size, double sigma, double data_range, bool reflect) {
  const DeviceGuard guard(x_any.get_device_index());
  const Tensor x = last_contiguous(x_any), y = last_contiguous(y_any);
  const SsimInput input = ssim_input(x, y, window_size, sigma, data_range, reflect);
  Tensor map = torch::stable::new_empty(x, {input.batch, input.channels, input.window_rows(), input.window_cols()});
  const Tensor workspace = workspace_of(x, memad_fast::cuda::ssim_map_workspace(input));
  check_launch(
      memad_fast::cuda::ssim_map(input, map.mutable_data_ptr(), workspace.mutable_data_ptr(), current_stream(x)),
      "ssim_map");
  return map;
}

Tensor ssim_loss(
    const Tensor& x_any, const Tensor& y_any, int64_t window_size, double sigma, double data_range, bool reflect) {
  const DeviceGuard guard(x_any.get_device_index());
  const Tensor x = last_contiguous(x_any), y = last_contiguous(y_any);
  const SsimInput input = ssim_input(x, y, window_size, sigma, data_range, reflect);
  Tensor loss = torch::stable::new_empty(x, {}, ScalarType::Float);
  const Tensor workspace = workspace_of(x, memad_fast::cuda::ssim_loss_workspace(input));
  check_launch(
      memad_fast::cuda::ssim_loss(
          input, loss.mutable_data_ptr<float>(), workspace.mutable_data_ptr(), current_stream(x)),
      "ssim_loss");
  return loss;
}

// The gradients of x and y; args lacks their places.
std::tuple<Tensor, Tensor> ssim_gradients(memad_fast::cuda::SsimBackward args, const Tensor& x) {
  const SsimInput& input = args.input;
  Tensor grad_x = torch::stable::new_empty(x, {input.batch, input.channels, input.height, input.width});
  Tensor grad_y = torch::stable::empty_like(grad_x);
  args.grad_x = grad_x.mutable_data_ptr();
  args.grad_y = grad_y.mutable_data_ptr();
  const Tensor workspace = workspace_of(x, memad_fast::cuda::ssim_backward_workspace(args));
  check_launch(
      memad_fast::cuda::ssim_backward(args, workspace.mutable_data_ptr(), current_stream(x)), "ssim_backward");
  return {grad_x, grad_y};
}

std::tuple<Tensor, Tensor> ssim_map_backward(
    const Tensor& grad, const Tensor& x_any, const Tensor& y_any, int64_t window_size, double sigma, double data_range,
    bool reflect) {
  const DeviceGuard guard(x_any.get_device_index());
  const Tensor x = last_contiguous(x_any), y = last_contiguous(y_any);
  const SsimInput input = ssim_input(x, y, window_size, sigma, data_range, reflect);
  STD_TORCH_CHECK(
      grad.dim() == 4 && grad.size(0) == input.batch && grad.size(1) == input.channels &&
          grad.size(2) == input.window_rows() && grad.size(3) == input.window_cols() &&
          grad.scalar_type() == x.scalar_type(),
      "grad: expected the shape and the dtype of the map");
  check_device(grad, x, "grad");
  return ssim_gradients({input, planes_of(grad), grad.stride(3), nullptr, nullptr, nullptr}, x);
}

std::tuple<Tensor, Tensor> ssim_loss_backward(
    const Tensor& grad, const Tensor& x_any, const Tensor& y_any, int64_t window_size, double sigma, double data_range,
    bool reflect) {
  const DeviceGuard guard(x_any.get_device_index());
  const Tensor x = last_contiguous(x_any), y = last_contiguous(y_any);
  const SsimInput input = ssim_input(x, y, window_size, sigma, data_range, reflect);
  STD_TORCH_CHECK(
      grad.dim() == 0 && grad.scalar_type() == ScalarType::Float, "grad: expected a float32 tensor of 0 dimensions");
  check_device(grad, x, "grad");
  return ssim_gradients({input, {}, 0, grad.const_data_ptr<float>(), nullptr, nullptr}, x);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(memad_fast, CUDA, m) {
  m.impl("fifo_write_", TORCH_BOX(&fifo_write_));
  m.impl("nearest_keys", TORCH_BOX(&nearest_keys));
  m.impl("nearest_keys_stats", TORCH_BOX(&nearest_keys_stats));
  m.impl("prepare_keys", TORCH_BOX(&prepare_keys));
  m.impl("prepare_keys_rows_", TORCH_BOX(&prepare_keys_rows_));
  m.impl("stcm_lookup", TORCH_BOX(&stcm_lookup));
  m.impl("histogram_correction", TORCH_BOX(&histogram_correction));
  m.impl("ssim_loss", TORCH_BOX(&ssim_loss));
  m.impl("ssim_loss_backward", TORCH_BOX(&ssim_loss_backward));
  m.impl("ssim_map", TORCH_BOX(&ssim_map));
  m.impl("ssim_map_backward", TORCH_BOX(&ssim_map_backward));
}
