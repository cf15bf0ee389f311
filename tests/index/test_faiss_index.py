"""FaissIndex: what brute force finds, given enough candidates, whatever the factory, removals, files; else near it."""

from __future__ import annotations

import errno
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, precondition, rule
from lives import StoredLife, integers
from peak_memory import grown_by_searching
from remembered import Remembered, assert_same
from searches import METRICS

from memad_fast.index import ExactIndex, FaissIndex, IndexFileError, make_index, open_index
from memad_fast.index import faiss_index as module
from memad_fast.index.files import MANIFEST, Folder
from memad_fast.ops.nearest_keys import reference

faiss = pytest.importorskip("faiss", reason="FaissIndex needs faiss-cpu or faiss-gpu")
pytestmark = pytest.mark.usefixtures("one_thread")

ALL = 10**6  # re-ranked: every row is a candidate
EVERY = [  # of each family one, on 16 numbers, with settings that make it thorough
    ("Flat", {}), ("SQ8", {}), ("SQfp16", {}), ("PQ4x4", {}), ("PQ4x4fs", {}), ("RQ2x4", {}), ("LSQ2x4", {}),
    ("IDMap,Flat", {}), ("IVF8,Flat", {"nprobe": 8}), ("IVF8,SQ8", {"nprobe": 8}), ("IVF8,PQ4x4", {"nprobe": 8}),
    ("IVF8,PQ4x4fs", {"nprobe": 8}), ("IVF8_HNSW8,Flat", {"nprobe": 8, "quantizer_efSearch": 16}),
    ("PCA8,Flat", {}), ("OPQ4_8,IVF8,PQ4x4", {"nprobe": 8}), ("RR8,IVF8,SQ8", {"nprobe": 8}), ("L2norm,Flat", {}),
    ("PQ4x4,RFlat", {"k_factor_rf": 4}), ("PQ4x4,Refine(SQ8)", {"k_factor_rf": 4}),
    ("IVF8,PQ4x4,RFlat", {"nprobe": 8, "k_factor_rf": 4}), ("HNSW16", {"efSearch": 64}),
    ("HNSW16_SQ8", {"efSearch": 64}), ("PCA8,HNSW16", {"efSearch": 64}),
]  # fmt: skip
L2_ALONE = [("LSH", {}), ("IMI2x4,Flat", {"nprobe": 256})]


def thorough(dim: int, factory: str = "IVF4,Flat", **options: Any) -> FaissIndex:
    """One that looks at all rows, trained on few."""
    probes = {"nprobe": 4} if "IVF4" in factory else {}
    return FaissIndex(dim, factory, settings=probes, rerank=ALL, **{"training_rows": 60, **options})


def parts(path: Path, role: str = "faiss") -> list[Path]:
    listed = json.loads((path / MANIFEST).read_text())["parts"]
    return [path / part["file"] for part in listed if part["about"]["role"] == role]


# --- search -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("factory", "thorough"), [*EVERY, *L2_ALONE])
def test_every_family_finds_what_it_can_and_never_what_is_gone(
    factory: str, thorough: dict, metric: str, tmp_path: Path
) -> None:
    if metric != "l2" and (factory, thorough) in L2_ALONE:
        with pytest.raises(
            ValueError, match=f"factory: expected what FAISS can build for dim 16, got '{factory}'; FAISS"
        ):
            FaissIndex(16, factory, metric=metric)
        return
    rows, query = torch.randn(1500, 16), torch.randn(30, 16)
    index = FaissIndex(16, factory, metric=metric, settings=thorough, rerank=20, training_rows=500, chunk_rows=256)
    assert index.stats().kind == factory
    for part in rows.split(300):
        index.add(part)
        index.search(query, 3)  # also while rows wait
    index.remove_oldest(200)  # few: they stay in FAISS
    assert (index.search(query, 5).ids >= 200).all()
    assert index._faiss.ntotal == 1500
    index.remove_oldest(500)
    assert index._faiss.ntotal == 800
    index.add(rows[:100])
    found = index.search(query, 5)
    assert (found.ids >= 700).all()
    live = torch.cat((rows[700:], rows[:100]))
    distances, _ = reference(query, live, 5, metric=metric)
    assert index.recall(query, 5) > (0.3 if "LSH" in factory or "Q2x4" in factory else 0.5)
    at = torch.tensor([[index.rows([i]).keys[0].tolist() for i in row] for row in found.ids.tolist()])
    torch.testing.assert_close(found.distances, own_distances(query, at, metric), atol=1e-5, rtol=1e-5)
    share = torch.isclose(found.distances[:, :, None], distances[:, None], atol=1e-6).any(2).float().mean().item()
    assert index.recall(query, 5) == pytest.approx(share, abs=1e-3)
    index.save(tmp_path / "index")
    again = open_index(tmp_path / "index")
    assert isinstance(again, FaissIndex)
    assert again.settings == thorough
    for got, expected in zip(again.search(query, 5)[:2], found[:2], strict=True):
        assert torch.equal(got, expected)


