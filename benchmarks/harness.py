"""The benchmark harness: every op beside its peers, its exactness and the machine's limit, in one run.

A benchmark file (``bench_<op>.py``) is a list of cases and one function::

    CASES = [
        Case(
            "20x128x128 forward",                     # the shape, as the tables show it
            inputs=lambda: (torch.rand(20, 128, 128),),
            providers=[ours(memad_fast.histogram_correction), eager("sort", sort_form), compiled("sort", sort_form)],
            expected=float64(reference),
            tolerance=1e-6,                           # ours is refused above it
            bytes=2 * 20 * 128 * 128 * 4,             # what the formula itself must read and write
            target=10.0,                              # times the best peer
        ),
    ]

    @each_provider(CASES)
    def bench_histogram_correction(measure, case, provider):
        measure(case, provider)

Providers of one case run one right after the other, on the same tensors, with the same threads
(``OMP_NUM_THREADS=1 pytest benchmarks/`` sets them for all). Each is warmed, timed by pytest-benchmark, and its result
is compared with float64; a wrong result of ours fails the run. ``conftest.py`` holds the options and the summary.

What the columns mean:

- median, spread: of one call, and the distance between its quartiles.
- ours is: how many times faster ours is: the median of this provider's time over ours, taken in pairs. Before each
  timed call of a peer, ours is called and timed too, so that noise of the machine meets both. Only such ratios count.
- share of limit: the least time the machine could need (the larger of bytes / copy bandwidth and flops / float32
  rate, both measured in this session) over the median. Data that fits the caches can exceed 100 % of the copy limit.
- error: largest absolute difference from float64, over the largest magnitude of that output.
- peak memory: growth of the process's resident set during one call, outputs included.
"""

from __future__ import annotations

import contextlib
import csv
import ctypes
import gc
import importlib.util
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from memad_fast import native

Function = Callable[..., Any]


@dataclass(frozen=True)
class Provider:
    """One way to compute a case: ``prepare(*inputs)`` runs once, untimed, and returns the call that is timed."""

    name: str
    prepare: Callable[..., Callable[[], Any]]
    requires: str = ""  # the module of a peer library; the provider is skipped where it is not installed
    precision: str = "float32"  # in which products are accumulated, where that is not the precision of the others
    is_ours: bool = False


@dataclass(frozen=True)
class Case:
    """One shape of an op, in one mode."""

    name: str
    inputs: Callable[[], tuple[Any, ...]]
    providers: Sequence[Provider]
    expected: Callable[..., Any]  # the float64 result, from the same inputs
    tolerance: float  # the largest error that ours may have
    flops: float = 0.0
    bytes: float = 0.0
    target: float | None = None  # how many times faster than the best peer ours is meant to be
    error: Callable[[Any, Any], float] | None = None  # (got, expected) -> error, where the default does not fit


def _direct(function: Function) -> Callable[..., Callable[[], Any]]:
    return lambda *inputs: lambda: function(*inputs)


def ours(function: Function, name: str = "ours") -> Provider:
    """This library's op."""
    return Provider(name, _direct(function), is_ours=True)


def eager(name: str, function: Function, requires: str = "") -> Provider:
    """A peer called as it is."""
    return Provider(name, _direct(function), requires)


def compiled(name: str, function: Function) -> Provider:
    """torch.compile of a peer, with static shapes, compiled anew for each case."""

    def prepare(*inputs: Any) -> Callable[[], Any]:
        torch._dynamo.reset()
        return _direct(torch.compile(function, dynamic=False))(*inputs)

    return Provider(f"torch.compile({name})", prepare)


