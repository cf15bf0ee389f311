"""The tables of a benchmark run: ratios, targets and files say what the rows say."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from report import Result, judgements, load, overview, refreshed, report, save


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
    assert judgement.line() == "- op, tiny: 15.00 µs, target 10 µs"


def test_the_report_names_every_row_that_misses() -> None:
    rows = [*beside_a_peer("met", 4.0, target=3.0), *beside_a_peer("missed", 2.0, target=3.0)]
    lines = report(rows)
    assert lines[lines.index("### Rows that miss their target") :] == [
        "### Rows that miss their target", "", "- op, missed: 2.00 x, target 3 x",
    ]  # fmt: skip
    assert "### No row misses its target" in report(rows[:2])


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_overview_holds_the_first_of_ours_beside_all_peers() -> None:
    rows = [*beside_a_peer("large", 4.0, target=3.0), row("large", "faster", 5.0, 2.5), row("large", "ours", 9.0, 9.0)]
    assert cells(overview(rows)[2])[:7] == [
        "`op`",
        "large",
        "2",
        "faster 5, peer 8",
        "2.5x",
        "3x missed",
        "50% of copy",
    ]


def test_a_target_that_was_not_measured_is_not_met() -> None:
    rows = [row("large", "ours", math.nan, math.nan, target=3.0, rounds=0), row("large", "peer", 1.0, 1.0)]
    assert "- op, large: not measured, target 3 x" in report(rows)


def test_the_share_of_the_read_is_shown_before_and_after() -> None:
    rows = beside_a_peer("step", 2.0, read_ms=0.5)
    rows[1].read_ms = 2.5
    assert cells(overview(rows)[2]) == ["step", "4 ms, peer", "2.5 ms (62%)", "2 ms", "0.5 ms (25%)", "2.00x"]


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


def test_a_marker_brings_the_overview_of_its_file_into_a_text(tmp_path: Path) -> None:
    rows = beside_a_peer("large", 4.0, target=3.0)
    save(rows, "a machine", tmp_path / "machine.csv")
    text = "before\n<!-- overview of machine.csv -->\nold\n<!-- end -->\nafter\n"
    fresh = refreshed(text, tmp_path)
    assert fresh.splitlines() == [
        "before", "<!-- overview of machine.csv -->", "", *overview(rows), "", "<!-- end -->", "after",
    ]  # fmt: skip
    assert refreshed(fresh, tmp_path) == fresh


def test_the_tables_of_the_readme_are_those_of_the_stored_run() -> None:
    root = Path(__file__).parents[1]
    text = (root / "README.md").read_text()
    assert "<!-- overview of " in text
    assert refreshed(text, root) == text, "python benchmarks/report.py README.md brings them up to date"


def test_the_program_for_gpus_runs_on_small_shapes_here() -> None:
    """Every case of it, without torch.compile, on the CPU's kernels: a mistake in it must not wait for a GPU."""
    root = Path(__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": str(root), "TORCHDYNAMO_DISABLE": "1"}
    command = [sys.executable, "benchmarks/gpu_bench.py", "--device", "cpu", "--tiny"]
    run = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    rows = [cells(line) for line in run.stdout.splitlines() if line.startswith("| ")]
    assert {row[0] for row in rows[1:]} == {
        "nearest_keys", "stcm_lookup", "bank_attention", "gumbel_topk", "histogram_correction", "ssim_loss",
        "fifo_write_", "scoring",
    }  # fmt: skip
    assert "FAILED" not in run.stdout