def own_distances(query: torch.Tensor, rows: torch.Tensor, metric: str) -> torch.Tensor:
    if metric == "l2":
        return (query[:, None] - rows).square().sum(2)
    if metric == "ip":
        return (query[:, None] * rows).sum(2)
    return 1 - torch.nn.functional.cosine_similarity(query[:, None], rows, dim=2)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("factory", ["Flat", "IVF8,Flat"])
def test_without_reranking_distances_are_those_of_float32(metric: str, dtype: torch.dtype, factory: str) -> None:
    rows, query = torch.randn(900, 16).to(dtype), torch.randn(20, 32).to(dtype)[:, ::2]  # not contiguous
    rows[5] = 0
    index = FaissIndex(16, factory, metric=metric, dtype=dtype, settings={"nprobe": 8} if "IVF" in factory else None)
    index.add(rows)
    distances, ids, _ = index.search(query, 4)
    exact, _ = reference(query.double(), rows.double(), 4, metric=metric)
    torch.testing.assert_close(distances.double(), exact, atol=3e-5, rtol=1e-5)
    assert index.recall(query, 4) > 0.98  # near ties of float32
    assert ids.unique().numel() > 20


def test_identical_rows_have_distance_zero_with_and_without_reranking() -> None:
    rows = 1000 + torch.randn(50, 16)
    for rerank in (None, 4):
        index = FaissIndex(16, "Flat", rerank=rerank)
        index.add(rows)
        distances = index.search(rows, 3).distances
        assert (distances >= 0).all()
        assert rerank is None or (distances[:, 0] == 0).all()


@pytest.mark.parametrize("factory", ["Flat", "IVF4,Flat", "HNSW16", "PQ4x4"])
def test_rows_that_are_gone_do_not_hide_those_behind_them(factory: str) -> None:
    """All of FAISS's first candidates are gone; the nearest rows that live come after them."""
    near, far = 0.01 * torch.randn(300, 16), torch.randn(700, 16) + 3
    index = FaissIndex(16, factory, training_rows=100, rerank=2, settings={"nprobe": 4} if "IVF" in factory else None)
    index.add(torch.cat((near, far)))
    index.remove_oldest(300)
    assert index._faiss.ntotal == 1000
    found = index.search(torch.zeros(5, 16), 10)
    assert (found.ids >= 300).all()
    assert index.recall(torch.zeros(5, 16), 10) > 0.5


def test_more_neighbours_than_rows_leave_empty_slots() -> None:
    index = FaissIndex(2, "Flat", values_dim=1)
    index.add(torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.tensor([[5.0], [6.0]]))
    distances, ids, values = index.search(torch.zeros(1, 2), 4)
    assert ids.tolist() == [[1, 0, -1, -1]]
    assert distances[0, :2].tolist() == [0.0, 1.0]
    assert distances[0, 2:].isnan().all()
    assert values is not None
    assert values.tolist() == [[[6.0], [5.0], [0.0], [0.0]]]


def test_lists_that_are_not_probed_leave_empty_slots() -> None:
    index = FaissIndex(1, "IVF2,Flat", training_rows=20)
    index.add(torch.cat((torch.zeros(10, 1), torch.full((10, 1), 100.0))))
    ids = index.search(torch.zeros(1, 1), 15).ids[0]
    assert sorted(ids[:10].tolist()) == list(range(10))
    assert (ids[10:] == -1).all()
    assert index.recall(torch.zeros(1, 1), 15) == 10 / 15 or index.recall(torch.zeros(1, 1), 15) == 1.0


