"""The CUDA kernels of nearest_keys on the model of CUDA (tests/cuda_model) give the CPU op's results, bit for bit."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from cuda_model.build import ORDERS, Model, model, needs_compiler
from duels import Duel, duels, half_steps, search_of
from hypothesis import given, settings
from hypothesis import strategies as st
from searches import CHANGES, METRICS, RANGE_CHANGES, Recipe, in_floats, on_a_lattice, recipes
from torch import Tensor

import memad_fast

pytestmark = needs_compiler

DTYPES = [torch.float32, torch.float16, torch.bfloat16]

SHIM = """
#include "cuda/nearest_keys.cu"
#include "cuda/nearest_keys_encode.cu"
#include "cuda/nearest_keys_full.cu"
#include "cuda/nearest_keys_listed.cu"
#include "cuda/nearest_keys_screen.cu"

using namespace memad_fast;

static Rows rows_of(const void* data, int64_t dtype, int64_t rows, int64_t cols, int64_t stride) {
  return {data, static_cast<Dtype>(dtype), rows, cols, stride};
}

extern "C" int prepare(const void* keys, int64_t dtype, int64_t rows, int64_t cols, int64_t stride, int64_t metric,
                       uint8_t* packed) {
  return cuda::prepare_keys(
      rows_of(keys, dtype, rows, cols, stride), static_cast<cuda::Metric>(metric), packed, nullptr);
}

extern "C" int prepare_rows(const void* keys, int64_t dtype, int64_t rows, int64_t cols, int64_t stride, int64_t metric,
                            uint8_t* packed, const int64_t* which, int64_t count) {
  return cuda::prepare_keys_rows(rows_of(keys, dtype, rows, cols, stride), static_cast<cuda::Metric>(metric), packed,
                                 which, count, nullptr);
}

static cuda::NearestKeys search_of(const void* query, int64_t dtype, int64_t count, int64_t cols, int64_t query_stride,
                                   const void* keys, int64_t rows, int64_t keys_stride, int64_t metric, int64_t k) {
  return {rows_of(query, dtype, count, cols, query_stride), rows_of(keys, dtype, rows, cols, keys_stride), nullptr,
          nullptr, k, static_cast<cuda::Metric>(metric), nullptr, nullptr};
}

extern "C" int workspace(const void* query, int64_t dtype, int64_t count, int64_t cols, int64_t query_stride,
                         const void* keys, int64_t rows, int64_t keys_stride, int64_t metric, int64_t k,
                         int64_t* bytes) {
  return cuda::nearest_keys_workspace(
      search_of(query, dtype, count, cols, query_stride, keys, rows, keys_stride, metric, k), bytes);
}

extern "C" int search(const void* query, int64_t dtype, int64_t count, int64_t cols, int64_t query_stride,
                      const void* keys, int64_t rows, int64_t keys_stride, int64_t metric, int64_t k,
                      const int64_t* filled, const uint8_t* packed, uint8_t* workspace, float* distances,
                      int64_t* indices, int64_t* survivors, bool* full_path) {
  cuda::NearestKeys args = search_of(query, dtype, count, cols, query_stride, keys, rows, keys_stride, metric, k);
  args.filled = filled;
  args.packed = packed;
  args.distances = distances;
  args.indices = indices;
  args.survivors = survivors;
  args.full_path = full_path;
  return cuda::nearest_keys(args, workspace, nullptr);
}

