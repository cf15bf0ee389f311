"""What the process holds in RAM, as Linux tells it."""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any


def peak_extra_bytes(call: Callable[[], Any]) -> int | None:
    """Growth of the peak resident set during ``call``, to about 0.5 MiB; None where Linux's /proc cannot tell."""
    try:
        before = settled_bytes()
        forget_peak()
        result = call()
        peak = peak_bytes()
    except (OSError, AttributeError):
        return None
    del result
    return max(0, peak - before)


def settled_bytes() -> int:
    """The resident set, once free pages that the allocator holds were handed back: later calls would re-use them."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return _status("VmRSS")


def forget_peak() -> None:
    """The peak counts from here."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """The largest resident set since ``forget_peak``."""
    return _status("VmHWM")


def _status(field: str) -> int:
    found = re.search(rf"{field}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    if found is None:
        raise OSError(f"/proc/self/status has no {field}")
    return int(found.group(1)) * 1024
