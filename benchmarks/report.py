"""The tables of a benchmark run: rows, verdicts, targets, files. What the columns mean is in ``harness.py``.

``python benchmarks/report.py README.md`` brings the tables of the README up to the stored run that its marker names.
"""

from __future__ import annotations

import csv
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any


@dataclass
class Result:
    """One row of the tables and of the CSV file."""

    op: str
    case: str
    provider: str
    is_ours: bool
    is_bare: bool
    backend: str
    isa: str
    dtype: str
    precision: str
    threads: int
    median_ms: float = float("nan")
    spread_ms: float = float("nan")
    rounds: int = 0
    ratio: float = float("nan")  # this provider's time over that of ours, paired
    error: float = float("nan")
    wrong: float | None = None
    share_of_limit: float = float("nan")
    limited_by: str = ""
    peak_mib: float = float("nan")
    read_ms: float | None = None
    target: float | None = None
    mean_of: str = ""
    layer_us: float | None = None
    skipped: str = ""

    @property
    def is_comparable(self) -> bool:
        """Whether it computes in a precision that ours is judged against."""
        return "not exact" not in self.precision


class Comparison:
    """The rows of one case: what is ours beside what is not."""

    def __init__(self, rows: Sequence[Result]) -> None:
        self.rows = rows
        self.op, self.case = rows[0].op, rows[0].case
        peers = [row for row in rows if row.rounds and not row.is_ours and not row.is_bare and row.is_comparable]
        self.peers = sorted(peers, key=lambda row: row.ratio)  # the best first, by ratios taken in pairs
        self.ours = next((row for row in rows if row.is_ours), None)
        self._alone = next((row for row in rows if row.is_bare and row.rounds), None)

    def speed(self, row: Result | None) -> float:
        """How many times faster than the best peer ``row`` is; nan if one of them did not run."""
        return self.peers[0].ratio / row.ratio if self.peers and row is not None and row.rounds else math.nan

    @property
    def layer_us(self) -> float:
        """Microseconds of the public call beyond those of the compiled op alone, from their ratio taken in pairs."""
        if self.ours is None or self._alone is None or not self.ours.rounds:
            return math.nan
        return self.ours.median_ms * (1.0 - self._alone.ratio / self.ours.ratio) * 1e3

    def verdict(self, row: Result) -> str:
        """What the table of the case shows for ``row``, one of ours, in words."""
        if row.layer_us is not None or self._alone is not None:
            return f"{row.provider}: the Python layer adds {self.layer_us:.1f} µs"
        if not self.peers:
            return f"{row.provider}: no peer ran"
        best = self.peers[0]
        text = f"{row.provider} ({row.isa}): {self.speed(row):.1f}x as fast as the best peer, {best.provider}"
        return text if best.precision == row.precision else f"{text}, which computes in {best.precision}"


def comparisons(results: Sequence[Result]) -> list[Comparison]:
    """The rows by op and case, in their order."""
    cases: dict[tuple[str, str], list[Result]] = {}
    for row in results:
        cases.setdefault((row.op, row.case), []).append(row)
    return [Comparison(rows) for rows in cases.values()]


@dataclass(frozen=True)
class Judgement:
    """A target, and what was measured for it."""

    op: str
    case: str
    got: float  # nan if it was not measured
    target: float
    unit: str  # "x", as fast as the best peer: at least; "µs", of the Python layer: at most

    @property
    def is_met(self) -> bool:
        return self.got <= self.target if self.unit == "µs" else self.got >= self.target

    def line(self) -> str:
        got = "not measured" if math.isnan(self.got) else f"{self.got:.2f} {self.unit}"
        return f"- {self.op}, {self.case}: {got}, target {self.target:g} {self.unit}"


