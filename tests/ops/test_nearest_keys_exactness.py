"""An attack on the exactness of nearest_keys: inputs made to slip through its screen, and truths that allow nothing.

Three kinds of truth:
- integer arithmetic, where the rows lie on a lattice (integers times a power of two): no tolerance, true ties;
- float64 with its own rounding as the only tolerance, for all other rows (tests/exactness.py);
- the search for all M keys, which has nothing to screen away: any other k is a prefix of it, to the bit.

And every result is the same bits for every instruction set, number of threads, batch split, memory layout and for keys
prepared, overwritten or neither.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from duels import Duel, balanced, duels, half_steps, lost_terms, rows_on_the_grid, search_of
from exactness import assert_exact_search, order_on_a_lattice
from hypothesis import given, settings
from hypothesis import strategies as st
from searches import (
    CHANGES,
    FORMATS,
    METRICS,
    RANGE_CHANGES,
    Recipe,
    Rows,
    in_floats,
    largest_on_a_lattice,
    on_a_lattice,
    recipes,
)
from torch import Tensor

import memad_fast

native = pytest.importorskip("memad_fast.native", exc_type=ImportError)

Result = tuple[Tensor, Tensor]


# --- every way to search ----------------------------------------------------------------------------------------


@contextmanager
def machine(level: str, threads: int = 1) -> Iterator[None]:
    before = native.isa(), torch.get_num_threads()
    native.set_isa(level)
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        native.set_isa(before[0])
        torch.set_num_threads(before[1])


def assert_same_bits(got: Result, expected: Result, way: str) -> None:
    assert torch.equal(got[1], expected[1]), f"other indices {way}"
    assert torch.equal(got[0].view(torch.int32), expected[0].view(torch.int32)), f"other distances {way}"


def spread(rows: Tensor) -> Tensor:
    """The same rows with other numbers between and beside them."""
    wide = torch.full((2 * rows.shape[0], rows.shape[1] + 5), 3.0, dtype=rows.dtype)
    view = wide[::2, 2:-3]
    view.copy_(rows)
    return view


def prepared_from_far_rows(keys: Tensor, metric: str) -> memad_fast.PreparedKeys:
    """Keys written over rows that lie elsewhere, so that the centre is theirs and not the keys'."""
    far = torch.full_like(keys, 1e4)
    far[1::2] = -7.0
    half = len(keys) // 2
    prepared = memad_fast.prepare_keys(far, metric=metric).overwrite_(half, keys[half:])
    return prepared.overwrite_(torch.arange(half), keys[:half])


def search_every_way(query: Tensor, keys: Tensor, k: int, metric: str, split: int) -> Result:
    """The one result of all ways to search; fails where there are two."""

    def search(queries: Tensor, searched: Tensor | memad_fast.PreparedKeys, best: int = k) -> Result:
        return memad_fast.nearest_keys(queries, searched, best, metric=metric)

    levels = native.isas()
    with machine(levels[0]):
        expected = search(query, keys)
        packed_low = memad_fast.prepare_keys(keys, metric=metric)
    for level in levels:
        with machine(level):
            prepared = memad_fast.prepare_keys(keys, metric=metric)
            assert_same_bits(search(query, keys), expected, f"on {level}")
            assert_same_bits(search(query, prepared), expected, f"on {level}, prepared")
            assert_same_bits(search(query, packed_low), expected, f"on {level}, prepared on {levels[0]}")
            assert_same_bits(
                search(query, prepared_from_far_rows(keys, metric)), expected, f"on {level}, around an old centre"
            )
            everything = search(query, keys, len(keys))
            assert_same_bits((everything[0][:, :k], everything[1][:, :k]), expected, f"on {level}, of all keys")
            parts = [search(part, prepared) for part in query.split(split)]
            whole = (torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts]))
            assert_same_bits(whole, expected, f"on {level}, {split} queries at a time")
    for threads in (2, 3):
        with machine(levels[-1], threads):
            assert_same_bits(search(query, keys), expected, f"on {threads} threads")
            assert_same_bits(search(query, prepared), expected, f"on {threads} threads, prepared")
    with machine(levels[-1]):
        assert_same_bits(search(spread(query), spread(keys)), expected, "in wider rows")
    return expected


