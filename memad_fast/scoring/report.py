"""One self-contained HTML page that says what a stream of images scored: worst first, readable at a glance.

The page has no scripts and asks for nothing: images are inside as base64, the histogram is SVG. While images are
scored only what the page needs is kept: every score (8 bytes an image) and the pictures of the worst few.
"""

from __future__ import annotations

import base64
import datetime
import heapq
import io
import math
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from memad_fast.scoring import heatmap

if TYPE_CHECKING:
    from memad_fast.scoring.stream import Result

Pixels = NDArray[np.uint8]

# The longer side of a picture in the page, in pixels.
_THUMBNAIL = 192
# Unreadable files are listed up to here; all of them are in the CSV.
_LISTED_FAILURES = 200
# A score beyond this many thresholds fills its bar, so that one extreme image does not flatten all others.
_BAR_END = 4.0
_BINS = 48


@dataclass(frozen=True)
class Facts:
    """What the head of the page says of the run and of the scoring."""

    model: str
    run: str
    threshold_note: str
    images_per_second: float
    version: str


@dataclass(order=True)
class _Row:
    """An image among the worst, ordered so that a heap drops the lowest score first, and of equal ones the later."""

    score: float
    minus_position: int
    path: str = field(compare=False)
    size: tuple[int, int] = field(compare=False)
    milliseconds: float = field(compare=False)
    image: Pixels = field(compare=False)
    places: Pixels = field(compare=False)
    reconstruction: Pixels = field(compare=False)


class Report:
    """Collects results one at a time and writes the page.

    Args:
        threshold: a score above it is an anomaly.
        map_level: the value of the anomaly map that good parts reach; the colours of all rows hang on it.
        worst: how many images the page shows.
    """

    def __init__(self, threshold: float, map_level: float, worst: int = 200) -> None:
        self.threshold = threshold
        self.map_level = map_level
        self.worst = worst
        self._scores = array("d")
        self._rows: list[_Row] = []
        self._failures: list[tuple[str, str]] = []
        self._failure_count = 0

    def add(self, result: Result) -> None:
        """Take note of one result, in the order of scoring."""
        if result.error:
            self._failure_count += 1
            if len(self._failures) < _LISTED_FAILURES:
                self._failures.append((result.path, result.error))
            return
        position = len(self._scores)
        self._scores.append(result.score)
        if len(self._rows) < self.worst:
            heapq.heappush(self._rows, self._row(result, position))
        elif self._rows and result.score > self._rows[0].score:
            heapq.heapreplace(self._rows, self._row(result, position))

    def _row(self, result: Result, position: int) -> _Row:
        assert result.image is not None
        assert result.anomaly_map is not None
        assert result.reconstruction is not None
        width, height = result.size
        shrink = _THUMBNAIL / max(width, height)
        size = max(1, round(width * shrink)), max(1, round(height * shrink))
        return _Row(
            result.score,
            -position,
            result.path,
            result.size,
            result.milliseconds,
            _picture(result.image, size),
            heatmap.levels(result.anomaly_map, self.map_level, size),
            _picture(result.reconstruction, size),
        )

    def write(self, path: Path, facts: Facts) -> None:
        """Write the page."""
        path.write_text(self.html(facts), encoding="utf-8", errors="replace")

    def html(self, facts: Facts) -> str:
        """The page as text."""
        rows = sorted(self._rows, reverse=True)
        scores = np.frombuffer(self._scores, dtype=np.float64)
        anomalies = int((scores > self.threshold).sum())
        parts = [
            _head(facts),
            _headline(len(scores), anomalies, self._failure_count, facts),
            _histogram(scores, self.threshold),
            _explanation(facts, self.threshold),
            _table(rows, len(scores), self.threshold),
            _failure_list(self._failures, self._failure_count),
            f"<footer>memad_fast {escape(facts.version)} · {_text(facts.run)} · "
            f"{datetime.datetime.now():%Y-%m-%d %H:%M}</footer></main></body></html>\n",
        ]
        return "\n".join(parts)


def _picture(image: NDArray[np.float32], size: tuple[int, int]) -> Pixels:
    """A model's image ``[C, H, W]`` in [0, 1] as RGB pixels of ``size`` (width, height)."""
    pixels = (np.clip(np.nan_to_num(image), 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8).transpose(1, 2, 0)
    if pixels.shape[2] == 1:
        pixels = np.repeat(pixels, 3, axis=2)
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))


