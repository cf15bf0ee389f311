"""The tables of a benchmark run: ratios, targets and files say what the rows say."""

from __future__ import annotations

from pathlib import Path

import pytest
from report import Result, judgements, load, overview, report, save


def row(case: str, provider: str, median_ms: float, ratio: float, **more: object) -> Result:
    is_ours = provider == "ours"
    values = {"is_bare": False, "rounds": 9, "error": 1e-7, "share_of_limit": 0.5, "limited_by": "copy"} | more
    return Result(
        "op", case, provider, is_ours, backend="cpu", isa="avx2", dtype="float32", precision="float32", threads=2,
        median_ms=median_ms, ratio=ratio, **values,  # type: ignore[arg-type]
    )  # fmt: skip


def beside_a_peer(case: str, ratio: float, **more: object) -> list[Result]:
    return [row(case, "ours", 2.0, 1.0, **more), row(case, "peer", 2.0 * ratio, ratio)]


def test_a_target_is_judged_against_the_fastest_peer_that_ran() -> None:
    rows = [
        *beside_a_peer("large", 4.0, target=3.0),
        row("large", "faster", 5.0, 2.5),
        row("large", "none", 0, 0, rounds=0),
    ]
    (judgement,) = judgements(rows)
    assert (judgement.got, judgement.is_met) == (2.5, False)
    assert judgements(rows[:2])[0].is_met


def test_cases_of_one_mean_are_judged_together() -> None:
    rows = [
        *beside_a_peer("a", 2.0, target=3.0, mean_of="forward"),
        *beside_a_peer("b", 8.0, target=3.0, mean_of="forward"),
    ]
    (judgement,) = judgements(rows)
    assert judgement.case == "forward, geometric mean of 2"
    assert judgement.got == pytest.approx(4.0)
    assert judgement.is_met


def test_the_python_layer_is_what_the_public_call_takes_beyond_the_compiled_op() -> None:
    rows = [row("tiny", "ours", 0.020, 1.0, layer_us=10.0), row("tiny", "alone", 0.005, 0.25, is_bare=True)]
    (judgement,) = judgements(rows)
    assert judgement.got == pytest.approx(15.0)
    assert not judgement.is_met
    assert judgement.line() == "- op, tiny: 15.00 µs of 10 µs"


def test_the_report_names_every_row_that_misses() -> None:
    rows = [*beside_a_peer("met", 4.0, target=3.0), *beside_a_peer("missed", 2.0, target=3.0)]
    lines = report(rows)
    assert lines[lines.index("### Rows that miss their target") :] == [
        "### Rows that miss their target", "", "- op, missed: 2.00 x of 3 x",
    ]  # fmt: skip
    assert "### No row misses its target" in report(rows[:2])


def test_the_overview_holds_the_first_of_ours_beside_the_best_peer() -> None:
    rows = [*beside_a_peer("large", 4.0), row("large", "ours", 9.0, 9.0)]
    cells = [cell.strip() for cell in overview(rows)[2].strip("|").split("|")]
    assert cells[:6] == ["`op`", "large", "2", "peer", "4.0x", "50% of copy"]


def test_the_share_of_the_read_is_shown_before_and_after() -> None:
    rows = beside_a_peer("step", 2.0, read_ms=0.5)
    rows[1].read_ms = 2.5
    cells = [cell.strip() for cell in overview(rows)[2].strip("|").split("|")]
    assert cells == ["step", "4 ms, peer", "2.5 ms (62%)", "2 ms", "0.5 ms (25%)", "2.00x"]


def test_stored_rows_come_back_and_those_of_other_cases_stay(tmp_path: Path) -> None:
    data = tmp_path / "machine.csv"
    first, second = beside_a_peer("a", 2.0, target=3.0), beside_a_peer("b", 4.0, read_ms=1.5, wrong=0.25)
    save(first, "a machine", data)
    save(second, "a machine", data)
    assert [(r.case, r.provider, r.ratio) for r in load(data)] == [
        (r.case, r.provider, r.ratio) for r in first + second
    ]
    assert load(data)[2].read_ms == 1.5
    assert load(data)[0].read_ms is None
    assert "a machine" in data.with_suffix(".md").read_text()