# --- the properties ---------------------------------------------------------------------------------------------


def assert_exact_on_a_lattice(query: Tensor, keys: Tensor, unit: float, k: int, metric: str, split: int) -> None:
    distances, indices = search_every_way(query, keys, k, metric, split)
    if metric == "cosine":  # its quotients are rounded
        return assert_exact_search(query, keys, distances, indices, metric)
    expected = order_on_a_lattice(query, keys, unit, k, metric)
    assert torch.equal(indices, expected[1]), "not the order of integer arithmetic"
    assert torch.equal(distances, expected[0]), "a distance is not the integer, rounded once"
    return None


@settings(max_examples=200, deadline=None)
@given(recipe=recipes(CHANGES), magnitude=st.one_of(st.integers(-149, 127), st.integers(-80, -55), st.integers(56, 70)))
def test_on_a_lattice_the_result_is_that_of_integer_arithmetic(recipe: Recipe, magnitude: int) -> None:
    """At any magnitude, and more often at those whose squares leave the range of float32."""
    query, keys, unit = on_a_lattice(recipe, magnitude)
    assert_exact_on_a_lattice(query, keys, unit, recipe.k, recipe.metric, recipe.split)


@settings(max_examples=200, deadline=None)
@given(recipe=recipes(CHANGES | RANGE_CHANGES))
def test_whatever_the_rows_the_result_is_that_of_float64(recipe: Recipe) -> None:
    query, keys = in_floats(recipe)
    distances, indices = search_every_way(query, keys, recipe.k, recipe.metric, recipe.split)
    assert_exact_search(query, keys, distances, indices, recipe.metric)


@settings(max_examples=60, deadline=None)
@given(
    recipe=recipes(CHANGES),
    bad=st.lists(st.tuples(st.booleans(), st.integers(0, 400), st.sampled_from([np.nan, np.inf, -np.inf])), min_size=1),
)
def test_rows_that_are_not_finite_change_nothing_for_the_others(
    recipe: Recipe, bad: list[tuple[bool, int, float]]
) -> None:
    query, keys = in_floats(recipe)
    for is_key, at, value in bad:
        rows = keys if is_key else query
        rows[at % len(rows), at % recipe.dim] = value
    distances, indices = search_every_way(query, keys, recipe.k, recipe.metric, recipe.split)
    assert_exact_search(query, keys, distances, indices, recipe.metric)


# --- rows that reach the bound of a screen ----------------------------------------------------------------------


