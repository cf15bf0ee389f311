"""Rows of results in a CSV file that no interruption can harm, and what the tables say of several seeds.

A table's rows are objects of a frozen dataclass whose fields are str, int, float, dict (JSON), or one of them or None::

    store = Store(RESULTS / "sets.csv", Row, key=("set", "system", "variant", "seed"))
    store.put(row)               # the file holds it, whole, when this returns; an older row of the same key is replaced
    rows = store.load()
    Spread.of([0.90, 0.92, 0.94]).text()   # "0.920 (0.900 to 0.940)"
"""

from __future__ import annotations

import csv
import io
import json
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from benchmarks.machine import processor
from memad_fast import __version__
from memad_fast._atomic import write_bytes

RESULTS = Path(__file__).parents[1] / "results" / "accuracy"

RowType = TypeVar("RowType")


class Store(Generic[RowType]):
    """Rows in a CSV file, one for each key, sorted by it. Written by one process at a time.

    A row is one line: a line break in a text becomes a space.
    """

    def __init__(self, path: Path, row_type: type[RowType], key: Sequence[str]) -> None:
        self.path = path
        self.row_type = row_type
        self.key = tuple(key)
        self._hints = typing.get_type_hints(row_type)

    def load(self) -> list[RowType]:
        """All rows. A last line that is torn off gives none; a column that the file lacks gives the field's default.

        Raises:
            ValueError: the file is not one of such rows, or one of its lines is not.
        """
        if not self.path.exists():
            return []
        text = self.path.read_bytes().decode("utf-8", "replace")
        whole = text[: text.rfind("\n") + 1]
        reader = csv.DictReader(io.StringIO(whole, newline=""))
        if whole and not set(self.key) <= set(reader.fieldnames or ()):
            raise ValueError(f"{self.path}: not a file of these results, it lacks some of the columns {self.key}")
        rows = [self._parse(cells, f"{self.path}, line {reader.line_num}") for cells in reader]
        return list({self._key(row): row for row in rows}.values())

    def put(self, row: RowType) -> None:
        """Add ``row``, in the place of one with the same key. The file is replaced whole or not at all."""
        self._write({self._key(each): each for each in self.load()} | {self._key(row): row})

    def remove(self, is_meant: Callable[[RowType], bool]) -> None:
        """Take rows out."""
        self._write({self._key(each): each for each in self.load() if not is_meant(each)})

    def _write(self, rows: dict[tuple[Any, ...], RowType]) -> None:
        text = io.StringIO(newline="")
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(self._hints)
        writer.writerows([_cell(getattr(rows[key], name)) for name in self._hints] for key in sorted(rows))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(self.path, text.getvalue().encode())

    def _key(self, row: RowType) -> tuple[Any, ...]:
        return tuple(getattr(row, name) for name in self.key)

    def _parse(self, cells: dict[str, str | None], line: str) -> RowType:
        known = {name: (hint, cells[name]) for name, hint in self._hints.items() if name in cells}
        try:
            return self.row_type(**{name: _value(hint, text) for name, (hint, text) in known.items()})
        except (TypeError, ValueError) as error:
            raise ValueError(f"{line}: {error}; mend the line, or remove it to make its row again") from error


def _cell(value: Any) -> Any:
    if value is None:
        return ""
    if isinstance(value, dict):
        return json.dumps(value)
    return " ".join(value.splitlines()) if isinstance(value, str) else value


def _value(hint: Any, text: str | None) -> Any:
    if text is None:
        raise ValueError("the line ends early")
    kinds = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    if not text and types.NoneType in kinds:
        return None
    kind = next(kind for kind in kinds if kind is not types.NoneType)
    return json.loads(text) if typing.get_origin(kind) is dict else kind(text)


@dataclass(frozen=True)
class Spread:
    """A figure over several seeds."""

    mean: float
    least: float
    most: float
    count: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread | None:
        """None of no values."""
        found = list(values)
        return cls(sum(found) / len(found), min(found), max(found), len(found)) if found else None

    def text(self, form: str = ".3f") -> str:
        """The mean and, of more than one, the least and the most."""
        if self.count == 1:
            return format(self.mean, form)
        return f"{format(self.mean, form)} ({format(self.least, form)} to {format(self.most, form)})"


def hardware(device: str = "cpu") -> str:
    """The line that tells what a figure was computed on."""
    name = processor() if device == "cpu" else torch.cuda.get_device_name(device)
    return f"{name}, torch {torch.__version__}, memad_fast {__version__}"


def write_page(path: Path, lines: Sequence[str]) -> None:
    """Replace a text file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, ("\n".join(lines) + "\n").encode())
