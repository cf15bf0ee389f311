"""Measuring on a GPU: the card's limits, and cases beside their peers within the time that a run has.

As in ``harness.py``, whose cases, providers and tables these are, but:

- Providers of a case take turns, round by round. Times are CUDA events around one call; before each the L2 cache is
  overwritten, which also keeps the card busy while the host launches. "ours is" compares calls of the same round.
- share of limit: bytes at the rate of a copy, or operations at the rate of torch's product in the precision named;
  both are measured in this run.
- peak memory: growth of torch's allocations on the card during a call, results included.
- A run has a time. Compiled peers are left out when much of it is spent, all peers near its end; the table says so.
  A call that fails becomes a row with its error, the others go on.
"""

from __future__ import annotations

import contextlib
import importlib.util
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from harness import Case, Provider, largest_error
from report import Result
from torch import Tensor

import memad_fast

# Shares of the run's time after which these are left out.
COMPILED_UNTIL, PEERS_UNTIL = 0.65, 0.85


class HostEvent:
    """What a CUDA event does, on a CPU."""

    def record(self) -> None:
        self.time = time.perf_counter()

    def elapsed_time(self, end: HostEvent) -> float:
        return (end.time - self.time) * 1e3


class TimedReads:
    """A call that reads a memory somewhere within: ``run(read)``; the time of its reads is kept too."""

    def __init__(self, run: Callable[[Callable], Any], read: Callable, event: Callable[[], Any]) -> None:
        self._run, self._read, self._event = run, read, event
        self._pairs: list[tuple[Any, Any]] = []

    def __call__(self) -> Any:
        self._pairs = []
        return self._run(self.timed_read)

    def timed_read(self, *arguments: Any) -> Any:
        start, end = self._event(), self._event()
        start.record()
        result = self._read(*arguments)
        end.record()
        self._pairs.append((start, end))
        return result

    def read_ms(self) -> float:
        """Of the last call, which has ended."""
        return sum(start.elapsed_time(end) for start, end in self._pairs)


