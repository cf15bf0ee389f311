"""Options, fixture and summary of ``pytest benchmarks/``; the measuring itself is in ``harness.py``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness import Case, Provider, Session
from report import report, save

_session = pytest.StashKey[Session]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("memad_fast benchmarks")
    group.addoption("--quick", action="store_true", help="fewer rounds: the whole suite in some minutes")
    group.addoption("--save-results", action="store_true", help="write benchmarks/results/<machine>.csv and .md")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    config.stash[_session] = (
        Session(seconds=0.15, slowest=2.0, least_rounds=3)
        if config.option.quick
        else Session(seconds=1.0, slowest=30.0, least_rounds=7)
    )
    config.option.benchmark_quiet = True  # our summary replaces pytest-benchmark's table


@pytest.fixture
def measure(request: pytest.FixtureRequest, benchmark: Any) -> Callable[[Case, Provider], None]:
    """``measure(case, provider)`` checks, warms and times one provider of one case."""
    session = request.config.stash[_session]
    op = request.path.stem.removeprefix("bench_")
    return lambda case, provider: session.measure(benchmark, op, case, provider)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    session = config.stash[_session]
    if config.option.benchmark_disable or not session.results:
        return
    terminalreporter.section("benchmarks")
    terminalreporter.line(session.machine.describe())
    for line in report(session.results):
        terminalreporter.line(line)
    if config.option.save_results:
        data = Path(__file__).with_name("results") / f"{session.machine.results_name}.csv"
        for path in save(session.results, session.machine.describe(), data):
            terminalreporter.line(f"wrote {path}")
