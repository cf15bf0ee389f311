"""ExactIndex: what brute force in float64 finds over all rows in order of age, whatever the chunks and budgets."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, rule
from lives import StoredLife, integers
from peak_memory import grown_by_searching, run_measured
from remembered import Remembered, assert_same
from searches import ADVERSARIES, METRICS

import memad_fast
from memad_fast.index import ExactIndex, IndexFileError, ShardedIndex, open_index
from memad_fast.index.sizes import parse_bytes

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


# --- search -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("path", [None, "index"])
def test_a_search_is_that_of_all_rows_at_once(
    isa: str, metric: str, dtype: torch.dtype, path: str | None, tmp_path: Path
) -> None:
    keys, values = torch.randn(1000, 19).to(dtype), torch.randn(1000, 3)
    query = torch.randn(30, 19).to(dtype)
    index = ExactIndex(
        19, metric=metric, dtype=dtype, values_dim=3, chunk_rows=128, path=None if path is None else tmp_path / path
    )
    at = 0
    for count in (1, 0, 63, 64, 300, 572):
        ids = index.add(keys[at : at + count], values[at : at + count])
        assert ids.tolist() == list(range(at, at + count))
        at += count
        for k in (1, 7):
            distances, found = memad_fast.nearest_keys(query, keys[:at], min(k, at), metric=metric)
            got = index.search(query, k)
            assert torch.equal(got.distances[:, :at], distances)
            assert torch.equal(got.ids[:, :at], found)
            assert got.values is not None
            assert torch.equal(got.values[:, :at], values[found])


@pytest.mark.parametrize("name", ADVERSARIES)
def test_adversarial_rows(name: str) -> None:
    query, keys = ADVERSARIES[name]()
    for metric in METRICS:
        index = ExactIndex(keys.shape[1], metric=metric, chunk_rows=64)
        index.add(keys)
        distances, rows = memad_fast.nearest_keys(query, keys, 5, metric=metric)
        got = index.search(query, 5)
        assert torch.equal(got.ids, rows)
        assert torch.equal(got.distances, distances)


def test_ties_go_to_the_oldest_row_whatever_its_id() -> None:
    index = ExactIndex(2, chunk_rows=64)
    ids = torch.randperm(300)
    index.add(torch.ones(300, 2), ids=ids)
    assert index.search(torch.zeros(1, 2), 200).ids[0].tolist() == ids[:200].tolist()


def test_more_neighbours_than_rows_leave_empty_slots() -> None:
    index = ExactIndex(2, values_dim=1)
    index.add(torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.tensor([[5.0], [6.0]]))
    distances, ids, values = index.search(torch.zeros(1, 2), 4)
    assert ids.tolist() == [[1, 0, -1, -1]]
    assert distances[0, :2].tolist() == [0.0, 1.0]
    assert distances[0, 2:].isnan().all()
    assert values is not None
    assert values.tolist() == [[[6.0], [5.0], [0.0], [0.0]]]


def test_a_query_that_is_not_finite_finds_nothing_and_none_gives_empty_results() -> None:
    index = ExactIndex(2)
    index.add(torch.zeros(3, 2))
    found = index.search(torch.tensor([[torch.nan, 0.0], [0.0, 1.0]]), 2)
    assert found.ids.tolist() == [[-1, -1], [0, 1]]
    assert found.values is None
    assert index.search(torch.empty(0, 2), 2).ids.shape == (0, 2)


def test_queries_in_blocks_find_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    index = ExactIndex(4, values_dim=1, chunk_rows=64)
    index.add(torch.randn(200, 4), torch.randn(200, 1))
    query = torch.randn(50, 4)
    expected = index.search(query, 3)
    monkeypatch.setattr("memad_fast.index.exact._SEARCH_BYTES", 64 * 3 * 7)
    for got, want in zip(index.search(query, 3), expected, strict=True):
        assert torch.equal(got, want)


def test_searching_asks_for_no_gradient_and_inference_mode_leaves_the_index_usable() -> None:
    index = ExactIndex(2, chunk_rows=64)
    index.add(torch.zeros(3, 2, requires_grad=True))
    assert not index.search(torch.ones(1, 2, requires_grad=True)).distances.requires_grad
    with torch.inference_mode():
        index.add(torch.ones(70, 2))
        index.search(torch.ones(1, 2))
    index.add(torch.ones(70, 2))
    assert index.search(torch.ones(1, 2), 200).ids[0, :140].tolist() == list(range(3, 143))


@pytest.mark.parametrize("added_by", ["reference", None])
@pytest.mark.parametrize("searched_by", ["reference", None])
def test_backends_may_change_between_adding_and_searching(added_by: str | None, searched_by: str | None) -> None:
    index, expected = ExactIndex(3, chunk_rows=256), Remembered(3, values_dim=None)
    for backend in (None, added_by, None, added_by, None):  # within a tail, and beyond
        keys = integers(80)
        with memad_fast.use_backend(backend):
            expected.add(keys, index.add(keys))
        with memad_fast.use_backend(searched_by):
            assert_same(index, expected)


@pytest.mark.parametrize("metric", ["l2", "ip"])
def test_as_on_a_gpu_chunks_are_searched_by_whole_searches(metric: str) -> None:
    """In Triton's interpreter: rows stay unpacked until a chunk is full, and each chunk is one search."""
    if not memad_fast.backends()["triton"].available:
        pytest.skip(memad_fast.backends()["triton"].reason)
    index, expected = ExactIndex(3, metric=metric, chunk_rows=64, values_dim=2), Remembered(3, metric)
    with memad_fast.use_backend("triton"):
        for count in (70, 20):
            keys, values = integers(count), torch.randn(count, 2)
            expected.add(keys, index.add(keys, values), values)
        index.remove_oldest(5)
        expected.remove_oldest(5)
        assert_same(index, expected, integers(3))


