"""ShardedIndex: what one ExactIndex answers that was given the same rows in the same order, bit for bit.

Every rank makes all ranks' rows from the same seed, so that each has the one index beside its shard.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from searches import METRICS
from torch import Tensor, distributed

from memad_fast.index import ExactIndex, IndexFileError, ShardedIndex

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="forks the ranks"),
    pytest.mark.skipif(not distributed.is_gloo_available(), reason="this torch has no gloo"),
]

DIM, VALUES = 3, 2


class Both:
    """One index and a sharded one, through the same life; ``rank`` is this process."""

    def __init__(self, rank: int, size: int, path: Path | None = None, group: Any = None, **options: Any) -> None:
        options = {"values_dim": VALUES, "chunk_rows": 64} | options
        self.rank, self.size = rank, size
        self.one = ExactIndex(DIM, **options)
        self.sharded = ShardedIndex(DIM, path=path, group=group, **options)

    def rows(self, count: int) -> tuple[Tensor, Tensor | None]:
        """Small integers: many ties, and sums without rounding."""
        keys = torch.randint(-2, 3, (count, DIM)).to(self.one.dtype)
        values = None if self.one.values_dim is None else torch.randn(count, VALUES).to(self.one.values_dtype)
        return keys, values

    def add(self, counts: list[int], ids: Tensor | None = None) -> None:
        keys, values = self.rows(sum(counts))
        expected = self.one.add(keys, values, ids)
        mine = slice(sum(counts[: self.rank]), sum(counts[: self.rank + 1]))
        given = None if ids is None else ids[mine]
        got = self.sharded.add(keys[mine], None if values is None else values[mine], given)
        assert torch.equal(got, expected[mine])

    def remove_oldest(self, n: int) -> None:
        self.one.remove_oldest(n)
        self.sharded.remove_oldest(n)

    def check(self, counts: list[int] | None = None, ks: tuple[int, ...] = (1, 4)) -> None:
        """``counts``: queries of each rank."""
        assert len(self.sharded) == len(self.one)
        assert self.sharded.next_id == self.one.next_id
        counts = [3, 0, 1, 2][: self.size] if counts is None else counts
        for k in (*ks, len(self.one) + 3):
            query = torch.randint(-2, 3, (sum(counts), DIM)).to(self.one.dtype)
            query = query[sum(counts[: self.rank]) : sum(counts[: self.rank + 1])]
            if len(self.one) == 0:
                with pytest.raises(ValueError, match="the index is empty; add rows first"):
                    self.sharded.search(query, k)
                return
            ids = torch.cat([piece.ids for piece in self.one.pieces()])
            ids = ids[torch.randint(0, len(ids), (2 * self.size,))][self.rank : 2 * self.rank]
            for got, expected in zip(self.sharded.rows(ids), self.one.rows(ids), strict=True):
                assert (got is None and expected is None) or same_bits(got, expected)
            for got, expected in zip(self.sharded.search(query, k), self.one.search(query, k), strict=True):
                assert (got is None) == (expected is None)
                assert got is None or (got.dtype == expected.dtype and same_bits(got, expected))


def same_bits(a: Tensor, b: Tensor) -> bool:
    a, b = (x.clone(memory_format=torch.contiguous_format).view(torch.uint8) for x in (a, b))
    return torch.equal(a, b)


def number_up_to(most: int) -> int:
    return int(torch.randint(0, most + 1, ()))


# --- a life ---------------------------------------------------------------------------------------------------------


def live(both: Both, path: Path, steps: int, reopen: dict[str, Any] | None) -> None:
    for step in range(steps):
        both.check()
        kind = number_up_to(9)
        if kind < 6:
            counts = [[0, 1, 5, 30, 90][number_up_to(4)] for _ in range(both.size)]
            ids = None
            if kind < 2:  # of its own, some of rows that were removed
                ids = torch.randperm(5000)
                held = torch.cat([torch.empty(0, dtype=torch.int64), *(piece.ids for piece in both.one.pieces())])
                ids = ids[~torch.isin(ids, held)][: sum(counts)]
            both.add(counts, ids)
        elif kind < 8:
            both.remove_oldest(number_up_to(len(both.one)) if number_up_to(3) else len(both.one))
        elif reopen is not None:
            both.sharded.save(path)
            if step % 2:
                both.sharded.close()
                both.sharded = ShardedIndex.open(path, **reopen)
    both.check(ks=(1, 2, 3, 7, 50))
    stats = both.sharded.stats()
    assert (stats.rows, stats.capacity) == (len(both.one), both.one.capacity)
    assert stats.ram_bytes >= both.sharded.shard.stats().ram_bytes


@pytest.mark.parametrize("size", [2, 4])
def test_a_life_is_that_of_one_index(size: int, tmp_path: Path) -> None:
    def run(rank: int) -> None:
        for seed, metric in enumerate(METRICS * (4 // size)):  # processes that wait for each other take long
            torch.manual_seed(seed)
            on_disk, path = seed % 2 == 0, tmp_path / f"index-{seed}"
            both = Both(
                rank, size, path if on_disk else None, metric=metric, capacity=[None, 5, 200][number_up_to(2)],
                memory_budget="1GB" if on_disk else None,
            )  # fmt: skip
            live(both, path, 25, {"mmap": on_disk, "verify": ["now", "sizes", "first_use"][seed % 3]})

    run_ranks(size, tmp_path, run)


def test_dtypes_of_rows_and_values(tmp_path: Path) -> None:
    def run(rank: int) -> None:
        for dtype, values_dtype in (
            (torch.float16, torch.bfloat16), (torch.bfloat16, torch.int64), (torch.float32, torch.bool),
            (torch.float32, torch.float64),
        ):  # fmt: skip
            both = Both(rank, 2, dtype=dtype, values_dtype=values_dtype)
            live(both, tmp_path / str(values_dtype), 6, {})
        live(Both(rank, 2, values_dim=None), tmp_path / "none", 6, {})

    run_ranks(2, tmp_path, run)


def test_queries_in_blocks_of_every_rank_find_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(rank: int) -> None:
        monkeypatch.setattr("memad_fast.index.exact._SEARCH_BYTES", [5000, 9000][rank])
        both = Both(rank, 2)
        both.add([100, 3])
        for counts in ([70, 9], [0, 33], [0, 0], [1, 1]):
            both.check(counts)
        strided = torch.randn(DIM, 5).T
        got, expected = both.sharded.search(strided, 3), both.one.search(strided, 3)
        assert all(same_bits(a, b) for a, b in zip(got, expected, strict=True))
        narrow = ShardedIndex(1)
        narrow.add(torch.tensor([[1.0 + rank, 9.0]])[:, ::2])  # of stride 2, and contiguous for torch
        assert narrow.search(torch.tensor([[2.0, 9.0]])[:, ::2]).ids.tolist() == [[1]]
        query = torch.full((2, DIM), torch.nan)
        assert (both.sharded.search(query, 2).ids == -1).all()
        assert not both.sharded.search(torch.zeros(1, DIM, requires_grad=True)).distances.requires_grad

    run_ranks(2, tmp_path, run)


def test_a_group_of_some_ranks(tmp_path: Path) -> None:
    def run(rank: int) -> None:
        group = distributed.new_group([1, 3])
        if rank in (0, 2):
            with pytest.raises(ValueError, match="group: this process is not in it"):
                ShardedIndex(DIM, group=group)
            return
        both = Both(rank // 2, 2, tmp_path / "index", group)
        both.add([4, 9])
        both.check()
        both.sharded.save()
        both.sharded = ShardedIndex.open(tmp_path / "index", group=group)
        both.add([1, 2], torch.tensor([70, 80, 90]))
        both.check()
        with pytest.raises(ValueError, match="rank 1: keys"):
            both.sharded.add(torch.zeros(1, DIM + rank - 1), torch.zeros(1, VALUES))

    run_ranks(4, tmp_path, run)


@pytest.mark.parametrize("keep_ids", [True, False])
def test_merging_keeps_the_order_of_age_over_all_shards(keep_ids: bool, tmp_path: Path) -> None:
    def run(rank: int) -> None:
        for capacity in (None, 150):
            boths = [Both(rank, 3, capacity=capacity) for _ in range(3)]
            for at, both in enumerate(boths):
                for step in range(4):
                    first = 1000 * at + 200 * step
                    counts = [[0, 3, 70][(at + step + r) % 3] for r in range(3)]
                    both.add(counts, torch.randperm(sum(counts)) + first if keep_ids or step % 2 else None)
                both.remove_oldest(11)
            first, *others = boths
            first.one.merge([other.one for other in others], keep_ids=keep_ids)
            first.sharded.merge([other.sharded for other in others], keep_ids=keep_ids)
            first.check()
            first.add([1, 2, 3])
            first.check()
            if keep_ids:
                with pytest.raises(ValueError, match=r"in the index already"):
                    first.sharded.merge([others[1].sharded])
            with pytest.raises(ValueError, match=r"ranks 0, 1, 2: others: .* got this one itself"):
                first.sharded.merge([others[0].sharded, first.sharded])
            with pytest.raises(TypeError, match=r"rank 1: others: expected ShardedIndex, got ExactIndex"):
                first.sharded.merge([first.one if rank == 1 else others[0].sharded])
            first.sharded.merge([])
            first.check()

    run_ranks(3, tmp_path, run)


# --- bad input ------------------------------------------------------------------------------------------------------


def refused(both: Both, error: type[Exception], match: str, call: Callable[[ShardedIndex], object]) -> None:
    """On every rank, and nothing is changed."""
    runs = len(both.sharded._ages)
    with pytest.raises(error, match=match):
        call(both.sharded)
    assert len(both.sharded._ages) == runs
    both.check()


def test_what_one_rank_is_given_wrongly_is_an_error_on_all(tmp_path: Path) -> None:
    def run(rank: int) -> None:
        both = Both(rank, 2, tmp_path / "index")
        both.add([70, 70], torch.randperm(140))
        bad = rank == 1  # this rank is given what is wrong
        good, values = torch.zeros(2, DIM), torch.zeros(2, VALUES)

        def adding(keys: Any = good, values: Any = values, ids: Any = None) -> Callable[[ShardedIndex], object]:
            arguments = (keys, values, ids) if bad else (good, torch.zeros(2, VALUES), None)
            return lambda index: index.add(*arguments)

        refused(both, TypeError, r"rank 1: keys: expected torch.float32 .* got torch.float16", adding(good.half()))
        refused(both, TypeError, r"rank 1: keys: ", adding("rows"))
        refused(both, ValueError, r"rank 1: keys: .*\[n, D\]", adding(torch.zeros(DIM)))
        refused(both, ValueError, r"rank 1: keys: ", adding(torch.zeros(2, DIM + 1)))
        refused(both, ValueError, r"rank 1: keys: .* in row 1", adding(torch.tensor([[0.0] * 3, [torch.nan] * 3])))
        refused(both, TypeError, r"rank 1: values: ", adding(values=values.double()))
        refused(both, TypeError, r"rank 1: values: ", adding(values=None))
        refused(both, ValueError, r"rank 1: values: ", adding(values=torch.zeros(3, VALUES)))
        refused(both, ValueError, r"ids: expected on all ranks that add rows or on none", adding(ids=[7000, 7001]))

        def giving(mine: Any, theirs: Any = (500, 501)) -> Callable[[ShardedIndex], object]:
            return lambda index: index.add(good, values, mine if bad else theirs)

        refused(both, TypeError, r"rank 1: ids: expected integers", giving([0.5, 1.5]))
        refused(both, ValueError, r"rank 1: ids: expected 2 like keys, got 3", giving([1000, 1001, 1002]))
        refused(both, ValueError, r"rank 1: ids: expected at least 0, got id -1", giving([-1, 1000]))
        many = (
            torch.zeros(300, DIM),
            torch.zeros(300, VALUES),
            range(10**6, 10**6 + 300),
        )  # the next row's age is no more
        refused(
            both, ValueError, r"rank 1: ids: expected at least 0, got id -5",
            lambda index: index.add(good, values, [-5, 1000]) if bad else index.add(*many),
        )  # fmt: skip
        refused(both, ValueError, r"rank 1: ids: expected less than", giving([2**63 - 1, 1000]))
        refused(both, ValueError, r"ids: id 900 given more than once, by rank 1$", giving([900, 900]))
        refused(both, ValueError, r"ids: id 500 given more than once, by ranks 0, 1", giving([500, 900]))
        on_zero = int(both.sharded.shard._tail.ids.listed[0]) if rank == 0 else 0
        said = torch.tensor([on_zero])
        distributed.broadcast(said, 0)
        refused(both, ValueError, rf"rank 0: ids: id {int(said)} in the index already", giving([int(said), 900]))

        for ids, error, match in (
            ([7000], ValueError, r"rank 1: ids: id 7000 not in the index: never added, or removed since"),
            ([0.5], TypeError, r"rank 1: ids: expected integers"),
        ):
            refused(both, error, match, lambda index, ids=ids: index.rows(ids if bad else [3, 4]))

        query = torch.zeros(1, DIM)
        for wrong, error, match in (
            ((query.double(), 1), TypeError, r"rank 1: query: expected torch.float32"),
            ((query[:, :2], 1), ValueError, r"rank 1: query: "),
            ((query, 0), ValueError, r"rank 1: k: expected at least 1, got 0"),
            ((query, 2**70), ValueError, r"rank 1: search: expected numbers below 2\*\*63"),
            ((query, 2.0), TypeError, r"rank 1: k: expected an int, got float"),
            ((query, 2), ValueError, r"k: expected the same on all ranks, got 1 on rank 0, 2 on rank 1"),
        ):
            refused(both, error, match, lambda index, w=wrong: index.search(*(w if bad else (query, 1))))
        for wrong, error, match in (
            (-1, ValueError, r"rank 1: n: expected 0 to 140 .* got -1"),
            (141, ValueError, r"rank 1: n: expected 0 to 140"),
            (True, TypeError, r"rank 1: n: expected an int, got bool"),
            (2, ValueError, r"n: expected the same on all ranks, got 1 on rank 0, 2 on rank 1"),
        ):
            refused(both, error, match, lambda index, w=wrong: index.remove_oldest(w if bad else 1))
        refused(
            both, RuntimeError, r"same methods in the same order; got rank 0 in stats, rank 1 in search",
            lambda index: index.search(query) if bad else index.stats(),
        )  # fmt: skip
        refused(
            both, ValueError, r"path: expected the index's own folder on all ranks or on none",
            lambda index: index.save(tmp_path / "other" if bad else None),
        )  # fmt: skip
        both.add([1, 2], torch.arange(1000, 1003))
        for _ in range(6):
            both.add([2, 1])
        both.remove_oldest(130)
        for _ in range(28):
            both.check()
            both.remove_oldest(1)
        both.add([1, 0])
        both.check()
        both.sharded.add(good, values, [2**63 - 2 - 2 * rank, 2000 + rank])
        with pytest.raises(ValueError, match=r"ids: none is left above the largest"):
            both.sharded.add(good, values)

    run_ranks(2, tmp_path, run)


def test_settings_that_differ_are_refused(tmp_path: Path) -> None:
    def run(rank: int) -> None:
        for settings, match in (
            ({"dim": 3 + rank}, r"dim: expected the same on all ranks, got 3 on rank 0, 4 on rank 1"),
            ({"metric": ["l2", "ip"][rank]}, r"metric: expected the same"),
            ({"capacity": [None, 5][rank]}, r"capacity: expected the same .* got None on rank 0, 5 on rank 1"),
            ({"dim": [3, 0][rank]}, r"rank 1: dim: expected at least 1, got 0"),
            ({"capacity": [5, 0][rank]}, r"rank 1: capacity: expected at least 1, got 0"),
            ({"metric": "l1"}, r"ranks 0, 1: metric: "),
        ):
            with pytest.raises(ValueError, match=match):
                ShardedIndex(**{"dim": 3, "path": tmp_path / "index"} | settings)
        index = ShardedIndex(3, path=tmp_path / "index")  # no lock is left
        index.add(torch.zeros(rank, 3))
        index.save()
        index.close()
        with pytest.raises(
            IndexFileError, match=r"rank 0: .*manifest.json: the folder holds an index already; open it"
        ):
            ShardedIndex(3, path=tmp_path / ("index" if rank == 0 else "elsewhere"))

    run_ranks(2, tmp_path, run)


def test_the_memory_budget_of_one_rank_is_an_error_on_all(tmp_path: Path) -> None:
    def run(rank: int) -> None:
        both = Both(rank, 2)
        both.add([5, 5])
        both.sharded.shard.memory_budget = 2**63 if rank == 0 else 40_000
        keys = torch.zeros(4000, DIM)
        for _ in range(2):
            refused(
                both, ValueError, r"rank 1: memory_budget: 40000 bytes, and \d+ are needed",
                lambda index: index.add(keys, torch.zeros(4000, VALUES)),
            )  # fmt: skip

    run_ranks(2, tmp_path, run)


# --- one process ----------------------------------------------------------------------------------------------------


def test_without_a_group_there_is_one_shard(tmp_path: Path) -> None:
    torch.manual_seed(0)
    both = Both(0, 1, tmp_path / "index", capacity=200)
    live(both, tmp_path / "index", 40, {})
    with pytest.raises(ValueError, match=r"^keys: "):
        both.sharded.add(torch.zeros(2, 5))


def test_processes_without_a_group_are_told_to_make_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(RuntimeError, match=r"WORLD_SIZE says 4 processes: call torch.distributed.init_process_group"):
        ShardedIndex(3)