def with_gradient(provider: Provider) -> Provider:
    """The provider's forward and backward: its call returns (outputs..., gradients of the float inputs...)."""

    def prepare(*inputs: Any) -> Callable[[], tuple[Tensor, ...]]:
        leaves = [x.detach().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs]
        wanted = [x for x in leaves if isinstance(x, Tensor) and x.requires_grad]
        forward = provider.prepare(*leaves)
        grad_outputs: list[Tensor] = []

        def call() -> tuple[Tensor, ...]:
            outputs = as_tuple(forward())
            differentiable = [out for out in outputs if out.requires_grad]
            if not grad_outputs:
                generator = torch.Generator().manual_seed(1)
                grad_outputs.extend(torch.randn(out.shape, generator=generator).to(out) for out in differentiable)
            gradients = torch.autograd.grad(differentiable, wanted, grad_outputs)
            return (*(out.detach() for out in outputs), *gradients)

        return call

    return replace(provider, prepare=prepare)


def float64(reference: Function) -> Function:
    """What a forward case expects: the reference on float64 inputs."""
    return lambda *inputs: reference(*(_widened(x) for x in inputs))


def float64_with_gradient(reference: Function) -> Function:
    """What a forward and backward case expects: outputs and gradients of the reference on float64 inputs."""
    provider = with_gradient(eager("float64", reference))
    return lambda *inputs: provider.prepare(*(_widened(x) for x in inputs))()


def _widened(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def each_provider(cases: Iterable[Case]) -> pytest.MarkDecorator:
    """Parametrises a benchmark with (case, provider); providers vary fastest, so that peers meet the same noise."""
    pairs = [pytest.param(case, who, id=f"{case.name}-{who.name}") for case in cases for who in case.providers]
    return pytest.mark.parametrize(("case", "provider"), pairs)


def as_tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, tuple | list) else (value,)


def largest_error(got: Any, expected: Any) -> float:
    """Largest absolute difference over the largest magnitude of that output; the worst of all outputs."""
    worst = 0.0
    for value, exact in zip(as_tuple(got), as_tuple(expected), strict=True):
        if exact.numel():
            difference = (torch.as_tensor(value).double() - exact.double()).abs().max()
            worst = max(worst, float(difference / exact.double().abs().max().clamp(min=1e-300)))
    return worst


# --- the machine --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """What this session runs on and what it can do at most, as measured here."""

    name: str
    threads: int
    copy_bandwidth: float  # bytes per second, read and written, of a 256 MiB torch copy_
    float32_rate: float  # flops per second of a 2048 x 2048 torch.mm: a proxy, somewhat below the peak of the FMA units

    @classmethod
    def measure(cls) -> Machine:
        source = torch.ones(64 << 20)
        target = torch.empty_like(source)
        copy = _best_of(lambda: target.copy_(source), 5)
        square = torch.ones(2048, 2048)
        product = _best_of(lambda: torch.mm(square, square), 5)
        return cls(_processor(), torch.get_num_threads(), 2 * source.nbytes / copy, 2 * 2048**3 / product)

    def least_seconds(self, case: Case) -> tuple[float, str]:
        """The least time for the case's bytes and flops, and which of the two sets it."""
        moving, computing = case.bytes / self.copy_bandwidth, case.flops / self.float32_rate
        return (moving, "copy") if moving >= computing else (computing, "float32")

    def describe(self) -> str:
        return (
            f"{self.name}, {self.threads} threads, torch {torch.__version__}; copy {self.copy_bandwidth / 1e9:.1f} GB/s"
            f" (256 MiB torch copy_, read + written), float32 {self.float32_rate / 1e9:.0f} GFLOP/s (torch.mm 2048)"
        )


def _best_of(call: Callable[[], Any], rounds: int, warm: bool = True) -> float:
    if warm:
        call()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def _processor() -> str:
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        model = found.group(1) if found else model
    model = re.sub(r"\((R|TM)\)", "", model)
    return f"{model.strip()}, {os.cpu_count()} cores"


# --- peak memory --------------------------------------------------------------------------------------------------


def peak_extra_bytes(call: Callable[[], Any]) -> int | None:
    """Growth of the peak resident set during ``call``, to about 0.5 MiB; None where Linux's /proc cannot tell.

    Free pages that the allocator holds are handed back first: memory re-used from an earlier call would not show.
    """
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # peak := present
        before = _resident("VmRSS")
        result = call()
        peak = _resident("VmHWM")
    except (OSError, AttributeError):
        return None
    del result
    return max(0, peak - before)


