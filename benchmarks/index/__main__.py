"""Measure, and write the tables and the plot:

    python -m benchmarks.index [--only 1000000x64,10000000x64] [--scratch FOLDER] [--seconds 4]

Each memory is measured in a process of its own; rows of others that were stored before stay. Needs faiss-cpu and, for
the plot, matplotlib. 10 M rows of 64 numbers take 9 GB of RAM, four indexes at once, and 12 GB of scratch; 100 M, of
which ours alone is measured (``--only 100000000x64``), 10 GB and 36 GB.
"""

from __future__ import annotations

import argparse
import multiprocessing
from pathlib import Path

from benchmarks.accuracy.results import Store, write_page
from benchmarks.index.measure import KEY, Row, measure
from benchmarks.index.memories import Memory
from benchmarks.index.tables import page, save_plot

RESULTS = Path(__file__).parents[1] / "results" / "index"
MEMORIES = [
    Memory(10_000, 64),
    Memory(100_000, 64),
    Memory(1_000_000, 64),
    Memory(10_000_000, 64),
    Memory(1_000_000, 512),
    Memory(1_000_000, 64, "gaussian"),
]


def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="memories, as ROWSxDIM or ROWSxDIMxKIND; default: all")
    parser.add_argument("--scratch", type=Path, help="a folder for rows and indexes; default: the system's")
    parser.add_argument("--seconds", type=float, default=4.0, help="for timing one contender and batch; default: 4")
    parser.add_argument(
        "--hnsw-rows", type=int, default=10**6, help="HNSW is built of as many rows at most: it takes long"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="where tables and plot go")
    options = parser.parse_args()
    wanted = [_memory(text) for text in options.only.split(",")] if options.only else MEMORIES
    store = Store(options.results / "index.csv", Row, KEY)
    for memory in wanted:
        child = multiprocessing.get_context("spawn").Process(
            target=measure, args=(memory, store, options.scratch, options.seconds, options.hnsw_rows)
        )
        child.start()
        child.join()
        if child.exitcode:
            raise SystemExit(f"{memory.name}: measuring failed")
        write_page(options.results / "index.md", page(store.load()))
        save_plot(store.load(), options.results / "index.png")


def _memory(text: str) -> Memory:
    rows, dim, *kind = text.split("x", 2)
    return Memory(int(rows), int(dim), *kind)


if __name__ == "__main__":
    main()