@pytest.mark.parametrize("factory", ["Flat", "IVF4,Flat", "HNSW8"])
@pytest.mark.parametrize("rerank", [None, 3])
def test_a_query_that_is_not_finite_finds_nothing_and_none_gives_empty_results(
    factory: str, rerank: int | None
) -> None:
    index = FaissIndex(2, factory, training_rows=8, rerank=rerank, values_dim=1)
    for count in (5, 5):  # waiting, and taken
        index.add(torch.randn(count, 2), torch.ones(count, 1))
        found = index.search(torch.tensor([[torch.nan, 0.0], [0.0, 1.0], [torch.inf, 0.0]]), 1)
        assert (found.ids[:, 0] >= 0).tolist() == [False, True, False]
        assert found.distances[:, 0].isnan().tolist() == [True, False, True]
        assert found.values is not None
        assert found.values.flatten().tolist() == [0, 1, 0]
        assert index.search(torch.empty(0, 2), 2).ids.shape == (0, 2)


def test_queries_in_blocks_find_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    index = FaissIndex(4, "Flat", values_dim=1, rerank=3)
    index.add(torch.randn(200, 4), torch.randn(200, 1))
    query = torch.randn(50, 4)
    expected = index.search(query, 3)
    monkeypatch.setattr(module, "_SEARCH_BYTES", 64 * 3 * 3 * 7)
    monkeypatch.setattr(module, "_EXACT_VALUES", 9)
    for got, want in zip(index.search(query, 3), expected, strict=True):
        assert torch.equal(got, want)


def test_searching_asks_for_no_gradient_and_inference_mode_leaves_the_index_usable() -> None:
    index = FaissIndex(2, "Flat", metric="cosine", rerank=2)
    index.add(torch.ones(3, 2, requires_grad=True))
    assert not index.search(torch.ones(1, 2, requires_grad=True)).distances.requires_grad
    with torch.inference_mode():
        index.add(torch.ones(70, 2))
        index.search(torch.ones(1, 2))
    index.add(torch.ones(70, 2))
    assert len(index.search(torch.ones(1, 2), 200).ids[0].unique()) == 144