# --- a life of adding, removing, saving ---------------------------------------------------------------------------


class Life(StoredLife):
    """Any order of changes, beside plain lists."""

    @initialize(
        metric=st.sampled_from(METRICS), capacity=st.sampled_from([None, None, 5, 200]),
        on_disk=st.booleans(), mmap=st.booleans(), seed=st.integers(0, 10**6),
    )  # fmt: skip
    def begin(self, metric: str, capacity: int | None, on_disk: bool, mmap: bool, seed: int) -> None:
        torch.manual_seed(seed)
        path = self.new_folder()
        index = ExactIndex(
            3, metric=metric, values_dim=2, capacity=capacity, chunk_rows=64, path=path if on_disk else None, mmap=mmap
        )
        self.begin_beside(index)

    @rule(count=st.sampled_from([1, 100]), keep_ids=st.booleans())
    def merge(self, count: int, keep_ids: bool) -> None:
        others = []
        for _ in range(2):
            other = ExactIndex(3, metric=self.index.metric, values_dim=2, chunk_rows=128)
            other.add(integers(count + 2), torch.randn(count + 2, 2), torch.randperm(10**6)[: count + 2] + 10**6)
            other.remove_oldest(2)
            others.append(other)
        keys = torch.cat([piece.keys for other in others for piece in other.pieces()])
        ids = torch.cat([piece.ids for other in others for piece in other.pieces()])
        values = torch.cat([piece.values for other in others for piece in other.pieces()])
        if keep_ids and (len(ids.unique()) < len(ids) or torch.isin(ids, self.expected.ids).any()):
            return
        first = self.index._next_id
        self.index.merge(others, keep_ids=keep_ids)
        self.expected.add(keys, ids if keep_ids else first + torch.arange(len(ids)), values)

    @invariant()
    def is_right(self) -> None:
        if hasattr(self, "expected"):
            assert_same(self.index, self.expected)
            self.index.verify()


Life.TestCase.settings = settings(
    max_examples=40, stateful_step_count=12, deadline=None, suppress_health_check=list(HealthCheck)
)
TestLife = pytest.mark.usefixtures("one_thread")(Life.TestCase)


def test_a_ring_keeps_the_newest_and_little_beside_them() -> None:
    index, expected = ExactIndex(3, values_dim=2, capacity=1000), Remembered(3, capacity=1000)
    for count in (10, 700, 400, 5000, 3, 999):
        keys, values = integers(count), torch.randn(count, 2)
        expected.add(keys, index.add(keys, values), values)
        assert_same(index, expected)
    grown = ExactIndex(3, values_dim=2, chunk_rows=64)
    grown.add(expected.keys, expected.values)
    assert index.stats().ram_bytes < 1.6 * grown.stats().ram_bytes


