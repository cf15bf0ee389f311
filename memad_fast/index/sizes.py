"""Sizes that users give and read: bytes in words, rows of a chunk, what an index will take."""

from __future__ import annotations

import re
from dataclasses import dataclass

CHUNK_BYTES = 1 << 26  # of rows: few enough to write, check and hold twice without notice
CHUNK_ROWS = 1 << 16
CHUNKS_OF_A_RING = 8  # at least: the dead rows of its oldest chunk are memory that serves nothing


@dataclass(frozen=True)
class Estimate:
    """What an index will take (``ExactIndex.estimate``)."""

    ram_bytes: int
    disk_bytes: int


def parse_bytes(size: int | str) -> int:
    """ "2GB", "1.5 GiB", "800 MB" or a number of bytes, as a number of bytes.

    Raises:
        TypeError, ValueError: it is none of these.

    Example:
        >>> from memad_fast.index.sizes import parse_bytes
        >>> parse_bytes("2GB"), parse_bytes("1.5 GiB"), parse_bytes(4096)
        (2000000000, 1610612736, 4096)
    """
    if isinstance(size, int) and not isinstance(size, bool):
        check_count("memory_budget", size)
        return size
    if not isinstance(size, str):
        raise TypeError(f'memory_budget: expected a number of bytes or a text like "2GB", got {type(size).__name__}')
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B\s*", size, re.IGNORECASE)
    if match is None or float(match[1]) == 0:
        raise ValueError(f'memory_budget: expected a number and B, kB, MB, GB, TB, KiB … TiB, like "2GB", got {size!r}')
    power = "_KMGT".index(match[2].upper() or "_")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** power)


def chunk_rows_for(asked: int | None, row_bytes: int, capacity: int | None, budget: int | None) -> int:
    """The rows of a chunk: as asked for, or by what a row, the ring and the budget take.

    Raises:
        ValueError: another number than a multiple of 64.
    """
    if asked is not None:
        if asked % 64:
            raise ValueError(f"chunk_rows: expected a multiple of 64, got {asked}")
        return asked
    most = min(CHUNK_ROWS, (CHUNK_BYTES if budget is None else min(CHUNK_BYTES, budget // 16)) // row_bytes)
    if capacity is not None:
        most = min(most, -(-capacity // CHUNKS_OF_A_RING))
    return max(64, most // 64 * 64)


def check_count(name: str, count: object) -> None:
    """``count`` is an int of at least 1."""
    if isinstance(count, bool) or not isinstance(count, int):
        raise TypeError(f"{name}: expected an int, got {type(count).__name__}")
    if count < 1:
        raise ValueError(f"{name}: expected at least 1, got {count}")