@dataclass(frozen=True)
class Card:
    """A device and what it can do at most, as measured here."""

    device: str
    name: str
    architecture: str
    copy_bandwidth: float  # bytes per second, read and written
    rates: dict[str, float]  # operations per second of a product

    @classmethod
    def measure(cls, device: str) -> Card:
        on_gpu = device == "cuda"
        source = torch.ones(1 << (29 if on_gpu else 22), device=device)
        target = torch.empty_like(source)
        bandwidth = 2e3 * source.nbytes / best_ms(device, lambda: target.copy_(source))
        size = 8192 if on_gpu else 256

        def rate(product: Callable[[], Any]) -> float:
            return 2e3 * size**3 / best_ms(device, product)

        wide = torch.randn(size, size, device=device)
        half, codes = wide.bfloat16(), wide.mul(20).clamp(-127, 127).to(torch.int8)
        rates = {
            "float32": rate(lambda: wide @ wide),
            "bf16": rate(lambda: half @ half),
            "int8": rate(lambda: torch._int_mm(codes, codes)),
        }
        if on_gpu:
            with allowing_tf32():
                rates["TF32"] = rate(lambda: wide @ wide)
        if not on_gpu:
            return cls(device, "cpu", "cpu", bandwidth, rates)
        properties = torch.cuda.get_device_properties(0)
        return cls(device, properties.name, f"sm_{properties.major}{properties.minor}", bandwidth, rates)

    def event(self) -> Any:
        return torch.cuda.Event(enable_timing=True) if self.device == "cuda" else HostEvent()

    def least_seconds(self, case: Case) -> tuple[float, str]:
        """The least time for the case's bytes and flops, and which of the two sets it."""
        computing, moving = case.flops / self.rates[case.rate], case.bytes / self.copy_bandwidth
        return (moving, "copy") if moving >= computing else (computing, case.rate)

    def describe(self) -> str:
        products = ", ".join(f"{name} {rate / 1e12:.1f}" for name, rate in self.rates.items())
        return (
            f"{self.name}, {self.architecture}, torch {torch.__version__}, CUDA {torch.version.cuda}; measured in this "
            f"run: copy {self.copy_bandwidth / 1e12:.2f} TB/s (read + written), products of 8,192 x 8,192 in TFLOP/s: "
            f"{products} (float32 with TF32 off, as in every peer that is not named TF32; int8 by torch._int_mm)"
        )

    @property
    def results_name(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")


@contextlib.contextmanager
def allowing_tf32():
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def best_ms(device: str, call: Callable[[], Any], rounds: int = 10) -> float:
    """The shortest of some calls, the first not counted."""
    times = []
    for _ in range(rounds + 1):
        start, end = (torch.cuda.Event(enable_timing=True) if device == "cuda" else HostEvent() for _ in range(2))
        start.record()
        call()
        end.record()
        synchronize(device)
        times.append(start.elapsed_time(end))
    return min(times[1:])


@dataclass
class _Runner:
    """One provider of a case that is ready to be timed."""

    provider: Provider
    row: Result
    call: Callable[[], Any]
    times: list[float] = field(default_factory=list)
    reads: list[float] = field(default_factory=list)


class Run:
    """One run: what it measures, within ``seconds`` from ``start`` on."""

    def __init__(self, card: Card, seconds: float, seconds_of_case: float, start: float) -> None:
        self.card, self.seconds, self.seconds_of_case, self.start = card, seconds, seconds_of_case, start
        self.results: list[Result] = []
        self.failures: list[str] = []
        # More than any L2 holds.
        self._cache_filler = torch.empty(64 << (20 if card.device == "cuda" else 4), device=card.device)

    @property
    def spent(self) -> float:
        """Share of the run's time."""
        return (time.perf_counter() - self.start) / self.seconds

    def measure(self, op: str, cases: Sequence[Case]) -> None:
        for case in cases:
            try:
                self._measure(op, case)
            except Exception as error:
                self._fail(self._row(op, case, case.providers[0]), error)
            if self.card.device == "cuda":
                torch.cuda.empty_cache()
            print(f"{self.spent:4.0%} of the time: {op} {case.name}", flush=True)

    def _measure(self, op: str, case: Case) -> None:
        if self.spent > 1.0:
            self._skip(self._row(op, case, case.providers[0]), "no time was left")
            return
        torch.manual_seed(0)
        with torch.device(self.card.device):
            inputs = case.inputs()
            expected = case.expected(*inputs)
        runners = []
        for provider in case.providers:
            row = self._row(op, case, provider, inputs)
            if reason := self._reason_to_skip(provider):
                self._skip(row, reason)
                continue
            try:
                runners.append(self._ready(provider, row, case, inputs, expected))
            except Exception as error:
                self._fail(row, error)
        del expected
        self._time(runners)
        least, limited_by = self.card.least_seconds(case)
        ours = next((runner for runner in runners if runner.provider.is_ours), None)
        for runner in runners:
            row, times = runner.row, sorted(runner.times)
            row.rounds, row.median_ms = len(times), statistics.median(times)
            row.spread_ms = times[3 * len(times) // 4] - times[len(times) // 4]
            row.share_of_limit, row.limited_by = least * 1e3 / row.median_ms, limited_by
            if ours is not None:
                row.ratio = statistics.median(a / b for a, b in zip(runner.times, ours.times, strict=True))
            if runner.reads:
                row.read_ms = statistics.median(runner.reads)
            self.results.append(row)

    def _reason_to_skip(self, provider: Provider) -> str:
        if provider.requires and importlib.util.find_spec(provider.requires) is None:
            return f"{provider.requires} is not installed"
        if not provider.is_ours and self.spent > PEERS_UNTIL:
            return "too little time was left"
        if provider.name.startswith("torch.compile") and self.spent > COMPILED_UNTIL:
            return "too little time was left to compile"
        return ""

    def _ready(self, provider: Provider, row: Result, case: Case, inputs: tuple[Any, ...], expected: Any) -> _Runner:
        """Prepare, check, warm, and measure the memory of one provider."""
        with self._as_asked(provider):
            call = provider.prepare(*inputs)
            got = call()
            row.error = (case.error or largest_error)(got, expected)
            row.wrong = case.wrong(got, expected) if case.wrong else None
            if provider.is_ours:
                assert row.error <= case.tolerance, f"error {row.error:.2e}, at most {case.tolerance:.2e} is allowed"
                assert not row.wrong, f"{row.wrong:.2%} of the answers are not those of float64"
            del got
            synchronize(self.card.device)
            if self.card.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                call()
                torch.cuda.synchronize()
                row.peak_mib = (torch.cuda.max_memory_allocated() - before) / 2**20
        return _Runner(provider, row, call)

    @contextlib.contextmanager
    def _as_asked(self, provider: Provider):
        """On the card, by the backend that the provider names."""
        backend = memad_fast.use_backend(provider.backend) if provider.backend else contextlib.nullcontext()
        with backend:
            yield

    def _time(self, runners: Sequence[_Runner]) -> None:
        """Rounds in which every provider has one call, as long as the case may take."""
        if not runners:
            return
        until = time.perf_counter() + self.seconds_of_case
        for number in range(100):
            if number >= 3 and time.perf_counter() > until:
                break
            if number == 1 and time.perf_counter() > until + 3 * self.seconds_of_case:
                break  # one round is all there is time for
            events = []
            for runner in runners:
                with self._as_asked(runner.provider):
                    start, end = self.card.event(), self.card.event()
                    self._cache_filler.zero_()
                    start.record()
                    runner.call()
                    end.record()
                events.append((start, end))
            synchronize(self.card.device)
            for runner, (start, end) in zip(runners, events, strict=True):
                runner.times.append(start.elapsed_time(end))
                if isinstance(runner.call, TimedReads):
                    runner.reads.append(runner.call.read_ms())

    def _row(self, op: str, case: Case, provider: Provider, inputs: tuple[Any, ...] = ()) -> Result:
        floats = [x.dtype for x in inputs if isinstance(x, Tensor) and x.is_floating_point()]
        dtype = str(floats[0]).removeprefix("torch.") if floats else ""
        is_first = provider is case.providers[0]
        return Result(
            op, case.name, provider.name, provider.is_ours, provider.is_bare,
            provider.backend or provider.requires or "torch", self.card.architecture, dtype, provider.precision,
            threads=0, target=case.target if is_first else None, mean_of=case.mean_of,
        )  # fmt: skip

    def _skip(self, row: Result, reason: str) -> None:
        row.skipped = reason
        self.results.append(row)

    def _fail(self, row: Result, error: Exception) -> None:
        text = " ".join(str(error).split())[:200]
        self.failures.append(f"{row.op} {row.case}, {row.provider}: {type(error).__name__}: {text}")
        self._skip(row, f"FAILED: {type(error).__name__}: {text[:80]}")