def test_rows_are_packed_when_they_come_and_chunks_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adding is incremental: over a life in small steps a row is packed a few times, not once a step."""
    from memad_fast.index import chunks

    packed = 0
    write, prepare = chunks.write, chunks.prepare_keys

    def counting_write(op: object, *arguments: torch.Tensor) -> None:
        nonlocal packed
        packed += len(arguments[2])
        write(op, *arguments)

    def counting_prepare(keys: torch.Tensor, *, metric: str) -> memad_fast.PreparedKeys:
        nonlocal packed
        packed += len(keys)
        return prepare(keys, metric=metric)

    monkeypatch.setattr(chunks, "write", counting_write)
    monkeypatch.setattr(chunks, "prepare_keys", counting_prepare)
    index = ExactIndex(3, chunk_rows=2048)
    for _ in range(600):
        index.add(torch.randn(10, 3))
    assert packed < 3 * len(index)


# --- ids --------------------------------------------------------------------------------------------------------


def test_automatic_ids_count_on_from_the_largest_ever() -> None:
    index = ExactIndex(1)
    assert index.add(torch.zeros(2, 1)).tolist() == [0, 1]
    assert index.add(torch.zeros(2, 1), ids=[70, 5]).tolist() == [70, 5]
    assert index.add(torch.zeros(2, 1), ids=np.array([2, 3], dtype=np.uint8)).tolist() == [2, 3]
    index.remove_oldest(4)
    assert index.add(torch.zeros(1, 1)).tolist() == [71]
    assert index.search(torch.zeros(1, 1), 3).ids.tolist() == [[2, 3, 71]]


def test_a_removed_id_may_come_again_and_means_the_new_row() -> None:
    index = ExactIndex(1)
    index.add(torch.tensor([[1.0], [2.0]]), ids=[7, 8])
    index.remove_oldest(1)
    with pytest.raises(ValueError, match=r"ids: id 7 not in the index: never added, or removed since"):
        index.rows([8, 7])
    index.add(torch.tensor([[3.0]]), ids=[7])
    assert index.rows([8, 7]).keys.tolist() == [[2.0], [3.0]]


def test_ids_that_are_not_unique_are_named_and_nothing_is_added() -> None:
    index = ExactIndex(1)
    index.add(torch.zeros(20, 1))
    with pytest.raises(ValueError, match=r"ids: ids 3, 9 given more than once"):
        index.add(torch.zeros(5, 1), ids=[9, 3, 3, 9, 50])
    with pytest.raises(ValueError, match=r"ids: ids 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 10 more in the index already"):
        index.add(torch.zeros(25, 1), ids=list(range(25)))
    with pytest.raises(ValueError, match=r"ids: expected at least 0, got id -4"):
        index.add(torch.zeros(1, 1), ids=[-4])
    with pytest.raises(ValueError, match=r"ids: expected less than 2\*\*63 - 1"):
        index.add(torch.zeros(1, 1), ids=[2**63 - 1])
    assert len(index) == 20
    assert index.add(torch.zeros(1, 1)).tolist() == [20]
    index.add(torch.zeros(1, 1), ids=[2**63 - 2])
    with pytest.raises(ValueError, match=r"ids: none is left above the largest"):
        index.add(torch.zeros(1, 1))


def test_merged_indexes_keep_their_ids_or_get_new_ones_all_or_none() -> None:
    indexes = []
    for value in (1.0, 2.0):
        index = ExactIndex(1, chunk_rows=64)
        index.add(torch.full((100, 1), value))
        indexes.append(index)
    whole = ExactIndex(1, chunk_rows=64)
    with pytest.raises(ValueError, match=r"ids: ids 0, 1, .* and 54 more in the index already"):
        whole.merge(indexes)
    assert len(whole) == 0
    whole.merge(indexes, keep_ids=False)
    assert whole.search(torch.tensor([[2.0]]), 101).ids[0].tolist() == [*range(100, 200), 0]
    with pytest.raises(ValueError, match="others: expected other indexes, got this one itself"):
        whole.merge([whole])
    with pytest.raises(ValueError, match=r"others: expected \(dim, metric"):
        whole.merge([ExactIndex(1, metric="ip")])
    with pytest.raises(TypeError, match=r"others: expected ExactIndex or FaissIndex, got int"):
        whole.merge([3])  # type: ignore[list-item]


def test_a_merge_that_fails_half_way_leaves_no_trace() -> None:
    index, expected = ExactIndex(3), Remembered(3, values_dim=None)
    good, bad = ExactIndex(3), ExactIndex(3)
    keys = integers(10)
    expected.add(keys, index.add(keys))
    good.add(integers(10), ids=range(100, 110))
    bad.add(integers(10), ids=[*range(200, 209), 5])
    with pytest.raises(ValueError, match=r"ids: id 5 in the index already"):
        index.merge([good, bad])
    assert_same(index, expected)
    keys = integers(10)  # where the good ones had been, and their codes
    expected.add(keys, index.add(keys, ids=range(100, 110)))
    assert_same(index, expected)


# --- memory -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("own_ids", [False, True])
@pytest.mark.parametrize(("dtype", "values_dim"), [(torch.float32, None), (torch.float16, 5)])
def test_the_estimate_is_what_an_index_takes(
    on_disk: bool, own_ids: bool, dtype: torch.dtype, values_dim: int | None, tmp_path: Path
) -> None:
    options = {"dtype": dtype, "values_dim": values_dim, "chunk_rows": 4096}
    index = ExactIndex(40, path=tmp_path / "index" if on_disk else None, **options)
    rows = 23000
    index.add(
        torch.randn(rows, 40).to(dtype),
        None if values_dim is None else torch.randn(rows, values_dim),
        torch.randperm(rows) if own_ids else None,
    )
    estimate = ExactIndex.estimate(rows, 40, own_ids=own_ids, on_disk=on_disk, **options)
    assert index.stats().ram_bytes == pytest.approx(estimate.ram_bytes, rel=0.03)
    index.save(tmp_path / "index")
    files = sum(file.stat().st_size for file in (tmp_path / "index").iterdir())
    assert index.stats().disk_bytes == files == pytest.approx(estimate.disk_bytes, rel=0.03)


def test_stats_say_what_there_is(tmp_path: Path) -> None:
    index = ExactIndex(64, metric="ip", capacity=5000)
    index.add(torch.randn(700, 64))
    stats = index.stats()
    assert (stats.rows, stats.dim, stats.metric, stats.kind, stats.capacity) == (700, 64, "ip", "exact", 5000)
    assert stats.disk_bytes == 0
    assert repr(index) == "ExactIndex(700 x 64, torch.float32, metric='ip')"


def test_with_rows_on_disk_ram_holds_codes_alone(tmp_path: Path) -> None:
    index = ExactIndex(512, chunk_rows=512, path=tmp_path / "index")
    index.add(torch.randn(8192, 512))
    assert index.stats().ram_bytes < 0.28 * 8192 * 512 * 4


@pytest.mark.parametrize(
    ("text", "size"),
    [("2GB", 2 * 10**9), ("1.5 GiB", 3 * 2**29), ("800 mb", 8 * 10**8), ("64KiB", 65536), ("7B", 7), (7, 7)],
)
def test_sizes_are_read(text: str | int, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GB", "2", "-1GB", "2XB", "0GB"])
def test_other_texts_are_no_sizes(text: str) -> None:
    with pytest.raises(ValueError, match="memory_budget: expected a number and B"):
        parse_bytes(text)


def test_what_the_budget_has_no_room_for_is_refused(tmp_path: Path) -> None:
    index = ExactIndex(64, memory_budget="4MB")
    index.add(torch.randn(5000, 64))
    with pytest.raises(ValueError, match=r"memory_budget: 4000000 bytes, and \d+ are needed; an index with a path"):
        index.add(torch.randn(20000, 64))
    assert len(index) == 5000
    on_disk = ExactIndex(64, memory_budget="4MB", path=tmp_path / "index")
    on_disk.add(torch.randn(60000, 64))
    assert on_disk.stats().ram_bytes <= 4_000_000


def test_the_process_stays_within_the_budget(tmp_path: Path) -> None:
    """160 MB of rows and 60 MB of codes with a budget of 30 MB: built, searched, opened and searched again."""
    script = f"""
