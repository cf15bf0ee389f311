"""greedy_coreset: the choice of greedy search in float64, whatever its pools and leaves are."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peak_memory import run_measured
from torch import Tensor
from torch.nn import functional

import memad_fast
from memad_fast.memory import coreset, greedy_coreset

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=["as they are", "tiny"])
def parts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny pools, leaves and blocks: many levels, and borders everywhere, in few rows."""
    if request.param == "tiny":
        make_parts_tiny(monkeypatch)


def make_parts_tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"_SHARE": 2, "_LEAF": 2, "_CENTRES": 3, "_BLOCK_BYTES": 100}.items():
        monkeypatch.setattr(coreset, name, value)


def greedy(features: Tensor, size: int, start: int = 0) -> list[int]:
    """The definition: all rows against each centre, in float64; the lowest index of equals."""
    rows = features.double()
    nearest = torch.full((len(rows),), torch.inf, dtype=torch.float64)
    chosen = [start]
    while len(chosen) < size:
        nearest = torch.minimum(nearest, (rows - rows[chosen[-1]]).square().sum(dim=1))
        nearest[chosen[-1]] = -1.0
        chosen.append(int(nearest.argmax()))
    return chosen


def clusters(count: int = 300) -> Tensor:
    """Of different size and width, with a few rows far from all."""
    which = (12 * torch.rand(count).square()).long()
    rows = 10 * torch.randn(12, 6)[which] + torch.rand(12, 1)[which] * torch.randn(count, 6)
    rows[::100] *= 5
    return rows


ROWS = {
    "random": lambda: torch.randn(300, 5),
    "of many dimensions": lambda: torch.randn(200, 300),
    "in clusters": clusters,
    "each many times": lambda: torch.randn(20, 3).repeat(20, 1)[torch.randperm(400)],
    "on a lattice": lambda: torch.randint(0, 3, (300, 4)).float(),
    "on a line": lambda: torch.arange(200.0)[:, None],
    "all equal": lambda: torch.full((300, 3), 0.1),
    "of no dimension": lambda: torch.zeros(100, 0),
    "one": lambda: torch.randn(1, 4),
    "two": lambda: torch.randn(2, 4),
    "huge": lambda: torch.randn(200, 4) * 1e37,
    "tiny": lambda: torch.randn(200, 4) * 1e-37,
    "of all magnitudes": lambda: torch.randn(200, 4) * torch.logspace(-30, 30, 200)[:, None],
    "far away": lambda: torch.randn(200, 4) + 1e4,
    "of one dominant dimension": lambda: torch.randn(200, 16) * torch.tensor([1e4] + [1.0] * 15),
    "every other column": lambda: torch.randn(200, 12)[:, ::2],
    "columns first": lambda: torch.randn(6, 200).T,
    "every other row, backwards": lambda: torch.randn(400, 5).flip(0)[::2],
    "float16": lambda: torch.randn(200, 4).half(),
    "bfloat16": lambda: torch.randn(200, 4).bfloat16(),
    "float64": lambda: torch.randn(150, 4, dtype=torch.float64),
    "float64, hardly different": lambda: 1 + 1e-12 * torch.randn(100, 4, dtype=torch.float64),
    "float64, huge": lambda: 1e150 * torch.randn(100, 4, dtype=torch.float64),
}


@pytest.mark.usefixtures("parts")
@pytest.mark.parametrize("name", ROWS)
def test_each_row_is_the_farthest_from_those_before(name: str) -> None:
    features = ROWS[name]()
    start = len(features) // 3
    for size in {1, min(2, len(features)), max(1, len(features) // 10), len(features)}:
        assert greedy_coreset(features, size, start=start).tolist() == greedy(features, size, start)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_any_small_rows(data: st.DataObject) -> None:
    """Integers: many exact ties, and sums without rounding."""
    count, dim = data.draw(st.integers(1, 60)), data.draw(st.integers(1, 4))
    numbers = st.integers(-3, 3)
    rows = data.draw(st.lists(st.lists(numbers, min_size=dim, max_size=dim), min_size=count, max_size=count))
    size, start = data.draw(st.integers(1, count)), data.draw(st.integers(0, count - 1))
    features = torch.tensor(rows, dtype=data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64])))
    with pytest.MonkeyPatch.context() as monkeypatch:
        make_parts_tiny(monkeypatch)
        assert greedy_coreset(features, size, start=start).tolist() == greedy(features, size, start)