def _source(pixels: Pixels) -> str:
    """Pixels as the ``src`` of an image element."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _text(value: str) -> str:
    """Text of unknown origin, such as a file name, for the page: escaped, and kept from turning the text around it."""
    printable = value.encode("utf-8", "replace").decode("utf-8")
    return f"<bdi>{escape(''.join(c if c.isprintable() else '�' for c in printable))}</bdi>"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


_STYLE = """
:root { color-scheme:light; --ink:#1c2733; --soft:#5d6b7a; --line:#dfe5ec;
  --bad:#c1121f; --good:#2f7d4f; --fill:#7c93ab; }
* { box-sizing: border-box; }
body { margin:0; background:#f4f6f9; color:var(--ink);
  font:15px/1.45 system-ui, "Segoe UI", Roboto, Arial, sans-serif; }
main { max-width:1120px; margin:0 auto; padding:28px 20px 40px; }
h1 { font-size:26px; margin:0 0 2px; } h2 { font-size:18px; margin:0 0 10px; }
.soft { color:var(--soft); } .small { font-size:13px; }
.tiles { display:grid; grid-template-columns:repeat(4, 1fr); gap:12px; margin:18px 0; }
.tile, section { background:#fff; border:1px solid var(--line); border-radius:8px; }
.tile { padding:12px 16px; } .tile b { display:block; font-size:28px; line-height:1.2; }
.tile.bad b { color:var(--bad); } .tile.good b { color:var(--good); }
section { padding:16px 18px; margin:0 0 16px; }
svg { display:block; width:100%; height:auto; } svg text { font:12px system-ui, Arial, sans-serif; fill:var(--soft); }
.key { display:grid; grid-template-columns:1fr 1fr; gap:26px; }
.scale { position:relative; height:14px; border-radius:3px; margin:10px 0 4px; }
.scale u { position:absolute; top:-3px; bottom:-3px; width:2px; background:var(--ink); }
.ticks { position:relative; height:18px; font-size:12px; color:var(--soft); }
.ticks span { position:absolute; transform:translateX(-50%); white-space:nowrap; }
.ticks span:first-child { transform:none; } .ticks span:last-child { transform:translateX(-100%); }
table { width:100%; border-collapse:collapse; }
th { text-align:left; font-weight:600; font-size:13px; color:var(--soft); padding:0 10px 8px 0; }
td { padding:10px 10px 10px 0; border-top:1px solid var(--line); vertical-align:middle; }
td.rank { color:var(--soft); width:44px; } td.picture { width:182px; }
td.picture img { display:block; width:170px; height:170px; object-fit:contain; background:#eef1f5; border-radius:4px; }
.name { font-weight:600; overflow-wrap:anywhere; } .folder { overflow-wrap:anywhere; }
.badge { display:inline-block; border-radius:4px; padding:1px 8px; font-size:13px; font-weight:600; color:#fff; }
.badge.bad { background:var(--bad); } .badge.good { background:var(--good); }
.verdict { margin:6px 0; } .verdict b { font-size:20px; margin-right:8px; }
.bar { position:relative; height:14px; background:#e8edf3; border-radius:3px; margin:8px 0 18px; }
.bar i { position:absolute; left:0; top:0; bottom:0; border-radius:3px; background:var(--fill); }
.bar i.bad { background:var(--bad); }
.bar u { position:absolute; top:-4px; bottom:-4px; width:2px; background:var(--ink); }
.failures td { padding:6px 10px 6px 0; overflow-wrap:anywhere; }
footer { color:var(--soft); font-size:13px; margin-top:20px; overflow-wrap:anywhere; }
@media (max-width:820px) { .tiles { grid-template-columns:repeat(2, 1fr); } .key { grid-template-columns:1fr; }
  td.picture { width:auto; } td.picture img { width:96px; height:96px; } }
@media print { body { background:#fff; font-size:12px; } main { max-width:none; padding:0; }
  * { -webkit-print-color-adjust:exact; print-color-adjust:exact; } tr, .tile, section.keep { break-inside:avoid; }
  thead { display:table-header-group; } td.picture { width:120px; } td.picture img { width:110px; height:110px; } }
"""


def _head(facts: Facts) -> str:
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Inspection report</title><style>{_STYLE}</style></head><body><main>"
        f'<h1>Inspection report</h1><div class="soft">model {_text(facts.model)} from {_text(facts.run)}</div>'
    )


def _headline(scored: int, anomalies: int, failures: int, facts: Facts) -> str:
    share = f"above the threshold, {anomalies / scored:.1%}" if scored else "above the threshold"
    tiles = [
        ("", f"{scored + failures:,}", "image" if scored + failures == 1 else "images"),
        ("bad" if anomalies else "good", f"{anomalies:,}", share),
        ("bad" if failures else "good", f"{failures:,}", "not scored"),
        ("", f"{facts.images_per_second:,.{0 if facts.images_per_second >= 10 else 1}f}", "images per second"),
    ]
    cells = "".join(f'<div class="tile {kind}"><b>{value}</b>{label}</div>' for kind, value, label in tiles)
    return f'<div class="tiles">{cells}</div>'


def _histogram(scores: NDArray[np.float64], threshold: float) -> str:
    """How many images have which score, as SVG, with the threshold as a line."""
    if scores.size == 0:
        return ""
    low, high = min(float(scores.min()), threshold), max(float(scores.max()), threshold)
    cut = high > _end_of_axis(high, threshold)
    high = _end_of_axis(high, threshold)
    if high <= low:
        low, high = low - 0.5, low + 0.5
    margin = 0.02 * (high - low)
    low, high = (low - margin if low < 0.0 else max(0.0, low - margin)), high + margin
    # The threshold is a bin edge, so that no bin holds images of both kinds.
    edges = _bin_edges(low, high, threshold)
    counts, _ = np.histogram(np.clip(scores, edges[0], edges[-1]), bins=edges)
    above_threshold, _ = np.histogram(np.clip(scores[scores > threshold], edges[0], edges[-1]), bins=edges)
    tallest = max(1, int(counts.max()))
    width, height, left, top, bottom = 1040, 220, 46, 24, 34
    plot_width, plot_height = width - left - 10, height - top - bottom

    def x(score: float) -> float:
        return left + (score - low) / (high - low) * plot_width

    bars = []
    for count, above, start, end in zip(counts, above_threshold, edges[:-1], edges[1:], strict=True):
        if count == 0:
            continue
        tall = max(2.0, count / tallest * plot_height)  # a single image stays visible among thousands
        colour = "#c1121f" if above else "#7c93ab"
        bars.append(
            f'<rect x="{x(start) + 0.5:.1f}" y="{top + plot_height - tall:.1f}" '
            f'width="{max(1.0, x(end) - x(start) - 1):.1f}" height="{tall:.1f}" fill="{colour}">'
            f"<title>{_plural(int(count), 'image')} from {_number(start)} to {_number(end)}</title></rect>"
        )
    base = top + plot_height
    ticks = "".join(
        f'<text x="{x(tick):.1f}" y="{base + 16}" text-anchor="middle">{_number(tick)}</text>'
        for tick in _ticks(low, high)
    )
    line = x(threshold)
    anchor = "end" if line > left + 0.75 * plot_width else "start"
    label = line - 6 if anchor == "end" else line + 6
    beyond = f" The last bar holds all scores from {_number(edges[-2])} on." if cut else ""
    return (
        f'<section class="keep"><h2>Scores of {_plural(scores.size, "image")}</h2>'
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="histogram of scores">'
        f'<line x1="{left}" x2="{width - 10}" y1="{base}" y2="{base}" stroke="#b9c4d0"/>'
        f'<text x="{left - 6}" y="{top + 10}" text-anchor="end">{tallest:,}</text>'
        f'<text x="{left - 6}" y="{base}" text-anchor="end">0</text>{"".join(bars)}{ticks}'
        f'<line x1="{line:.1f}" x2="{line:.1f}" y1="{top - 16}" y2="{base}" stroke="#1c2733" stroke-width="2" '
        f'stroke-dasharray="5 3"/><text x="{label:.1f}" y="{top - 7}" text-anchor="{anchor}" '
        f'style="fill:#1c2733;font-weight:600">threshold {_number(threshold)}</text></svg>'
        '<div class="soft small">Across: the score. Up: how many images. Red: above the threshold.'
        f"{beyond}</div></section>"
    )


def _bin_edges(low: float, high: float, threshold: float) -> NDArray[np.float64]:
    below = min(_BINS - 1, max(1, round(_BINS * (threshold - low) / (high - low))))
    if not low < threshold < high:
        return np.linspace(low, high, _BINS + 1)
    return np.concatenate([np.linspace(low, threshold, below + 1), np.linspace(threshold, high, _BINS - below + 1)[1:]])


def _end_of_axis(highest: float, threshold: float) -> float:
    """Where score axes end: at the highest score, but at most ``_BAR_END`` thresholds out."""
    return min(highest, _BAR_END * threshold) if threshold > 0.0 else highest


def _ticks(low: float, high: float) -> list[float]:
    """About eight round numbers from ``low`` to ``high``."""
    rough = (high - low) / 8
    unit = 10.0 ** math.floor(math.log10(rough))
    step = unit * min((f for f in (1, 2, 5, 10) if f * unit >= rough), default=10)
    first = math.ceil(low / step)
    return [index * step for index in range(first, math.floor(high / step) + 1)]


def _explanation(facts: Facts, threshold: float) -> str:
    stops = ", ".join(
        f"rgb({r},{g},{b}) {100 * index / 255:.0f}%"
        for index, (r, g, b) in enumerate(heatmap.COLOURS.tolist())
        if index % 15 == 0
    )
    mark = 100 * heatmap.NORMAL_MARK
    return (
        '<section class="keep key"><div><h2>How to read the heat maps</h2>'
        "The reconstruction is what the model, which has seen good parts only, makes of the image. The heat map shows "
        "where the two differ. All images of this page share one colour scale."
        f'<div class="scale" style="background:linear-gradient(to right, {stops})">'
        f'<u style="left:{mark:.0f}%"></u></div>'
        '<div class="ticks"><span style="left:0">no difference</span>'
        f'<span style="left:{mark:.0f}%">good parts reach this</span>'
        f'<span style="left:100%">{1 / heatmap.NORMAL_MARK:.2g} times that, and more</span></div></div>'
        f"<div><h2>Where the threshold comes from</h2>{_text(facts.threshold_note)}"
        '<div class="soft small" style="margin-top:8px">'
        f"An image is an anomaly when its score is above {_number(threshold)}.</div></div></section>"
    )


def _table(rows: list[_Row], scored: int, threshold: float) -> str:
    if not rows:
        return ""
    more = scored - len(rows)
    note = f" The worst {len(rows):,} are shown; {more:,} more are in scores.csv." if more else ""
    scale = _bar_scale(rows, threshold)
    body = "".join(_table_row(rank, row, threshold, scale) for rank, row in enumerate(rows, start=1))
    return (
        f'<section><h2>Images, worst first</h2><div class="soft small" style="margin-bottom:12px">'
        f"The line across each bar is the threshold.{note}</div><table><thead><tr><th></th><th>image</th>"
        f"<th>heat map</th><th>reconstruction</th><th>score</th></tr></thead><tbody>{body}</tbody></table></section>"
    )


def _bar_scale(rows: list[_Row], threshold: float) -> Callable[[float], float]:
    """Maps a score to its place in percent on the rows' common axis, which starts at 0 unless a score is negative."""
    low = min(0.0, threshold, rows[-1].score)
    high = max(_end_of_axis(rows[0].score, threshold), threshold)
    high = low + 1.0 if high <= low else high + 0.08 * (high - low)
    return lambda score: 100.0 * min(1.0, (score - low) / (high - low))


def _table_row(rank: int, row: _Row, threshold: float, scale: Callable[[float], float]) -> str:
    kind, verdict = ("bad", "anomaly") if row.score > threshold else ("good", "good")
    ratio = f"{row.score / threshold:.2f} × threshold · " if threshold > 0.0 else ""
    name, folder = Path(row.path).name, str(Path(row.path).parent)
    place, line = scale(row.score), scale(threshold)
    pictures = (
        ("image", row.image),
        ("heat map over the image", heatmap.overlay(row.image, row.places)),
        ("reconstruction", row.reconstruction),
    )
    cells = "".join(f'<td class="picture"><img alt="{alt}" src="{_source(p)}"></td>' for alt, p in pictures)
    return (
        f'<tr><td class="rank">{rank}</td>{cells}<td><div class="name">{_text(name)}</div>'
        f'<div class="folder soft small">{_text(folder)}</div>'
        f'<div class="verdict"><b>{_number(row.score)}</b><span class="badge {kind}">{verdict}</span></div>'
        f'<div class="bar"><i class="{kind}" style="width:{place:.1f}%"></i><u style="left:{line:.1f}%"></u></div>'
        f'<div class="soft small">{ratio}{row.size[0]} × {row.size[1]} pixels · {row.milliseconds:.1f} ms</div>'
        "</td></tr>"
    )


def _failure_list(failures: list[tuple[str, str]], count: int) -> str:
    if not count:
        return ""
    rows = "".join(f"<tr><td>{_text(path)}</td><td>{_text(error)}</td></tr>" for path, error in failures)
    more = count - len(failures)
    note = f'<div class="soft small">{more:,} more are in scores.csv.</div>' if more else ""
    return (
        f'<section><h2>{_plural(count, "image")} not scored</h2><table class="failures"><thead><tr><th>file</th>'
        f"<th>reason</th></tr></thead><tbody>{rows}</tbody></table>{note}</section>"
    )