import torch
from memad_fast.index import ExactIndex
torch.set_num_threads(1)
warm = ExactIndex(64)
warm.add(torch.randn(3000, 64))
warm.search(torch.randn(300, 64), 3)
rows = torch.randn(20000, 64)
query = torch.randn(300, 64)
before = peak()
index = ExactIndex(64, memory_budget="30MB", path={str(tmp_path / "index")!r})
for shift in range(32):
    index.add(rows.roll(shift, 1))
first = index.search(query, 3)
index.save()
index.close()
del index
index = ExactIndex.open({str(tmp_path / "index")!r}, memory_budget="30MB")
assert torch.equal(index.search(query, 3).ids, first.ids)
print(len(index), peak() - before)
"""
    rows, grown = run_measured(script).split()
    assert int(rows) == 640_000
    assert int(grown) < 45 << 20  # the allocator and one chunk that is written or checked come on top


def test_rows_that_searches_touched_do_not_stay_in_memory(tmp_path: Path) -> None:
    """82 MB of rows on disk, 28 MB of codes, no budget: searches that touch most of the rows' pages."""
    assert grown_by_searching(tmp_path / "index", "ExactIndex", queries=500, times=4) < 50 << 20


# --- bad input --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"dim": 0}, ValueError, r"dim: expected at least 1, got 0"),
        ({"dim": 2.0}, TypeError, r"dim: expected an int, got float"),
        ({"metric": "l1"}, ValueError, r"metric: expected one of l2, cosine, ip, got 'l1'"),
        ({"dtype": torch.float64}, TypeError, r"dtype: expected torch.float32, .*, got torch.float64"),
        ({"capacity": 0}, ValueError, r"capacity: expected at least 1, got 0"),
        ({"values_dim": 0}, ValueError, r"values_dim: expected at least 1, got 0"),
        ({"chunk_rows": 100}, ValueError, r"chunk_rows: expected a multiple of 64, got 100"),
        ({"memory_budget": 1.5}, TypeError, r"memory_budget: expected a number of bytes or a text"),
        ({"memory_budget": 0}, ValueError, r"memory_budget: expected at least 1, got 0"),
        pytest.param(
            {"device": "cuda"},
            ValueError,
            r"device: cuda was asked for, and torch finds no CUDA device",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
        ({"path": "x", "device": "meta"}, ValueError, r"mmap: rows on meta cannot be read where they lie"),
    ],
)
def test_bad_arguments_are_named(arguments: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ExactIndex(**({"dim": 3} | arguments))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1.0], torch.zeros(1, 2)), TypeError, r"keys: expected a torch.Tensor, got list"),
        ((torch.zeros(2, 4), torch.zeros(2, 2)), ValueError, r"keys: expected 3 like the index in dimension 1"),
        ((torch.zeros(3), torch.zeros(2, 2)), ValueError, r"keys: expected 2 dimensions \[n, D\]"),
        ((torch.zeros(2, 3).half(), torch.zeros(2, 2)), TypeError, r"keys: expected torch.float32 like the index"),
        ((torch.zeros(2, 3).int(), torch.zeros(2, 2)), TypeError, r"keys: expected float32"),
        (
            (torch.zeros(2, 3, device="meta"), torch.zeros(2, 2)),
            ValueError,
            r"keys: expected device cpu like the index",
        ),
        ((torch.zeros(2, 3),), TypeError, r"values: expected a torch.Tensor, got NoneType"),
        ((torch.zeros(2, 3), torch.zeros(3, 2)), ValueError, r"values: expected 2 like keys in dimension 0"),
        ((torch.zeros(2, 3), torch.zeros(2, 1)), ValueError, r"values: expected 2 like the index in dimension 1"),
        ((torch.zeros(2, 3), torch.zeros(2, 2).int()), TypeError, r"values: expected torch.float32 like the index"),
        ((torch.zeros(2, 3), torch.zeros(2, 2), [1]), ValueError, r"ids: expected 2 like keys, got 1"),
        ((torch.zeros(2, 3), torch.zeros(2, 2), [1.0, 2.0]), TypeError, r"ids: expected integers \[n\], got float64"),
    ],
)
def test_bad_rows_are_refused_whole(arguments: tuple, error: type[Exception], message: str) -> None:
    index = ExactIndex(3, values_dim=2)
    index.add(torch.zeros(1, 3), torch.zeros(1, 2))
    with pytest.raises(error, match=message):
        index.add(*arguments)
    assert len(index) == 1
    assert index.add(torch.zeros(1, 3), torch.zeros(1, 2)).tolist() == [1]


