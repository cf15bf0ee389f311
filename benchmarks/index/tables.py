"""The rows as tables, verdicts and a plot: a pure function of the rows."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.accuracy.results import Store
from benchmarks.index.measure import KEY, Row
from benchmarks.report import table

FASTER, LESS_RAM, OPENED_WITHIN = 5.0, 0.3, 1.0
_COLUMNS = (
    "memory", "index", "batch 1, ms", "64, ms", "1,024, ms", "ours is", "recall", "RAM, MB", "of float32", "disk, MB",
    "build, s", "open, s",
)  # fmt: skip

_HEAD = """\
One nearest row of each query. "ours is": how many times faster ExactIndex is at batches of 1, 64 and 1,024, the median
of calls taken in pairs. Recall: the share of 1,024 queries (64 in a memory above 20 M rows) whose nearest row, by
float64 differences, was found; approximate indexes are at the fastest setting (a power of two) that found it for 99 %
of as many other queries. RAM: growth of the resident set by opening and searching; of float32: over what the rows take.
ExactIndex leaves its rows on disk: pages that a search touched count. Its first search checks all parts.
"""


def page(rows: Sequence[Row]) -> list[str]:
    """The lines of a page."""
    rows = _sorted(rows)
    machines = sorted({f"{row.hardware}; {row.threads} threads" for row in rows})
    beside = [(row.memory, row.index, _number(row.first_s), _number(_mb(row.build_peak_mib))) for row in rows]
    return [
        *(
            "# Large memories beside FAISS",
            "",
            f"`make bench-index`, on {'; '.join(machines)}.",
            "",
            *_HEAD.splitlines(),
            "",
        ),
        *(*overview(rows), "", "![Cost as the memory grows](index.png)", ""),
        *("## First search, and the peak while building", ""),
        *table(("memory", "index", "first search, s", "peak RAM while building, MB"), beside),
        *("", "## Targets", "", *_targets(rows)),
    ]


def overview(rows: Sequence[Row]) -> list[str]:
    """The table of the page."""
    rows = _sorted(rows)
    return table(_COLUMNS, [_cells(row, rows) for row in rows])


def refreshed(text: str, root: Path) -> str:
    """``text`` with the table of each results file that a marker in it names: see the README."""

    def section(found: re.Match[str]) -> str:
        return "\n".join(
            [found["start"], "", *overview(Store(root / found["data"], Row, KEY).load()), "", found["end"]]
        )

    return re.sub(r"(?P<start><!-- index of (?P<data>\S+) -->).*?(?P<end><!-- end -->)", section, text, flags=re.DOTALL)


def save_plot(rows: Sequence[Row], path: Path) -> None:
    """Time of a query and RAM over the number of rows, of the memories that differ in nothing else."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    dims = {row.dim for row in rows}
    grown = max(
        dims, key=lambda dim: len({row.rows for row in rows if row.dim == dim and row.memory.endswith(f"x {dim}")})
    )
    figure, (times, memory) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    kinds: dict[str, list[Row]] = {}
    for row in rows:
        if row.dim == grown and row.memory.endswith(f"x {grown}"):
            kinds.setdefault(_kind(row), []).append(row)
    for kind, found in kinds.items():
        found = sorted(found, key=lambda row: row.rows)
        marker = {"marker": "o", "linewidth": 2.5 if found[0].is_ours else 1.2, "label": kind}
        times.plot([row.rows for row in found], [(row.ms_64 or 0) / 64 for row in found], **marker)
        memory.plot([row.rows for row in found], [_mb(row.ram_mib) for row in found], **marker)
    for axes, title in ((times, "ms a query, in batches of 64"), (memory, "RAM, MB")):
        axes.set(xscale="log", yscale="log", xlabel=f"rows of {grown} numbers", title=title)
        axes.grid(alpha=0.3)
    times.legend(fontsize="small")
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def _sorted(rows: Sequence[Row]) -> list[Row]:
    """By the size of their memories, those of other numbers last."""
    return sorted(rows, key=lambda row: (row.memory.endswith("gaussian"), row.dim, row.rows, row.order))


def _cells(row: Row, rows: Sequence[Row]) -> tuple[str, ...]:
    ratios = (row.ratio_1, row.ratio_64, row.ratio_1024)
    is_first = row.order == 0
    return (
        row.memory, row.index, *(_number(each) for each in (row.ms_1, row.ms_64, row.ms_1024)),
        "" if is_first else " / ".join(f"{each:.2g}x" for each in ratios if each is not None),
        "exact" if row.is_exact and row.recall == 1.0 else "" if row.recall is None else f"{row.recall:.4f}",
        _number(_mb(row.ram_mib)), "" if row.ram_mib is None else f"{_share(row):.2f}", _number(_mb(row.disk_mib)),
        _number(row.build_s), _number(row.open_s),
    )  # fmt: skip


def _targets(rows: Sequence[Row]) -> list[str]:
    """Of every memory that holds a million rows or more."""
    lines = []
    for memory in dict.fromkeys(row.memory for row in rows if row.rows >= 10**6):
        mine = [row for row in rows if row.memory == memory and row.is_ours]
        flat = next((row for row in rows if row.memory == memory and row.index == "faiss Flat"), None)
        if flat is None or not mine:
            continue
        for row in mine:
            for batch in (64, 1024):
                of_ours, of_flat = getattr(row, f"ratio_{batch}"), getattr(flat, f"ratio_{batch}")
                speed = of_flat / (1.0 if row.order == 0 else of_ours)
                lines.append(
                    _verdict(
                        f"{memory}, batch {batch:,}: {row.index} is {speed:.1f}x faiss Flat",
                        speed >= FASTER,
                        f"{FASTER:g}x",
                    )
                )
            share = _share(row) / _share(flat)
            lines.append(
                _verdict(
                    f"{memory}: {row.index} takes {share:.2f} of the RAM of faiss Flat",
                    share <= LESS_RAM,
                    f"{LESS_RAM:g}",
                )
            )
            opened = row.open_s or 0.0
            lines.append(
                _verdict(
                    f"{memory}: {row.index} is open in {opened:.2f} s", opened < OPENED_WITHIN, f"{OPENED_WITHIN:g} s"
                )
            )
            lines.append(
                _verdict(f"{memory}: {row.index} found the nearest row of {row.recall:.2%}", row.recall == 1.0, "all")
            )
    return lines


def _verdict(text: str, is_met: bool, target: str) -> str:
    return f"- {text}; target {target} {'met' if is_met else '**missed**'}"


def _kind(row: Row) -> str:
    if row.is_ours:
        return row.index
    return re.sub(r"IVF\d+", "IVF", row.index.split(", ")[0]) + ("" if row.is_exact else " at recall 0.99")


def _mb(mebibytes: float | None) -> float | None:
    return None if mebibytes is None else mebibytes * 2**20 / 1e6


def _share(row: Row) -> float:
    return (row.ram_mib or 0.0) * 2**20 / (4 * row.rows * row.dim)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]):
        path.write_text(refreshed(path.read_text(), path.parent))
