// memad_fast._native: the CPU kernels for NumPy arrays, without torch. memad_fast/native.py is its public face:
// it documents and checks; the functions here take C-contiguous float32 arrays of the right shape.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cmath>
#include <cstdint>
#include <exception>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "bindings/partition_view.h"
#include "core/isa.h"
#include "core/parallel.h"
#include "cpu/bank_attention.h"
#include "cpu/gumbel_topk.h"
#include "cpu/histogram_correction.h"
#include "cpu/nearest_keys.h"
#include "cpu/ssim.h"
#include "cpu/stcm_lookup.h"

namespace py = pybind11;
using memad_fast::Dtype;
using memad_fast::ThreadLoop;

namespace {

using FloatArray = py::array_t<float, py::array::c_style | py::array::forcecast>;

int thread_count = 1;

// Threads live for one call: an inspection process calls a few times a second, and nothing survives a fork.
void run_on_threads(int64_t begin, int64_t end, int64_t grain, ThreadLoop::Body body, const void* context) {
  const int64_t pieces = std::min<int64_t>(thread_count, (end - begin + grain - 1) / grain);
  const int64_t step = (end - begin + pieces - 1) / pieces;
  std::exception_ptr failure;
  std::mutex guard;
  const auto piece = [&](int64_t from) {
    try {
      body(from, std::min(from + step, end), context);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(guard);
      failure = std::current_exception();
    }
  };
  std::vector<std::thread> workers;
  for (int64_t from = begin + step; from < end; from += step) workers.emplace_back(piece, from);
  piece(begin);
  for (std::thread& worker : workers) worker.join();
  if (failure) std::rethrow_exception(failure);
}

ThreadLoop thread_loop() { return {run_on_threads, thread_count}; }

py::tuple gumbel_topk(const FloatArray& query, const FloatArray& memory, int64_t k, double temperature,
                      std::optional<int64_t> seed, int combine) {
  const int64_t rows = query.shape(0), width = query.shape(1), items = memory.shape(0);
  FloatArray read({rows, width}), scores({rows, k});
  py::array_t<int64_t> indices({rows, k});
  const memad_fast::GumbelTopk args{
      {query.data(), Dtype::f32, rows, width, width}, {memory.data(), Dtype::f32, items, width, width}, k, temperature,
      seed.has_value(), seed.value_or(0), static_cast<memad_fast::Combine>(combine),
      read.mutable_data(), indices.mutable_data(), scores.mutable_data()};
  {
    const py::gil_scoped_release release;
    memad_fast::gumbel_topk(args, thread_loop());
  }
  return py::make_tuple(read, indices, scores);
}

std::array<uint32_t, 4> philox4x32(const std::array<uint32_t, 4>& counter, const std::array<uint32_t, 2>& key) {
  std::array<uint32_t, 4> words;
  const uint64_t joined = static_cast<uint64_t>(key[1]) << 32 | key[0];
  memad_fast::philox4x32(counter.data(), static_cast<int64_t>(joined), words.data());
  return words;
}

py::tuple gumbel_noise(const py::array_t<uint32_t, py::array::c_style>& words) {
  py::array_t<float> low(words.size()), noise(words.size()), high(words.size());
  memad_fast::gumbel_noise(words.data(), words.size(), low.mutable_data(), noise.mutable_data(), high.mutable_data());
  return py::make_tuple(low, noise, high);
}

// The last dimension of both arrays is contiguous; other strides are read in place.
using StridedArray = py::array_t<float>;

memad_fast::PartitionView view_of(const StridedArray& array, float* data) {
  std::vector<int64_t> sizes, strides;
  for (py::ssize_t d = 0; d < array.ndim(); ++d) {
    sizes.push_back(array.shape(d));
    strides.push_back(array.strides(d) / static_cast<py::ssize_t>(sizeof(float)));
  }
  return {data, array.ndim(), sizes.data(), strides.data()};
}

memad_fast::BankAttentionInputs bank_attention_inputs(
    const memad_fast::PartitionView& query, const FloatArray& bank, double threshold, const std::string& shrink,
    bool renormalize, const std::string& similarity, double temperature) {
  const auto rule = shrink == "soft"   ? memad_fast::Shrink::soft
                    : shrink == "hard" ? memad_fast::Shrink::hard
                                       : memad_fast::Shrink::none;
  const int64_t partitions = bank.shape(0), items = bank.shape(1), width = bank.shape(2);
  return {Dtype::f32,  partitions, query.count(), items, width,       query.rows(),           bank.data(), items * width,
          width,       threshold,  rule,          renormalize, similarity == "cosine", temperature};
}

FloatArray bank_attention(const StridedArray& query, const FloatArray& bank, double threshold,
                          const std::string& shrink, bool renormalize, const std::string& similarity,
                          double temperature) {
  FloatArray read(std::vector<py::ssize_t>(query.shape(), query.shape() + query.ndim()));
  const auto query_view = view_of(query, const_cast<float*>(query.data()));
  const auto read_view = view_of(read, read.mutable_data());
  const auto inputs = bank_attention_inputs(query_view, bank, threshold, shrink, renormalize, similarity, temperature);
  {
    const py::gil_scoped_release release;
    memad_fast::bank_attention({inputs, read_view.rows()}, thread_loop());
  }
  return read;
}

py::tuple bank_attention_stats(const StridedArray& query, const FloatArray& bank, double threshold,
                               const std::string& shrink, const std::string& similarity, double temperature) {
  FloatArray dead_share(bank.shape(0)), entropy(bank.shape(0));
  const auto query_view = view_of(query, const_cast<float*>(query.data()));
  const auto inputs = bank_attention_inputs(query_view, bank, threshold, shrink, false, similarity, temperature);
  const memad_fast::BankAttentionStats args{inputs, dead_share.mutable_data(), entropy.mutable_data()};
  {
    const py::gil_scoped_release release;
    memad_fast::bank_attention_stats(args, thread_loop());
  }
  return py::make_tuple(dead_share, entropy);
}

py::tuple histogram_correction(const FloatArray& error, double fraction) {
  const int64_t images = error.shape(0), pixels = images == 0 ? 0 : error.size() / images;
  FloatArray corrected(std::vector<py::ssize_t>(error.shape(), error.shape() + error.ndim()));
  FloatArray mu(images), score(images);
  const auto count = static_cast<int64_t>(std::floor(fraction * static_cast<double>(pixels)));
  const memad_fast::HistogramCorrection args{
      error.data(), Dtype::f32, images, pixels, pixels, count,
      corrected.mutable_data(), mu.mutable_data(), score.mutable_data()};
  {
    const py::gil_scoped_release release;
    memad_fast::histogram_correction(args, thread_loop());
  }
  return py::make_tuple(corrected, mu, score);
}

memad_fast::Rows rows_of(const FloatArray& matrix) {
  return {matrix.data(), Dtype::f32, matrix.shape(0), matrix.shape(1), matrix.shape(1)};
}

// Inputs and outputs of one search, which must outlive the call.
struct Search {
  py::array_t<float> distances;
  py::array_t<int64_t> indices;
  memad_fast::NearestKeys args;

