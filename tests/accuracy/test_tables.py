"""The tables say what the rows say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.accuracy.contenders import CONTENDERS
from benchmarks.accuracy.experiment import KEY, Row
from benchmarks.accuracy.published import PUBLISHED
from benchmarks.accuracy.results import Store
from benchmarks.accuracy.tables import REFERENCE, beside_published, overview, page, refreshed

MakeRow = Callable[..., Row]


def cells(lines: list[str], title: str) -> list[str]:
    """Of the row that begins with ``title`` in the first set's table."""
    begin = next((number for number, line in enumerate(lines) if line.startswith("## ")), 0)
    found = next(line for line in lines[begin:] if line.startswith(f"| {title} "))
    return [cell.strip() for cell in found.strip("|").split("|")]


def test_a_row_shows_the_mean_and_the_range_of_its_seeds(make_row: MakeRow) -> None:
    rows = [
        make_row(
            "pmb", "", seed, auroc,
            pixel_auroc=auroc / 2, epochs=12.0, seen=1200, parameters=5000, cpu_seconds=10.0 * seed,
        )
        for seed, auroc in enumerate([0.70, 0.80, 0.90])
    ]  # fmt: skip
    lines = page("Title", ["Head."], rows)
    assert cells(lines, "pmb") == [
        "pmb", "**0.800 (0.700 to 0.900)**", "", "**0.400 (0.350 to 0.450)**", "-", "3", "12", "1,200", "5,000", "10",
    ]  # fmt: skip
    assert lines[:3] == ["# Title", "", "Head."]
    assert "Seeds: 0, 1, 2." in lines


def test_the_gain_is_taken_seed_by_seed(make_row: MakeRow) -> None:
    rows = [
        *(make_row("pmb", "", seed, auroc) for seed, auroc in enumerate([0.70, 0.80, 0.96])),
        *(make_row("pmb", "without memory", seed, auroc) for seed, auroc in enumerate([0.60, 0.75, 0.95])),
        *(make_row("memstc", "", seed, auroc) for seed, auroc in enumerate([0.5, 0.6])),
        *(make_row("memstc", "without memory", seed, auroc) for seed, auroc in enumerate([0.6, 0.5])),
        *(make_row("simsid", "", seed, auroc) for seed, auroc in enumerate([0.5, 0.6])),
        *(make_row("simsid", "without memory", seed, auroc) for seed, auroc in enumerate([0.6, 0.7])),
    ]
    lines = page("Title", [], rows)
    assert cells(lines, "pmb")[2] == "+0.053 (+0.010 to +0.100)"
    assert cells(lines, "- without memory")[2] == ""
    assert (
        "Better than its ablation with every seed: pmb (+0.053). Worse than its ablation with every seed: simsid"
        " (-0.100). Neither: memstc (+0.000)." in lines
    )


def test_dead_reads_are_told(make_row: MakeRow) -> None:
    rows = [make_row("pmb", "", 0, 0.9, dead_rows=0.2), make_row("pmb", "", 1, 0.9, dead_rows=0.4)]
    assert "Reads that give all zeros, in the memory with most of them: pmb 30%." in page("Title", [], rows)


def test_a_gain_counts_only_seeds_that_both_have(make_row: MakeRow) -> None:
    rows = [
        make_row("pmb", "", 0, 0.9),
        make_row("pmb", "", 1, 0.1),
        make_row("pmb", "without memory", 0, 0.8),
        make_row("pmb", "without memory", 1, None, error="it broke"),
    ]
    lines = page("Title", [], rows)
    assert cells(lines, "pmb")[2] == "+0.100"
    assert not any("Better than its ablation" in line for line in lines), "one seed proves nothing"


def test_failures_are_shown(make_row: MakeRow) -> None:
    rows = [
        make_row("pmb", "", 0, 0.9),
        make_row("pmb", "", 1, None, error="TrainingError: the loss became nan"),
        make_row("simsid", "", 0, None, error="ended by SIGKILL"),
    ]
    lines = page("Title", [], rows)
    assert cells(lines, "pmb")[5] == "1 of 2"
    assert cells(lines, "simsid")[1] == "failed"
    assert "Failed: pmb, seed 1: TrainingError: the loss became nan" in lines
    assert "Failed: simsid, seed 0: ended by SIGKILL" in lines


@pytest.mark.parametrize(("stated", "ours", "is_marked"), [(0.6, 0.5, False), (0.8, 0.5, True), (0.6, 0.7, True)])
def test_what_does_not_beat_image_statistics_is_marked(
    make_row: MakeRow, stated: float, ours: float, is_marked: bool
) -> None:
    rows = [
        make_row("pmb", "", 0, 0.7),
        make_row("image statistics", "", 0, ours),
        make_row(REFERENCE, "image statistics", 0, stated),
    ]
    lines = page("Title", [], rows)
    assert ("†" in cells(lines, "pmb")[1]) == is_marked
    assert "†" not in cells(lines, "image statistics")[1]
    assert cells(lines, "image statistics, as the set's README says")[1] == f"{stated:.3f}"


@pytest.mark.parametrize(("neighbours", "is_smoke_test"), [(0.94, False), (0.95, True)])
def test_a_set_that_patch_neighbours_solve_is_a_smoke_test(
    make_row: MakeRow, neighbours: float, is_smoke_test: bool
) -> None:
    rows = [make_row("pmb", "", 0, 0.7, trained_on=9, size=64, normal=3, abnormal=3, preset="small")]
    lines = page("Title", [], [*rows, make_row("patchcore", "of raw pixels", 0, neighbours)])
    assert any("A smoke test" in line for line in lines) == is_smoke_test


