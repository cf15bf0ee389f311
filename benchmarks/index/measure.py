"""Measures every contender on one memory, in one process.

One after the other they are built, saved, dropped, opened again and searched; all stay open. Then the searches are
timed in pairs: before each call of another contender, ours is called and timed too, so that noise of the machine meets
both. FAISS's approximate indexes are set to the fastest setting that finds the nearest row of 99 % of some queries;
times and recall are of others.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks.accuracy.results import Store, hardware
from benchmarks.index.contenders import Contender, contenders, seconds
from benchmarks.index.memories import Memory, distances, nearest
from benchmarks.resident import forget_peak, peak_bytes, settled_bytes

RECALL = 0.99
BATCHES = (1, 64, 1024)
_CHECKED, _CHECKED_OF_HUGE = 1024, 64  # queries that recall is of, and as many others that settings are tuned on
_POOL_SLEEPS = 0.02  # seconds until idle threads of torch's pool leave the cores to FAISS's, and the other way round
_POOL_WAKES = 0.05  # seconds of calls before the one that counts; where one takes longer, it counts itself
KEY = ("memory", "order")


@dataclass(frozen=True)
class Row:
    """One contender on one memory. Times of searches are medians, in milliseconds a call."""

    memory: str
    order: int
    index: str
    rows: int
    dim: int
    build_s: float | None = None
    build_peak_mib: float | None = None
    disk_mib: float | None = None
    open_s: float | None = None
    first_s: float | None = None
    ram_mib: float | None = None
    recall: float | None = None
    checked: int = 0
    ms_1: float | None = None
    ms_64: float | None = None
    ms_1024: float | None = None
    ratio_1: float | None = None
    ratio_64: float | None = None
    ratio_1024: float | None = None
    threads: int = 0
    hardware: str = ""

    @property
    def is_ours(self) -> bool:
        return self.index.startswith("ExactIndex")

    @property
    def is_exact(self) -> bool:
        """Whether it looks at every row."""
        return self.is_ours or self.index == "faiss Flat"


def measure(memory: Memory, store: Store[Row], scratch: Path | None, timed_for: float, most_hnsw_rows: int) -> None:
    """Replace the rows of a memory; best in a process of its own, whose RAM nothing else is in."""
    with tempfile.TemporaryDirectory(dir=scratch, prefix="memad_fast_index_") as folder:
        rows = Measurement(memory, Path(folder), timed_for).all(contenders(memory, most_hnsw_rows))
    store.remove(lambda row: row.memory == memory.name)
    for row in rows:
        store.put(row)


class Measurement:
    """One memory, and what was measured on it so far."""

    def __init__(self, memory: Memory, scratch: Path, timed_for: float) -> None:
        self.memory, self.scratch, self.timed_for = memory, scratch, timed_for
        self.rows = memory.rows_in(scratch)
        self.checked = _CHECKED if self.rows.path else _CHECKED_OF_HUGE
        self.query = memory.queries(self.checked + max(BATCHES))
        self.truth = nearest(self.query[: 2 * self.checked], self.rows)
        self._warm_up()

    def all(self, makers: list[Callable[[], Contender]]) -> list[Row]:
        """A row of each contender; the first is the one that the others are timed beside."""
        measured = []
        for order, make in enumerate(makers):
            contender = make()
            row = self._build_and_open(contender, order)
            _say(f"{self.memory.name}: {contender.name}: built in {row.build_s:.0f} s, recall {row.recall:.4f}")
            measured.append((contender, row))
        ours = measured[0][0]
        rows = []
        for contender, row in measured:
            times, ratios = zip(*(self._timed(ours, contender, batch) for batch in BATCHES), strict=True)
            named = dict(
                zip(("ms_1", "ms_64", "ms_1024", "ratio_1", "ratio_64", "ratio_1024"), times + ratios, strict=True)
            )
            rows.append(replace(row, **named))
            _say(f"{self.memory.name}: {contender.name}: {', '.join(f'{each:.3g}' for each in times)} ms")
        return rows

    def _build_and_open(self, contender: Contender, order: int) -> Row:
        place = self.scratch / f"index{order}"
        before = settled_bytes()
        forget_peak()
        build = contender.build(self.rows, place)
        build_peak = peak_bytes() - before
        before = settled_bytes()
        opening = seconds(lambda: contender.open(place))
        first = seconds(lambda: contender.search(self.query[:1]))
        if self.checked < max(BATCHES):  # else what is checked touches as much
            contender.search(self.query[-max(BATCHES) :])
        tuned_on, checked = slice(self.checked), slice(self.checked, 2 * self.checked)
        for setting in contender.settings():
            contender.set(setting)
            if self._recall(contender, tuned_on) >= RECALL:
                break
        recall = self._recall(contender, checked)
        if contender.is_ours and recall < 1.0:
            raise AssertionError(f"{contender.name} missed the nearest row of {1 - recall:.2%} of the queries")
        return Row(
            self.memory.name, order, contender.name, self.memory.rows, self.memory.dim, build_s=build,
            build_peak_mib=build_peak / 2**20, disk_mib=_size(place) / 2**20, open_s=opening, first_s=first,
            ram_mib=(settled_bytes() - before) / 2**20, recall=recall, checked=self.checked,
            threads=torch.get_num_threads(), hardware=hardware(),
        )  # fmt: skip

    def _recall(self, contender: Contender, which: slice) -> float:
        query, truth = self.query[which], self.truth[which]
        found = contender.search(query)
        if bool((found < 0).any()):  # an IVF cell may be empty
            found = found.clamp(min=0)
        return float((distances(query, self.rows, found) <= truth * (1 + 1e-12)).double().mean())  # orders of summation

    def _timed(self, ours: Contender, other: Contender, batch: int) -> tuple[float, float]:
        """Milliseconds of a call, and its time over that of ours."""
        query = self.query[self.checked :][:batch]
        mine, its = [], []
        until = time.perf_counter() + self.timed_for
        while not its or (time.perf_counter() < until and len(its) < 99):
            mine.append(_awake(lambda: ours.search(query)))
            its.append(_awake(lambda: other.search(query)))
        ratios = [theirs / own for theirs, own in zip(its, mine, strict=True)]
        return 1e3 * statistics.median(its), statistics.median(ratios)

    def _warm_up(self) -> None:
        """Thread pools and buffers of the libraries are nobody's memory."""
        import faiss

        index = faiss.IndexFlatL2(self.memory.dim)
        index.add(self.query.numpy())
        index.search(self.query.numpy(), 1)
        torch.cdist(self.query, self.query)


def _awake(call: Callable[[], object]) -> float:
    """Seconds of a call of a thread pool that is awake and spread over the cores, which takes the system some calls."""
    time.sleep(_POOL_SLEEPS)
    until = time.perf_counter() + _POOL_WAKES
    while True:
        spent = seconds(call)
        if time.perf_counter() > until:
            return spent


def _say(line: str) -> None:
    print(line, flush=True)


def _size(place: Path) -> int:
    return sum(file.stat().st_size for file in ([place] if place.is_file() else place.iterdir()))