  Search(const FloatArray& query, const FloatArray& keys, int64_t k, int metric)
      : distances({query.shape(0), static_cast<py::ssize_t>(k)}), indices({query.shape(0), static_cast<py::ssize_t>(k)}),
        args{rows_of(query), rows_of(keys), keys.shape(0), nullptr, 0, k, static_cast<memad_fast::Metric>(metric),
             distances.mutable_data(), indices.mutable_data()} {}
};

using ByteArray = py::array_t<uint8_t, py::array::c_style>;

ByteArray prepare_keys(const FloatArray& keys, int metric) {
  ByteArray packed(memad_fast::PackedLayout(keys.shape(0), keys.shape(1)).bytes);
  const memad_fast::PrepareKeys args{rows_of(keys), rows_of(keys).rows, static_cast<memad_fast::Metric>(metric), packed.mutable_data()};
  {
    const py::gil_scoped_release release;
    memad_fast::prepare_keys(args, thread_loop());
  }
  return packed;
}

py::tuple nearest_keys(
    const FloatArray& query, const FloatArray& keys, const std::optional<ByteArray>& packed, int64_t k, int metric) {
  Search search(query, keys, k, metric);
  if (packed) {
    search.args.packed = packed->data();
    search.args.packed_size = packed->size();
  }
  {
    const py::gil_scoped_release release;
    memad_fast::nearest_keys(search.args, thread_loop());
  }
  return py::make_tuple(search.distances, search.indices);
}

py::tuple stcm_lookup(const FloatArray& query, const FloatArray& keys, const FloatArray& values, int64_t filled) {
  Search search(query, keys, 1, static_cast<int>(memad_fast::Metric::l2));
  search.args.searched = filled;
  FloatArray read({query.shape(0), values.shape(1)});
  {
    float* out = read.mutable_data();
    const memad_fast::StcmLookup args{search.args, rows_of(values), out};
    const py::gil_scoped_release release;
    memad_fast::stcm_lookup(args, thread_loop());
  }
  return py::make_tuple(read, search.distances.reshape({query.shape(0)}), search.indices.reshape({query.shape(0)}));
}

memad_fast::SsimInput ssim_input(
    const FloatArray& x, const FloatArray& y, int64_t window_size, double sigma, double data_range, bool reflect) {
  const int64_t channels = x.shape(1), height = x.shape(2), width = x.shape(3);
  const auto planes = [&](const FloatArray& images) {
    return memad_fast::Planes{images.data(), channels * height * width, height * width, width};
  };
  return {planes(x), planes(y), Dtype::f32, x.shape(0), channels, height, width, window_size, sigma, data_range, reflect};
}

FloatArray ssim_map(
    const FloatArray& x, const FloatArray& y, int64_t window_size, double sigma, double data_range, bool reflect) {
  const memad_fast::SsimInput input = ssim_input(x, y, window_size, sigma, data_range, reflect);
  FloatArray map({input.batch, input.channels, input.window_rows(), input.window_cols()});
  const memad_fast::SsimMap args{input, map.mutable_data()};
  const py::gil_scoped_release release;
  memad_fast::ssim_map(args, thread_loop());
  return map;
}

float ssim_loss(
    const FloatArray& x, const FloatArray& y, int64_t window_size, double sigma, double data_range, bool reflect) {
  float loss = 0.0f;
  const memad_fast::SsimLoss args{ssim_input(x, y, window_size, sigma, data_range, reflect), &loss};
  const py::gil_scoped_release release;
  memad_fast::ssim_loss(args, thread_loop());
  return loss;
}

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (memad_fast::Isa isa : memad_fast::supported_isas()) names.emplace_back(memad_fast::isa_name(isa));
  return names;
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "CPU kernels of memad_fast for NumPy arrays; see memad_fast.native";
  thread_count = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
  m.def("isas", &isas);
  m.def("isa", [] { return std::string(memad_fast::isa_name(memad_fast::active_isa())); });
  m.def("set_isa", &memad_fast::set_isa);
  m.def("num_threads", [] { return thread_count; });
  m.def("set_num_threads", [](int count) {
    if (count < 1) throw std::invalid_argument("count: expected at least 1, got " + std::to_string(count));
    thread_count = count;
  });
  m.def("bank_attention", &bank_attention);
  m.def("bank_attention_stats", &bank_attention_stats);
  m.def("gumbel_topk", &gumbel_topk);
  m.def("philox4x32", &philox4x32);
  m.def("gumbel_noise", &gumbel_noise);
  m.def("histogram_correction", &histogram_correction);
  m.def("prepare_keys", &prepare_keys);
  m.def("nearest_keys", &nearest_keys);
  m.def("stcm_lookup", &stcm_lookup);
  m.def("ssim_loss", &ssim_loss);
  m.def("ssim_map", &ssim_map);
}