def test_faiss_uses_as_many_threads_as_torch_and_leaves_its_own_number(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    faiss.omp_set_num_threads(2)
    monkeypatch.setattr(module, "_threads", seeing(seen, module._threads))
    index = FaissIndex(2, "Flat")
    index.add(torch.ones(3, 2))
    index.search(torch.ones(1, 2))
    assert set(seen) == {torch.get_num_threads()}
    assert faiss.omp_get_max_threads() == 2


def seeing(seen: list[int], real: Any) -> Any:
    import contextlib

    @contextlib.contextmanager
    def threads() -> Any:
        with real():
            seen.append(faiss.omp_get_max_threads())
            yield

    return threads


# --- recall -----------------------------------------------------------------------------------------------------


def test_recall_counts_any_of_rows_at_the_same_distance() -> None:
    index = FaissIndex(2, "Flat")
    index.add(torch.ones(100, 2))
    assert index.recall(torch.zeros(3, 2), 5) == 1.0


def test_recall_is_the_share_that_was_found_against_own_rows_and_against_an_exact_index() -> None:
    rows, query = torch.randn(2000, 8), torch.randn(64, 8)
    ids = torch.randperm(2000)
    index, exact = FaissIndex(8, "IVF32,Flat"), ExactIndex(8)
    index.add(rows, ids=ids)
    exact.add(rows, ids=ids)
    for probes in (1, 4, 32):
        index.set(nprobe=probes)
        found, nearest = index.search(query, 10).ids, exact.search(query, 10).ids
        share = (found[:, :, None] == nearest[:, None]).any(2).float().mean().item()
        assert index.recall(query, 10) == pytest.approx(share)
        assert index.recall(query, 10, exact=exact) == pytest.approx(share)
    assert share == 1.0
    exact.add(torch.zeros(1, 8), ids=[5000])
    with pytest.raises(ValueError, match=r"exact: expected the rows of this index, found id 5000"):
        index.recall(torch.zeros(1, 8), exact=exact)
    with pytest.raises(ValueError, match=r"query: expected at least one finite row"):
        index.recall(torch.full((1, 8), torch.nan))


def test_reranking_makes_codes_find_more_and_hnsw_finds_nearly_all() -> None:
    rows = torch.randn(3000, 4) @ torch.randn(4, 16)
    query = rows[:100] + 0.05 * torch.randn(100, 16)
    shares = []
    for rerank in (None, 20):
        index = FaissIndex(16, "PQ4x4", rerank=rerank)
        index.add(rows)
        shares.append(index.recall(query, 5))
    assert shares[0] + 0.2 < shares[1]
    index = FaissIndex(16, "HNSW32", settings={"efSearch": 128})
    index.add(rows)
    assert index.recall(query, 5) > 0.99


# --- training ---------------------------------------------------------------------------------------------------


def test_rows_wait_and_are_searched_exactly_until_there_are_enough() -> None:
    index, expected = FaissIndex(3, "IVF4,Flat", values_dim=2), Remembered(3)
    assert index.training_rows == 39 * 4
    for count in (100, 55):
        keys, values = integers(count), torch.randn(count, 2)
        expected.add(keys, index.add(keys, values), values)
        assert not index._faiss.is_trained
        assert_same(index, expected)
    index.remove_oldest(20)
    index.add(integers(30), torch.randn(30, 2))
    assert index._faiss.is_trained
    assert index._faiss.ntotal == 165


@pytest.mark.parametrize(
    ("factory", "rows"),
    [
        ("Flat", 0), ("HNSW32", 0), ("IVF1024,Flat", 39 * 1024), ("IVF16,PQ4x4", 39 * 16), ("IVF16,PQ4", 39 * 256),
        ("SQ8", 39 * 256), ("PCA4,Flat", 39 * 256), ("OPQ4_8,IVF16,PQ4x4", 39 * 256), ("PQ4x4,RFlat", 39 * 16),
        ("IMI2x4,Flat", 39 * 16), ("IDMap,IVF8,Flat", 39 * 8), ("IVF65536_HNSW32,Flat", 39 * 65536),
    ],
)  # fmt: skip
def test_how_many_rows_it_waits_for_is_faiss_advice(factory: str, rows: int) -> None:
    assert FaissIndex(16, factory).training_rows == rows


def test_training_takes_a_sample_that_is_the_same_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = []
    real = FaissIndex._to_faiss
    rows = torch.randn(5000, 3)
    for _ in range(2):
        index = FaissIndex(3, "IVF4,Flat")
        monkeypatch.setattr(FaissIndex, "_to_faiss", lambda self, rows: samples.append(rows) or real(self, rows))
        index.add(rows)
        monkeypatch.setattr(FaissIndex, "_to_faiss", real)
    assert samples[0].shape == (256 * 4, 3)
    assert torch.equal(samples[0], samples[2])
    assert torch.isin(samples[0], rows).all()


def test_it_can_be_trained_earlier_on_other_rows_and_again() -> None:
    index, expected = thorough(3, values_dim=2, training_rows=1000), Remembered(3)
    index.train(torch.randn(50, 3))
    assert index._faiss.is_trained
    for _ in range(2):
        keys, values = integers(70), torch.randn(70, 2)
        expected.add(keys, index.add(keys, values), values)
        index.remove_oldest(10)
        expected.remove_oldest(10)
        index.train()
        assert index._faiss.ntotal == len(index)
        assert_same(index, expected)
    with pytest.raises(RuntimeError, match=r"train: 'IVF4,Flat' on 2 rows; FAISS says: .*should be at least as large"):
        index.train(torch.zeros(2, 3))
    assert_same(index, expected)
    FaissIndex(3, "Flat").train(torch.zeros(1, 3))  # needs none
    for keys, message in (
        (None, "train: expected rows, got none"),
        (torch.full((9, 3), torch.inf), "keys: expected fin"),
    ):
        with pytest.raises(ValueError, match=message):
            FaissIndex(3, "IVF4,Flat").train(keys)


# --- a life of adding, removing, saving ---------------------------------------------------------------------------


class Life(StoredLife):
    """Any order of changes, beside plain lists. All rows are candidates, so that answers are those of brute force."""

    @initialize(
        metric=st.sampled_from(METRICS), capacity=st.sampled_from([None, None, 70, 200]), on_disk=st.booleans(),
        factory=st.sampled_from(["Flat", "IVF4,Flat", "IVF4,SQ8", "PCA2,Flat", "IDMap,Flat", "SQ8,RFlat"]),
        seed=st.integers(0, 10**6),
    )  # fmt: skip
    def begin(self, metric: str, capacity: int | None, on_disk: bool, factory: str, seed: int) -> None:
        torch.manual_seed(seed)
        path = self.new_folder()
        index = thorough(
            3, factory, metric=metric, values_dim=2, capacity=capacity, chunk_rows=64, path=path if on_disk else None
        )
        self.begin_beside(index)

    @precondition(lambda self: len(self.expected.ids))
    @rule()
    def faiss_fails(self) -> None:
        taken, self.index._faiss = self.index._faiss, Failing(self.index._faiss)
        if taken.is_trained:
            with pytest.raises(RuntimeError, match=r"add: '.*'; FAISS says: out of something"):
                self.index.add(integers(100), torch.randn(100, 2))
        self.index._faiss = taken

    @rule(count=st.sampled_from([1, 100]), exact=st.booleans())
    def merge(self, count: int, exact: bool) -> None:
        options = {"metric": self.index.metric, "values_dim": 2}
        other = ExactIndex(3, **options) if exact else FaissIndex(3, "Flat", **options)
        keys, values = integers(count + 2), torch.randn(count + 2, 2)
        other.add(keys, values)
        other.remove_oldest(2)
        first = self.index.next_id
        self.index.merge([other], keep_ids=False)
        self.expected.add(keys[2:], first + torch.arange(count), values[2:])

    @invariant()
    def is_right(self) -> None:
        if hasattr(self, "expected"):
            assert_same(self.index, self.expected)
            if len(self.index):
                assert self.index.recall(torch.randn(3, 3), 2) == 1.0


class Failing:
    """An index of FAISS that has no room for further rows."""

    def __init__(self, index: Any) -> None:
        self.index = index

    def __getattr__(self, name: str) -> Any:
        return getattr(self.index, name)

    def add(self, rows: Any) -> None:
        self.index.add(rows[:1])
        raise RuntimeError("Error in void faiss::add() at /somewhere/x.cpp:12: out of something")

    def add_with_ids(self, rows: Any, ids: Any) -> None:
        self.index.add_with_ids(rows[:1], ids[:1])
        raise RuntimeError("Error in void faiss::add() at /somewhere/x.cpp:12: out of something")


Life.TestCase.settings = settings(
    max_examples=25, stateful_step_count=10, deadline=None, suppress_health_check=list(HealthCheck)
)
TestLife = pytest.mark.usefixtures("one_thread")(Life.TestCase)


@pytest.mark.parametrize("factory", ["Flat", "IVF4,Flat", "HNSW8", "IVF4,PQ2x4,RFlat"])
def test_a_ring_gives_rows_to_faiss_a_few_times_and_keeps_no_more_than_half_as_many_dead(
    factory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = 0
    real = FaissIndex._to_faiss

    def counting(self: FaissIndex, rows: torch.Tensor) -> Any:
        nonlocal given
        given += len(rows)
        return real(self, rows)

    index = FaissIndex(4, factory, capacity=600, training_rows=100)
    monkeypatch.setattr(FaissIndex, "_to_faiss", counting)
    for _ in range(60):
        index.add(torch.randn(100, 4))
        assert index._faiss.ntotal <= 1.5 * 600 + 100
    assert given <= 3.2 * 6000
    if factory == "IVF4,Flat":
        assert given <= 6000 + 200  # and the sample


# --- files ------------------------------------------------------------------------------------------------------


def saved(path: Path, factory: str = "IVF4,Flat") -> tuple[FaissIndex, Remembered]:
    index, expected = thorough(3, factory, values_dim=2, chunk_rows=64, path=path), Remembered(3)
    keys, values = integers(200), torch.randn(200, 2)
    expected.add(keys, index.add(keys, values), values)
    index.save()
    return index, expected


@pytest.mark.parametrize("factory", ["Flat", "IVF4,Flat"])
def test_what_faiss_holds_is_written_again_only_where_it_changed_by_a_quarter(tmp_path: Path, factory: str) -> None:
    index, expected = saved(tmp_path, factory)
    before = parts(tmp_path)
    assert len(before) == 1
    for count, same in ((30, True), (20, True), (10, False), (0, True)):
        keys, values = integers(count), torch.randn(count, 2)
        expected.add(keys, index.add(keys, values), values)
        index.save()
        assert (parts(tmp_path) == before) == same
        before = parts(tmp_path)
        again = FaissIndex.open(tmp_path)
        assert again._faiss.ntotal == len(index)
        assert_same(again, expected)
    index.remove_oldest(140)
    expected.remove_oldest(140)
    index.save()
    assert parts(tmp_path) != before
    before = parts(tmp_path)
    index.set(**({"nprobe": 3} if "IVF" in factory else {}))
    index.save()
    assert parts(tmp_path) == before
    assert FaissIndex.open(tmp_path).settings == index.settings
    if "IVF" in factory:
        index.train()
        index.save()
        assert parts(tmp_path) != before


def test_large_ones_are_written_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PART_BYTES", 1000)
    index, expected = saved(tmp_path)
    files = parts(tmp_path)
    assert len(files) > 3
    assert_same(FaissIndex.open(tmp_path), expected)
    monkeypatch.undo()
    assert_same(FaissIndex.open(tmp_path), expected)
    index.save(tmp_path / "copy")
    assert len(parts(tmp_path / "copy")) == 1
    index.close()
    for file in files:
        content = file.read_bytes()
        for torn, message in (
            (content[:-1], "torn or truncated"),
            (content[:-5] + bytes([content[-5] ^ 1]) + content[-4:], "torn or altered"),
        ):
            file.write_bytes(torn)
            with pytest.raises(IndexFileError, match=f"{file.name}: .*{message}"):
                FaissIndex.open(tmp_path)
        file.write_bytes(content)
    files[1].unlink()
    with pytest.raises(IndexFileError, match=f"{files[1].name}: no such file"):
        FaissIndex.open(tmp_path)


def test_an_altered_part_of_rows_is_never_searched(tmp_path: Path) -> None:
    index, _ = saved(tmp_path)
    index.close()
    file = parts(tmp_path, "chunk")[1]
    content = bytearray(file.read_bytes())
    content[-3] ^= 4
    file.write_bytes(content)
    with pytest.raises(IndexFileError, match=f"{file.name}: .*torn or altered"):
        FaissIndex.open(tmp_path, verify="now")
    with pytest.raises(IndexFileError, match=f"{file.name}: .*torn or altered"):
        FaissIndex.open(tmp_path).search(torch.zeros(1, 3))


def test_a_disk_that_fills_leaves_the_last_state_and_the_index_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index, expected = saved(tmp_path)
    before = Remembered(3)
    before.add(expected.keys, expected.ids, expected.values)
    keys, values = integers(300), torch.randn(300, 2)
    expected.add(keys, index.add(keys, values), values)
    monkeypatch.setattr(module, "_PART_BYTES", 1000)
    real, written = Folder.write_part, []

    def filling(folder: Folder, tensors: Any, about: Any) -> Any:
        if about["role"] == "faiss" and len(written) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        record = real(folder, tensors, about)
        if about["role"] == "faiss":
            written.append(folder.path / record.file)
        return record

    monkeypatch.setattr(Folder, "write_part", filling)
    with pytest.raises(OSError, match="No space left"):
        index.save()
    assert len(written) == 2
    assert not any(file.exists() for file in written)
    monkeypatch.undo()
    assert_same(FaissIndex.open(tmp_path), before)
    assert_same(index, expected)
    index.save()
    assert_same(FaissIndex.open(tmp_path), expected)


def test_what_faiss_cannot_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path)

    def written_by_a_later_one(reader: Any) -> None:
        raise RuntimeError("Error in read_index() at /x/index_read.cpp:7: Index type 0x1 not recognized")

    monkeypatch.setattr(faiss, "read_index", written_by_a_later_one)
    with pytest.raises(
        IndexFileError,
        match=rf"{parts(tmp_path)[0].name} .*written by FAISS .*; FAISS says: Index type 0x1 not recogniz",
    ):
        FaissIndex.open(tmp_path)


def test_each_kind_opens_its_own_folders(tmp_path: Path) -> None:
    saved(tmp_path / "faiss")
    exact = ExactIndex(3, path=tmp_path / "exact")
    exact.save()
    with pytest.raises(IndexFileError, match="expected an index of kind 'exact', got 'faiss'"):
        ExactIndex.open(tmp_path / "faiss")
    with pytest.raises(IndexFileError, match="expected an index of kind 'faiss', got 'exact'"):
        FaissIndex.open(tmp_path / "exact")
    assert isinstance(open_index(tmp_path / "faiss"), FaissIndex)
    assert isinstance(open_index(tmp_path / "exact"), ExactIndex)


def test_an_index_is_made_of_a_factory_string(tmp_path: Path) -> None:
    index = make_index("IVF16,Flat", 3, path=tmp_path)
    assert isinstance(index, FaissIndex)
    assert (index.factory, index.path) == ("IVF16,Flat", tmp_path)
    with pytest.raises(
        ValueError, match=r"index: expected 'exact' or a factory string of FAISS, got 'nearest': .* parse"
    ):
        make_index("nearest", 3)


def test_a_folder_that_cannot_be_used_is_not_blamed_on_the_kind(tmp_path: Path) -> None:
    ExactIndex(3).save(tmp_path)
    with pytest.raises(IndexFileError, match=r"json: the folder holds an index already"):
        make_index("Flat", 3, path=tmp_path)


def test_rows_on_disk_leave_what_faiss_holds_in_ram(tmp_path: Path) -> None:
    index = FaissIndex(64, "PQ8x4", training_rows=500, chunk_rows=512, path=tmp_path)
    index.add(torch.randn(8192, 64))
    assert index.stats().ram_bytes < 0.06 * 8192 * 64 * 4
    index.save()
    assert index.stats().disk_bytes == sum(file.stat().st_size for file in tmp_path.iterdir())


# --- bad input --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"dim": 0}, ValueError, r"dim: expected at least 1, got 0"),
        ({"metric": "l1"}, ValueError, r"metric: expected one of l2, cosine, ip, got 'l1'"),
        ({"factory": "Blah"}, ValueError, r"factory: .* for dim 4, got 'Blah'; FAISS says: could not parse"),
        ({"factory": "PQ3"}, ValueError, r"factory: .*'PQ3'; FAISS says: .*should be a multiple of the number"),
        ({"factory": 3}, TypeError, r"factory: expected a factory string of FAISS, got int"),
        ({"dtype": torch.float64}, TypeError, r"dtype: expected torch.float32, .*, got torch.float64"),
        ({"rerank": 0}, ValueError, r"rerank: expected at least 1, got 0"),
        ({"training_rows": 1.5}, TypeError, r"training_rows: expected an int, got float"),
        ({"capacity": 0}, ValueError, r"capacity: expected at least 1, got 0"),
        ({"capacity": 100}, ValueError, r"capacity: expected at least the 156 rows that .* is trained on, got 100"),
        ({"settings": {"nprobes": 3}}, ValueError, r"settings: 'IVF4,Flat' takes nprobe, max_codes; got 'nprobes'"),
        ({"settings": {"efSearch": 3}}, ValueError, r"settings: 'IVF4,Flat' takes nprobe, max_codes; got 'efSearch'"),
        ({"settings": {"nprobe": "3"}}, TypeError, r"nprobe: expected a number, got str"),
        ({"settings": {"nprobe": 0}}, ValueError, r"nprobe: expected a whole number of at least 1, got 0"),
        ({"settings": {"nprobe": 1.5}}, ValueError, r"nprobe: expected a whole number of at least 1, got 1.5"),
        ({"factory": "Flat", "settings": {"nprobe": 3}}, ValueError, r"settings: 'Flat' takes none; got 'nprobe'"),
        ({"faiss_device": "meta"}, ValueError, r"faiss_device: expected cpu or cuda, got meta"),
        pytest.param(
            {"faiss_device": "cuda"}, ValueError, r"faiss_device: cuda was asked for, and torch finds no CUDA device",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
    ],
)  # fmt: skip
def test_bad_arguments_are_named_and_make_no_folder(
    arguments: dict, error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        FaissIndex(**({"dim": 4, "factory": "IVF4,Flat", "path": tmp_path / "index"} | arguments))
    assert not (tmp_path / "index").exists()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1.0], torch.zeros(1, 2)), TypeError, r"keys: expected a torch.Tensor, got list"),
        ((torch.zeros(2, 4), torch.zeros(2, 2)), ValueError, r"keys: expected 3 like the index in dimension 1"),
        ((torch.zeros(2, 3).half(), torch.zeros(2, 2)), TypeError, r"keys: expected torch.float32 like the index"),
        (
            (torch.tensor([[0, 0, 0], [0, torch.nan, 0]]), torch.zeros(2, 2)),
            ValueError,
            r"keys: expected finite .* row 1",
        ),
        ((torch.zeros(2, 3), torch.zeros(3, 2)), ValueError, r"values: expected 2 like keys in dimension 0"),
        ((torch.zeros(2, 3), torch.zeros(2, 2), [5, 5]), ValueError, r"ids: id 5 given more than once"),
        ((torch.zeros(2, 3), torch.zeros(2, 2), [7, 0]), ValueError, r"ids: id 0 in the index already"),
    ],
)
def test_bad_rows_are_refused_whole(arguments: tuple, error: type[Exception], message: str) -> None:
    index = FaissIndex(3, "Flat", values_dim=2)
    index.add(torch.zeros(1, 3), torch.zeros(1, 2))
    with pytest.raises(error, match=message):
        index.add(*arguments)
    assert len(index) == index._faiss.ntotal == 1
    assert index.add(torch.zeros(1, 3), torch.zeros(1, 2)).tolist() == [1]


