"""nearest_keys_merge_: pieces of a bank, in any order, leave what a search of the whole bank finds."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from searches import ADVERSARIES, METRICS, one_dominant_dimension
from torch import Tensor

import memad_fast
from memad_fast.ops import PreparedKeys, nearest_keys_merge_
from memad_fast.ops.nearest_keys import reference
from memad_fast.ops.prepare_keys import packed_bytes

DTYPES = [torch.float32, torch.float16, torch.bfloat16]

# How a piece [first, last) of the bank reaches the op: rows of its own, prepared or not, or a range of the whole bank.
FORMS: dict[str, Callable[[Tensor, int, int, str], tuple[Tensor | PreparedKeys, dict[str, int]]]] = {
    "rows": lambda keys, first, last, metric: (keys[first:last], {"offset": first}),
    "prepared rows": lambda keys, first, last, metric: (
        memad_fast.prepare_keys(keys[first:last], metric=metric), {"offset": first}
    ),
    "range": lambda keys, first, last, metric: (keys, {"first": first, "last": last}),
    "prepared range": lambda keys, first, last, metric: (
        memad_fast.prepare_keys(keys, metric=metric), {"first": first, "last": last}
    ),
}  # fmt: skip


def empty(count: int, k: int) -> tuple[Tensor, Tensor]:
    return torch.full((count, k), torch.nan, dtype=torch.float64), torch.full((count, k), -1)


def pieces_of(rows: int, choices: random.Random, most: int = 4) -> Iterator[tuple[int, int, str]]:
    """Ranges that make up the bank, in any order, each with a form."""
    cuts = sorted({0, rows, *(choices.randint(0, rows) for _ in range(most - 1))})
    pieces = list(itertools.pairwise(cuts))
    choices.shuffle(pieces)
    for first, last in pieces:
        yield first, last, choices.choice(list(FORMS))


def search_in_pieces(query: Tensor, keys: Tensor, k: int, metric: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    ranks, indices = empty(len(query), k)
    for first, last, form in pieces_of(len(keys), random.Random(seed)):
        piece, where = FORMS[form](keys, first, last, metric)
        nearest_keys_merge_(ranks, indices, query, piece, **where, metric=metric)
    return ranks, indices


def assert_pieces_are_the_whole(query: Tensor, keys: Tensor, k: int, metric: str, seed: int = 0) -> None:
    """The same indices, and values that round to the same distances; empty slots beyond the keys."""
    ranks, indices = search_in_pieces(query, keys, k, metric, seed)
    there = min(k, len(keys))
    distances, expected = memad_fast.nearest_keys(query, keys, there, metric=metric)
    assert torch.equal(indices[:, :there], expected)
    assert (indices[:, there:] == -1).all()
    assert torch.equal(ranks.isnan(), indices == -1)
    values = -ranks if metric == "ip" else ranks
    assert torch.equal(values[:, :there].to(distances.dtype).nan_to_num(nan=7.0), distances.nan_to_num(nan=7.0))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("count", "rows", "dim", "k"),
    [(1, 1, 1, 1), (3, 5, 7, 9), (9, 300, 16, 1), (40, 130, 64, 2), (200, 700, 3, 5), (5, 65, 129, 70)],
)
def test_random_pieces(isa: str, metric: str, dtype: torch.dtype, count: int, rows: int, dim: int, k: int) -> None:
    query, keys = torch.randn(count, dim).to(dtype), torch.randn(rows, dim).to(dtype)
    for seed in range(3):
        assert_pieces_are_the_whole(query, keys, k, metric, seed)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6), count=st.integers(0, 12), rows=st.integers(1, 150), dim=st.integers(0, 20),
    k=st.integers(1, 12), metric=st.sampled_from(METRICS), ties=st.booleans(), broken=st.booleans(),
)  # fmt: skip
def test_any_pieces(seed: int, count: int, rows: int, dim: int, k: int, metric: str, ties: bool, broken: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    query, keys = (torch.randn(n, dim, generator=generator) for n in (count, rows))
    if ties:
        query, keys = query.round(), keys.round()
    if broken and dim:
        query[: count // 3, 0], keys[: rows // 3, -1] = torch.inf, torch.nan
    assert_pieces_are_the_whole(query, keys, k, metric, seed)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", ADVERSARIES)
def test_adversarial_rows(isa: str, name: str, metric: str) -> None:
    query, keys = ADVERSARIES[name]()
    for k in (1, 5):
        assert_pieces_are_the_whole(query, keys, k, metric)
        assert_pieces_are_the_whole(query[:3], keys, k, metric, seed=1)


@pytest.mark.parametrize("metric", METRICS)
def test_ties_across_pieces_go_to_the_lowest_index_in_whatever_order_they_come(isa: str, metric: str) -> None:
    query, keys = torch.randn(20, 6), torch.randn(1, 6).repeat(40, 1)
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]):
        ranks, indices = empty(20, 15)
        for piece in order:
            part = keys[10 * piece : 10 * piece + 10]
            nearest_keys_merge_(ranks, indices, query, part, offset=10 * piece, metric=metric)
        assert indices.tolist() == [list(range(15))] * 20


def test_offsets_beyond_32_bits_are_kept(isa: str) -> None:
    ranks, indices = empty(9, 3)
    query, keys = torch.randn(9, 4), torch.randn(50, 4)
    for offset in (2**40, 2**50):
        nearest_keys_merge_(ranks, indices, query, keys, offset=offset)
    expected = memad_fast.nearest_keys(query, keys, 2)[1]
    assert indices[:, 0].equal(expected[:, 0] + 2**40)
    assert indices[:, 1].equal(expected[:, 0] + 2**50)  # the same row, later
    assert indices[:, 2].equal(expected[:, 1] + 2**40)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_neither_finds_nor_is_found(isa: str, bad: float) -> None:
    query, keys = torch.randn(20, 10), torch.randn(90, 10)
    query[1, 4] = bad
    keys[::2, 3] = bad
    for metric in METRICS:
        assert_pieces_are_the_whole(query, keys, 60, metric)


def test_queries_that_cannot_be_screened(isa: str) -> None:
    keys = torch.randn(400, 16)
    for query in (torch.randn(30, 16) * 1e19, torch.randn(30, 16) * 1e30):
        assert_pieces_are_the_whole(query, keys, 3, "l2")


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("count", [100, 5])  # many are screened in float32, a few take every key in float64
def test_queries_that_codes_cannot_decide(isa: str, metric: str, count: int) -> None:
    query, keys = one_dominant_dimension(count, 24), one_dominant_dimension(3000, 24)
    assert memad_fast.nearest_keys_stats(query, memad_fast.prepare_keys(keys)).full_path.all()
    for k in (1, 3):
        assert_pieces_are_the_whole(query, keys, k, metric)


def test_results_do_not_depend_on_threads(isa: str) -> None:
    threads = torch.get_num_threads()
    try:
        for count, rows in ((400, 300), (40, 3000), (2, 3000)):
            for number in (1, 3, 7):
                torch.set_num_threads(number)
                torch.manual_seed(0)
                assert_pieces_are_the_whole(torch.randn(count, 20), torch.randn(rows, 20), 3, "l2")
    finally:
        torch.set_num_threads(threads)


def test_every_instruction_set_leaves_the_same_bits() -> None:
    from memad_fast import native

    query, keys = ADVERSARIES["near ties"]()
    results = []
    for level in native.isas():
        native.set_isa(level)
        results.append(search_in_pieces(query, keys, 4, "cosine"))
    native.set_isa("auto")
    for ranks, indices in results[1:]:
        assert torch.equal(indices, results[0][1])
        assert torch.equal(ranks.view(torch.int64), results[0][0].view(torch.int64))


def test_an_empty_range_and_no_slots_change_nothing() -> None:
    query, keys = torch.randn(4, 3), torch.randn(5, 3)
    ranks, indices = empty(4, 2)
    nearest_keys_merge_(ranks, indices, query, keys, first=5)
    nearest_keys_merge_(ranks, indices, query, keys, first=2, last=2)
    nearest_keys_merge_(*empty(4, 0), query, keys)
    assert (indices == -1).all()


def test_views_of_keys_and_queries_are_read_in_place(isa: str) -> None:
    wide_query, wide_keys = torch.randn(30, 40), torch.randn(200, 60)
    assert_pieces_are_the_whole(wide_query[::2, 3:23], wide_keys[1::2, 5:25], 3, "l2")
    assert_pieces_are_the_whole(torch.randn(20, 15).T, torch.randn(20, 90).T, 3, "l2")


# --- keys with room -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_keys_packed_with_room_are_searched_as_far_as_they_are_there(isa: str, metric: str, dtype: torch.dtype) -> None:
    """As an index adds them: the first at once, the others into the room, row by row and in runs."""
    query, keys = torch.randn(9, 5).to(dtype), torch.randn(130, 5).to(dtype)
    room = torch.empty_like(keys)
    room[:7] = keys[:7]
    packed = torch.ops.memad_fast.prepare_keys_with_room(room[:7], 130, metric)
    assert packed.numel() == packed_bytes(130, 5, on_gpu=False)
    there = 7
    for more in (0, 1, 62, 60):
        rows = torch.arange(there, there + more)
        room[rows] = keys[rows] + 0
        if more:
            torch.ops.memad_fast.prepare_keys_rows_(packed, room, rows, metric)
        there += more
        ranks, indices = empty(9, 3)
        nearest_keys_merge_(ranks, indices, query, PreparedKeys(room, packed, metric), last=there, metric=metric)
        assert torch.equal(indices, memad_fast.nearest_keys(query, keys[:there], 3, metric=metric)[1])


def test_room_for_fewer_keys_than_there_are_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"capacity: expected at least 4 like keys, got 3"):
        torch.ops.memad_fast.prepare_keys_with_room(torch.randn(4, 2), 3, "l2")


# --- other backends -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_backends_that_compose_it_of_whole_searches(backend: str, metric: str) -> None:
    """Small integers are summed exactly in any order, so that backends must agree to the index."""
    if not memad_fast.backends()[backend].available:
        pytest.skip(memad_fast.backends()[backend].reason)
    query, keys = torch.randint(-2, 3, (6, 4)).float(), torch.randint(-2, 3, (70, 4)).float()
    query[1, 0] = torch.nan
    keys[3, 2] = torch.inf
    expected = search_in_pieces(query, keys, 9, metric, seed=1)
    with memad_fast.use_backend(backend):
        got = search_in_pieces(query, keys, 9, metric, seed=1)
    assert torch.equal(got[1], expected[1])
    assert torch.equal(got[0].nan_to_num(nan=7.0), expected[0].nan_to_num(nan=7.0))


@pytest.mark.parametrize("metric", METRICS)
def test_float64_is_served_by_the_reference(metric: str) -> None:
    query, keys = torch.randn(9, 5, dtype=torch.float64), torch.randn(90, 5, dtype=torch.float64)
    keys[40:80] = keys[:40]
    ranks, indices = search_in_pieces(query, keys, 7, metric)
    distances, expected = reference(query, keys, 7, metric=metric)
    assert torch.equal(indices, expected)
    torch.testing.assert_close(-ranks if metric == "ip" else ranks, distances)


# --- torch ------------------------------------------------------------------------------------------------------


def test_opcheck() -> None:
    query, keys = torch.randn(9, 5), torch.randn(20, 5)
    packed = torch.ops.memad_fast.prepare_keys_with_room(keys, 64, "l2")
    room = torch.cat([keys, torch.zeros(44, 5)])
    ranks, indices = torch.full((9, 3), 1e9, dtype=torch.float64), torch.full((9, 3), 10**6)
    torch.library.opcheck(
        torch.ops.memad_fast.nearest_keys_merge_.default, (ranks, indices, query, room, packed, 2, 20, 5, "l2")
    )
    torch.library.opcheck(torch.ops.memad_fast.prepare_keys_with_room.default, (keys, 64, "ip"))


def test_it_counts_as_a_change_of_what_it_writes_and_asks_for_no_gradient() -> None:
    ranks, indices = empty(2, 1)
    query, keys = torch.randn(2, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    nearest_keys_merge_(ranks, indices, query, keys)
    assert (ranks._version, indices._version, query._version) == (1, 1, 0)
    assert not ranks.requires_grad


def test_it_compiles_as_one_graph() -> None:
    def search(query: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        ranks, indices = torch.full((4, 2), torch.nan, dtype=torch.float64), torch.full((4, 2), -1)
        for first in (5, 0):
            nearest_keys_merge_(ranks, indices, query, keys, first=first, last=first + 5)
        return ranks, indices

    query, keys = torch.randn(4, 3), torch.randn(10, 3)
    expected = search(query, keys)
    for got, want in zip(
        torch.compile(search, fullgraph=True, backend="aot_eager")(query, keys), expected, strict=True
    ):
        assert torch.equal(got, want)


# --- bad input --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"ranks": [1.0]}, TypeError, r"ranks: expected a torch.Tensor, got list"),
        ({"ranks": torch.zeros(2, 1)}, TypeError, r"ranks: expected torch.float64, got torch.float32"),
        ({"indices": torch.zeros(2, 1)}, TypeError, r"indices: expected torch.int64, got torch.float32"),
        ({"indices": torch.zeros(2, 2).long()}, ValueError, r"indices: expected 1 like ranks in dimension 1"),
        ({"ranks": torch.zeros(3, 1).double()}, ValueError, r"ranks: expected 2 like query in dimension 0"),
        ({"ranks": torch.zeros(2).double()}, ValueError, r"ranks: expected 2 dimensions \[N, k\]"),
        ({"ranks": torch.zeros(2, 3).double()[:, ::3]}, ValueError, r"ranks: expected a contiguous tensor"),
        ({"indices": torch.zeros(2, 1, device="meta").long()}, ValueError, r"indices: expected device cpu like query"),
        ({"query": torch.ones(2, 3).half()}, TypeError, r"keys: expected torch.float16 like query"),
        ({"query": torch.ones(2, 4)}, ValueError, r"keys: expected 4 like query in dimension 1"),
        ({"keys": torch.ones(0, 3)}, ValueError, r"keys: expected at least 1 row"),
        ({"first": -1}, ValueError, r"first, last: expected a range within 0 to 5, got -1 to 5"),
        ({"last": 6}, ValueError, r"first, last: expected a range within 0 to 5, got 0 to 6"),
        ({"first": 3, "last": 2}, ValueError, r"first, last: expected a range within 0 to 5, got 3 to 2"),
        ({"metric": "l1"}, ValueError, r"metric: expected one of l2, cosine, ip, got 'l1'"),
    ],
)
def test_bad_input_names_the_argument(change: dict, error: type[Exception], message: str) -> None:
    ranks, indices = empty(2, 1)
    arguments = {"ranks": ranks, "indices": indices, "query": torch.ones(2, 3), "keys": torch.ones(5, 3)} | change
    with pytest.raises(error, match=message):
        nearest_keys_merge_(**arguments)
    assert (indices == -1).all()


def test_keys_prepared_for_another_metric_or_changed_since_are_refused() -> None:
    query, keys = torch.ones(2, 3), torch.ones(5, 3)
    prepared = memad_fast.prepare_keys(keys)
    with pytest.raises(ValueError, match=r"metric: the keys were prepared for 'l2', got 'ip'"):
        nearest_keys_merge_(*empty(2, 1), query, prepared, metric="ip")
    keys.add_(1)
    with pytest.raises(ValueError, match=r"keys: the rows were changed in place"):
        nearest_keys_merge_(*empty(2, 1), query, prepared)
