"""The Triton search in Triton's interpreter: the CPU's bits, on every path, whatever the rows.

The CPU's own tests prove its results right (tests/ops/test_nearest_keys_exactness.py); the rows here are theirs, fewer.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from duels import Duel, duels, half_steps, rows_on_the_grid, search_of
from hypothesis import HealthCheck, given, settings
from searches import ADVERSARIES, CHANGES, METRICS, RANGE_CHANGES, Recipe, in_floats, one_dominant_dimension, recipes
from torch import Tensor

import memad_fast
from memad_fast import _triton

pytestmark = pytest.mark.skipif(
    not _triton.serves_cpu_tensors(), reason="Triton's interpreter is off (tests/gpu does the same on a GPU)"
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
few = settings(max_examples=5, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def search(query: Tensor, keys: Tensor, packed: Tensor | None, k: int, metric: str, filled: Tensor | None = None):
    from memad_fast.kernels import nearest_keys

    return nearest_keys.search(query, keys, packed, k, metric, filled)


def assert_as_the_cpu(
    query: Tensor, keys: Tensor, k: int = 1, metric: str = "l2", packed: Tensor | None = None
) -> None:
    """Indices, and distances bit for bit."""
    expected = memad_fast.nearest_keys(query, keys, k, metric=metric)
    got = search(query, keys, packed, k, metric)
    assert torch.equal(got.indices, expected[1])
    assert torch.equal(got.distances.view(torch.int32), expected[0].view(torch.int32))


def interpreted_right(*rows: Tensor) -> bool:
    """Triton's interpreter reads bfloat16 numbers below the normal ones as other numbers; a GPU does not."""
    return all(x.dtype != torch.bfloat16 or not ((x != 0) & (x.abs() < 2.0**-126)).any() for x in rows)


# --- rows -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    ("count", "rows", "dim", "k"), [(1, 1, 1, 1), (3, 5, 7, 5), (70, 300, 65, 1), (9, 260, 130, 3), (2, 40, 200, 40)]
)
def test_fresh_rows(count: int, rows: int, dim: int, k: int, metric: str) -> None:
    assert_as_the_cpu(torch.randn(count, dim), torch.randn(rows, dim), k, metric)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_fresh_rows_of_16_bits(dtype: torch.dtype, metric: str) -> None:
    assert_as_the_cpu(torch.randn(20, 70).to(dtype), torch.randn(200, 70).to(dtype), 2, metric)


@pytest.mark.parametrize("name", ADVERSARIES)
def test_adversarial_rows(name: str) -> None:
    """Of two groups of keys, as the screen for k = 2 needs them; the interpreter takes 30 ms for each that is left."""
    query, keys = ADVERSARIES[name]()
    query, keys = query[:6, :100], keys[:40, :100]
    for metric, k in (("l2", 1), ("cosine", 1), ("ip", 1), ("l2", 2)):
        assert_as_the_cpu(query, keys, k, metric)


@few
@given(recipe=recipes(CHANGES | RANGE_CHANGES, dims=(3, 64, 129)))
def test_whatever_the_rows(recipe: Recipe) -> None:
    query, keys = in_floats(recipe)
    if interpreted_right(query, keys):
        assert_as_the_cpu(query[:16], keys[:70], min(recipe.k, 5), recipe.metric)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("past_half", [-1, 1])
def test_the_error_of_a_code_can_be_the_whole_bound(metric: str, past_half: int) -> None:
    duel = Duel(metric, past_half=past_half, pairs=27, count=2)
    for gap in (-4, 4):
        for near, far, zeros in ((2, 20, 1), (0, 0, 70)):
            query, keys, k = search_of(replace(duel, gap=gap, near=near, far=far, zeros=zeros), *half_steps(duel))
            assert_as_the_cpu(query, keys, k, metric)


@few
@given(duel=duels(pairs=(27,)))
def test_rows_around_the_middle_of_two_codes(duel: Duel) -> None:
    query, keys, k = search_of(replace(duel, count=3), *half_steps(duel))
    assert_as_the_cpu(query, keys, k, duel.metric)


@pytest.mark.parametrize("metric", METRICS)
def test_rows_on_the_grid_leave_only_the_rounding_of_a_score(metric: str) -> None:
    query, keys, k = rows_on_the_grid(metric, 0)
    assert_as_the_cpu(query[:2], keys, k, metric)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("k", [1, 3])
def test_rows_that_are_not_finite_and_rows_that_no_screen_holds(metric: str, k: int) -> None:
    query, keys = torch.randn(9, 20), torch.randn(100, 20)
    query[1, 3], query[2, 4] = torch.nan, torch.inf
    query[5] *= 1e25
    keys[7, 0], keys[20, 19], keys[40] = torch.nan, -torch.inf, torch.inf
    keys[60:63] *= 1e25
    assert_as_the_cpu(query, keys, k, metric)
    assert_as_the_cpu(query, keys[40:42].repeat(3, 1)[::2], k, metric)  # no finite key


@pytest.mark.parametrize("metric", METRICS)
def test_no_queries_and_no_columns(metric: str) -> None:
    assert_as_the_cpu(torch.empty(0, 5), torch.randn(9, 5), 2, metric)
    assert_as_the_cpu(torch.empty(3, 0), torch.empty(4, 0), 3, metric)