extern "C" int gather(const void* values, int64_t dtype, int64_t rows, int64_t cols, int64_t stride,
                      const int64_t* indices, int64_t count, void* read) {
  return cuda::gather_values(rows_of(values, dtype, rows, cols, stride), indices, count, read, nullptr);
}
"""


def aligned(size: int) -> Tensor:
    """``size`` bytes at a multiple of 256, poisoned."""
    memory = torch.full((size + 256,), 0xAB, dtype=torch.uint8)
    return memory[-memory.data_ptr() % 256 :][:size]


def matrix(rows: Tensor) -> list[object]:
    return [rows, DTYPES.index(rows.dtype), rows.shape[0], rows.shape[1], rows.stride(0)]


@dataclass
class Found:
    distances: Tensor
    indices: Tensor
    survivors: Tensor
    full_path: Tensor


class Searcher:
    """The launchers as functions of tensors."""

    def __init__(self, library: Model) -> None:
        self.library = library

    def prepare(self, keys: Tensor, metric: str = "l2") -> Tensor:
        padded, dims = -(-keys.shape[0] // 128) * 128, max(1, -(-keys.shape[1] // 64)) * 64
        packed = aligned(padded * (dims + 20) + 4 * dims)
        self.library.call("prepare", *matrix(keys), METRICS.index(metric), packed)
        return packed

    def overwrite(self, packed: Tensor, keys: Tensor, rows: Tensor, metric: str = "l2") -> None:
        self.library.call("prepare_rows", *matrix(keys), METRICS.index(metric), packed, rows, rows.numel())

    def search(
        self,
        query: Tensor,
        keys: Tensor,
        k: int = 1,
        metric: str = "l2",
        packed: Tensor | None = None,
        filled: Tensor | None = None,
    ) -> Found:
        packed = self.prepare(keys, metric) if packed is None else packed
        inputs = [*matrix(query), keys, keys.shape[0], keys.stride(0), METRICS.index(metric), k]
        size = torch.zeros(1, dtype=torch.int64)
        self.library.call("workspace", *inputs, size)
        count = query.shape[0]
        found = Found(
            torch.full((count, k), -7.0),
            torch.full((count, k), -7),
            torch.full((count,), -7),
            torch.ones(count, dtype=torch.bool),
        )
        outputs = [found.distances, found.indices, found.survivors, found.full_path]
        self.library.call("search", *inputs, filled, packed, aligned(int(size)), *outputs)
        return found


@pytest.fixture
def searcher() -> Searcher:
    return on_a_device(90, 4, 227 << 10)


def on_a_device(*device: int) -> Searcher:
    library = model(SHIM)
    library.set_order("random 1")
    library.set_device(*device)
    return Searcher(library)


def assert_equals_the_cpus(
    searcher: Searcher, query: Tensor, keys: Tensor, k: int = 1, metric: str = "l2", **options: Tensor
) -> Found:
    distances, indices = memad_fast.nearest_keys(query, keys, k, metric=metric)
    found = searcher.search(query, keys, k, metric, **options)
    assert torch.equal(found.indices, indices)
    assert torch.equal(found.distances.view(torch.int32), distances.view(torch.int32))
    return found


# Compute capability, multiprocessors, bytes of shared memory that a block may have.
devices = st.sampled_from([(90, 4, 227 << 10), (80, 2, 163 << 10), (120, 3, 99 << 10), (90, 1, 227 << 10)])


@settings(max_examples=12, deadline=None)
@given(recipe=recipes(CHANGES), magnitude=st.integers(-149, 127), device=devices)
def test_on_a_lattice_ties_are_the_cpus(recipe: Recipe, magnitude: int, device: tuple[int, ...]) -> None:
    query, keys, _ = on_a_lattice(recipe, magnitude)
    assert_equals_the_cpus(on_a_device(*device), query[:70], keys, recipe.k, recipe.metric)


@settings(max_examples=20, deadline=None)
@given(recipe=recipes(CHANGES | RANGE_CHANGES), device=devices)
def test_whatever_the_rows_the_result_is_the_cpus(recipe: Recipe, device: tuple[int, ...]) -> None:
    query, keys = in_floats(recipe)
    assert_equals_the_cpus(on_a_device(*device), query[:70], keys, recipe.k, recipe.metric)


@settings(max_examples=12, deadline=None)
@given(duel=duels(), device=devices)
def test_rows_that_reach_the_bound_of_the_screen(duel: Duel, device: tuple[int, ...]) -> None:
    query, keys, k = search_of(duel, *half_steps(duel))
    assert_equals_the_cpus(on_a_device(*device), query, keys, k, duel.metric)


def several(count: int, rows: int, dim: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(count, dim, generator=random), torch.randn(rows, dim, generator=random)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 16, 33, 70, 130])
def test_every_dtype_and_width(searcher: Searcher, dim: int, dtype: torch.dtype, metric: str) -> None:
    query, keys = several(3, 140, dim)
    for k in (1, 2):
        assert_equals_the_cpus(searcher, query.to(dtype), keys.to(dtype), k, metric)


# Of a device: the widest tiles that stay in shared memory, tiles that are streamed, splits and waves.
DEVICES = {
    "two blocks": (90, 4, 227 << 10, 70),
    "one block, queries resident": (120, 2, 99 << 10, 70),
    "queries streamed": (120, 2, 99 << 10, 330),
    "one multiprocessor": (80, 1, 163 << 10, 70),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", DEVICES)
def test_every_shape_of_the_screen_in_every_order_of_threads(searcher: Searcher, name: str, order: str) -> None:
    *device, dim = DEVICES[name]
    searcher.library.set_device(*device)
    searcher.library.set_order(order)
    query, keys = several(70, 700, dim)
    for k in (1, 3):
        found = assert_equals_the_cpus(searcher, query, keys, k)
        assert not found.full_path.any(), "the screen decides Gaussian rows"
        assert found.survivors.float().mean() < 25, "and leaves few keys"


def test_many_queries_come_to_the_same_with_four_lanes_each(searcher: Searcher) -> None:
    searcher.library.set_device(90, 1, 227 << 10)
    query, keys = several(300, 150, 20)
    query[5], query[250] = torch.nan, 1e30
    assert_equals_the_cpus(searcher, query, keys)


def test_equal_rows_take_the_full_path_to_the_lowest_index(searcher: Searcher) -> None:
    searcher.library.set_device(90, 1, 227 << 10)
    keys = torch.randn(1, 40).repeat(1500, 1)
    for k in (1, 3):
        found = assert_equals_the_cpus(searcher, torch.randn(2, 40), keys, k)
        assert found.full_path.all()
        assert (found.survivors == 1500).all()
        assert found.indices.tolist() == [list(range(k))] * 2


def test_a_cluster_that_fits_the_lists_is_decided_from_them(searcher: Searcher) -> None:
    keys = torch.randn(500, 30)
    keys[::20] = keys[0] + 1e-5 * torch.randn(25, 30)
    for k in (1, 4):
        found = assert_equals_the_cpus(searcher, keys[:1] + 1e-5, keys, k)
        assert not found.full_path.any()
        assert 25 <= found.survivors.item() < 150


def test_more_neighbours_than_lists_hold(searcher: Searcher) -> None:
    query, keys = several(2, 90, 20)
    for k in (64, 65, 90):
        found = assert_equals_the_cpus(searcher, query, keys, k)
        assert found.full_path.all() == (k > 64)


def test_lists_are_tightened_where_a_split_is_long(searcher: Searcher) -> None:
    """Keys that come nearer and nearer: each one is listed, and must leave the list again."""
    searcher.library.set_device(90, 1, 227 << 10)
    keys = torch.linspace(100.0, 1.0, 1500)[:, None] * torch.ones(1, 64)
    for k in (1, 3):
        found = assert_equals_the_cpus(searcher, torch.zeros(1, 64), keys, k)
        assert not found.full_path.any()
        assert found.survivors.item() < 40


def test_rows_that_are_not_finite_or_huge(searcher: Searcher) -> None:
    query, keys = several(8, 200, 24)
    query[0, 3], query[1, 0], query[2] = torch.inf, torch.nan, 1e25
    keys[0, 1], keys[17, 0], keys[100], keys[150], keys[151] = torch.nan, -torch.inf, 1e25, -3e38, 3e38
    for metric in METRICS:
        for k in (1, 3):
            found = assert_equals_the_cpus(searcher, query, keys, k, metric)
            assert found.indices[:2].eq(-1).all()
            assert found.survivors[:2].eq(0).all()
            assert not found.full_path[:2].any()


def test_fewer_finite_keys_than_neighbours(searcher: Searcher) -> None:
    query, keys = several(3, 7, 10)
    keys[[1, 2, 4, 6]] = torch.inf
    for k in (3, 4, 7):
        found = assert_equals_the_cpus(searcher, query, keys, k)
        assert found.indices[:, 3:].eq(-1).all()
        assert found.distances[:, 3:].isnan().all()


def test_denormals_and_the_smallest_rows(searcher: Searcher) -> None:
    query, keys = several(3, 150, 20)
    for scale in (2.0**-135, 2.0**-70, 2.0**60, 2.0**64):
        for metric in METRICS:
            assert_equals_the_cpus(searcher, query * scale, keys * scale, 2, metric)


def test_strides_and_addresses(searcher: Searcher) -> None:
    """Rows in wider ones, at odd addresses, and one row for all queries."""
    query, keys = several(5, 200, 37)
    wide_query, wide_keys = torch.full((10, 45), 3.0), torch.full((200, 41), 3.0)
    wide_query[::2, 3:40], wide_keys[:, 1:38] = query, keys
    for k in (1, 2):
        assert_equals_the_cpus(searcher, wide_query[::2, 3:40], wide_keys[:, 1:38], k)
        assert_equals_the_cpus(searcher, query[:1].expand(4, -1), keys, k)


def test_only_filled_keys_are_searched(searcher: Searcher) -> None:
    query, keys = several(3, 300, 40)
    for metric in METRICS:
        packed = searcher.prepare(keys, metric)
        for filled in (-5, 0, 1, 63, 64, 200, 300, 999):
            searched = max(0, min(filled, 300))
            found = searcher.search(query, keys, 2, metric, packed, torch.tensor([filled]))
            many = min(2, searched)
            if many:
                expected = memad_fast.nearest_keys(query, keys[:searched], many, metric=metric)
                assert torch.equal(found.distances[:, :many], expected[0])
                assert torch.equal(found.indices[:, :many], expected[1])
            assert found.indices[:, many:].eq(-1).all()


def test_overwritten_keys_are_found_around_the_old_centre(searcher: Searcher) -> None:
    query, keys = several(4, 200, 50)
    for metric in METRICS:
        rows = torch.full_like(keys, 1e4)
        packed = searcher.prepare(rows, metric)
        which = torch.randperm(200)
        rows[which] = keys[which]
        searcher.overwrite(packed, rows, torch.cat([which, torch.tensor([-1, 200, 1 << 40])]), metric)
        assert_equals_the_cpus(searcher, query, keys, 3, metric, packed=packed)


def test_the_packed_form_is_laid_out_as_the_header_says(searcher: Searcher) -> None:
    keys = torch.randn(5, 70)
    keys[3, 2] = torch.nan
    packed = searcher.prepare(keys)
    codes = packed[: 128 * 128].view(torch.int8).view(128, 128)
    numbers = packed[128 * 128 : 128 * 148].view(torch.float32).view(5, 128)
    centre = packed[128 * 148 :].view(torch.float32)
    finite = torch.tensor([0, 1, 2, 4])
    assert torch.allclose(centre[:70], keys[finite].mean(0), atol=1e-6)
    assert centre[70:].eq(0).all()
    assert codes[5:].eq(0).all()
    assert codes[finite].abs().amax(1).eq(127).all()
    rest = keys[finite] - centre[:70] - numbers[1, finite, None] * codes[finite, :70]
    assert (rest.double().norm(dim=1) <= numbers[2, finite]).all()
    assert (rest.double().norm(dim=1) >= 0.9 * numbers[2, finite]).all()
    assert numbers[0, 3] == torch.inf
    assert numbers[0, 5:].eq(torch.inf).all()
    assert numbers[1:, 5:].eq(0).all()


def test_empty_inputs(searcher: Searcher) -> None:
    assert_equals_the_cpus(searcher, torch.randn(0, 20), torch.randn(9, 20))
    assert_equals_the_cpus(searcher, torch.randn(3, 0), torch.randn(9, 0), 2)
    assert_equals_the_cpus(searcher, torch.randn(3, 5), torch.randn(1, 5))


def test_values_are_gathered_bit_for_bit(searcher: Searcher) -> None:
    indices = torch.tensor([3, -1, 0, 3])
    for dtype in DTYPES:
        for width in (0, 1, 33):
            values = torch.randn(5, width + 3).to(dtype)[:, 2 : 2 + width]
            read = torch.ones(4, width, dtype=dtype)
            searcher.library.call("gather", *matrix(values), indices, 4, read)
            assert torch.equal(read[[0, 2, 3]], values[[3, 0, 3]])
            assert read[1].isnan().all()


def test_the_workspace_is_bounded(searcher: Searcher) -> None:
    """Of shapes that are too large to search here: only the plan runs."""
    shapes = [(8 << 20, 1024, 128), (25088, 16384, 1024), (65536, 2048, 512), (64, 10**7, 128), (300, 9000, 60_000)]
    for count, rows, dim in shapes:
        query, keys = torch.empty(1, dim).expand(count, dim), torch.empty(1, dim).expand(rows, dim)
        size = torch.zeros(1, dtype=torch.int64)
        for device in ((90, 132, 227 << 10), (80, 108, 163 << 10), (120, 170, 99 << 10)):
            searcher.library.set_device(*device)
            for k in (1, 5, 64):
                searcher.library.call("workspace", *matrix(query), keys, rows, keys.stride(0), 0, k, size)
                assert 0 < int(size) <= (64 << 20) + 64 * count * k + 4096