def test_rows_that_are_not_finite_are_named() -> None:
    index = ExactIndex(2, chunk_rows=64)
    keys = torch.zeros(200, 2)
    keys[3, 1], keys[70, 0], keys[150, 0] = torch.nan, torch.inf, -torch.inf
    with pytest.raises(ValueError, match=r"keys: expected finite rows, got a NaN or an infinity in rows? 3"):
        index.add(keys)
    keys[3] = 0
    with pytest.raises(ValueError, match=r"in row 70"):
        index.add(keys)
    assert len(index) == 0


def test_bad_searches_and_removals_are_named() -> None:
    index = ExactIndex(3)
    with pytest.raises(ValueError, match=r"search: the index is empty; add rows first"):
        index.search(torch.zeros(1, 3))
    index.add(torch.zeros(4, 3))
    for arguments, error, message in (
        ((torch.zeros(1, 2),), ValueError, r"query: expected 3 like the index in dimension 1"),
        ((torch.zeros(1, 3).double(),), TypeError, r"query: expected torch.float32 like the index, got torch.float64"),
        ((torch.zeros(1, 3), 0), ValueError, r"k: expected at least 1, got 0"),
        ((torch.zeros(1, 3), 1.0), TypeError, r"k: expected an int, got float"),
    ):
        with pytest.raises(error, match=message):
            index.search(*arguments)
    for n, error, message in (
        (5, ValueError, r"n: expected 0 to 4 \(the number of rows\), got 5"),
        (-1, ValueError, r"n: expected 0 to 4"),
        (True, TypeError, r"n: expected an int, got bool"),
    ):
        with pytest.raises(error, match=message):
            index.remove_oldest(n)
    with pytest.raises(ValueError, match=r"values: the index has none"):
        index.add(torch.zeros(1, 3), torch.zeros(1, 1))
    with pytest.raises(ValueError, match=r"path: the index has no folder yet"):
        index.save()
    with pytest.raises(IndexFileError, match=r"nowhere/manifest.json: no such file"):
        ExactIndex.open("nowhere")
    index.remove_oldest(4)
    with pytest.raises(ValueError, match="the index is empty"):
        index.search(torch.zeros(1, 3))


