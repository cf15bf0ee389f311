"""Several ranks of a gloo group on this machine, each a fork of the test: for the tests of what runs on many."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

from torch import distributed


def start_ranks(size: int, folder: Path, run: Callable[[int], None]) -> list[int]:
    """Processes that run ``run(rank)`` as the ranks of a group of their own; ``folder`` is for its files."""
    at = len(list(folder.glob("group-*")))
    store = folder / f"group-{at}"
    store.mkdir(parents=True)
    return [_start(rank, size, store, run) for rank in range(size)]


def run_ranks(size: int, folder: Path, run: Callable[[int], None]) -> None:
    """As ``start_ranks``; returns when all have ended well, and raises what went wrong."""
    children = start_ranks(size, folder, run)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    told = "\n".join(file.read_text() for file in sorted(folder.glob("group-*/said-*")))
    assert codes == [0] * size, f"exit codes {codes}\n{told}"


def _start(rank: int, size: int, store: Path, run: Callable[[int], None]) -> int:
    child = os.fork()
    if child:
        return child
    try:
        distributed.init_process_group(
            "gloo", init_method=f"file://{store}/store", rank=rank, world_size=size, timeout=timedelta(seconds=60)
        )
        run(rank)
        distributed.barrier()  # a rank that ends breaks the connections of the others
    except BaseException:
        (store / f"said-{rank}").write_text(f"rank {rank}: {traceback.format_exc()}")
        os._exit(1)
    os._exit(0)
