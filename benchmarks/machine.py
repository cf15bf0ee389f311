"""What the machine is called in results."""

from __future__ import annotations

import contextlib
import os
import platform
import re
from pathlib import Path


def processor() -> str:
    """The processor's name and the number of cores."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        model = found.group(1) if found else model
    model = re.sub(r"\((R|TM)\)", "", model)
    return f"{model.strip()}, {os.cpu_count()} cores"