def test_bad_searches_are_named() -> None:
    index = FaissIndex(3, "Flat")
    with pytest.raises(ValueError, match=r"search: the index is empty; add rows first"):
        index.search(torch.zeros(1, 3))
    index.add(torch.zeros(4, 3))
    for arguments, error, message in (
        ((torch.zeros(1, 2),), ValueError, r"query: expected 3 like the index in dimension 1"),
        ((torch.zeros(1, 3).double(),), TypeError, r"query: expected torch.float32 like the index, got torch.float64"),
        ((torch.zeros(1, 3), 0), ValueError, r"k: expected at least 1, got 0"),
    ):
        with pytest.raises(error, match=message):
            index.search(*arguments)
        with pytest.raises(error, match=message):
            index.recall(*arguments)
    with pytest.raises(TypeError, match="others: expected ExactIndex or FaissIndex, got int"):
        index.merge([3])  # type: ignore[list-item]


def test_a_factory_that_takes_rows_only_once_says_so_and_loses_none() -> None:
    index, expected = FaissIndex(3, "NSG8"), Remembered(3, values_dim=None)
    keys = integers(200)
    expected.add(keys, index.add(keys))
    with pytest.raises(RuntimeError, match=r"add: 'NSG8'; FAISS says: .*NSG does not support incremental addition"):
        index.add(integers(1))
    assert_same(index, expected)


