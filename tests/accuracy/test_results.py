"""Rows of results: what is put is there, whatever happened to the file before."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from benchmarks.accuracy.results import Spread, Store


@dataclass(frozen=True)
class Row:
    set: str
    seed: int
    auroc: float | None
    types: dict[str, float]
    error: str = ""


FIRST = Row("cookies", 0, 0.1 + 0.2, {"broken, large": 0.5})
SECOND = Row("cookies", 1, None, {}, error='it said "no", then nothing')


@pytest.fixture
def store(tmp_path: Path) -> Store[Row]:
    return Store(tmp_path / "deep" / "rows.csv", Row, key=("set", "seed"))


def test_rows_come_back_as_they_were_put(store: Store[Row]) -> None:
    assert store.load() == []
    store.put(replace(SECOND, error='it said "no",\nthen nothing'))
    store.put(FIRST)
    assert store.load() == [FIRST, SECOND]


def test_a_row_takes_the_place_of_an_older_one_of_its_key(store: Store[Row]) -> None:
    store.put(FIRST)
    store.put(SECOND)
    store.put(replace(FIRST, auroc=0.9))
    assert store.load() == [replace(FIRST, auroc=0.9), SECOND]


@pytest.mark.parametrize("torn", [1, 5, 9, 20, -1, -4])
def test_a_torn_line_costs_its_own_row_only(store: Store[Row], torn: int) -> None:
    store.put(FIRST)
    before = store.path.read_bytes()
    store.put(replace(FIRST, seed=1, error="it stopped"))
    line = store.path.read_bytes()[len(before) :]
    store.path.write_bytes(before + line[:torn])
    assert store.load() == [FIRST]
    store.put(replace(FIRST, seed=2))
    assert store.load() == [FIRST, replace(FIRST, seed=2)]


def test_a_file_of_before_a_column_was_added_is_read(store: Store[Row]) -> None:
    store.put(FIRST)
    lines = store.path.read_text().splitlines()
    store.path.write_text("\n".join(line.rpartition(",")[0] for line in lines) + "\n")
    assert store.load() == [FIRST]


def test_a_line_that_cannot_be_read_is_named_and_not_dropped(store: Store[Row]) -> None:
    store.put(FIRST)
    store.put(SECOND)
    store.path.write_text(store.path.read_text().replace("cookies,0,", "cookies,zero,"))
    with pytest.raises(ValueError, match=r"rows\.csv, line 2: .*'zero'"):
        store.put(FIRST)
    assert "zero" in store.path.read_text()


def test_another_file_is_not_overwritten(store: Store[Row]) -> None:
    store.path.parent.mkdir()
    store.path.write_text("name,price\nbolt,3\n")
    with pytest.raises(ValueError, match="not a file of these results"):
        store.put(FIRST)
    assert store.path.read_text() == "name,price\nbolt,3\n"


def test_a_spread_is_the_mean_and_the_range() -> None:
    assert Spread.of([0.9, 0.92, 0.97]) == Spread(pytest.approx(0.93), 0.9, 0.97, 3)  # type: ignore[arg-type]
    assert Spread.of([]) is None
    assert Spread(0.93, 0.9, 0.97, 3).text() == "0.930 (0.900 to 0.970)"
    assert Spread(0.93, 0.93, 0.93, 1).text() == "0.930"
