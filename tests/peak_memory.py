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


def grown_by_searching(folder: Path, kind: str, *, queries: int, times: int = 1, **options: object) -> int:
    """Bytes that a process gains by opening an index of 20 chunks of 16,384 x 64 on disk and searching it ``times``."""
    script = f"""
import torch
from memad_fast.index import {kind}
torch.set_num_threads(1)
index = {kind}(64, chunk_rows=16384, path={str(folder)!r}, **{options!r})
for _ in range(20):
    index.add(torch.randn(16384, 64))
index.save()
index.close()
del index
open("/proc/self/clear_refs", "w").write("5")
before = peak()
index = {kind}.open({str(folder)!r})
for _ in range({times}):
    index.search(torch.randn({queries}, 64), 3)
print(peak() - before)
"""
    return int(run_measured(script))
