"""How far something is that takes minutes: told to a function, or shown as a bar (by rich, if it is installed)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

Tell = Callable[[int, int], None]  # (done, of how many)


def untold(done: int, total: int) -> None:
    """Where nobody asked."""


@contextmanager
def progress_bar(what: str) -> Iterator[Tell]:
    """Gives the function that moves the bar on. The bar appears when it is first told something.

    Raises:
        ModuleNotFoundError: rich is not installed.
    """
    try:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    except ModuleNotFoundError as missing:
        raise ModuleNotFoundError(
            "a progress bar needs the package rich: pip install 'memad_fast[app]'", name="rich"
        ) from missing
    bar = Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    task = bar.add_task(what, total=None)

    def tell(done: int, total: int) -> None:
        bar.start()  # once
        bar.update(task, completed=done, total=total)

    try:
        yield tell
    finally:
        if bar.live.is_started:
            bar.stop()
