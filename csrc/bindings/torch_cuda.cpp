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
#include <tuple>

#include "cuda/fifo_write_.h"
#include "cuda/histogram_correction.h"

// Declared by torch only under USE_CUDA, defined in libtorch_cuda, which is loaded before this library.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void* current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return stream;
}

memad_fast::Dtype dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return memad_fast::Dtype::f32;
    case ScalarType::Half:
      return memad_fast::Dtype::f16;
    case ScalarType::BFloat16:
      return memad_fast::Dtype::bf16;
    default:
      STD_TORCH_CHECK(false, name, ": the cuda backend takes float32, float16 or bfloat16; use the reference backend for float64");
  }
}

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
  const torch::stable::accelerator::DeviceGuard guard(keys.get_device_index());
  const int error = memad_fast::cuda::fifo_write(
      ring_copy(keys, new_keys, "keys"), ring_copy(values, new_values, "values"),
      cursor.mutable_data_ptr<int64_t>(), keys.size(0), new_keys.size(0), current_stream(keys));
  STD_TORCH_CHECK(error == 0, "fifo_write_: the CUDA launch failed with error ", error);
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

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(memad_fast, CUDA, m) {
  m.impl("fifo_write_", TORCH_BOX(&fifo_write_));
  m.impl("histogram_correction", TORCH_BOX(&histogram_correction));
}