def test_the_best_is_bold_per_set_and_nothing_is_averaged_over_sets(make_row: MakeRow) -> None:
    rows = [
        make_row("pmb", "", 0, 0.7, set="one"),
        make_row("simsid", "", 0, 0.9, set="one"),
        make_row("pmb", "", 0, 0.6, set="two"),
        make_row("simsid", "", 0, 0.5, set="two"),
    ]
    lines = page("Title", [], rows)
    one, two = lines[lines.index("## one") : lines.index("## two")], lines[lines.index("## two") :]
    assert (cells(one, "pmb")[1], cells(one, "simsid")[1]) == ("0.700", "**0.900**")
    assert (cells(two, "pmb")[1], cells(two, "simsid")[1]) == ("**0.600**", "0.500")
    assert "0.65" not in "\n".join(lines)


def test_defect_types_have_a_table_of_their_own(make_row: MakeRow) -> None:
    rows = [
        make_row("pmb", "", 0, 0.7, types={"crack": 0.6, "hole": 0.8}),
        make_row("pmb", "", 1, 0.7, types={"crack": 0.7, "hole": 0.9}),
    ]
    lines = page("Title", [], rows)
    start = lines.index("Mean image AUROC of each:")
    assert cells(lines[start:], "system") == ["system", "crack", "hole"]
    assert cells(lines[start:], "pmb") == ["pmb", "0.650", "0.850"]


def test_the_overview_has_a_column_a_set_and_means_with_their_marks(make_row: MakeRow) -> None:
    rows = [
        make_row("pmb", "", 0, 0.9),
        make_row("pmb", "", 1, 0.8),
        make_row("pmb", "without memory", 0, 0.5),
        make_row("image statistics", "", 0, 0.6),
        make_row("memstc", "", 0, 0.7, set="other"),
        make_row("memstc", "without memory", 0, None, set="other", error="no"),
        make_row(REFERENCE, "image statistics", 0, 0.6, set="a set without any row"),
    ]
    lines = overview(rows)
    first = rows[0].set
    assert [[cell.strip() for cell in line.strip("|").split("|")] for line in [lines[0], *lines[2:]]] == [
        ["image AUROC", *sorted([first, "other"])],
        *(
            [title, *(cell for _, cell in sorted([(first, one), ("other", other)]))]
            for title, one, other in (
                ("pmb", "**0.850**", ""),
                ("- without memory", "0.500 †", ""),
                ("memstc", "", "**0.700**"),
                ("- without memory", "", "-"),
                ("image statistics", "0.600", ""),
                ("seeds", "2", "1"),
            )
        ),
    ]


def test_a_marker_brings_the_overview_into_a_text(make_row: MakeRow, tmp_path: Path) -> None:
    rows = [make_row("pmb", "", 0, 0.9)]
    store = Store(tmp_path / "sets.csv", Row, KEY)
    store.put(rows[0])
    fresh = refreshed("before\n<!-- accuracy of sets.csv -->\nold\n<!-- end -->\nafter\n", tmp_path)
    assert fresh.splitlines() == [
        "before", "<!-- accuracy of sets.csv -->", "", *overview(rows), "", "<!-- end -->", "after",
    ]  # fmt: skip


def test_published_figures_stand_beside_those_of_the_same_set(make_row: MakeRow) -> None:
    rows = [
        make_row("pmb", "", 0, 0.90, set="mvtec_bottle"),
        make_row("pmb", "", 1, 0.96, set="mvtec_bottle"),
        make_row("pmb", "without memory", 0, None, set="mvtec_bottle", error="no"),
        make_row("pmb", "", 0, 0.99, set="mnist"),
        make_row("salad", "", 0, 0.70, set="cookies"),
    ]
    lines = beside_published(rows)
    assert cells(lines, "mvtec_bottle")[1:5] == ["pmb", "0.952", "0.930", "-0.022"]
    assert cells(lines, "mnist")[1:5] == ["pmb", "0.981", "0.990", "+0.009"]
    assert len(lines) == 2 + 2
    assert all(line in page("Title", [], rows) for line in lines)
    assert beside_published(rows[-1:]) == []


def test_every_published_figure_belongs_to_a_contender() -> None:
    known = {(contender.system, contender.variant) for contender in CONTENDERS}
    assert {(paper.system, paper.variant) for paper in PUBLISHED} <= known
    assert all(0.5 < paper.image_auroc <= 1 for paper in PUBLISHED)


def test_a_marker_may_name_several_files_and_another_table(make_row: MakeRow, tmp_path: Path) -> None:
    rows = [make_row("pmb", "", 0, 0.9, set="mvtec_bottle"), make_row("pmb", "", 0, 0.8, set="mnist")]
    for name, row in zip(("sets.csv", "mnist.csv"), rows, strict=True):
        Store(tmp_path / name, Row, KEY).put(row)
    both = "sets.csv mnist.csv"
    fresh = refreshed(
        f"<!-- accuracy of {both} --><!-- end -->\n<!-- published figures beside {both} --><!-- end -->", tmp_path
    )
    assert all(line in fresh.splitlines() for line in [*overview(rows), *beside_published(rows)])


def test_the_table_of_the_readme_is_that_of_the_stored_results() -> None:
    root = Path(__file__).parents[2]
    text = (root / "README.md").read_text()
    assert "<!-- accuracy of " in text
    assert refreshed(text, root) == text, "python -m benchmarks.accuracy.tables README.md brings it up to date"