def test_views_give_the_same_as_copies() -> None:
    wide = torch.randn(80, 150)
    for query, keys in (
        (wide[::2, 3:67], wide[1::2, 5:69]),
        (wide.T[:64, :30].T, wide[:64].T[:30].T),
        (wide[:1, :64].expand(9, 64), wide[:1, :64].expand(7, 64)),
    ):
        keys = keys if keys.shape[1] == query.shape[1] else wide[:40, : query.shape[1]]
        assert_as_the_cpu(query, keys, 2)


@pytest.mark.parametrize("k", [1, 2])
def test_rows_too_long_for_sums_of_codes(monkeypatch: pytest.MonkeyPatch, k: int) -> None:
    """Of fewer dimensions than on a GPU: the interpreter takes seconds for a row of 65,537."""
    from memad_fast.kernels import nearest_keys

    monkeypatch.setattr(nearest_keys, "_MOST_CODED", 64)
    query, keys = torch.randn(2, 65), torch.randn(5, 65)
    keys[3] = query[1]
    assert_as_the_cpu(query, keys, k)
    assert search(query, keys, None, k, "l2").full_path.all()


# --- paths ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("splits", [1, 50])
def test_splits_segments_chunks_and_tiles_change_nothing(
    monkeypatch: pytest.MonkeyPatch, metric: str, k: int, splits: int
) -> None:
    from memad_fast.kernels import nearest_keys

    monkeypatch.setattr(nearest_keys, "LIMITS", nearest_keys.Limits(1, splits, 8))
    monkeypatch.setattr(nearest_keys, "_turns", lambda processor: nearest_keys.Turns(32, 4))
    monkeypatch.setattr(nearest_keys, "_tile", lambda *_: nearest_keys.Tile(64, 64, 64, 4, 2))
    query, keys = torch.randn(66, 130), torch.randn(200, 130)  # two chunks, three steps of a tile
    keys[::20] = query[65] + 1e-6 * torch.randn(10, 130)
    assert_as_the_cpu(query, keys, k, metric)


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("filled", [0, 1, 32, 65, 99, 900, -3])
@pytest.mark.parametrize("scale", [1.0, 1e19])  # the screen holds no rows as long as the second: all are computed
def test_only_filled_rows_are_searched(filled: int, k: int, scale: float) -> None:
    query, keys = scale * torch.randn(5, 40), scale * torch.randn(100, 40)
    query[1] *= 1e25 / scale  # takes every key
    keys[filled % 100] = query[0] if filled < 100 else keys[0]  # the first that is not filled
    got = search(query, keys, None, k, "l2", torch.tensor(filled))
    last = min(max(filled, 0), 100)
    masked = keys.clone()
    masked[last:] = torch.nan
    expected = memad_fast.nearest_keys(query, masked, k)
    assert torch.equal(got.indices, expected[1])
    assert torch.equal(got.distances.nan_to_num(-1), expected[0].nan_to_num(-1))


@pytest.mark.parametrize("metric", METRICS)
def test_any_centre_gives_the_same(metric: str) -> None:
    from memad_fast.kernels import prepare_keys

    query, keys = torch.randn(9, 40), torch.randn(150, 40)
    far = torch.full_like(keys, 1e4)
    far[1::2] = -7.0
    packed = prepare_keys.prepare_keys(far, metric)
    prepare_keys.prepare_keys_rows_(packed, keys, torch.randperm(150), metric)
    assert_as_the_cpu(query, keys, 2, metric, packed)


def test_prepared_keys_follow_what_is_written() -> None:
    query, keys = torch.randn(9, 40), torch.randn(150, 40)
    rows, new = torch.tensor([149, 0, 70]), torch.randn(3, 40) * 5
    with memad_fast.use_backend("triton"):
        prepared = memad_fast.prepare_keys(keys.clone())
        got = memad_fast.nearest_keys(query, prepared.overwrite_(rows, new), 2)
    keys[rows] = new
    expected = memad_fast.nearest_keys(query, keys, 2)
    assert torch.equal(got[1], expected[1])
    assert torch.equal(got[0], expected[0])


def test_codes_leave_few_of_random_keys_to_float64() -> None:
    query, keys = torch.randn(30, 64), torch.randn(1000, 64)
    for k in (1, 2):
        found = search(query, keys, None, k, "l2")
        assert (found.survivors >= k).all()
        assert found.survivors.float().mean() < 12
        assert not found.full_path.any()


def test_what_codes_cannot_decide_is_counted() -> None:
    query, keys = torch.randn(3, 8), torch.ones(200, 8)
    query[1, 4] = torch.nan
    with memad_fast.use_backend("triton"):
        stats = memad_fast.nearest_keys_stats(query, keys, 2)
    assert stats.survivors.tolist() == [200, 0, 200]
    assert stats.full_path.tolist() == [True, False, True]
    dominant = one_dominant_dimension(150, 24)
    assert search(dominant[:4], dominant, None, 1, "l2").survivors.min() > 20


def test_packed_keys_of_another_shape_are_refused() -> None:
    from memad_fast.kernels import prepare_keys

    query, keys = torch.randn(2, 3), torch.randn(200, 3)
    packed = prepare_keys.prepare_keys(keys, "l2")
    for foreign in (packed[:-4], memad_fast.prepare_keys(keys).packed):
        with pytest.raises(ValueError, match=r"packed: expected the packed form of keys \[200, 3\]"):
            search(query, keys, foreign, 1, "l2")
