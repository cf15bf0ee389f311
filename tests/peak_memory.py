"""The most memory that a program held, measured in a process of its own."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

# Not resource.getrusage: what it tells of a child begins at the peak of the process that started it.
_PRELUDE = """
import pathlib, re

def peak():
    status = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\\s*(\\d+) kB", status).group(1))
"""


def run_measured(program: str, *, cwd: Path | None = None) -> str:
    """What ``program`` prints; in it ``peak()`` is the most bytes that its process held so far."""
    if sys.platform != "linux":
        pytest.skip("reads the peak resident set from /proc")
    done = subprocess.run(
        [sys.executable, "-c", _PRELUDE + textwrap.dedent(program)], capture_output=True, text=True, cwd=cwd
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