def test_a_difference_that_float32_cannot_tell_decides() -> None:
    """10⁶ and 10⁶ + 2⁻⁸: the same in float32, where the lower index would be chosen."""
    features = torch.tensor([[0.0, 0.0], [1000.0, 0.0], [1000.0, 2.0**-4]])
    assert greedy_coreset(features, 2).tolist() == [0, 2]


@pytest.mark.parametrize("make", [lambda: torch.randn(6000, 8), lambda: clusters(6000)], ids=["random", "in clusters"])
def test_many_rows(make: Callable[[], Tensor]) -> None:
    features = make()
    assert greedy_coreset(features, 0.1).tolist() == greedy(features, 600)


def test_the_choice_is_that_of_the_pairwise_form() -> None:
    """In float32, every row's distance to each centre by itself: the same where nothing nearly ties."""
    features = torch.randn(2000, 16)
    chosen, nearest = [5], torch.full((2000,), torch.inf)
    while len(chosen) < 200:
        distances = functional.pairwise_distance(features, features[chosen[-1]][None], p=2.0)
        nearest = torch.minimum(nearest, distances)
        chosen.append(int(nearest.argmax()))
    assert greedy_coreset(features, 200, start=5).tolist() == chosen


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_every_backend_chooses_the_same(backend: str) -> None:
    if not memad_fast.backends()[backend].available:
        pytest.skip(f"no {backend}: {memad_fast.backends()[backend].reason}")
    features = torch.randn(100, 3)
    memad_fast.use_backend(backend)
    assert greedy_coreset(features, 10).tolist() == greedy(features, 10)


def test_a_shift_changes_nothing() -> None:
    features = torch.randint(-500, 500, (400, 8)).float()
    assert torch.equal(greedy_coreset(features, 40), greedy_coreset(features + 10_000, 40))


def test_the_beginning_of_a_larger_choice_is_the_smaller_one() -> None:
    features = clusters(900)
    assert torch.equal(greedy_coreset(features, 400)[:100], greedy_coreset(features, 100))


@pytest.mark.parametrize(("share", "rows"), [(1.0, 30), (0.5, 15), (0.1, 3), (0.05, 2), (1e-9, 1)])
def test_a_float_is_a_share_of_the_rows(share: float, rows: int) -> None:
    features = torch.randn(30, 2)
    assert torch.equal(greedy_coreset(features, share), greedy_coreset(features, rows))


def test_gradients_and_rows_are_left_alone() -> None:
    features = torch.randn(300, 4, requires_grad=True)
    before = features.detach().clone()
    chosen = greedy_coreset(features, 30)
    assert not chosen.requires_grad
    assert torch.equal(features.detach(), before)
    with torch.inference_mode():
        assert torch.equal(greedy_coreset(before, 30), chosen)


# --- cost ---------------------------------------------------------------------------------------------------------