def test_settings_change_all_or_none() -> None:
    index = FaissIndex(3, "IVF4_HNSW8,Flat", settings={"nprobe": 2})
    with pytest.raises(ValueError, match=r"settings: .* takes nprobe, .*quantizer_efSearch.*; got 'bogus'"):
        index.set(nprobe=4, bogus=1)
    assert index.settings == {"nprobe": 2}
    assert index._faiss.nprobe == 2
    index.set(quantizer_efSearch=33)
    index.add(torch.randn(500, 3))
    assert (index._faiss.nprobe, faiss.downcast_index(index._faiss.quantizer).hnsw.efSearch) == (2, 33)


def test_without_faiss_the_packages_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    saved(tmp_path / "index")
    monkeypatch.setitem(sys.modules, "faiss", None)
    for make in (
        lambda: FaissIndex(3, path=tmp_path / "new"),
        lambda: open_index(tmp_path / "index"),
        lambda: make_index("Flat", 3),
    ):
        with pytest.raises(
            ModuleNotFoundError, match=r"FaissIndex needs the package faiss-cpu, or faiss-gpu for a GPU"
        ):
            make()
    assert not (tmp_path / "new").exists()


def test_a_gpu_needs_faiss_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delattr(faiss, "StandardGpuResources", raising=False)
    with pytest.raises(
        ModuleNotFoundError, match=r"faiss_device: cuda:1 was asked for, .* install faiss-gpu in its place"
    ):
        FaissIndex(3, "Flat", faiss_device="cuda:1")


