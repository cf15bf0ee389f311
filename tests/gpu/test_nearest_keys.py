"""nearest_keys on the GPU: the CPU's bits, whatever the rows; the CPU's own tests prove those right."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from duels import Duel, duels, half_steps, lost_terms, rows_on_the_grid, search_of
from exactness import assert_exact_search, order_on_a_lattice
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from searches import (
    ADVERSARIES,
    CHANGES,
    METRICS,
    RANGE_CHANGES,
    Recipe,
    in_floats,
    on_a_lattice,
    one_dominant_dimension,
    recipes,
)
from torch import Tensor
from where import DEVICE, DTYPES, HAS_GPU, each_backend, sized

import memad_fast

pytestmark = each_backend("nearest_keys", "prepare_keys", "prepare_keys_rows_")

# Many small cases: hypothesis prints the one that fails.
many = settings(max_examples=sized(300, 6), deadline=None, suppress_health_check=list(HealthCheck))
# Each length of rows is compiled for each metric and dtype. This one ends inside a block of 64 codes.
DIM = 60

Result = tuple[Tensor, Tensor]


def by_the_cpu(query: Tensor, keys: Tensor, k: int, metric: str) -> Result:
    with memad_fast.use_backend("cpu"):
        return memad_fast.nearest_keys(query, keys, k, metric=metric)


def assert_same_bits(got: Result, expected: Result) -> None:
    assert torch.equal(got[1].cpu(), expected[1])
    assert torch.equal(got[0].cpu().view(torch.int32), expected[0].view(torch.int32))


def search(query: Tensor, keys: Tensor, k: int, metric: str) -> Result:
    """The one result of the keys, of prepared keys, of keys written around another centre, and of parts."""
    query, keys = query.to(DEVICE), keys.to(DEVICE)
    found = memad_fast.nearest_keys(query, keys, k, metric=metric)
    prepared = memad_fast.prepare_keys(keys, metric=metric)
    old = memad_fast.prepare_keys(
        torch.full_like(keys, 7.0).index_fill_(0, keys.new_zeros(1).long(), 1e4), metric=metric
    )
    old.overwrite_(0, keys)
    expected = found[0].cpu(), found[1].cpu()
    assert_same_bits(memad_fast.nearest_keys(query, prepared, k, metric=metric), expected)
    assert_same_bits(memad_fast.nearest_keys(query, old, k, metric=metric), expected)
    part = len(query) // 3 + 1
    parts = [memad_fast.nearest_keys(rows, prepared, k, metric=metric) for rows in query.split(part)]
    if parts:
        assert_same_bits((torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])), expected)
    return expected


def assert_search_is_exact(query: Tensor, keys: Tensor, k: int = 1, metric: str = "l2") -> None:
    found = search(query, keys, k, metric)
    assert_same_bits(found, by_the_cpu(query, keys, k, metric))
    if query.numel() and len(query) * keys.numel() < 2**24:
        assert_exact_search(query, keys, *found, metric)


# --- shapes, dtypes, metrics ------------------------------------------------------------------------------------


# Around the tiles: 16 to 256 queries and keys, 64 values of a row, 32 keys of a group; few queries, many keys.
SHAPES = sized(
    [
        (1, 1, 1), (3, 5, 7), (15, 127, 63), (16, 128, 64), (17, 129, 65), (128, 255, 64), (129, 257, 64),
        (300, 4097, 64), (2, 100_000, 64), (64, 33_000, 64), (5000, 31, 64), (1000, 1000, 512), (40, 3000, 1024),
        (7, 500, 2049),
    ],
    [(3, 5, 7), (17, 129, 65)],
)  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fresh_rows(backend: str, shape: tuple[int, int, int]) -> None:
    count, rows, dim = shape
    query, keys = torch.randn(count, dim), torch.randn(rows, dim)
    assert_search_is_exact(query, keys)
    if dim == 64:
        for k in (2, 5, min(rows, 77)):
            assert_search_is_exact(query, keys, k)


@pytest.mark.parametrize("metric", METRICS)
def test_every_metric(backend: str, metric: str) -> None:
    for count, rows, dim, k in sized([(130, 500, 64, 1), (1000, 300, 64, 7), (30, 70, 129, 70)], [(5, 30, 9, 2)]):
        assert_search_is_exact(torch.randn(count, dim), torch.randn(rows, dim), k, metric)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_fresh_rows_of_16_bits(backend: str, dtype: torch.dtype, metric: str) -> None:
    for count, rows, k in sized([(130, 500, 1), (1000, 5000, 1), (40, 1000, 9)], [(9, 40, 2)]):
        assert_search_is_exact(torch.randn(count, 64).to(dtype), torch.randn(rows, 64).to(dtype), k, metric)


@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize("k", [1, 4])
def test_every_number_of_queries_and_keys_around_the_tiles(backend: str, metric: str, k: int) -> None:
    """Integers leave no band: ties are true ties, and go to the lowest index."""
    counts, sizes = sized(
        ((1, 2, 15, 16, 17, 31, 33, 63, 65, 127, 128, 129, 255, 257), range(4, 300, 3)), ((3,), (4, 9))
    )
    for rows in sizes:
        for count in counts:
            query, keys = torch.randint(-2, 3, (count, 3)).float(), torch.randint(-2, 3, (rows, 3)).float()
            got = memad_fast.nearest_keys(query.to(DEVICE), keys.to(DEVICE), k, metric=metric)
            expected = (
                order_on_a_lattice(query, keys, 1.0, k, metric) if rows < 30 else by_the_cpu(query, keys, k, metric)
            )
            assert_same_bits(got, expected)


# --- adversarial ------------------------------------------------------------------------------------------------


def padded(rows: Tensor) -> Tensor:
    """Rows of DIM values, if they are shorter: zeros change no distance, and spare a compilation."""
    return torch.nn.functional.pad(rows, (0, max(0, DIM - rows.shape[1])))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", ADVERSARIES)
def test_adversarial_rows(backend: str, name: str, metric: str) -> None:
    query, keys = (padded(rows) for rows in ADVERSARIES[name]())
    if not HAS_GPU:
        query, keys = query[:4], keys[:50]
    for k in (1, 5):
        assert_search_is_exact(query, keys, k, metric)
    assert_search_is_exact(query[:2], keys, 1, metric)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("name", ["near ties", "duplicates", "offset 1e4", "one dominant dimension", "all magnitudes"])
def test_adversarial_rows_of_16_bits(backend: str, name: str, dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    query, keys = (padded(rows).clamp(-largest, largest).to(dtype) for rows in ADVERSARIES[name]())
    assert_search_is_exact(query[: sized(30, 3)], keys[: sized(400, 50)], 3)


@many
@given(recipe=recipes(CHANGES, dims=(DIM,)), magnitude=st.integers(-149, 127))
def test_on_a_lattice_the_result_is_that_of_integer_arithmetic(backend: str, recipe: Recipe, magnitude: int) -> None:
    query, keys, unit = on_a_lattice(recipe, magnitude)
    found = search(query, keys, recipe.k, recipe.metric)
    if recipe.metric == "cosine":
        assert_same_bits(found, by_the_cpu(query, keys, recipe.k, recipe.metric))
    else:
        assert_same_bits(found, order_on_a_lattice(query, keys, unit, recipe.k, recipe.metric))


@many
@given(recipe=recipes(CHANGES | RANGE_CHANGES, dims=(DIM,)))
def test_whatever_the_rows_the_result_is_that_of_the_cpu(backend: str, recipe: Recipe) -> None:
    assert_search_is_exact(*in_floats(recipe), recipe.k, recipe.metric)


@many
@given(
    recipe=recipes(CHANGES, dims=(DIM,)),
    bad=st.lists(st.tuples(st.booleans(), st.integers(0, 400), st.sampled_from([torch.nan, torch.inf])), min_size=1),
)
def test_rows_that_are_not_finite_change_nothing_for_the_others(
    backend: str, recipe: Recipe, bad: list[tuple[bool, int, float]]
) -> None:
    query, keys = in_floats(recipe)
    for is_key, at, value in bad:
        rows = keys if is_key else query
        rows[at % len(rows), at % recipe.dim] = value
    assert_search_is_exact(query, keys, recipe.k, recipe.metric)


# Pairs of dimensions that make rows of DIM values.
PAIRS = 25


def assert_duel_is_exact(duel: Duel, rows: tuple) -> None:
    query, keys, k = search_of(duel, *rows)
    found = search(query, keys, k, duel.metric)
    if duel.metric == "cosine":
        assert_same_bits(found, by_the_cpu(query, keys, k, duel.metric))
    else:
        assert_same_bits(found, order_on_a_lattice(query, keys, 1.0, k, duel.metric))


@many
@given(duel=duels(pairs=(PAIRS,)))
def test_rows_around_the_middle_of_two_codes(backend: str, duel: Duel) -> None:
    assert_duel_is_exact(duel, half_steps(duel))


@pytest.mark.parametrize(("metric", "pairs"), [("l2", PAIRS), ("cosine", PAIRS), ("ip", PAIRS), ("l2", 121)])
@pytest.mark.parametrize("past_half", [-1, 1])
def test_the_error_of_a_code_can_be_the_whole_bound(backend: str, metric: str, pairs: int, past_half: int) -> None:
    duel = Duel(metric, past_half=past_half, pairs=pairs)
    rows = half_steps(duel)
    for gap in (-4, 4):
        for count in sized((1, 40, 300), (2,)):
            for near, far, zeros in ((2, 20, 1), (0, 60, 1), (0, 0, 70)):
                assert_duel_is_exact(replace(duel, gap=gap, count=count, near=near, far=far, zeros=zeros), rows)


@pytest.mark.parametrize("past_half", [-1, 1])
def test_float32_can_lose_every_term_of_a_sum(backend: str, past_half: int) -> None:
    for gap in (-4, 4):
        for crowd in sized((0, 110), (20,)):
            duel = Duel("l2", past_half=past_half, pairs=26, gap=gap, near=2, far=5, crowd=crowd, count=sized(40, 3))
            assert_duel_is_exact(duel, lost_terms(duel))


@pytest.mark.parametrize("metric", METRICS)
def test_rows_on_the_grid_leave_only_the_rounding_of_a_score(backend: str, metric: str) -> None:
    for seed in range(sized(3, 1)):
        query, keys, k = rows_on_the_grid(metric, seed)
        for count in sized((1, 40), (2,)):
            found = search(padded(query[:count]), padded(keys), k, metric)
            assert_same_bits(found, by_the_cpu(query[:count], keys, k, metric))


def test_as_many_survivors_as_there_are_keys(backend: str) -> None:
    """Banks of equal rows and of rows that codes cannot tell apart, beyond any list of survivors; k = 1 and more."""
    rows = sized(5000, 80)
    equal = torch.randn(1, 64).repeat(rows, 1)
    crowded = torch.randn(1, 64) + 1e-6 * torch.randn(rows, 64)
    dominant = one_dominant_dimension(rows, 64)
    for keys in (equal, crowded, dominant):
        query = torch.cat([keys[:1], torch.randn(sized(20, 2), 64), keys[-1:] * 1.5])
        for k in (1, 3):
            assert_search_is_exact(query, keys, k)


def test_the_nearest_key_comes_last_and_first(backend: str) -> None:
    """A threshold that falls with every tile, and one that never falls."""
    rows = sized(20_000, 70)
    distances = torch.linspace(9, 1, rows)
    for order in (distances, distances.flip(0)):
        keys = torch.zeros(rows, 64)
        keys[:, 0] = order
        assert_search_is_exact(torch.zeros(sized(40, 2), 64), keys, 1)
        assert_search_is_exact(torch.zeros(sized(40, 2), 64), keys, 4)


# --- what is not a number, empty, strided -----------------------------------------------------------------------


def test_no_queries_no_finite_key_and_no_columns(backend: str) -> None:
    distances, indices = memad_fast.nearest_keys(torch.empty(0, 64).to(DEVICE), torch.randn(4, 64).to(DEVICE), 2)
    assert distances.shape == indices.shape == (0, 2)
    for metric in METRICS:
        assert_search_is_exact(torch.randn(9, 64), torch.full((20, 64), torch.nan), 2, metric)
        got = memad_fast.nearest_keys(torch.empty(3, 0).to(DEVICE), torch.empty(4, 0).to(DEVICE), 3, metric=metric)
        assert_same_bits(got, by_the_cpu(torch.empty(3, 0), torch.empty(4, 0), 3, metric))


@pytest.mark.parametrize("dtype", DTYPES)
def test_views_give_the_same_as_copies(backend: str, dtype: torch.dtype) -> None:
    count = sized(150, 6)
    wide_query, wide_keys = (torch.randn(rows, 150, device=DEVICE).to(dtype) for rows in (2 * count, 400))
    views = (wide_query[::2, 3:67], wide_query.T[:64, :count].T, wide_query[:1, :64].expand(count, 64))
    for query in views:
        for keys in (wide_keys[1::2, 5:69], wide_keys[:64, :130].T, wide_keys[:1, :64].expand(9, 64)):
            got = memad_fast.nearest_keys(query, keys, 2)
            expected = memad_fast.nearest_keys(query.contiguous(), keys.contiguous(), 2)
            assert torch.equal(got[1], expected[1])
            assert torch.equal(got[0], expected[0])
            prepared = memad_fast.nearest_keys(query, memad_fast.prepare_keys(keys), 2)
            assert torch.equal(prepared[1], expected[1])


def test_rows_too_long_for_sums_of_codes(backend: str) -> None:
    dim = sized(65_537, 200)
    query, keys = torch.randn(9, dim), torch.randn(20, dim)
    keys[3] = query[5]
    assert_search_is_exact(query, keys, 2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_prepared_keys_follow_what_is_written(backend: str, dtype: torch.dtype) -> None:
    keys = torch.randn(sized(700, 70), 64).to(dtype)
    prepared = memad_fast.prepare_keys(keys.to(DEVICE))
    rows = torch.randperm(len(keys))[:20]
    for new in (torch.randn(20, 64), torch.randn(20, 64) * 100 + 50, torch.full((20, 64), torch.nan)):
        keys[rows] = new.to(dtype)
        prepared.overwrite_(rows.to(DEVICE), new.to(dtype).to(DEVICE))
        query = torch.cat([keys[rows].nan_to_num(), torch.randn(sized(100, 5), 64).to(dtype)])
        assert_same_bits(memad_fast.nearest_keys(query.to(DEVICE), prepared, 2), by_the_cpu(query, keys, 2, "l2"))


def test_a_row_outside_the_keys_is_not_written(backend: str) -> None:
    """The op itself gets its rows on the device, where nobody can look at them."""
    if backend == "cpu":
        pytest.skip("the CPU's kernel refuses it")
    keys = torch.randn(70, 64, device=DEVICE)
    packed = torch.ops.memad_fast.prepare_keys(keys, "l2")
    before = packed.clone()
    torch.ops.memad_fast.prepare_keys_rows_(packed, keys, torch.tensor([-1, 70, 2**40], device=DEVICE), "l2")
    assert torch.equal(packed, before)


def test_packed_keys_of_one_backend_serve_another(backend: str) -> None:
    query, keys = torch.randn(50, 64, device=DEVICE), torch.randn(300, 64, device=DEVICE)
    prepared = memad_fast.prepare_keys(keys)
    expected = memad_fast.nearest_keys(query, prepared)
    with memad_fast.use_backend(None):
        for got, want in zip(memad_fast.nearest_keys(query, prepared), expected, strict=True):
            assert torch.equal(got, want)