def test_rows_that_cannot_be_next_are_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are compared with fewer than half of the centres, and with several at a time."""
    compared, calls, merge = 0, 0, coreset.nearest_keys_merge_

    def counted(distances: Tensor, nearest: Tensor, query: Tensor, keys: Tensor) -> None:
        nonlocal compared, calls
        compared += len(query) * len(keys)
        calls += len(query) > coreset._LEAF
        merge(distances, nearest, query, keys)

    monkeypatch.setattr(coreset, "nearest_keys_merge_", counted)
    greedy_coreset(torch.randn(10_000, 64), 200)
    assert compared < 10_000 * 200 / 2
    assert calls < 200 / 2


def test_memory_beside_the_features_is_of_the_number_of_rows() -> None:
    """A copy of the features would take 102 MB."""
    program = """
        import torch
        from memad_fast.memory import greedy_coreset

        features = torch.randn(100_000, 256)
        greedy_coreset(features[:1000], 100)
        before = peak()
        greedy_coreset(features, 300)
        print(peak() - before)
    """
    assert int(run_measured(program)) < 64 * 100_000 + 5 * coreset._BLOCK_BYTES


# --- progress -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("parts")
@pytest.mark.parametrize("features", [torch.arange(200.0)[:, None], torch.ones(200, 2)], ids=["different", "equal"])
def test_every_row_is_told_once(features: Tensor) -> None:
    told: list[tuple[int, int]] = []
    greedy_coreset(features, 150, progress=lambda *numbers: told.append(numbers))
    assert told == [(count, 150) for count in range(1, 151)]


def test_true_shows_a_bar(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rich")
    greedy_coreset(torch.randn(200, 2), 150, progress=True)
    assert "coreset" in (shown := capsys.readouterr().out)
    assert "150/150" in shown
    greedy_coreset(torch.randn(200, 2), 150)
    assert capsys.readouterr().out == ""


def test_a_bar_without_rich_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    with pytest.raises(ModuleNotFoundError, match=r"needs the package rich: pip install 'memad_fast\[app\]'"):
        greedy_coreset(torch.zeros(2, 1), 1, progress=True)
    assert greedy_coreset(torch.zeros(2, 1), 1).tolist() == [0]


# --- what is wrong ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_rows_that_are_not_finite_are_named(value: float) -> None:
    features = torch.zeros(50, 3)
    features[[7, 40], 1] = value
    with pytest.raises(ValueError, match=r"features: expected finite rows.*\[7, 40\]"):
        greedy_coreset(features, 1)


def test_rows_whose_distances_overflow_are_named() -> None:
    features = torch.tensor([[0.0], [1e154], [-1e154]], dtype=torch.float64)
    with pytest.raises(ValueError, match=r"an overflow in rows \[1, 2\]"):
        greedy_coreset(features, 1)
    assert greedy_coreset(features / 2, 3).tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"features": torch.zeros(2, 1, dtype=torch.int64)}, TypeError, "features: expected float32"),
        ({"features": [[1.0]]}, TypeError, "features: expected a torch.Tensor, got list"),
        ({"features": torch.zeros(2)}, ValueError, r"features: expected 2 dimensions \[N, D\]"),
        ({"features": torch.zeros(0, 3)}, ValueError, r"features: expected at least 1 row, got shape \(0, 3\)"),
        ({"size": 0}, ValueError, "size: expected 1 to 2 .the number of rows., got 0"),
        ({"size": 3}, ValueError, "size: expected 1 to 2 .the number of rows., got 3"),
        ({"size": 0.0}, ValueError, "size: expected a share above 0.0 up to 1.0, got 0.0"),
        ({"size": 1.5}, ValueError, "size: expected a share above 0.0 up to 1.0, got 1.5"),
        ({"size": float("nan")}, ValueError, "size: expected a share"),
        ({"size": True}, TypeError, "size: expected an int or a float, got bool"),
        ({"size": "10%"}, TypeError, "size: expected an int or a float, got str"),
        ({"start": 2}, ValueError, "start: expected 0 to 1, got 2"),
        ({"start": -1}, ValueError, "start: expected 0 to 1, got -1"),
        ({"start": 0.5}, TypeError, "start: expected an int, got float"),
    ],
)
def test_a_wrong_argument_is_named(arguments: dict, error: type[Exception], message: str) -> None:
    features = arguments.pop("features", torch.zeros(2, 1))
    with pytest.raises(error, match=message):
        greedy_coreset(features, **{"size": 1, **arguments})
