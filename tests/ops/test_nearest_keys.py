"""nearest_keys: the indices are those of the float64 values of the inputs, whatever the inputs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from exactness import assert_exact_search, order_on_a_lattice
from hypothesis import given, settings
from hypothesis import strategies as st
from peak_memory import run_measured
from searches import ADVERSARIES, METRICS, one_dominant_dimension
from torch import Tensor

import memad_fast
from memad_fast.ops.nearest_keys import reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def assert_search_is_exact(query: Tensor, keys: Tensor, k: int = 1, metric: str = "l2") -> None:
    """The search of the keys and of the prepared keys: exact, and the same bits."""
    distances, indices = memad_fast.nearest_keys(query, keys, k, metric=metric)
    prepared = memad_fast.nearest_keys(query, memad_fast.prepare_keys(keys, metric=metric), k, metric=metric)
    assert torch.equal(indices, prepared[1])
    assert torch.equal(distances, prepared[0])
    assert_exact_search(query, keys, distances, indices, metric)


# --- the assertion itself ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", METRICS)
def test_the_assertion_accepts_the_reference_and_refuses_what_is_not_exact(metric: str) -> None:
    query, keys = torch.randn(6, 5), torch.randn(30, 5)
    keys[20] = keys[3]
    distances, indices = reference(query, keys, 4, metric=metric)
    assert_exact_search(query, keys, distances, indices, metric)
    next_best = reference(query, keys, 5, metric=metric)
    with pytest.raises(AssertionError, match="left out"):
        assert_exact_search(query, keys, next_best[0][:, 1:], next_best[1][:, 1:], metric)
    with pytest.raises(AssertionError, match="not in order"):
        assert_exact_search(query, keys, distances.flip(1), indices.flip(1), metric)
    with pytest.raises(AssertionError, match="distance is wrong"):
        assert_exact_search(query, keys, distances * (1 + 3e-7), indices, metric)
    with pytest.raises(AssertionError, match="twice"):
        assert_exact_search(query, keys, distances[:, [0, 0]], indices[:, [0, 0]], metric)


def test_the_assertion_wants_the_lowest_of_equal_rows() -> None:
    query, keys = torch.zeros(1, 2), torch.tensor([[3.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    assert_exact_search(query, keys, torch.tensor([[1.0]]), torch.tensor([[1]]))
    with pytest.raises(AssertionError, match="lower index"):
        assert_exact_search(query, keys, torch.tensor([[1.0]]), torch.tensor([[2]]))
    with pytest.raises(AssertionError, match="out of the order"):
        assert_exact_search(query, keys, torch.tensor([[1.0, 1.0]]), torch.tensor([[2, 1]]))


def test_the_assertion_wants_nothing_found_where_nothing_is_finite() -> None:
    query, keys = torch.tensor([[0.0], [torch.nan]]), torch.tensor([[torch.inf], [2.0]])
    distances, indices = torch.tensor([[4.0, torch.nan], [torch.nan, torch.nan]]), torch.tensor([[1, -1], [-1, -1]])
    assert_exact_search(query, keys, distances, indices)
    for row, column, key in ((0, 0, 0), (0, 1, 0), (1, 0, 1)):
        wrong = indices.clone()
        wrong[row, column] = key
        with pytest.raises(AssertionError, match=r"not finite|where there is none"):
            assert_exact_search(query, keys, distances, wrong)


@pytest.mark.parametrize("metric", ["l2", "ip"])
def test_the_order_on_a_lattice_is_that_of_integers(metric: str) -> None:
    query, keys = torch.randint(-(2**20), 2**20, (3, 4)), torch.randint(-(2**20), 2**20, (50, 4))
    keys[30:] = keys[:20] + torch.randint(-1, 2, (20, 4))
    keys[7] = keys[9]
    unit = 2.0**-30
    distances, indices = order_on_a_lattice(query * unit, keys * unit, unit, 6, metric)
    for n, row in enumerate(query.tolist()):
        pairs = [list(zip(row, key, strict=True)) for key in keys.tolist()]
        if metric == "l2":
            ranks = [sum((q - k) ** 2 for q, k in pair) for pair in pairs]
        else:
            ranks = [-sum(q * k for q, k in pair) for pair in pairs]
        expected = sorted(range(50), key=lambda key: (ranks[key], key))[:6]
        assert indices[n].tolist() == expected
        sign = 1 if metric == "l2" else -1
        assert distances[n].tolist() == torch.tensor([sign * ranks[key] for key in expected]).mul(unit**2).tolist()
    with pytest.raises(AssertionError, match="not exact"):
        order_on_a_lattice(query * 128.0, keys * 128.0, 1.0, 1, metric)


# --- shapes, dtypes, metrics ------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("count", "rows", "dim", "k"),
    [
        (1, 1, 1, 1), (3, 5, 7, 5), (5, 100, 33, 3), (40, 300, 17, 1), (130, 500, 64, 2), (30, 77, 129, 77),
        (4, 1000, 100, 4), (13, 700, 5, 1), (7, 65, 2049, 2), (2, 3, 4096, 3), (250, 63, 16, 1),
    ],
)  # fmt: skip
def test_fresh_rows(isa: str, metric: str, dtype: torch.dtype, count: int, rows: int, dim: int, k: int) -> None:
    assert_search_is_exact(torch.randn(count, dim).to(dtype), torch.randn(rows, dim).to(dtype), k, metric)


@pytest.mark.parametrize("metric", METRICS)
def test_integers_leave_no_band_so_indices_equal_the_references(isa: str, metric: str) -> None:
    """Small integers are summed exactly: ties are true ties, and go to the lowest index."""
    query, keys = torch.randint(-2, 3, (90, 6)).float(), torch.randint(-2, 3, (400, 6)).float()
    expected = reference(query, keys, 9, metric=metric)
    if metric == "cosine":  # its quotients are rounded
        return assert_search_is_exact(query, keys, 9, metric)
    got = memad_fast.nearest_keys(query, keys, 9, metric=metric)
    assert torch.equal(got[1], expected[1])
    assert torch.equal(got[0], expected[0])
    return None


@settings(max_examples=80, deadline=None)
@given(
    data=st.data(), count=st.integers(0, 9), rows=st.integers(1, 40), dim=st.integers(0, 20),
    metric=st.sampled_from(METRICS),
)  # fmt: skip
def test_any_integers(data: st.DataObject, count: int, rows: int, dim: int, metric: str) -> None:
    k = data.draw(st.integers(1, rows))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    query = torch.randint(-3, 4, (count, dim), generator=generator).float()
    keys = torch.randint(-3, 4, (rows, dim), generator=generator).float()
    got = memad_fast.nearest_keys(query, keys, k, metric=metric)
    expected = reference(query, keys, k, metric=metric)
    torch.testing.assert_close(got[0], expected[0])
    if metric != "cosine":
        assert torch.equal(got[1], expected[1])


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=24, max_size=24),
    metric=st.sampled_from(METRICS),
)
def test_any_finite_floats(values: list[float], metric: str) -> None:
    rows = torch.tensor(values).reshape(8, 3)
    assert_search_is_exact(rows[:3], rows[3:], 2, metric)


# --- adversarial ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", ADVERSARIES)
def test_adversarial_rows(isa: str, name: str, metric: str) -> None:
    query, keys = ADVERSARIES[name]()
    for k in (1, 5):
        assert_search_is_exact(query, keys, k, metric)
        assert_search_is_exact(query[:3], keys, k, metric)


@pytest.mark.parametrize("name", ["near ties", "squares underflow", "offset 1e4"])
def test_exact_also_where_the_processor_flushes_denormals(isa: str, name: str) -> None:
    query, keys = ADVERSARIES[name]()
    try:
        torch.set_flush_denormal(True)
        found = [memad_fast.nearest_keys(query[:n], keys, 2)[1] for n in (3, len(query))]
    finally:
        torch.set_flush_denormal(False)
    expected = memad_fast.nearest_keys(query, keys, 2)[1]
    assert torch.equal(found[0], expected[:3])
    assert torch.equal(found[1], expected)


@pytest.mark.parametrize("metric", METRICS)
def test_every_instruction_set_finds_the_same_bits(metric: str) -> None:
    from memad_fast import native

    for name in ("near ties", "permuted rows", "one dominant dimension"):
        query, keys = ADVERSARIES[name]()
        results = []
        for level in native.isas():
            native.set_isa(level)
            packed = memad_fast.prepare_keys(keys, metric=metric).packed
            results.append((*memad_fast.nearest_keys(query, keys, 3, metric=metric), packed))
        native.set_isa("auto")
        for result in results[1:]:
            for got, expected in zip(result, results[0], strict=True):
                assert torch.equal(got, expected)


def test_keys_packed_on_one_instruction_set_serve_another() -> None:
    from memad_fast import native

    query, keys = torch.randn(30, 20), torch.randn(100, 20)
    native.set_isa("portable")
    prepared = memad_fast.prepare_keys(keys)
    native.set_isa("auto")
    assert torch.equal(memad_fast.nearest_keys(query, prepared)[1], memad_fast.nearest_keys(query, keys)[1])


# --- what is not a number, empty, huge -------------------------------------------------------------------------


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("count", [3, 20])
def test_non_finite_rows(isa: str, metric: str, bad: float, count: int) -> None:
    query, keys = torch.randn(count, 10), torch.randn(90, 10)
    query[1, 4] = bad
    keys[::2, 3] = bad
    for searched in (keys, memad_fast.prepare_keys(keys, metric=metric)):
        distances, indices = memad_fast.nearest_keys(query, searched, 60, metric=metric)
        assert (indices[1] == -1).all()
        assert distances[1].isnan().all()
        rest = [0, *range(2, count)]
        assert (indices[rest, :45] % 2 == 1).all()
        assert (indices[rest, 45:] == -1).all()
        assert torch.equal(distances.isnan(), indices == -1)
        assert_exact_search(query[rest], keys[1::2], distances[rest, :45], indices[rest, :45] // 2, metric)


def test_no_finite_key_at_all(isa: str) -> None:
    distances, indices = memad_fast.nearest_keys(torch.randn(7, 3), torch.full((20, 3), torch.nan), 2)
    assert (indices == -1).all()
    assert distances.isnan().all()


def test_no_queries_give_empty_results(isa: str) -> None:
    distances, indices = memad_fast.nearest_keys(torch.empty(0, 3), torch.randn(4, 3), 2)
    assert distances.shape == indices.shape == (0, 2)
    assert (distances.dtype, indices.dtype) == (torch.float32, torch.int64)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("count", [2, 9])
def test_rows_without_elements_are_all_alike(isa: str, metric: str, count: int) -> None:
    distances, indices = memad_fast.nearest_keys(torch.empty(count, 0), torch.empty(4, 0), 3, metric=metric)
    assert indices.tolist() == [[0, 1, 2]] * count
    assert (distances == (1.0 if metric == "cosine" else 0.0)).all()


def test_an_identical_row_has_distance_exactly_zero(isa: str) -> None:
    keys = torch.randn(50, 37) * 1e3
    for metric in ("l2", "cosine"):
        distances, indices = memad_fast.nearest_keys(keys, keys, metric=metric)
        assert indices[:, 0].tolist() == list(range(50))
        assert (distances == 0).all()


def test_cosine_of_a_zero_vector_is_zero(isa: str) -> None:
    query = torch.tensor([[0.0, 0.0], [1.0, 0.0]]).repeat(4, 1)
    keys = torch.tensor([[-1.0, 0.0], [0.0, 0.0], [-1.0, 1.0]])
    distances, indices = memad_fast.nearest_keys(query, keys, 3, metric="cosine")
    assert indices[:2].tolist() == [[0, 1, 2], [1, 2, 0]]
    assert distances[0].tolist() == [1.0, 1.0, 1.0]
    assert distances[1, [0, 2]].tolist() == [1.0, 2.0]


def test_distances_beyond_float32_are_infinite_and_still_ordered(isa: str) -> None:
    distances, indices = memad_fast.nearest_keys(torch.tensor([[3e38]]), torch.tensor([[-3e38], [-2e38]]), 2)
    assert distances.tolist() == [[torch.inf, torch.inf]]
    assert indices.tolist() == [[1, 0]]


def test_more_elements_than_32_bits_keep_their_shape() -> None:
    query, keys = torch.empty(2**31 + 1, 2, device="meta"), torch.empty(5, 2, device="meta")
    distances, indices = memad_fast.nearest_keys(query, keys, 3)
    assert distances.shape == indices.shape == (2**31 + 1, 3)


@pytest.mark.parametrize("count", [2, 40])
def test_offsets_beyond_32_bits_are_read(isa: str, count: int) -> None:
    """Keys 2^31 elements apart, in a file-less mapping of which two pages exist."""
    width, stride = 8, 2**31
    storage = torch.from_numpy(np.memmap("/dev/zero", dtype=np.float32, mode="c", shape=(stride + width,)))
    keys = storage.as_strided((2, width), (stride, 1))
    keys[0], keys[1] = torch.randn(width), torch.randn(width)
    query = keys[1].expand(count, width)
    distances, indices = memad_fast.nearest_keys(query, keys, 2)
    assert indices.tolist() == [[1, 0]] * count
    assert torch.equal(distances, memad_fast.nearest_keys(query, keys.clone(), 2)[0])


def test_expanded_keys_all_tie(isa: str) -> None:
    keys = torch.ones(1, 1).expand(3, 1)
    assert memad_fast.nearest_keys(torch.zeros(2, 1), keys, 3)[1].tolist() == [[0, 1, 2]] * 2


# --- views, splits, memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [3, 40])
def test_views_give_the_same_as_copies(isa: str, count: int) -> None:
    wide_query, wide_keys = torch.randn(2 * count, 30), torch.randn(200, 60)
    for query in (wide_query[::2, 3:23], torch.randn(20, count).T, wide_query[:1, :20].expand(count, 20)):
        for keys in (wide_keys[1::2, 5:25], wide_keys[:20].T, wide_keys[:1, :20].expand(9, 20)):
            got = memad_fast.nearest_keys(query, keys, 2)
            expected = memad_fast.nearest_keys(query.contiguous(), keys.contiguous(), 2)
            assert torch.equal(got[1], expected[1])
            assert torch.equal(got[0], expected[0])


@pytest.mark.parametrize(("count", "rows", "dim"), [(400, 300, 20), (40, 3000, 20), (2, 3000, 20)])
def test_results_do_not_depend_on_splits_or_threads(isa: str, count: int, rows: int, dim: int) -> None:
    query, keys = torch.randn(count, dim), torch.randn(rows, dim)
    whole = memad_fast.nearest_keys(query, keys, 3)
    threads = torch.get_num_threads()
    try:
        for number in (1, 3, 7):
            torch.set_num_threads(number)
            for got, expected in zip(memad_fast.nearest_keys(query, keys, 3), whole, strict=True):
                assert torch.equal(got, expected)
    finally:
        torch.set_num_threads(threads)
    for size in (1, 33):
        parts = [memad_fast.nearest_keys(part, keys, 3) for part in query[:70].split(size)]
        for index in (0, 1):
            assert torch.equal(torch.cat([part[index] for part in parts]), whole[index][:70])


@pytest.mark.parametrize("form", ["keys", "memad_fast.prepare_keys(keys)"])
def test_no_matrix_of_queries_by_keys_is_stored(form: str) -> None:
    """20,000 x 20,000 scores would take 1.6 GB."""
    program = f"""
        import torch, memad_fast

        query, keys = torch.randn(20000, 8), torch.randn(20000, 8)
        searched = {form}
        memad_fast.nearest_keys(query[:100], searched)
        before = peak()
        memad_fast.nearest_keys(query, searched)
        print(peak() - before)
    """
    assert int(run_measured(program)) < 50e6


# --- what the screen leaves over ----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [lambda keys: keys, memad_fast.prepare_keys])
def test_codes_leave_few_of_random_keys_to_float64(isa: str, form: Callable) -> None:
    query, keys = torch.randn(50, 64), torch.randn(1000, 64)
    stats = memad_fast.nearest_keys_stats(query, form(keys))
    assert stats.survivors.shape == stats.full_path.shape == (50,)
    assert (stats.survivors >= 1).all()
    assert (stats.survivors < 100).all()
    assert not stats.full_path.any()


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    "count", [100, 5]
)  # many such queries are screened in float32, a few take every key in float64
def test_queries_that_codes_cannot_decide_take_the_full_path(isa: str, metric: str, count: int, k: int) -> None:
    query, keys = one_dominant_dimension(count, 24), one_dominant_dimension(3000, 24)
    query[0] = 0.0
    prepared = memad_fast.prepare_keys(keys, metric=metric)
    stats = memad_fast.nearest_keys_stats(query, prepared, k, metric=metric)
    assert stats.full_path[1:].all()
    assert_search_is_exact(query, keys, k, metric)


def test_rows_too_long_for_sums_of_codes_take_the_full_path(isa: str) -> None:
    query, keys = torch.randn(9, 65537), torch.randn(20, 65537)
    keys[3] = query[5]
    assert memad_fast.nearest_keys_stats(query, keys).full_path.all()
    assert_search_is_exact(query, keys, 2)


def test_rows_as_long_as_sums_of_codes_allow(isa: str) -> None:
    keys = torch.ones(3, 65536)
    keys[1] *= -1
    query = torch.cat([keys[1:2], keys[:1] + 0.5, torch.zeros(3, 65536)])
    assert_search_is_exact(query, keys, 2)


def test_stats_of_rows_that_are_not_finite_and_of_equal_rows(isa: str) -> None:
    query, keys = torch.randn(3, 8), torch.ones(200, 8)
    query[1, 4] = torch.nan
    stats = memad_fast.nearest_keys_stats(query, keys, k=2)
    assert stats.survivors.tolist()[1] == 0
    assert not stats.full_path[1]
    assert (stats.survivors[[0, 2]] >= 200).all()  # all tie
    reference = memad_fast.nearest_keys_stats(query.double(), keys.double(), k=2)
    assert reference.survivors.tolist() == [200, 0, 200]
    assert reference.full_path.tolist() == [True, False, True]
    none = memad_fast.nearest_keys_stats(torch.empty(0, 8), keys)
    assert none.survivors.shape == none.full_path.shape == (0,)


def test_stats_refuse_what_the_search_refuses() -> None:
    with pytest.raises(ValueError, match=r"k: expected 1 to 3 \(the number of keys\), got 4"):
        memad_fast.nearest_keys_stats(torch.zeros(1, 2), torch.zeros(3, 2), 4)
    with pytest.raises(ValueError, match="metric: expected"):
        memad_fast.nearest_keys_stats(torch.zeros(1, 2), torch.zeros(3, 2), metric="l1")


# --- gradients, graphs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_equal_the_references(isa: str, metric: str, dtype: torch.dtype) -> None:
    query, keys = torch.randn(25, 19).to(dtype), torch.randn(12, 19).to(dtype)
    query[3, 2] = torch.nan
    keys[4] = 0.0
    keys[5, 1] = torch.inf
    weights = torch.randn(25, 3).masked_fill(torch.arange(25)[:, None] == 3, 0.0)
    results = []
    for q, rows in ((query.clone(), keys.clone()), (query.double(), keys.double())):
        q.requires_grad_()
        rows.requires_grad_()
        distances, _ = memad_fast.nearest_keys(q, rows, 3, metric=metric)
        results.append(torch.autograd.grad((distances.nan_to_num() * weights).sum(), (q, rows)))
    tolerance = {torch.float32: 3e-6, torch.float16: 3e-3, torch.bfloat16: 3e-2}[dtype]
    for got, expected in zip(*results, strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)


def test_gradients_of_prepared_keys_go_to_their_rows() -> None:
    query, keys = torch.randn(25, 19, requires_grad=True), torch.randn(12, 19, requires_grad=True)
    grads = [
        torch.autograd.grad(memad_fast.nearest_keys(query, searched, 2)[0].sum(), (query, keys))
        for searched in (keys, memad_fast.prepare_keys(keys))
    ]
    for got, expected in zip(*grads, strict=True):
        assert torch.equal(got, expected)


def test_slots_that_found_nothing_give_no_gradient() -> None:
    query, keys = torch.full((2, 3), torch.nan, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    distances, _ = memad_fast.nearest_keys(query, keys, 2)
    for gradient in torch.autograd.grad(distances.sum(), (query, keys)):
        assert (gradient == 0).all()


def test_gradients_are_the_same_bits_on_any_number_of_threads() -> None:
    query, keys = torch.randn(500, 9, requires_grad=True), torch.randn(7, 9, requires_grad=True)
    threads, grads = torch.get_num_threads(), []
    try:
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            grads.append(torch.autograd.grad(memad_fast.nearest_keys(query, keys, 3)[0].sum(), (query, keys)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in grads[1:] for a, b in zip(other, grads[0], strict=True))


@pytest.mark.parametrize("metric", METRICS)
def test_gradcheck(metric: str) -> None:
    query = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    keys = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda q, rows: memad_fast.nearest_keys(q, rows, 2, metric=metric)[0], (query, keys))


def test_opcheck() -> None:
    ops = torch.ops.memad_fast
    for requires_grad in (False, True):
        query, keys = torch.randn(9, 5).requires_grad_(requires_grad), torch.randn(8, 5).requires_grad_(requires_grad)
        packed = ops.prepare_keys(keys.detach(), "l2")
        torch.library.opcheck(ops.nearest_keys.default, (query, keys, None, 2, "ip"))
        torch.library.opcheck(ops.nearest_keys.default, (query, keys, packed, 2, "l2"))
        torch.library.opcheck(ops.nearest_keys_stats.default, (query, keys, packed, 2, "l2"))
    backward = (torch.randn(9, 2), query.detach(), keys.detach(), torch.randint(0, 8, (9, 2)), "l2")
    torch.library.opcheck(ops.nearest_keys_backward_query.default, backward)
    torch.library.opcheck(ops.nearest_keys_backward_keys.default, backward)


def test_compiles_and_exports_as_one_graph() -> None:
    query, keys = torch.randn(9, 5), torch.randn(8, 5)
    prepared = memad_fast.prepare_keys(keys)
    expected = memad_fast.nearest_keys(query, keys, 2)

    class Search(torch.nn.Module):
        def forward(self, query: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
            return memad_fast.nearest_keys(query, keys, 2)

    calls = [
        torch.compile(lambda q: memad_fast.nearest_keys(q, keys, 2), fullgraph=True)(query),
        torch.compile(lambda q: memad_fast.nearest_keys(q, prepared, 2), fullgraph=True)(query),
        torch.export.export(Search(), (query, keys)).module()(query, keys),
    ]
    for got in calls:
        assert torch.equal(got[0], expected[0])
        assert torch.equal(got[1], expected[1])


# --- bad input --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1.0], torch.ones(2, 3)), TypeError, r"query: expected a torch.Tensor, got list"),
        ((torch.ones(2, 3), [1.0]), TypeError, r"keys: expected a torch.Tensor, got list"),
        ((torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 3)), TypeError, r"query: expected float32.*int64"),
        ((torch.ones(2, 3), torch.ones(2, 3).half()), TypeError, r"keys: expected torch.float32 like query"),
        ((torch.ones(3), torch.ones(2, 3)), ValueError, r"query: expected 2 dimensions \[N, D\], got shape \(3,\)"),
        ((torch.ones(2, 3), torch.ones(2, 3, 1)), ValueError, r"keys: expected 2 dimensions"),
        ((torch.ones(2, 3), torch.ones(2, 4)), ValueError, r"keys: expected 3 like query in dimension 1"),
        ((torch.ones(2, 3), torch.ones(2, 3, device="meta")), ValueError, r"keys: expected device cpu like query"),
        ((torch.ones(2, 3), torch.ones(0, 3)), ValueError, r"keys: expected at least 1 row"),
        ((torch.ones(2, 3), torch.ones(2, 3), 3), ValueError, r"k: expected 1 to 2 .*, got 3"),
        ((torch.ones(2, 3), torch.ones(2, 3), 0), ValueError, r"k: expected 1 to 2 .*, got 0"),
        ((torch.ones(2, 3), torch.ones(2, 3), 1.0), TypeError, r"k: expected an int, got float"),
    ],
)
def test_bad_input_names_the_argument(arguments: tuple, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        memad_fast.nearest_keys(*arguments)


def test_an_unknown_metric_or_that_of_other_prepared_keys_is_refused() -> None:
    with pytest.raises(ValueError, match=r"metric: expected one of l2, cosine, ip, got 'l1'"):
        memad_fast.nearest_keys(torch.ones(2, 3), torch.ones(2, 3), metric="l1")
    with pytest.raises(ValueError, match=r"metric: the keys were prepared for 'l2', got 'ip'"):
        memad_fast.nearest_keys(torch.ones(2, 3), memad_fast.prepare_keys(torch.ones(2, 3)), metric="ip")


def test_foreign_packed_bytes_are_refused() -> None:
    query, keys = torch.ones(2, 3), torch.randn(20, 3)
    search = torch.ops.memad_fast.nearest_keys
    packed = memad_fast.prepare_keys(keys).packed
    assert packed is not None
    with pytest.raises((RuntimeError, ValueError), match="packed: expected"):
        search(query, keys, torch.zeros_like(packed), 1, "l2")
    with pytest.raises((RuntimeError, ValueError), match=r"packed: expected.*\[19, 3\]"):
        search(query, keys[:19], packed, 1, "l2")
    with pytest.raises((RuntimeError, ValueError), match="packed: expected"):
        search(query, keys, packed[:-4], 1, "l2")
    with pytest.raises((RuntimeError, ValueError), match="metric"):
        search(query, keys, packed, 1, "ip")


@pytest.mark.parametrize("metric", METRICS)
def test_native_gives_the_same_bits(isa: str, metric: str) -> None:
    from memad_fast import native

    query, keys = torch.randn(30, 21), torch.randn(200, 21)
    expected = memad_fast.nearest_keys(query, keys, 3, metric=metric)
    prepared = native.prepare_keys(keys.numpy(), metric=metric)
    assert len(prepared) == 200
    assert prepared.nbytes == memad_fast.prepare_keys(keys, metric=metric).nbytes
    for rows in (keys.numpy(), prepared):
        got = native.nearest_keys(query.numpy(), rows, 3, metric=metric)
        for array, tensor in zip(got, expected, strict=True):
            np.testing.assert_array_equal(array, tensor.numpy())


def test_native_keys_prepared_once_stay_as_they_were() -> None:
    from memad_fast import native

    keys = np.eye(4, dtype=np.float32)
    prepared = native.prepare_keys(keys)
    keys[:] = 7
    distances, indices = native.nearest_keys(np.eye(4, dtype=np.float32), prepared)
    assert indices[:, 0].tolist() == [0, 1, 2, 3]
    assert (distances == 0).all()
    with pytest.raises(ValueError, match="read-only"):
        prepared.keys[0] = 1
    with pytest.raises(ValueError, match="metric: the keys were prepared for 'l2', got 'ip'"):
        native.nearest_keys(keys, prepared, metric="ip")
    with pytest.raises(ValueError, match="keys: expected at least 1 row"):
        native.prepare_keys(keys[:0])
