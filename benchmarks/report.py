"""The tables of a benchmark run: rows, verdicts, targets, files. What the columns mean is in ``harness.py``.

``python benchmarks/report.py benchmarks/results/<machine>.csv`` prints the overview of a stored run, for the README.
"""

from __future__ import annotations

import csv
import statistics
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


_COLUMNS = ("provider", "precision", "median ms", "spread", "ours is", "share of limit", "error", "wrong", "peak MiB")


def report(results: Sequence[Result]) -> list[str]:
    """The lines of the summary: a table and a verdict for each case, then the overview and the rows that miss."""
    lines: list[str] = []
    for op, case in dict.fromkeys((row.op, row.case) for row in results):
        rows = [row for row in results if (row.op, row.case) == (op, case)]
        with_read = any(row.read_ms is not None for row in rows)
        columns = (*_COLUMNS, "read") if with_read else _COLUMNS
        lines += ["", f"### {op}: {case}", "", *table(columns, [_cells(row, with_read) for row in rows]), ""]
        lines += [_verdict(row, rows) for row in rows if row.is_ours and row.rounds and len(rows) > 1]
    missed = [judgement.line() for judgement in judgements(results) if not judgement.is_met]
    heading = "### Rows that miss their target" if missed else "### No row misses its target"
    return [*lines, "", "### Overview", "", *overview(results), "", heading, "", *missed]


def best_peer(rows: Sequence[Result]) -> Result | None:
    """The fastest of a case's rows that are not ours, by ratios taken in pairs."""
    peers = [row for row in rows if row.rounds and not row.is_ours and not row.is_bare]
    return min(peers, key=lambda row: row.ratio, default=None)


def _verdict(row: Result, rows: Sequence[Result]) -> str:
    alone = next((other for other in rows if other.is_bare and other.rounds), None)
    if alone is not None:
        return f"{row.provider}: the Python layer adds {_layer_us(row, alone):.1f} µs"
    best = best_peer(rows)
    if best is None:
        return f"{row.provider}: no peer ran"
    verdict = f"{row.provider} ({row.isa}): {best.ratio / row.ratio:.1f}x as fast as the best peer, {best.provider}"
    return verdict if best.precision == row.precision else f"{verdict}, which computes in {best.precision}"


def _layer_us(row: Result, alone: Result) -> float:
    """Microseconds of the public call beyond those of the compiled op, from their ratio taken in pairs."""
    return row.median_ms * (1.0 - alone.ratio / row.ratio) * 1e3


@dataclass(frozen=True)
class Judgement:
    """A target, and what was measured for it."""

    op: str
    case: str
    got: float
    target: float
    unit: str  # "x", as fast as the best peer: at least; "µs", of the Python layer: at most

    @property
    def is_met(self) -> bool:
        return self.got <= self.target if self.unit == "µs" else self.got >= self.target

    def line(self) -> str:
        return f"- {self.op}, {self.case}: {self.got:.2f} {self.unit} of {self.target:g} {self.unit}"


def judgements(results: Sequence[Result]) -> list[Judgement]:
    """Every target of these rows that can be judged: of a case, of a Python layer, of a geometric mean of cases."""
    found: list[Judgement] = []
    means: dict[tuple[str, str, float], list[float]] = {}
    for row in results:
        rows = [other for other in results if (other.op, other.case) == (row.op, row.case)]
        alone = next((other for other in rows if other.is_bare and other.rounds), None)
        best = best_peer(rows)
        if row.layer_us is not None and alone is not None:
            found.append(Judgement(row.op, row.case, _layer_us(row, alone), row.layer_us, "µs"))
        if row.target is None or best is None or not row.rounds:
            continue
        if row.mean_of:
            means.setdefault((row.op, row.mean_of, row.target), []).append(best.ratio / row.ratio)
        else:
            found.append(Judgement(row.op, row.case, best.ratio / row.ratio, row.target, "x"))
    for (op, name, target), ratios in means.items():
        mean = statistics.geometric_mean(ratios)
        found.append(Judgement(op, f"{name}, geometric mean of {len(ratios)}", mean, target, "x"))
    return found


def overview(results: Sequence[Result]) -> list[str]:
    """The first provider that is ours beside the best peer; the read's share of whole steps; what the targets say."""
    cells = []
    for row in results:
        rows = [other for other in results if (other.op, other.case) == (row.op, row.case)]
        best = best_peer(rows)
        is_judged_elsewhere = any(other.is_bare or other.read_ms is not None for other in rows)
        if best is None or is_judged_elsewhere or row is not next(r for r in rows if r.is_ours):
            continue
        cells.append(
            (
                f"`{row.op}`", row.case, f"{row.median_ms:.4g}", best.provider, f"{best.ratio / row.ratio:.1f}x",
                _share(row), f"{_number(row.peak_mib)} / {_number(best.peak_mib)}",
            )
        )  # fmt: skip
    columns = ("op", "case", "ours, ms", "best peer", "ours is", "share of limit", "peak MiB, ours / peer")
    targets = [
        (f"`{j.op}`", j.case, f"{j.got:.2f} {j.unit}", f"{j.target:g} {j.unit}", "met" if j.is_met else "missed")
        for j in judgements(results)
    ]
    tables = [
        table(columns, cells) if cells else [],
        table(
            ("step", "with the best peer", "of it the read", "with ours", "of it the read", "ours is"), _steps(results)
        ),
        table(("op", "case", "measured", "target", ""), targets),
    ]
    return [line for lines in tables if len(lines) > 2 for line in ["", *lines]][1:]


def _steps(results: Sequence[Result]) -> list[tuple[str, ...]]:
    """The end-to-end cases: milliseconds of the whole step and the share of the read in it, before and after."""
    steps = []
    for ours in (row for row in results if row.is_ours and row.read_ms is not None):
        peer = best_peer([row for row in results if (row.op, row.case) == (ours.op, ours.case)])
        if peer is not None:
            before, after = ((f"{row.median_ms:.4g} ms", _read(row)) for row in (peer, ours))
            ratio = f"{peer.ratio / ours.ratio:.2f}x"
            steps.append((ours.case, f"{before[0]}, {peer.provider}", before[1], *after, ratio))
    return steps


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
        f"{row.error:.1e}", wrong, _number(row.peak_mib), *read,
    )  # fmt: skip


def _share(row: Result) -> str:
    return f"{row.share_of_limit:.0%} of {row.limited_by}" if row.share_of_limit > 0 else ""


def _number(value: float) -> str:
    return "" if value != value else f"{value:.1f}"


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


if __name__ == "__main__":
    print("\n".join(overview(load(Path(sys.argv[1])))))
