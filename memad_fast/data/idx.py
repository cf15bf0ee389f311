"""MNIST's idx files: one class is normal, the others are the anomalies.

An idx file is 0, 0, type (8 = ubyte), rank, then one big-endian uint32 a dimension, then the values.
"""

from __future__ import annotations

import gzip
import struct
import zlib
from pathlib import Path

import numpy as np

from memad_fast.data.classes import one_class_normal
from memad_fast.data.dataset import DataError, Dataset

_UBYTE = 8
# Parts of the set -> the names its files go by.
_PREFIXES = {"train": ("train",), "test": ("t10k", "test")}
_KINDS = {"images": ("idx3", 3), "labels": ("idx1", 1)}


def is_idx_folder(folder: Path) -> bool:
    """Whether the folder holds idx training images."""
    return _find(folder, "train", "images") is not None


def open_idx(folder: Path, *, image_size: int, channels: int | None, normal_class: int | None) -> Dataset:
    """Open ``train-images-idx3-ubyte[.gz]`` and its three companions with ``normal_class`` as the normal one."""
    arrays = {
        (part, kind): read_idx(_require(folder, part, kind), rank)
        for part in _PREFIXES
        for kind, (_, rank) in _KINDS.items()
    }
    for part in _PREFIXES:
        images, labels = arrays[part, "images"], arrays[part, "labels"]
        if len(images) != len(labels):
            raise DataError(f"{folder}: {len(images)} {part} images but {len(labels)} labels")
    return one_class_normal(
        arrays["train", "images"],
        arrays["train", "labels"],
        arrays["test", "images"],
        arrays["test", "labels"],
        name=folder.name,
        normal_class=normal_class,
        image_size=image_size,
        channels=channels,
        source={"kind": "idx", "path": str(folder)},
    )


def read_idx(path: Path, rank: int) -> np.ndarray:
    """Read one idx file of unsigned bytes, gzipped or not.

    Raises:
        DataError: wrong magic number, type or rank; fewer or more bytes than the header promises; damaged gzip. The
            message names the file.
    """
    data = _bytes(path)
    if len(data) < 4:
        raise DataError(f"{path}: {len(data)} bytes are too few for an idx file")
    if data[:2] != b"\0\0" or data[2] != _UBYTE or data[3] != rank:
        raise DataError(
            f"{path}: expected the magic number {_UBYTE << 8 | rank:#010x} (unsigned bytes, {rank} dimensions),"
            f" got 0x{data[:4].hex()}"
        )
    header = 4 + 4 * rank
    if len(data) < header:
        raise DataError(f"{path}: truncated in its header, {len(data)} of {header} bytes")
    shape = struct.unpack(f">{rank}I", data[4:header])
    expected = header
    for offset, size in enumerate(shape):
        expected = header + size if offset == 0 else header + (expected - header) * size
    if len(data) != expected:
        what = "truncated" if len(data) < expected else "longer than its header says"
        raise DataError(f"{path}: {what}, expected {expected} bytes for shape {list(shape)}, got {len(data)}")
    return np.frombuffer(data, dtype=np.uint8, offset=header).reshape(shape)


def _bytes(path: Path) -> bytes:
    if path.suffix != ".gz":
        return path.read_bytes()
    try:
        with gzip.open(path) as file:
            return file.read()
    except (EOFError, OSError, zlib.error) as error:
        raise DataError(f"{path}: damaged gzip file: {error}") from error


def _find(folder: Path, part: str, kind: str) -> Path | None:
    for name in _names(part, kind):
        if (folder / name).is_file():
            return folder / name
    return None


def _require(folder: Path, part: str, kind: str) -> Path:
    path = _find(folder, part, kind)
    if path is None:
        raise DataError(f"{folder}: no {part} {kind}; looked for {', '.join(_names(part, kind))}")
    return path


def _names(part: str, kind: str) -> list[str]:
    code = _KINDS[kind][0]
    return [
        f"{prefix}-{kind}{joint}{code}-ubyte{ending}"
        for prefix in _PREFIXES[part]
        for joint in "-."
        for ending in ("", ".gz")
    ]