def test_what_is_searched_on_a_gpu_goes_there_and_comes_back_for_files(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With FAISS's functions for GPUs played by ones that leave the index where it is."""
    moves: list[object] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(faiss, "StandardGpuResources", object, raising=False)
    monkeypatch.setattr(
        faiss, "index_cpu_to_gpu", lambda _, number, index: moves.append(number) or index, raising=False
    )
    monkeypatch.setattr(faiss, "index_gpu_to_cpu", lambda index: moves.append("back") or index, raising=False)
    monkeypatch.setattr(faiss, "GpuParameterSpace", faiss.ParameterSpace, raising=False)
    index, expected = thorough(3, values_dim=2, faiss_device="cuda:1", path=tmp_path), Remembered(3)
    keys, values = integers(200), torch.randn(200, 2)
    expected.add(keys, index.add(keys, values), values)
    index.remove_oldest(120)
    expected.remove_oldest(120)
    assert_same(index, expected)
    index.save()
    assert moves == [1, 1, "back"]  # untrained, trained
    assert_same(FaissIndex.open(tmp_path, faiss_device="cuda"), expected)
    assert moves[3:] == [0, 0]


def test_rows_that_re_ranking_touched_do_not_stay_in_memory(tmp_path: Path) -> None:
    """84 MB of rows on disk, 21 MB of codes in FAISS: searches whose candidates lie on most of the rows' pages."""
    grown = grown_by_searching(tmp_path / "index", "FaissIndex", queries=300, factory="SQ8", rerank=10)
    assert grown < 60 << 20
