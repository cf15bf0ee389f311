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
is compared with float64; a wrong result of ours fails the run. ``report.py`` makes the tables, ``conftest.py`` holds
the options and the summary.

What the columns mean:

- median, spread: of one call, and the distance between its quartiles.
- ours is: how many times faster ours is: the median of this provider's time over ours, taken in pairs. Before each
  timed call of a peer, ours is called and timed too, so that noise of the machine meets both. Only such ratios count.
- share of limit: the least time the machine could need over the median: the longer of a torch copy_ of as many bytes
  (so what fits a cache is held against the cache) and the operations at the rate of a matrix product, float32 or int8.
  All are measured in this session; the rates are what torch reaches, somewhat below the peak of the units.
- error: largest absolute difference from float64, over the largest magnitude of that output.
- wrong: share of discrete answers (indices) that are not the float64 ones; ours must have none.
- peak memory: growth of the process's resident set during one call, outputs included.
- read: in an end-to-end case, the time of the memory read inside the call, and its share.

Two kinds of case are judged otherwise than by their ratio to the best peer: a latency case holds the public call
against the compiled op alone (``bare``), and cases that share a ``mean_of`` are judged by their geometric mean.
"""

from __future__ import annotations

import importlib.util
import os
import re
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import pytest
import torch
from machine import processor
from report import Result
from resident import peak_extra_bytes
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
    is_bare: bool = False  # ours without its Python layer
    share: float = 1.0  # of the case's work that a call does; times are scaled to all of it, and the name says so
    backend: str = ""  # of ours on a GPU: the backend that must serve it


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
    rate: str = "float32"  # at which the flops could be done: "float32", "int8", on a GPU "bf16"
    target: float | None = None  # how many times faster than the best peer the first provider, ours, is meant to be
    mean_of: str = ""  # the target is for the geometric mean of the op's cases with this name
    error: Callable[[Any, Any], float] | None = None  # (got, expected) -> error, where the default does not fit
    wrong: Callable[[Any, Any], float] | None = None  # (got, expected) -> share of wrong discrete answers
    calls: int = 1  # made in one timed round, for calls of microseconds
    layer_us: float | None = None  # the most that the Python layer may add to the provider that is bare


def _direct(function: Function) -> Callable[..., Callable[[], Any]]:
    return lambda *inputs: lambda: function(*inputs)


def ours(function: Function, name: str = "ours") -> Provider:
    """This library's op."""
    return Provider(name, _direct(function), is_ours=True)