def judgements(results: Sequence[Result]) -> list[Judgement]:
    """Every target of these rows: of a case, of a Python layer, of the geometric mean of cases."""
    found: list[Judgement] = []
    means: dict[tuple[str, str, float], list[float]] = {}
    for case in comparisons(results):
        ours = case.ours
        if ours is None:
            continue
        if ours.layer_us is not None:
            found.append(Judgement(case.op, case.case, case.layer_us, ours.layer_us, "µs"))
        if ours.target is not None and ours.mean_of:
            means.setdefault((case.op, ours.mean_of, ours.target), []).append(case.speed(ours))
        elif ours.target is not None:
            found.append(Judgement(case.op, case.case, case.speed(ours), ours.target, "x"))
    for (op, name, target), speeds in means.items():
        mean = math.exp(sum(map(math.log, speeds)) / len(speeds))
        found.append(Judgement(op, f"{name}, geometric mean of {len(speeds)}", mean, target, "x"))
    return found


# --- tables -------------------------------------------------------------------------------------------------------

_COLUMNS = ("provider", "precision", "median ms", "spread", "ours is", "share of limit", "error", "wrong", "peak MiB")


def report(results: Sequence[Result]) -> list[str]:
    """The lines of the summary: a table and a verdict for each case, then the overview and the rows that miss."""
    lines: list[str] = []
    for case in comparisons(results):
        with_read = any(row.read_ms is not None for row in case.rows)
        columns = (*_COLUMNS, "read") if with_read else _COLUMNS
        lines += ["", f"### {case.op}: {case.case}", ""]
        lines += [*table(columns, [_cells(row, with_read) for row in case.rows]), ""]
        lines += [case.verdict(row) for row in case.rows if row.is_ours and row.rounds]
    missed = [judgement.line() for judgement in judgements(results) if not judgement.is_met]
    heading = "### Rows that miss their target" if missed else "### No row misses its target"
    return [*lines, "", "### Overview", "", *overview(results), "", heading, "", *missed]


def overview(results: Sequence[Result]) -> list[str]:
    """The rows that have a target beside all their peers, the steps with a read in them, the Python layers."""
    cases = comparisons(results)
    tables = [
        table(_TARGET_COLUMNS, [*map(_target_cells, _with_target(cases)), *_means(results)]),
        table(_STEP_COLUMNS, [_step_cells(case) for case in cases if case.peers and case.peers[0].read_ms is not None]),
        table(_LAYER_COLUMNS, [_layer_cells(case) for case in cases if case.ours and case.ours.layer_us is not None]),
    ]
    return [line for lines in tables if len(lines) > 2 for line in ["", *lines]][1:]


_TARGET_COLUMNS = (
    "op", "case", "ours, ms", "peers, ms, the best first", "ours is", "target", "share of limit",
    "error, ours / best peer", "peak MiB, ours / best peer",
)  # fmt: skip
_STEP_COLUMNS = ("step", "with the best peer", "of it the read", "with ours", "of it the read", "ours is")
_LAYER_COLUMNS = ("call on a few values", "public, µs", "Python layer, µs", "at most", "beside, µs")


def _with_target(cases: Sequence[Comparison]) -> list[Comparison]:
    return [case for case in cases if case.ours is not None and case.ours.target is not None]


def _target_cells(case: Comparison) -> tuple[str, ...]:
    ours = case.ours
    assert ours is not None
    target, speed = f"{ours.target:g}x", case.speed(ours)
    verdict = "in the mean" if ours.mean_of else "met" if speed >= (ours.target or 0) else "missed"
    beside = [
        f"{measure(ours)} / {measure(case.peers[0]) if case.peers else ''}"
        for measure in (lambda row: _number(row.error, ".0e"), lambda row: _number(row.peak_mib, ".1f"))
    ]
    peers = ", ".join(f"{row.provider} {row.median_ms:.4g}" for row in case.peers)
    return (
        f"`{case.op}`", case.case, f"{ours.median_ms:.4g}", peers, f"{speed:.1f}x", f"{target} {verdict}",
        _share(ours), *beside,
    )  # fmt: skip