def test_an_index_says_what_it_takes_and_where_it_is(tmp_path: Path) -> None:
    index = ExactIndex(2, dtype=torch.float16, values_dim=3, capacity=4)
    assert (index.dim, index.dtype, index.device) == (2, torch.float16, torch.device("cpu"))
    assert (index.values_dim, index.values_dtype, index.capacity) == (3, torch.float32, 4)
    assert (index.path, index.next_id) == (None, 0)
    index.add(torch.zeros(1, 2).half(), torch.zeros(1, 3), ids=[7])
    index.remove_oldest(1)
    index.save(tmp_path / "index")
    opened = ExactIndex.open(tmp_path / "index")
    assert (opened.path, opened.next_id, opened.dtype) == (tmp_path / "index", 8, torch.float16)


def test_an_index_is_opened_whatever_kind_it_is_of(tmp_path: Path) -> None:
    index = ExactIndex(2, path=tmp_path)
    index.add(torch.eye(2))
    index.save()
    index.close()
    assert open_index(tmp_path).search(torch.ones(1, 2), k=2).ids.tolist() == [[0, 1]]
    with pytest.raises(IndexFileError, match="no such file"):
        open_index(tmp_path / "nothing")
    ShardedIndex(2, path=tmp_path / "shards").save()
    with pytest.raises(IndexFileError, match=r"shards of several processes; ShardedIndex.open opens them"):
        open_index(tmp_path / "shards")


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_an_index_is_neither_copied_nor_pickled(copied: Callable[[ExactIndex], object]) -> None:
    with pytest.raises(TypeError, match="ExactIndex: an index is neither copied nor pickled; save it"):
        copied(ExactIndex(2))
