"""The benchmark of large memories: what it calls the nearest row is, and its tables say what its rows say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.accuracy.results import Store
from benchmarks.index.contenders import Exact, contenders
from benchmarks.index.measure import KEY, Measurement, Row, measure
from benchmarks.index.memories import BLOCK, Memory, Rows, distances, nearest
from benchmarks.index.tables import overview, page, refreshed, save_plot

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("is_stored", [True, False])
@pytest.mark.parametrize("kind", ["patches", "gaussian"])
def test_the_nearest_rows_are_those_of_float64_differences(tmp_path: Path, kind: str, is_stored: bool) -> None:
    memory = Memory(BLOCK + 500, 5, kind)
    rows = memory.rows_in(tmp_path) if is_stored else Rows(memory)
    query = memory.queries(20)
    keys = torch.cat([memory.block(0), memory.block(1)])
    assert len(keys) == memory.rows
    expected, numbers = (query.double()[:, None] - keys.double()).square().sum(2).min(1)
    torch.testing.assert_close(nearest(query, rows), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(distances(query, rows, numbers), expected, rtol=1e-12, atol=0)


def test_queries_are_no_rows_of_the_memory() -> None:
    memory = Memory(1000, 4)
    assert not (memory.queries(50)[:, None] == memory.block(0)).all(2).any()


def test_only_ours_is_measured_where_no_file_of_the_rows_fits(tmp_path: Path) -> None:
    memory = Memory(10**8, 64)
    assert {make().is_ours for make in contenders(memory, 10**6)} == {True}
    assert memory.rows_in(tmp_path).path is None


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store[Row], list[Row]]:
    pytest.importorskip("faiss")
    folder = tmp_path_factory.mktemp("index")
    store = Store(folder / "index.csv", Row, KEY)
    for rows in (800, 3000):
        measure(Memory(rows, 8), store, folder, timed_for=0.0, most_hnsw_rows=1000)
    return store, store.load()


def test_every_contender_has_its_figures(measured: tuple[Store[Row], list[Row]]) -> None:
    _, rows = measured
    kinds = {(row.rows, row.index.split(",")[0].rstrip("0123456789")) for row in rows}
    both = {(count, kind) for count in (800, 3000) for kind in ("ExactIndex", "faiss Flat", "faiss IVF")}
    assert kinds == both | {(800, "faiss HNSW")}
    assert len(rows) == 7
    for row in rows:
        assert row.recall is not None
        assert row.recall >= 0.98
        assert row.recall == 1.0 or not row.is_ours
        for figure in (row.ms_1, row.ms_64, row.ms_1024, row.ratio_64, row.build_s, row.open_s, row.disk_mib):
            assert figure is not None
            assert figure > 0


def test_measuring_again_replaces_the_rows_of_a_memory_alone(measured: tuple[Store[Row], list[Row]]) -> None:
    store, rows = measured
    again, kept = Memory(3000, 8), [row for row in rows if row.rows == 800]
    store.put(replace(next(row for row in rows if row.rows == 3000), order=99))
    measure(again, store, None, timed_for=0.0, most_hnsw_rows=0)
    assert [row.order for row in store.load() if row.memory == again.name] == [0, 1, 2]
    assert [row for row in store.load() if row.memory != again.name] == kept


def test_an_index_of_ours_that_misses_a_row_stops_the_run(tmp_path: Path) -> None:
    pytest.importorskip("faiss")

    class Wrong(Exact):
        def search(self, query: Tensor) -> Tensor:
            return (super().search(query) + 1) % 500

    memory = Memory(500, 8)
    with pytest.raises(AssertionError, match="ExactIndex missed the nearest row of"):
        Measurement(memory, tmp_path, 0.0).all([lambda: Wrong(memory)])


def test_a_budget_is_tried_where_a_memory_is_large() -> None:
    names = [make().name for make in contenders(Memory(10**6, 64), 10**6)]
    assert names == [
        "ExactIndex", "ExactIndex, memory_budget 0.3 of the rows", "FaissIndex IVF4096,SQ8", "faiss Flat",
        "faiss IVF4096", "faiss HNSW32",
    ]  # fmt: skip


def row(index: str, order: int, **figures: float) -> Row:
    figures = {"ms_1": 1.0, "ms_64": 2.0, "ms_1024": 3.0, "open_s": 0.1, "recall": 1.0} | figures
    return Row("1 M x 64", order, index, 10**6, 64, **figures)  # type: ignore[arg-type]


def test_targets_are_judged_against_faiss_flat() -> None:
    rows = [
        row("ExactIndex", 0, ram_mib=100.0, ratio_1=1.0, ratio_64=1.0, ratio_1024=1.0),
        row("ExactIndex, in a budget", 1, ram_mib=60.0, ratio_1=2.0, ratio_64=2.0, ratio_1024=2.0, open_s=2.0),
        row("faiss Flat", 2, ram_mib=250.0, ratio_1=3.0, ratio_64=8.0, ratio_1024=12.0),
    ]
    text = "\n".join(page(rows))
    assert "1 M x 64, batch 64: ExactIndex is 8.0x faiss Flat; target 5x met" in text
    assert "1 M x 64, batch 64: ExactIndex, in a budget is 4.0x faiss Flat; target 5x **missed**" in text
    assert "1 M x 64: ExactIndex takes 0.40 of the RAM of faiss Flat; target 0.3 **missed**" in text
    assert "1 M x 64: ExactIndex, in a budget takes 0.24 of the RAM of faiss Flat; target 0.3 met" in text
    assert "1 M x 64: ExactIndex, in a budget is open in 2.00 s; target 1 s **missed**" in text


def test_a_marker_brings_the_table_into_a_text(measured: tuple[Store[Row], list[Row]]) -> None:
    store, _ = measured
    text = f"before\n<!-- index of {store.path.name} -->\nold\n<!-- end -->\nafter\n"
    fresh = refreshed(text, store.path.parent)
    assert "\n".join(overview(store.load())) in fresh
    assert "old" not in fresh
    assert fresh.startswith("before\n")
    assert fresh.endswith("<!-- end -->\nafter\n")


def test_the_plot_is_a_picture(measured: tuple[Store[Row], list[Row]], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    save_plot(measured[1], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_the_table_of_the_readme_is_that_of_the_stored_run() -> None:
    root = Path(__file__).parents[1]
    text = (root / "README.md").read_text()
    assert refreshed(text, root) == text