def assert_duel_is_exact(duel: Duel, q: Rows, a: Rows) -> None:
    query, keys, k = search_of(duel, q, a)
    assert_exact_on_a_lattice(query, keys, 1.0, k, duel.metric, max(1, duel.count // 2))


def quantised(row: Rows, levels: int) -> Rows:
    step = np.abs(row).max() / levels
    return np.round(row / step) * step


CODES = [(127, 127), (63, 127), (127, 63), (64, 127), (64, 64), (31, 127), (15, 15)]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("past_half", [-1, 1])
@pytest.mark.parametrize("levels", CODES)
def test_the_attack_itself_reaches_the_bound(metric: str, past_half: int, levels: tuple[int, int]) -> None:
    duel = Duel(metric, levels, past_half=past_half)
    q, a = balanced(duel, *half_steps(duel))
    q_code, a_code = quantised(q, levels[0]), quantised(a, levels[1])
    bound = np.linalg.norm(q - q_code) * np.linalg.norm(a_code) + np.linalg.norm(q) * np.linalg.norm(a - a_code)
    assert -past_half * (q @ a - q_code @ a_code) > 0.98 * bound
    assert abs(a @ a / 2 - q @ a if metric == "l2" else q @ a) < 1e-6 * bound


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("past_half", [-1, 1])
@pytest.mark.parametrize("levels", CODES)
def test_the_error_of_a_code_can_be_the_whole_bound(metric: str, past_half: int, levels: tuple[int, int]) -> None:
    duel = Duel(metric, levels, past_half=past_half)
    q, a = half_steps(duel)
    for gap in (-4, 4):
        for count in (1, 40):
            # The last two have k = 1 (l2, all metrics) in a bank of more than a group of keys.
            for near, far, zeros in ((2, 20, 1), (0, 60, 1), (0, 0, 70)):
                assert_duel_is_exact(replace(duel, gap=gap, count=count, near=near, far=far, zeros=zeros), q, a)


@settings(max_examples=150, deadline=None)
@given(duel=duels())
def test_rows_around_the_middle_of_two_codes(duel: Duel) -> None:
    assert_duel_is_exact(duel, *half_steps(duel))


@pytest.mark.parametrize("past_half", [-1, 1])
@pytest.mark.parametrize("pairs", [4, 100, 450])
def test_float32_can_lose_every_term_of_a_sum(past_half: int, pairs: int) -> None:
    for gap in (-4, 4):
        for crowd in (0, 110):  # more than codes can tell apart, so float32 has to
            for near in (0, 2):
                duel = Duel(
                    "l2", past_half=past_half, pairs=pairs, gap=gap, near=near, far=5, crowd=crowd, count=40, seed=crowd
                )
                assert_duel_is_exact(duel, *lost_terms(duel))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("seed", range(3))
def test_rows_on_the_grid_leave_only_the_rounding_of_a_score(metric: str, seed: int) -> None:
    query, keys, k = rows_on_the_grid(metric, seed)
    for count in (1, 40):
        assert_exact_on_a_lattice(query[:count], keys, 1.0, k, metric, 7)


# --- large searches ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Large:
    """Rows on a lattice, a few units apart where it matters, and the truth for l2 and ip."""

    query: Tensor
    keys: Tensor
    truth: dict[str, Result]  # of the five nearest


LARGE = {
    "a million keys": (3, 1_000_000, 32),
    "a million keys, many queries": (20, 1_000_000, 8),
    "ten thousand queries": (10_000, 2_048, 64),
    "rows of 4,096": (40, 300, 4_096),
    "one key": (10_000, 1, 64),
    "one dimension": (50, 100_000, 1),
    "rows of 70,000": (9, 40, 70_000),
}


@pytest.fixture(scope="module", params=LARGE)
def large(request: pytest.FixtureRequest) -> Large:
    count, rows, dim = LARGE[request.param]
    random = np.random.default_rng(len(request.param))
    largest = largest_on_a_lattice(FORMATS[0], dim) // 4
    query = random.integers(-largest, largest, (count, dim)).astype(np.float64)
    keys = random.integers(-largest, largest, (rows, dim), dtype=np.int32).astype(np.float32)
    # Keys around every query (or so many): 16 at one distance but for a few units, some of them exactly.
    ties = 16
    for n in range(min(count, rows // (4 * ties))):
        difference = random.permuted(np.tile(random.integers(-largest, largest, dim) // 64, (ties, 1)), axis=1)
        difference[::2, 0] += random.integers(-1, 2, ties // 2)
        keys[random.integers(0, rows, ties)] = query[n] + difference
    tensors = torch.from_numpy(query).float(), torch.from_numpy(keys)
    k = min(5, rows)
    return Large(*tensors, {metric: order_on_a_lattice(*tensors, 1.0, k, metric) for metric in ("l2", "ip")})


@pytest.mark.parametrize("metric", ["l2", "ip"])
def test_large_searches_are_exact(isa: str, large: Large, metric: str) -> None:
    expected = large.truth[metric]
    prepared = memad_fast.prepare_keys(large.keys, metric=metric)
    part = len(large.query) // 3
    for threads in (1, 2, 3):
        with machine(isa, threads):
            for searched in (large.keys, prepared):
                got = memad_fast.nearest_keys(large.query, searched, expected[1].shape[1], metric=metric)
                assert torch.equal(got[1], expected[1])
                assert torch.equal(got[0], expected[0])
            assert torch.equal(
                memad_fast.nearest_keys(large.query[part:], prepared, metric=metric)[1], expected[1][part:, :1]
            )
