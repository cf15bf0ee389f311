"""Which kind of index a word or a folder asks for."""

from __future__ import annotations

import os

from memad_fast.index.base import Index
from memad_fast.index.exact import ExactIndex
from memad_fast.index.faiss_index import FaissIndex
from memad_fast.index.files import Folder, IndexFileError


def open_index(path: str | os.PathLike[str], *, mmap: bool = True) -> Index:
    """Open a saved index, whatever kind it is of.

    Args:
        path: the folder that ``save`` wrote.
        mmap: leave on disk what that kind can leave there, as its ``open`` says.

    Raises:
        IndexFileError: the manifest or a part is missing, torn, altered, or of a later version. It is named.
        ModuleNotFoundError: it is searched by FAISS, which is not installed.

    Example:
        >>> import tempfile, torch
        >>> from memad_fast.index import ExactIndex, open_index
        >>> index = ExactIndex(2)
        >>> _ = index.add(torch.eye(2))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     index.save(folder)
        ...     open_index(folder)
        ExactIndex(2 x 2, torch.float32, metric='l2')
    """
    folder = Folder(path)
    if not folder.exists and any(folder.path.glob("shard-*-of-*")):
        raise IndexFileError(f"{folder.path}: shards of several processes; ShardedIndex.open opens them, in as many")
    kind = folder.read()["kind"]
    if kind == "exact":
        return ExactIndex.open(path, mmap=mmap)
    if kind == "faiss":
        return FaissIndex.open(path, mmap=mmap)
    raise IndexFileError(f"{folder.path}: an index of kind {kind!r}, which this version does not know")


def make_index(kind: str, dim: int, *, path: str | os.PathLike[str] | None = None) -> Index:
    """An empty index of a kind that is given as a word, as on the command line.

    Args:
        kind: "exact" (``ExactIndex``), or a factory string of FAISS (``FaissIndex``), as "IVF1024,Flat".
        dim: D, the length of a row.
        path: a folder, new or empty, that it writes to. None: in RAM until ``save``.

    Raises:
        ValueError: another word. What else ``ExactIndex`` and ``FaissIndex`` raise.

    Example:
        >>> from memad_fast.index import make_index
        >>> make_index("exact", 3)
        ExactIndex(0 x 3, torch.float32, metric='l2')
    """
    if kind == "exact":
        return ExactIndex(dim, path=path)
    try:
        return FaissIndex(dim, kind, path=path)
    except IndexFileError:  # the folder's fault, which a list of kinds would hide
        raise
    except ValueError as error:
        raise ValueError(f"index: expected 'exact' or a factory string of FAISS, got {kind!r}: {error}") from error
