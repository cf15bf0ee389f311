"""A process that dies at a given step of its work on files: for kill tests."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

STEPS = ("fsync", "replace", "unlink", "write", "open")


def die() -> None:
    """SIGKILL to this process."""
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(step: str, number: int, after: bool, die: Callable[[], None] = die) -> None:
    """From here on, ``die`` before, or after, the call of a step that ``number`` (from 0) others go before."""
    calls = 0

    def around(real: Callable) -> Callable:
        def call(*arguments: object, **options: object) -> object:
            nonlocal calls
            calls += 1
            if calls > number and not after:
                die()
            result = real(*arguments, **options)
            if calls > number and after:
                die()
            return result

        return call

    if step != "write":
        setattr(os, step, around(getattr(os, step)))
        return
    fdopen = os.fdopen

    class Torn:
        """A file that writes in two halves."""

        def __init__(self, handle: int, mode: str) -> None:
            self.file = fdopen(handle, mode, buffering=0)
            self.flush, self.fileno = self.file.flush, self.file.fileno

        def __enter__(self) -> Torn:
            return self

        def __exit__(self, *raised: object) -> None:
            self.file.close()

        def write(self, data: object) -> None:
            content = memoryview(data).cast("B")  # type: ignore[arg-type]
            half = len(content) // 2
            around(self.file.write)(content[:half])
            self.file.write(content[half:])

    os.fdopen = Torn  # type: ignore[assignment,misc]