def _resident(field_name: str) -> int:
    found = re.search(rf"{field_name}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    if found is None:
        raise OSError(f"/proc/self/status has no {field_name}")
    return int(found.group(1)) * 1024


# --- measuring ----------------------------------------------------------------------------------------------------

# A peer library brings a thread pool of its own, and the idle threads of torch's pool spin for some milliseconds
# before they sleep. Waiting them out keeps the two from fighting for the cores.
_POOL_SLEEPS = 0.02


@dataclass
class Result:
    """One row of the tables and of the CSV file."""

    op: str
    case: str
    provider: str
    is_ours: bool
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
    share_of_limit: float = float("nan")
    limited_by: str = ""
    peak_mib: float = float("nan")
    target: float | None = None
    skipped: str = ""


@dataclass
class Session:
    """What one pytest run measures: how long, on which machine, and what was found."""

    seconds: float  # spent on timing one provider, about
    slowest: float  # a peer whose one call takes longer is reported, not timed
    least_rounds: int
    results: list[Result] = field(default_factory=list)
    _machine: Machine | None = None
    _case: Case | None = None
    _inputs: tuple[Any, ...] = ()
    _expected: Any = None
    _ours: Callable[[], Any] | None = None  # the case's first provider, where that is ours

    @property
    def machine(self) -> Machine:
        if self._machine is None:
            self._machine = Machine.measure()
        return self._machine

    def measure(self, benchmark: Any, op: str, case: Case, provider: Provider) -> None:
        """Check, warm and time one provider of one case, and keep the row."""
        least, limited_by = self.machine.least_seconds(case)
        if self._case is not case:
            torch.manual_seed(0)
            self._case, self._inputs = case, case.inputs()
            self._expected, self._ours = case.expected(*self._inputs), None
        row = self._row(op, case, provider)
        row.limited_by = limited_by
        self.results.append(row)
        if provider.requires and importlib.util.find_spec(provider.requires) is None:
            self._skip(row, f"{provider.requires} is not installed")

        call = provider.prepare(*self._inputs)
        got = call()
        row.error = (case.error or largest_error)(got, self._expected)
        del got
        if provider.is_ours:
            assert row.error <= case.tolerance, (
                f"{case.name}: error {row.error:.2e}, at most {case.tolerance:.2e} allowed"
            )

        once = _best_of(call, 1, warm=False)
        if once > self.slowest and not provider.is_ours:
            self._skip(row, f"one call takes {once:.1f} s")
        peak = peak_extra_bytes(call)
        row.peak_mib = float("nan") if peak is None else peak / 2**20
        if provider.is_ours and self._ours is None:
            self._ours = call
        beside: list[float] = []

        def time_ours() -> None:
            if self._ours is not None and self._ours is not call:
                beside.append(_best_of(self._ours, 1, warm=False))
            if provider.requires:
                time.sleep(_POOL_SLEEPS)

        rounds = min(300, max(self.least_rounds, int(self.seconds / once)))
        benchmark.pedantic(call, setup=time_ours, rounds=rounds)
        if benchmark.disabled:  # --benchmark-disable checks the results only
            return
        times = benchmark.stats.stats.data
        pairs = zip(times, beside[-rounds:], strict=True) if beside else ()
        row.ratio = statistics.median([theirs / mine for theirs, mine in pairs] or [1.0])
        times = sorted(times)
        row.rounds, row.median_ms = rounds, statistics.median(times) * 1e3
        row.spread_ms = (times[3 * len(times) // 4] - times[len(times) // 4]) * 1e3
        row.share_of_limit = least * 1e3 / row.median_ms
        benchmark.group = f"{op} {case.name}"
        benchmark.extra_info.update(asdict(row), flops=case.flops, bytes=case.bytes)

    def _row(self, op: str, case: Case, provider: Provider) -> Result:
        floats = [x.dtype for x in self._inputs if isinstance(x, Tensor) and x.is_floating_point()]
        dtype = str(floats[0]).removeprefix("torch.") if floats else ""
        backend = "cpu" if provider.is_ours else provider.requires or "torch"
        isa = native.isa() if provider.is_ours else torch.backends.cpu.get_cpu_capability().lower()
        return Result(
            op, case.name, provider.name, provider.is_ours, backend, isa, dtype, provider.precision,
            self.machine.threads, target=case.target if provider.is_ours else None,
        )  # fmt: skip

    def _skip(self, row: Result, reason: str) -> None:
        row.skipped = reason
        pytest.skip(reason)


# --- tables -------------------------------------------------------------------------------------------------------

_COLUMNS = ("provider", "precision", "median ms", "spread", "ours is", "share of limit", "error", "peak MiB")


def report(results: Sequence[Result]) -> list[str]:
    """The lines of the summary: a markdown table and a verdict for each case, then the rows that miss their target."""
    lines: list[str] = []
    missed: list[str] = []
    for op, case in dict.fromkeys((row.op, row.case) for row in results):
        rows = [row for row in results if (row.op, row.case) == (op, case)]
        lines += ["", f"### {op}: {case}", "", *_table([_cells(row) for row in rows]), ""]
        peers = [row for row in rows if row.rounds and not row.is_ours]
        best = min(peers, key=lambda row: row.ratio, default=None)
        for row in (row for row in rows if row.rounds and row.is_ours and best is not None):
            assert best is not None
            speed = best.ratio / row.ratio
            verdict = f"{row.provider} ({row.isa}): {speed:.1f}x as fast as the best peer, {best.provider}"
            if best.precision != row.precision:
                verdict += f", which computes in {best.precision}"
            if row.target is not None:
                verdict += f"; target {row.target:g}x {'met' if speed >= row.target else 'missed'}"
                if speed < row.target:
                    missed.append(f"- {op}, {case}: {row.provider} {speed:.1f}x of {row.target:g}x")
            lines.append(verdict)
    heading = "### Rows that miss their target" if missed else "### No row misses its target"
    return [*lines, "", heading, "", *missed]


def _cells(row: Result) -> tuple[str, ...]:
    if row.skipped:
        return (row.provider, row.precision, f"skipped: {row.skipped}", *[""] * (len(_COLUMNS) - 3))
    ratio = "" if row.is_ours else f"{row.ratio:.2f}x as fast"
    share = f"{row.share_of_limit:.0%} of {row.limited_by}" if row.share_of_limit > 0 else ""
    peak = "" if row.peak_mib != row.peak_mib else f"{row.peak_mib:.1f}"
    return (
        row.provider, row.precision, f"{row.median_ms:.3f}", f"{row.spread_ms:.3f}", ratio, share, f"{row.error:.1e}",
        peak,
    )  # fmt: skip


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in [_COLUMNS, *rows]) for i in range(len(_COLUMNS))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
             for row in [_COLUMNS, *rows]]  # fmt: skip
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]


def save(session: Session, folder: Path) -> list[Path]:
    """Write ``<machine>.csv`` and ``<machine>.md`` into ``folder``. Rows of cases that did not run now are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = re.sub(r"[^a-z0-9]+", "-", session.machine.name.lower()).strip("-")
    table, text = folder / f"{stem}.csv", folder / f"{stem}.md"
    now = {(row.op, row.case) for row in session.results}
    rows = [row for row in _load(table) if (row.op, row.case) not in now] + session.results
    rows.sort(key=lambda row: row.op)
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Result)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    text.write_text("\n".join(["# Benchmarks", "", session.machine.describe(), *report(rows), ""]))
    return [table, text]


def _load(table: Path) -> list[Result]:
    """The rows of an earlier run; none if there was no run or its columns were others."""
    if not table.exists():
        return []
    with table.open(newline="") as file:
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