def _means(results: Sequence[Result]) -> list[tuple[str, ...]]:
    return [
        (f"`{j.op}`", j.case, "", "", f"{j.got:.1f}x", f"{j.target:g}x {'met' if j.is_met else 'missed'}", "", "", "")
        for j in judgements(results)
        if "geometric mean" in j.case
    ]


def _step_cells(case: Comparison) -> tuple[str, ...]:
    """Milliseconds of the whole step and the share of the read in it, before and after."""
    before, after = case.peers[0], case.ours
    assert after is not None
    return (
        case.case, f"{before.median_ms:.4g} ms, {before.provider}", _read(before), f"{after.median_ms:.4g} ms",
        _read(after), f"{case.speed(after):.2f}x",
    )  # fmt: skip


def _layer_cells(case: Comparison) -> tuple[str, ...]:
    ours = case.ours
    assert ours is not None
    beside = ", ".join(f"{row.provider.removesuffix(', for scale')} {row.median_ms * 1e3:.1f}" for row in case.peers)
    return (case.case, f"{ours.median_ms * 1e3:.1f}", f"{case.layer_us:.1f}", f"{ours.layer_us:g}", beside)


def _read(row: Result) -> str:
    return "" if row.read_ms is None else f"{row.read_ms:.4g} ms ({row.read_ms / row.median_ms:.0%})"


def _cells(row: Result, with_read: bool) -> tuple[str, ...]:
    read = (_read(row),) * with_read
    if row.skipped:
        return (row.provider, row.precision, f"skipped: {row.skipped}", *[""] * (len(_COLUMNS) - 3), *read)
    ratio = "" if row.is_ours else f"{row.ratio:.2f}x as fast"
    wrong = "" if row.wrong is None else f"{row.wrong:.2%}"
    return (
        row.provider, row.precision, f"{row.median_ms:.4g}", f"{row.spread_ms:.3g}", ratio, _share(row),
        _number(row.error, ".1e"), wrong, _number(row.peak_mib, ".1f"), *read,
    )  # fmt: skip


def _share(row: Result) -> str:
    return f"{row.share_of_limit:.0%} of {row.limited_by}" if row.share_of_limit > 0 else ""


def _number(value: float, form: str) -> str:
    return "" if math.isnan(value) else format(value, form)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a markdown table."""
    widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
             for row in [columns, *rows]]  # fmt: skip
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]


def save(results: Sequence[Result], machine: str, data: Path) -> list[Path]:
    """Write the CSV file ``data`` and, beside it, the tables as text. Rows of cases that did not run now are kept."""
    data.parent.mkdir(parents=True, exist_ok=True)
    now = {(row.op, row.case) for row in results}
    rows = [*(row for row in load(data) if (row.op, row.case) not in now), *results]
    rows.sort(key=lambda row: row.op)
    with data.open("w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Result)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    text = data.with_suffix(".md")
    text.write_text("\n".join(["# Benchmarks", "", machine, *report(rows), ""]))
    return [data, text]


def load(data: Path) -> list[Result]:
    """The rows of an earlier run; none if there was no run or its columns were others."""
    if not data.exists():
        return []
    with data.open(newline="") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != [f.name for f in fields(Result)]:
            return []
        return [Result(**{f.name: _parse(str(f.type), row[f.name]) for f in fields(Result)}) for row in reader]


def _parse(kind: str, text: str) -> Any:
    if kind == "bool":
        return text == "True"
    if kind == "str":
        return text
    if kind == "int":
        return int(text)
    return float(text) if text else None


def refreshed(text: str, folder: Path) -> str:
    """``text`` with the overview of each results file that a marker in it names: see the README."""

    def section(found: re.Match[str]) -> str:
        return "\n".join([found["start"], "", *overview(load(folder / found["data"])), "", found["end"]])

    return re.sub(
        r"(?P<start><!-- overview of (?P<data>\S+) -->).*?(?P<end><!-- end -->)", section, text, flags=re.DOTALL
    )


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]):
        path.write_text(refreshed(path.read_text(), path.parent))