def bare(function: Function) -> Provider:
    """This library's compiled op, called with as little around it as Python allows."""
    return Provider("compiled op alone", _direct(function), is_bare=True)


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
                generator = torch.Generator(outputs[0].device).manual_seed(1)
                grad_outputs.extend(
                    torch.randn(out.shape, generator=generator, device=out.device).to(out) for out in differentiable
                )
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
    rates: dict[str, float]  # operations per second of a 2048 x 2048 product, float32 and int8

    @classmethod
    def measure(cls) -> Machine:
        source = torch.ones(64 << 20)
        bandwidth = 2 * source.nbytes / _copy_seconds(source)
        square, codes = torch.ones(2048, 2048), torch.ones(2048, 2048, dtype=torch.int8)
        product = _best_of(lambda: torch.mm(square, square), 5)
        int8_product = _best_of(lambda: torch._int_mm(codes, codes), 5)
        rates = {"float32": 2 * 2048**3 / product, "int8": 2 * 2048**3 / min(product, int8_product)}
        return cls(processor(), torch.get_num_threads(), bandwidth, rates)

    def least_seconds(self, case: Case) -> tuple[float, str]:
        """The least time for the case's bytes and flops, and which of the two sets it."""
        computing = case.flops / self.rates[case.rate]
        moving = _copy_seconds(torch.ones(int(case.bytes) // 8)) if case.bytes else 0.0
        return (moving, "copy") if moving >= computing else (computing, case.rate)

    def describe(self) -> str:
        return (
            f"{self.name}, {self.threads} threads, torch {torch.__version__}; copy {self.copy_bandwidth / 1e9:.1f} GB/s"
            f" (256 MiB torch copy_, read + written), 2048 x 2048 products: float32 {self.rates['float32'] / 1e9:.0f}"
            f" GFLOP/s (torch.mm), int8 {self.rates['int8'] / 1e9:.0f} GOP/s (torch._int_mm)"
        )

    @property
    def results_name(self) -> str:
        """The stem of this session's result files: the machine, and the instruction set where one is forced."""
        is_forced = os.environ.get("MEMAD_FAST_ISA", "auto") not in ("", "auto")
        name = f"{self.name} {native.isa()}" if is_forced else self.name
        return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _copy_seconds(source: Tensor) -> float:
    target = torch.empty_like(source)
    return _best_of(lambda: target.copy_(source), 5)


def _best_of(call: Callable[[], Any], rounds: int, warm: bool = True) -> float:
    if warm:
        call()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


# --- measuring ----------------------------------------------------------------------------------------------------

# A peer library brings a thread pool of its own, and the idle threads of torch's pool spin for some milliseconds
# before they sleep. Waiting them out keeps the two from fighting for the cores.
_POOL_SLEEPS = 0.02


class Step:
    """A call that reads a memory somewhere within: ``run(read)``. The time of each read is kept too."""

    def __init__(self, run: Callable[[Function], Any], read: Function) -> None:
        self.read_seconds: list[float] = []
        self._run, self._read = run, read

    def __call__(self) -> Any:
        self.read_seconds.append(0.0)
        return self._run(self._timed_read)

    def _timed_read(self, *arguments: Any) -> Any:
        start = time.perf_counter()
        result = self._read(*arguments)
        self.read_seconds[-1] += time.perf_counter() - start
        return result


def _repeated(call: Callable[[], Any], count: int) -> Callable[[], Any]:
    if count == 1:
        return call

    def calls() -> None:
        for _ in range(count):
            call()

    return calls


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
    _least: tuple[float, str] = (0.0, "")
    _expected: Any = None
    _ours: Callable[[], Any] | None = None  # the case's first provider, where that is ours

    @property
    def machine(self) -> Machine:
        if self._machine is None:
            self._machine = Machine.measure()
        return self._machine

    def measure(self, benchmark: Any, op: str, case: Case, provider: Provider) -> None:
        """Check, warm and time one provider of one case, and keep the row."""
        if self._case is not case:
            torch.manual_seed(0)
            self._case, self._inputs, self._least = case, case.inputs(), self.machine.least_seconds(case)
            self._expected, self._ours = case.expected(*self._inputs), None
        least, limited_by = self._least
        row = self._row(op, case, provider)
        row.limited_by = limited_by
        self.results.append(row)
        if provider.requires and importlib.util.find_spec(provider.requires) is None:
            self._skip(row, f"{provider.requires} is not installed")

        call = provider.prepare(*self._inputs)
        self._check(row, case, call())
        once = _best_of(call, 1, warm=False)
        if once > self.slowest and not provider.is_ours:
            self._skip(row, f"one call takes {once:.1f} s")
        peak = peak_extra_bytes(call)
        row.peak_mib = float("nan") if peak is None else peak / 2**20
        timed = _repeated(call, case.calls)
        if provider.is_ours and self._ours is None:
            self._ours = timed
        beside: list[float] = []

        def time_ours() -> None:
            if self._ours is not None and self._ours is not timed:
                beside.append(_best_of(self._ours, 1, warm=False))
            if provider.requires:
                time.sleep(_POOL_SLEEPS)

        rounds = min(300, max(self.least_rounds, int(self.seconds / (once * case.calls))))
        benchmark.pedantic(timed, setup=time_ours, rounds=rounds)
        if benchmark.disabled:  # --benchmark-disable checks the results only
            return
        times = [seconds / provider.share for seconds in benchmark.stats.stats.data]
        pairs = zip(times, beside[-rounds:], strict=True) if beside else ()
        row.ratio = statistics.median([theirs / mine for theirs, mine in pairs] or [1.0])
        times = sorted(seconds / case.calls for seconds in times)
        row.rounds, row.median_ms = rounds, statistics.median(times) * 1e3
        row.spread_ms = (times[3 * len(times) // 4] - times[len(times) // 4]) * 1e3
        row.share_of_limit = least * 1e3 / row.median_ms
        if isinstance(call, Step):
            row.read_ms = statistics.median(call.read_seconds[-rounds:]) * 1e3
        benchmark.group = f"{op} {case.name}"
        benchmark.extra_info.update(asdict(row), flops=case.flops, bytes=case.bytes)

    def _check(self, row: Result, case: Case, got: Any) -> None:
        """Compare a result with float64; ours must be within the tolerance and name no wrong answer."""
        row.error = (case.error or largest_error)(got, self._expected)
        row.wrong = case.wrong(got, self._expected) if case.wrong else None
        if row.is_ours:
            assert row.error <= case.tolerance, (
                f"{case.name}: error {row.error:.2e}, at most {case.tolerance:.2e} allowed"
            )
            assert not row.wrong, f"{case.name}: {row.wrong:.2%} of the answers are not those of float64"

    def _row(self, op: str, case: Case, provider: Provider) -> Result:
        floats = [x.dtype for x in self._inputs if isinstance(x, Tensor) and x.is_floating_point()]
        dtype = str(floats[0]).removeprefix("torch.") if floats else ""
        is_compiled_here = provider.is_ours or provider.is_bare
        backend = "cpu" if is_compiled_here else provider.requires or "torch"
        isa = native.isa() if is_compiled_here else torch.backends.cpu.get_cpu_capability().lower()
        is_first = provider is case.providers[0]
        return Result(
            op, case.name, provider.name, provider.is_ours, provider.is_bare, backend, isa, dtype, provider.precision,
            self.machine.threads, target=case.target if is_first else None, mean_of=case.mean_of,
            layer_us=case.layer_us if is_first else None,
        )  # fmt: skip

    def _skip(self, row: Result, reason: str) -> None:
        row.skipped = reason
        pytest.skip(reason)
